"""What arrays are to this engine: tensors on a device, in the channels_last memory format."""

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

NumpyArray = np.ndarray[Any, np.dtype[Any]]


def choose_device(device: str, index: int = 0) -> str:
    """Return "cpu", or "cuda:N" for that or for "cuda", which takes GPU number ``index``, round and round.

    Raises ValueError where it is unknown or not present.
    """
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ValueError(f"unknown device {device!r}: expected cpu, cuda or cuda:N")
    if kind == "cpu":
        return "cpu"
    count = count_gpus()
    if int(number or 0) >= count:
        raise ValueError(f"device {device!r} is not available: PyTorch finds {count} CUDA devices")
    return f"cuda:{number or index % count}"


def count_gpus() -> int:
    """Return how many CUDA devices this process sees."""
    return int(torch.cuda.device_count())


def be_deterministic(products: str) -> None:
    """Let a GPU give the same bits each time, or raise RuntimeError, naming the operation, where PyTorch cannot.

    ``products`` says how those of float32 are computed: "ieee", or "tf32", rounded to 11 bits. For the whole process.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrix product is computed
    torch.use_deterministic_algorithms(True)
    torch._C._set_deterministic_fill_uninitialized_memory(False)  # a debugging aid that would write each tensor twice
    torch.backends.cudnn.benchmark = False  # it picks the fastest kernels of the moment
    torch.backends.cudnn.conv.fp32_precision = products  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = products
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # sums inside stay float32
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def set_threads(count: int, callers: int = 1) -> None:
    """Let ``callers`` threads, the current one among them, share ``count`` threads; each of them has to call this."""
    torch.set_num_threads(max(1, count // callers))


def kernels(device: str) -> str:
    """Return what computes on ``device``, on which the last bits depend: the GPU, or the instructions of the CPU."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return f"torch on {torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"torch on {device}, {torch.backends.cpu.get_cpu_capability()}"


def tensor(a: NumpyArray, device: str) -> Tensor:
    """Return ``a`` as a tensor on ``device``; on the CPU both share their memory."""
    return torch.from_numpy(a).to(device)


def as_array(a: NumpyArray, like: Tensor | None = None) -> Tensor:
    """Return the NumPy array ``a`` as a tensor on the device of ``like``, the CPU if None; its dtype is kept."""
    if not a.flags.writeable or min(a.strides, default=0) < 0:  # torch knows neither
        a = a.copy(order="K")
    return torch.from_numpy(a).to("cpu" if like is None else like.device)


def to_numpy(a: Tensor) -> NumpyArray:
    """Return a tensor as a NumPy array; from the CPU, both share their memory. Types of 16 bits come as float32."""
    a = a.float() if a.dtype in (torch.bfloat16, torch.float16) else a
    array: NumpyArray = a.detach().cpu().numpy()
    return array


def fits(x: Tensor, array: Tensor) -> bool:
    """Return whether a layer with parameters as ``array`` takes ``x``: of the same dtype."""
    return x.dtype == array.dtype


def for_loss(logits: Tensor) -> Tensor:
    """Return the outputs of a model in the type that a loss computes in: here, as they are."""
    return logits


def empty(size: int, like: Tensor | None = None) -> Tensor:
    """Return a 1-D tensor of ``size`` numbers, not set yet, of the dtype and on the device of ``like``."""
    return torch.empty(size) if like is None else like.new_empty(size)


def address(a: Tensor) -> int:
    """Return where in memory the tensor begins."""
    return a.data_ptr()


def retire(a: Tensor) -> None:
    """Empty a tensor that was replaced by another: an optimizer that still holds it raises."""
    a.set_()  # type: ignore[call-overload]


def seal(y: Tensor, cache: Any) -> Any:
    """Return what tells whether ``y`` is changed in place, where ``cache`` needs it: torch counts such changes."""
    parts = cache if isinstance(cache, tuple) else (cache,)
    return (y, y._version) if any(part is y for part in parts) else None


def is_intact(seal: Any) -> bool:
    """Return whether what was sealed is as it was."""
    return seal is None or seal[0]._version == seal[1]


def copy_into(target: Tensor, source: NumpyArray) -> None:
    """Copy the NumPy array ``source`` into the tensor ``target``, converted to the target's dtype."""
    target.copy_(as_array(source, target))


def channels_last_view(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View the 1-D ``flat`` as ``shape``; a 4-D shape (O, C, kH, kW) lies in memory as (O, kH, kW, C)."""
    if flat.ndim != 1:
        raise ValueError(f"channels_last_view: expected a 1-D array, got shape {tuple(flat.shape)}")
    if len(shape) != 4:
        return flat.view(shape)
    O, C, kH, kW = shape
    return flat.view(O, kH, kW, C).permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """Return 4-D tensors in channels_last memory, copied only if they are not; others contiguous."""
    if x.ndim != 4:
        return x.contiguous()
    _, C, H, W = x.shape
    strides = (H * W * C, 1, W * C, C)
    if x.stride() == strides:
        return x
    # torch leaves the strides of axes of size 1 open, and some kernels then guess another layout and fail
    return x.contiguous(memory_format=torch.channels_last).as_strided(x.shape, strides)

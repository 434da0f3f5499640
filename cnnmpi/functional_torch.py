"""The operations of ``cnnmpi.functional``, of the same names and signatures, on torch tensors.

Forward and backward call torch's own kernels, the backward ones by hand: tensors here never require gradients, so
autograd records nothing. Images are (N, C, H, W) in the channels_last memory format. Nothing but the loss waits for
the device, so a step up to the logits, and from their gradient back, can be captured in a CUDA graph.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnnmpi.common.arguments import (
    check_choice,
    check_loss,
    check_range,
    check_smoothing,
    check_split,
    check_weights,
    joined_shape,
    mean_divisor,
)
from cnnmpi.sizes import Size, check_groups, conv_size, conv_transpose_size, pair, pool_size, upsampling, whole

aten = torch.ops.aten
NumpyArray = np.ndarray[Any, np.dtype[Any]]


# -- arrays ----------------------------------------------------------------------------------------------------------


def choose_device(device: str, index: int = 0) -> str:
    """Return "cpu", or "cuda:N" for that or for "cuda", which takes GPU number ``index``, round and round.

    Raises ValueError where it is unknown or not present.
    """
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ValueError(f"unknown device {device!r}: expected cpu, cuda or cuda:N")
    if kind == "cpu":
        return "cpu"
    count = torch.cuda.device_count()
    if int(number or 0) >= count:
        raise ValueError(f"device {device!r} is not available: PyTorch finds {count} CUDA devices")
    return f"cuda:{number or index % count}"


def set_threads(count: int, callers: int = 1) -> None:
    """Let ``callers`` threads, the current one among them, share ``count`` threads; each of them has to call this."""
    torch.set_num_threads(max(1, count // callers))


def tensor(a: NumpyArray, device: str) -> Tensor:
    """Return ``a`` as a tensor on ``device``; on the CPU both share their memory."""
    return torch.from_numpy(a).to(device)


def as_array(a: NumpyArray, like: Tensor | None = None) -> Tensor:
    """Return the NumPy array ``a`` as a tensor on the device of ``like``, the CPU if None; its dtype is kept."""
    if not a.flags.writeable or min(a.strides, default=0) < 0:  # torch knows neither
        a = a.copy(order="K")
    return torch.from_numpy(a).to("cpu" if like is None else like.device)


def to_numpy(a: Tensor) -> NumpyArray:
    """Return a tensor as a NumPy array; from the CPU, both share their memory."""
    array: NumpyArray = a.detach().cpu().numpy()
    return array


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


def _channels_last(x: Tensor) -> Tensor:
    """Return 4-D tensors in channels_last memory, copied only if they are not; others contiguous."""
    if x.ndim != 4:
        return x.contiguous()
    _, C, H, W = x.shape
    # torch leaves the strides of axes of size 1 open, and some kernels then guess another layout and fail
    return x.contiguous(memory_format=torch.channels_last).as_strided(x.shape, (H * W * C, 1, W * C, C))


# -- convolution and the linear layer --------------------------------------------------------------------------------


def conv2d(
    x: Tensor,
    W: Tensor,
    b: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    filters: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Any]:
    """Cross-correlate ``x`` (N, C, H, W) with the filters ``W`` (O, C / groups, kH, kW), add ``b`` (O,).

    Returns y (N, O, Ho, Wo). ``filters`` stays as it is: torch's kernels take W itself.
    """
    groups = whole("groups", groups)
    conv_size(x.shape, W.shape, stride, padding, dilation, groups)
    x, W = _channels_last(x), _channels_last(W)
    options = pair(stride), pair(padding), pair(dilation), False, (0, 0), groups
    return _channels_last(torch.convolution(x, W, b, *options)), (x, W, b, options)


def conv_transpose2d(
    x: Tensor,
    W: Tensor,
    b: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> tuple[Tensor, Any]:
    """Spread ``x`` (N, C, H, W) by the filters ``W`` (C, O / groups, kH, kW), add ``b`` (O,): y (N, O, Ho, Wo).

    This is the transpose of conv2d (see ``cnnmpi.functional.conv_transpose2d``).
    """
    groups = whole("groups", groups)
    conv_transpose_size(x.shape, W.shape, stride, padding, output_padding, dilation, groups)
    x, W = _channels_last(x), _channels_last(W)
    options = pair(stride), pair(padding), pair(dilation), True, pair(output_padding), groups
    return _channels_last(torch.convolution(x, W, b, *options)), (x, W, b, options)


def conv2d_backward(
    dy: Tensor, cache: Any, *, input_grad: bool = True, weight_grad: bool = True
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx, dW, db) for ``dy`` (N, O, Ho, Wo).

    dx is None unless ``input_grad``, dW and db unless ``weight_grad``; db without a bias, too.
    """
    x, W, b, options = cache
    wanted = (input_grad, weight_grad, weight_grad and b is not None)
    dx, dW, db = aten.convolution_backward(_channels_last(dy), x, W, [dy.shape[1]], *options, wanted)
    return dx, dW, db


conv_transpose2d_backward = conv2d_backward


def linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> tuple[Tensor, Any]:
    """Return y = x W' + b for ``x`` (N, in), ``W`` (out, in), ``b`` (out,)."""
    return torch.nn.functional.linear(x, W, b), (x, W, b is not None)


def linear_backward(dy: Tensor, cache: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (dx, dW, db) = (dy W, dy' x, sum of dy over the batch)."""
    x, W, has_bias = cache
    return dy @ W, dy.T @ x, dy.sum(0) if has_bias else None


# -- activations -----------------------------------------------------------------------------------------------------


def add(x: Tensor, y: Tensor) -> Tensor:
    """Return x + y. Raises ValueError unless the shapes are equal."""
    if x.shape != y.shape:
        raise ValueError(f"add: expected two arrays of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    return x + y


def concat(arrays: Sequence[Tensor]) -> Tensor:
    """Return ``arrays`` (N, C_i, ...) side by side along the channels: (N, sum of C_i, ...).

    Raises ValueError where they differ in more than their channels, and for none.
    """
    joined_shape("concat", [tuple(a.shape) for a in arrays])
    return _channels_last(torch.cat(list(arrays), 1))


def split(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Cut ``x`` (N, C, ...) along the channels into tensors (N, size, ...), one for each of ``sizes``."""
    check_split("split", x.shape[1], sizes)
    return [_channels_last(part) for part in aten.split_with_sizes(x, sizes, 1)]


def relu(x: Tensor) -> tuple[Tensor, Any]:
    """Return max(x, 0), element by element."""
    y = torch.relu(_channels_last(x))
    return y, y


def relu_backward(dy: Tensor, cache: Any) -> Tensor:
    """Return dy where the output was positive, else 0."""
    dx: Tensor = aten.threshold_backward(_channels_last(dy), cache, 0)
    return dx


def leaky_relu(x: Tensor, *, negative_slope: float = 0.01) -> tuple[Tensor, Any]:
    """Return x where it is positive, else ``negative_slope`` x, element by element."""
    x = _channels_last(x)
    return torch.nn.functional.leaky_relu(x, negative_slope), (x, negative_slope)


def leaky_relu_backward(dy: Tensor, cache: Any) -> Tensor:
    """Return dy where x was positive, else ``negative_slope`` dy."""
    dx: Tensor = aten.leaky_relu_backward(_channels_last(dy), *cache, False)
    return dx


def sigmoid(x: Tensor) -> tuple[Tensor, Any]:
    """Return 1 / (1 + exp(-x)), element by element."""
    y = torch.sigmoid(_channels_last(x))
    return y, y


def sigmoid_backward(dy: Tensor, cache: Any) -> Tensor:
    """Return dx = dy y (1 - y)."""
    dx: Tensor = aten.sigmoid_backward(_channels_last(dy), cache)
    return dx


def tanh(x: Tensor) -> tuple[Tensor, Any]:
    """Return (exp(x) - exp(-x)) / (exp(x) + exp(-x)), element by element."""
    y = torch.tanh(_channels_last(x))
    return y, y


def tanh_backward(dy: Tensor, cache: Any) -> Tensor:
    """Return dx = dy (1 - y^2)."""
    dx: Tensor = aten.tanh_backward(_channels_last(dy), cache)
    return dx


def silu(x: Tensor) -> tuple[Tensor, Any]:
    """Return x sigmoid(x), element by element."""
    x = _channels_last(x)
    return torch.nn.functional.silu(x), x


def silu_backward(dy: Tensor, cache: Any) -> Tensor:
    """Return dx = dy s (1 + x (1 - s)) with s = sigmoid(x)."""
    dx: Tensor = aten.silu_backward(_channels_last(dy), cache)
    return dx


def gelu(x: Tensor, *, approximate: str = "none") -> tuple[Tensor, Any]:
    """Return x Phi(x), element by element, with Phi the standard normal distribution or its approximation by tanh."""
    check_choice("gelu", "approximate", approximate, "none", "tanh")
    x = _channels_last(x)
    return torch.nn.functional.gelu(x, approximate=approximate), (x, approximate)


def gelu_backward(dy: Tensor, cache: Any) -> Tensor:
    """Return dx = dy (Phi(x) + x phi(x)), where phi is the derivative of Phi."""
    x, approximate = cache
    dx: Tensor = aten.gelu_backward(_channels_last(dy), x, approximate=approximate)
    return dx


def dropout(x: Tensor, keep: Tensor, *, p: float) -> tuple[Tensor, Any]:
    """Return x where ``keep`` (bool, of its shape) is true, scaled by 1 / (1 - p), and 0 elsewhere."""
    mask = keep.to(x.dtype) * (1 / (1 - p) if p < 1 else 0)
    return x * mask, mask


def dropout_backward(dy: Tensor, cache: Any) -> Tensor:
    """Return dy, masked and scaled as the forward pass was."""
    dx: Tensor = dy * cache
    return dx


def flatten(x: Tensor) -> tuple[Tensor, Any]:
    """Return (N, ...) as (N, features); features in the order (C, H, W)."""
    return x.flatten(1), x.shape


def flatten_backward(dy: Tensor, cache: Any) -> Tensor:
    """Return dy in the shape that went in."""
    return _channels_last(dy.reshape(cache))


def softmax(x: Tensor) -> Tensor:
    """Return exp(x) / sum exp(x) along the last axis."""
    return torch.softmax(x, -1)


def softmax_backward(dy: Tensor, y: Tensor) -> Tensor:
    """Return dx = y (dy - sum dy y) for y = softmax(x)."""
    dx: Tensor = aten._softmax_backward_data(dy, y, -1, y.dtype)
    return dx


# -- losses ----------------------------------------------------------------------------------------------------------


def cross_entropy_loss(
    logits: Tensor, targets: Tensor, *, weight: Any = None, label_smoothing: float = 0.0, reduction: str = "mean"
) -> tuple[float, Tensor]:
    """Return the cross-entropy of ``logits`` (N, K) against ``targets`` and its gradient (N, K).

    ``targets`` are classes (N,) or probabilities (N, K). Options, formula and errors are those of
    ``cnnmpi.functional.cross_entropy_loss``. Waits for the device.
    """
    op = "cross_entropy_loss"
    targets = torch.as_tensor(targets, device=logits.device)
    is_classes = check_loss(op, logits, targets, reduction, classes=True)
    check_smoothing(op, label_smoothing)
    N, K = logits.shape
    mass: Any = 1  # sum_k w_k q'_k
    divisor: float = N
    if is_classes:
        targets = targets.long()
        check_range(op, "targets", targets, 0, K - 1)
        q = torch.full_like(logits, label_smoothing / K)
        q.scatter_(1, targets[:, None], 1 - label_smoothing + label_smoothing / K)
    else:
        check_range(op, "target probabilities", targets, least=0)
        q = targets.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / K
    if weight is not None:
        weight = torch.as_tensor(weight, dtype=logits.dtype, device=logits.device)
        check_weights(op, "weight", weight, K)
        q *= weight
        if is_classes and reduction == "mean":
            divisor = mean_divisor(op, weight[targets].sum(dtype=torch.float64).item())
    if weight is not None or not is_classes:
        mass = q.sum(1, keepdim=True)
    log_p = torch.log_softmax(logits, 1)
    return _reduced(-_times(q, log_p).sum(1), mass * log_p.exp() - q, divisor, reduction)


def binary_cross_entropy_loss(
    logits: Tensor, targets: Tensor, *, pos_weight: Any = None, reduction: str = "mean"
) -> tuple[float, Tensor]:
    """Return the binary cross-entropy of ``logits`` (N, K), for K labels that an image may have, and its gradient.

    ``targets`` are floats (N, K) in 0..1. Options, formula and errors are those of
    ``cnnmpi.functional.binary_cross_entropy_loss``. Waits for the device.
    """
    op = "binary_cross_entropy_loss"
    targets = torch.as_tensor(targets, device=logits.device)
    check_loss(op, logits, targets, reduction)
    check_range(op, "targets", targets, 0, 1)
    N, K = logits.shape
    positive = targets.to(logits.dtype)
    negative = 1 - positive
    if pos_weight is not None:
        pos_weight = torch.as_tensor(pos_weight, dtype=logits.dtype, device=logits.device)
        check_weights(op, "pos_weight", pos_weight, K)
        positive = positive * pos_weight
    log_sigmoid = torch.nn.functional.logsigmoid  # softplus(z) = -log_sigmoid(-z), but torch's is linear from 20 on
    losses = -_times(positive, log_sigmoid(logits)) - _times(negative, log_sigmoid(-logits))
    dlogits = ((positive + negative) * torch.sigmoid(logits) - positive) / K
    return _reduced(losses.mean(1, dtype=torch.float64), dlogits, N, reduction)


def mse_loss(outputs: Tensor, targets: Tensor, *, reduction: str = "mean") -> tuple[float, Tensor]:
    """Return the squared error of ``outputs`` (N, K) against ``targets`` (N, K) and its gradient (N, K).

    Formula and errors are those of ``cnnmpi.functional.mse_loss``. Waits for the device.
    """
    op = "mse_loss"
    targets = torch.as_tensor(targets, device=outputs.device)
    check_loss(op, outputs, targets, reduction)
    check_range(op, "targets", targets)
    N, K = outputs.shape
    difference = outputs - targets.to(outputs.dtype)
    return _reduced(difference.square().mean(1, dtype=torch.float64), difference * (2 / K), N, reduction)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Return a b, and 0 where a is, even if b is infinite."""
    return torch.where(a != 0, a * b, 0)


def _reduced(losses: Tensor, dlogits: Tensor, divisor: float, reduction: str) -> tuple[float, Tensor]:
    """Return the sum of the samples' ``losses`` with its gradient, both divided by ``divisor`` for "mean"."""
    loss = losses.sum(dtype=torch.float64).item()
    return (loss / divisor, dlogits / divisor) if reduction == "mean" else (loss, dlogits)


# -- normalisation ---------------------------------------------------------------------------------------------------


def batch_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
) -> tuple[Tensor, Any]:
    """Return y = gamma (x - mean) / sqrt(var + eps) + beta for each channel of (N, C) or (N, C, H, W), or max(y, 0).

    Options, running statistics and errors are those of ``cnnmpi.functional.batch_norm``.
    """
    if training and x[:, 0].numel() < 2:
        shape = tuple(x.shape)
        raise ValueError(f"batch normalisation in training needs more than one value per channel, got {shape}")
    x = _channels_last(x)
    y, mean, inv_std = aten.native_batch_norm(x, gamma, beta, running_mean, running_var, training, momentum, eps)
    if relu:
        y = torch.relu(y)
    return y, (y if relu else None, (x, gamma, running_mean, running_var, mean, inv_std, training, eps))


def batch_norm_backward(dy: Tensor, cache: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dgamma, dbeta)."""
    y, saved = cache
    dy = _channels_last(dy) if y is None else relu_backward(dy, y)
    dx, dgamma, dbeta = aten.native_batch_norm_backward(dy, *saved, (True, True, True))
    return dx, dgamma, dbeta


def group_norm(x: Tensor, gamma: Tensor, beta: Tensor, *, num_groups: int, eps: float = 1e-5) -> tuple[Tensor, Any]:
    """Return y = gamma (x - mean) / sqrt(var + eps) + beta for groups of channels of (N, C) or (N, C, H, W).

    Options and errors are those of ``cnnmpi.functional.group_norm``.
    """
    N, C = x.shape[:2]
    check_groups("group_norm", num_groups, C)
    x, sizes = _channels_last(x), (N, C, math.prod(x.shape[2:]), num_groups)
    y, mean, inv_std = aten.native_group_norm(x, gamma, beta, *sizes, eps)
    return _channels_last(y), (x, mean, inv_std, gamma, *sizes)


def group_norm_backward(dy: Tensor, cache: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dgamma, dbeta)."""
    dx, dgamma, dbeta = aten.native_group_norm_backward(_channels_last(dy), *cache, (True, True, True))
    return _channels_last(dx), dgamma, dbeta


# -- pooling ---------------------------------------------------------------------------------------------------------


def _pool_options(x: Tensor, k: Size, stride: Size | None, padding: Size) -> tuple[tuple[int, int], ...]:
    """Return kernel size, stride and padding as pairs. Raises ValueError for what does not fit."""
    stride = k if stride is None else stride
    pool_size(x.shape[2:], k, stride, padding)
    return pair(k), pair(stride), pair(padding)


def max_pool2d(x: Tensor, k: Size, *, stride: Size | None = None, padding: Size = 0) -> tuple[Tensor, Any]:
    """Return the maximum of each window of ``x`` (N, C, H, W): y (N, C, Ho, Wo). ``stride`` is ``k`` unless given."""
    options = _pool_options(x, k, stride, padding)
    x = _channels_last(x)
    y, where = aten.max_pool2d_with_indices(x, *options)
    return y, (x, options, where)


def max_pool2d_backward(dy: Tensor, cache: Any) -> Tensor:
    """Give each dy to the place of its window's maximum; to the first of several equal ones."""
    x, options, where = cache
    dx: Tensor = aten.max_pool2d_with_indices_backward(_channels_last(dy), x, *options, (1, 1), False, where)
    return dx


def avg_pool2d(x: Tensor, k: Size, *, stride: Size | None = None, padding: Size = 0) -> tuple[Tensor, Any]:
    """Return the mean of each window of ``x`` (N, C, H, W), padding counted as zeros."""
    options = _pool_options(x, k, stride, padding)
    x = _channels_last(x)
    return aten.avg_pool2d(x, *options), (x, options)


def avg_pool2d_backward(dy: Tensor, cache: Any) -> Tensor:
    """Give an equal share of each dy to all places of its window."""
    x, options = cache
    dx: Tensor = aten.avg_pool2d_backward(_channels_last(dy), x, *options, False, True, None)
    return dx


def upsample_nearest2d(x: Tensor, scale: Size) -> tuple[Tensor, Any]:
    """Return ``x`` (N, C, H, W) with each pixel repeated: y (N, C, scale H, scale W)."""
    sH, sW = upsampling(scale)
    size = [x.shape[2] * sH, x.shape[3] * sW]
    return _channels_last(aten.upsample_nearest2d(_channels_last(x), size)), (size, list(x.shape))


def upsample_nearest2d_backward(dy: Tensor, cache: Any) -> Tensor:
    """Return dx: each pixel receives the sum over its copies."""
    return _channels_last(aten.upsample_nearest2d_backward(_channels_last(dy), *cache))


def global_avg_pool2d(x: Tensor) -> tuple[Tensor, Any]:
    """Return the mean over all positions: (N, C, H, W) -> (N, C)."""
    return _channels_last(x).mean((2, 3)), x.shape


def global_avg_pool2d_backward(dy: Tensor, cache: Any) -> Tensor:
    """Give an equal share of dy (N, C) to all positions."""
    N, C, H, W = cache
    return _channels_last((dy / (H * W))[:, :, None, None].expand(N, C, H, W))

"""The operations of ``cnnmpi.functional``, of the same names and signatures, on torch tensors.

Forward and backward call torch's own kernels, the backward ones by hand: tensors here never require gradients, so
autograd records nothing. Images are (N, C, H, W) in the channels_last memory format. Nothing but the loss waits for
the device, so a step up to the logits, and from their gradient back, can be captured in a CUDA graph.
"""

import importlib
from types import ModuleType

from cnnmpi.functional_torch.activation import (
    add,
    concat,
    dropout,
    dropout_backward,
    flatten,
    flatten_backward,
    gelu,
    gelu_backward,
    leaky_relu,
    leaky_relu_backward,
    relu,
    relu_backward,
    sigmoid,
    sigmoid_backward,
    silu,
    silu_backward,
    softmax,
    softmax_backward,
    split,
    tanh,
    tanh_backward,
)
from cnnmpi.functional_torch.arrays import (
    address,
    as_array,
    be_deterministic,
    channels_last,
    channels_last_view,
    choose_device,
    copy_into,
    count_gpus,
    empty,
    fits,
    for_loss,
    is_intact,
    kernels,
    retire,
    seal,
    set_threads,
    tensor,
    to_numpy,
)
from cnnmpi.functional_torch.conv import (
    conv2d,
    conv2d_backward,
    conv_transpose2d,
    conv_transpose2d_backward,
    linear,
    linear_backward,
)
from cnnmpi.functional_torch.loss import binary_cross_entropy_loss, cross_entropy_loss, mse_loss
from cnnmpi.functional_torch.norm import batch_norm, batch_norm_backward, group_norm, group_norm_backward
from cnnmpi.functional_torch.pool import (
    avg_pool2d,
    avg_pool2d_backward,
    global_avg_pool2d,
    global_avg_pool2d_backward,
    max_pool2d,
    max_pool2d_backward,
    upsample_nearest2d,
    upsample_nearest2d_backward,
)

__all__ = [
    "add",
    "address",
    "as_array",
    "avg_pool2d",
    "avg_pool2d_backward",
    "batch_norm",
    "batch_norm_backward",
    "be_deterministic",
    "binary_cross_entropy_loss",
    "channels_last",
    "channels_last_view",
    "choose_device",
    "concat",
    "conv2d",
    "conv2d_backward",
    "conv_transpose2d",
    "conv_transpose2d_backward",
    "copy_into",
    "count_gpus",
    "cross_entropy_loss",
    "dropout",
    "dropout_backward",
    "empty",
    "fits",
    "flatten",
    "flatten_backward",
    "for_loss",
    "gelu",
    "gelu_backward",
    "global_avg_pool2d",
    "global_avg_pool2d_backward",
    "group_norm",
    "group_norm_backward",
    "is_intact",
    "kernels",
    "leaky_relu",
    "leaky_relu_backward",
    "linear",
    "linear_backward",
    "max_pool2d",
    "max_pool2d_backward",
    "mse_loss",
    "relu",
    "relu_backward",
    "retire",
    "seal",
    "set_threads",
    "sigmoid",
    "sigmoid_backward",
    "silu",
    "silu_backward",
    "softmax",
    "softmax_backward",
    "split",
    "tanh",
    "tanh_backward",
    "tensor",
    "to_numpy",
    "upsample_nearest2d",
    "upsample_nearest2d_backward",
]

PRECISIONS = ("float32", "tf32", "bfloat16", "float16")


def engine(precision: str, device: str = "cpu") -> ModuleType:
    """Return the module with the operations of a precision: this one, or one of the same names beside it.

    On a GPU, PyTorch computes by deterministic kernels from then on, in the whole process, and rounds the products of
    float32 for "tf32" only. Raises ValueError for an unknown precision, and for "tf32" elsewhere.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if device.startswith("cuda"):
        be_deterministic("tf32" if precision == "tf32" else "ieee")
    elif precision == "tf32":
        raise ValueError("precision tf32 is a GPU's: a processor computes in float32, bfloat16 or float16")
    return importlib.import_module(f"{__name__}.{precision}" if precision in ("bfloat16", "float16") else __name__)

"""NumPy mathematics, in pairs: ``y, cache = op(x, W, b, option=)`` and ``dx, dW, db = op_backward(dy, cache)``.

Pure functions: positional arguments are differentiated, keyword arguments are not; ``set_threads`` and
``constant_filters`` change how fast they are, not what they return. Images are (N, C, H, W) to the caller and
channels-last, (N, H, W, C), in memory. ``cnnmpi.functional_torch`` has the same names on tensors.
"""

from cnnmpi.functional.activation import (
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
from cnnmpi.functional.arrays import (
    address,
    as_array,
    channels_last_view,
    copy_into,
    empty,
    is_intact,
    retire,
    seal,
    to_numpy,
)
from cnnmpi.functional.blocks import set_threads
from cnnmpi.functional.conv import col2im, conv2d, conv2d_backward, im2col, linear, linear_backward
from cnnmpi.functional.init import kaiming_normal, kaiming_uniform, whitening, xavier_normal, xavier_uniform
from cnnmpi.functional.loss import binary_cross_entropy_loss, cross_entropy_loss, mse_loss
from cnnmpi.functional.metrics import accuracy, label_accuracy, top5_accuracy
from cnnmpi.functional.norm import batch_norm, batch_norm_backward, group_norm, group_norm_backward
from cnnmpi.functional.pool import (
    avg_pool2d,
    avg_pool2d_backward,
    global_avg_pool2d,
    global_avg_pool2d_backward,
    max_pool2d,
    max_pool2d_backward,
)
from cnnmpi.functional.winograd import constant_filters

__all__ = [
    "accuracy",
    "add",
    "address",
    "as_array",
    "avg_pool2d",
    "avg_pool2d_backward",
    "batch_norm",
    "batch_norm_backward",
    "binary_cross_entropy_loss",
    "channels_last_view",
    "col2im",
    "concat",
    "constant_filters",
    "conv2d",
    "conv2d_backward",
    "copy_into",
    "cross_entropy_loss",
    "dropout",
    "dropout_backward",
    "empty",
    "flatten",
    "flatten_backward",
    "gelu",
    "gelu_backward",
    "global_avg_pool2d",
    "global_avg_pool2d_backward",
    "group_norm",
    "group_norm_backward",
    "im2col",
    "is_intact",
    "kaiming_normal",
    "kaiming_uniform",
    "label_accuracy",
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
    "to_numpy",
    "top5_accuracy",
    "whitening",
    "xavier_normal",
    "xavier_uniform",
]

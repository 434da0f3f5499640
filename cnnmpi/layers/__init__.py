"""The layers: each holds parameters and the cache of its last forward pass; the mathematics is in ``functional``.

A layer computes with the module ``F``: ``cnnmpi.functional`` (NumPy) or, after ``to_torch()``, its twin
``cnnmpi.functional_torch``. No layer writes into its input or its ``dout``. Options and shapes are those of torch.nn.
"""

from cnnmpi.layers.base import Array, Layer, Pair
from cnnmpi.layers.containers import Concat, Identity, Residual, Sequential
from cnnmpi.layers.convolution import Conv2d, Convolution, ConvTranspose2d, Whitening
from cnnmpi.layers.fixed import (
    GELU,
    AvgPool2d,
    Dropout,
    Flatten,
    GlobalAvgPool2d,
    LeakyReLU,
    MaxPool2d,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Tanh,
    Upsample,
)
from cnnmpi.layers.learned import BatchNorm, GroupNorm, Linear

__all__ = [
    "GELU",
    "Array",
    "AvgPool2d",
    "BatchNorm",
    "Concat",
    "Conv2d",
    "ConvTranspose2d",
    "Convolution",
    "Dropout",
    "Flatten",
    "GlobalAvgPool2d",
    "GroupNorm",
    "Identity",
    "Layer",
    "LeakyReLU",
    "Linear",
    "MaxPool2d",
    "Pair",
    "ReLU",
    "Residual",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Tanh",
    "Upsample",
    "Whitening",
]

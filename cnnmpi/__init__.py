"""cnnmpi: data-parallel training of convolutional networks, from scratch in NumPy, with MPI and HDF5.

The number of ranks changes the time, never the result. Start with ``cnnmpi.train``, or build from the layers here.
"""

import sys

if sys.platform == "win32":
    raise ImportError("cnnmpi runs on Linux, not on Windows: install it in the Windows Subsystem for Linux (WSL 2)")

from cnnmpi.data import DataLoader, load_cifar10
from cnnmpi.functional import binary_cross_entropy_loss, cross_entropy_loss, mse_loss
from cnnmpi.gradcheck import GradientError, check_gradients
from cnnmpi.layers import (
    GELU,
    AvgPool2d,
    BatchNorm,
    Concat,
    Conv2d,
    ConvTranspose2d,
    Dropout,
    Flatten,
    GlobalAvgPool2d,
    GroupNorm,
    Identity,
    Layer,
    LeakyReLU,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    Sigmoid,
    SiLU,
    Softmax,
    Tanh,
    Upsample,
)
from cnnmpi.models import MobileNet, Model, ResNet18, SimpleCNN, SmallResNet
from cnnmpi.optim import SGD, Adam, AdamW
from cnnmpi.rng import first_draws
from cnnmpi.train import Config, Trainer, fit, load_checkpoint, on_all_ranks, set_up

__all__ = [
    "GELU",
    "SGD",
    "Adam",
    "AdamW",
    "AvgPool2d",
    "BatchNorm",
    "Concat",
    "Config",
    "Conv2d",
    "ConvTranspose2d",
    "DataLoader",
    "Dropout",
    "Flatten",
    "GlobalAvgPool2d",
    "GradientError",
    "GroupNorm",
    "Identity",
    "Layer",
    "LeakyReLU",
    "Linear",
    "MaxPool2d",
    "MobileNet",
    "Model",
    "ReLU",
    "ResNet18",
    "Residual",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "SimpleCNN",
    "SmallResNet",
    "Softmax",
    "Tanh",
    "Trainer",
    "Upsample",
    "binary_cross_entropy_loss",
    "check_gradients",
    "cross_entropy_loss",
    "first_draws",
    "fit",
    "load_checkpoint",
    "load_cifar10",
    "mse_loss",
    "on_all_ranks",
    "set_up",
]

"""Initial values of weights, drawn from an explicit generator; and the filters of a whitening layer."""

import contextlib
import contextvars
import math
from collections.abc import Iterator

import numpy as np

from cnnmpi.functional.blocks import Array

# Correlation of neighbouring pixels and channels: 0.92 to 0.93 in CIFAR-10, and about its square at a distance of two.
# But that of red with blue is 0.83, less than the square: hence 0.9 from channel to channel.
PIXELS, COLOURS = 0.92, 0.9


_most: contextvars.ContextVar[float] = contextvars.ContextVar("most", default=math.inf)


@contextlib.contextmanager
def at_most(numbers: int) -> Iterator[None]:
    """In this block, refuse weights of more ``numbers``, before memory is taken: for sizes that come from a file."""
    token = _most.set(numbers)
    try:
        yield
    finally:
        _most.reset(token)


def check_size(*shape: int) -> None:
    """Raise ValueError for more numbers than ``at_most`` allows."""
    if math.prod(map(int, shape)) > _most.get():
        raise ValueError(f"an array of shape {shape} would have more than the {_most.get()} numbers allowed here")


def fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (fan_in, fan_out), the inputs and outputs that a weight (out, in, ...) connects at one position."""
    if len(shape) < 2:
        raise ValueError(f"a weight of shape {shape} has no fan-in and fan-out: at least 2 dimensions are needed")
    if min(shape) < 1:
        raise ValueError(f"a weight of shape {tuple(map(int, shape))} is empty: every size must be at least 1")
    check_size(*shape)
    fan_out, fan_in, *window = map(int, shape)  # NumPy's narrow integers would overflow
    return fan_in * math.prod(window), fan_out * math.prod(window)


def kaiming_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draw from N(0, 2 / fan_in), which keeps the variance through ReLU layers (He et al., 2015); float64."""
    return rng.normal(0, math.sqrt(2 / fans(shape)[0]), shape)


def kaiming_uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draw uniformly with the variance 2 / fan_in (He et al., 2015); float64."""
    bound = math.sqrt(6 / fans(shape)[0])
    return rng.uniform(-bound, bound, shape)


def xavier_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draw from N(0, 2 / (fan_in + fan_out)) (Glorot and Bengio, 2010); float64."""
    return rng.normal(0, math.sqrt(2 / sum(fans(shape))), shape)


def xavier_uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Draw uniformly with the variance 2 / (fan_in + fan_out) (Glorot and Bengio, 2010); float64."""
    bound = math.sqrt(6 / sum(fans(shape)))
    return rng.uniform(-bound, bound, shape)


def whitening(shape: tuple[int, ...]) -> Array:
    """Return filters (out, C, kH, kW), float64, whose outputs on natural images vary about equally and independently.

    Neighbouring pixels of images are alike: of the directions of a 3x3 patch, the brightness has a thousand times the
    variance of the twelfth. That slows gradient descent down, and principal components, each divided by its standard
    deviation, mend it (Page, "How to train your ResNet 8: bag of tricks", 2019). Where the correlation falls by a
    constant factor with each step along an axis (PIXELS in height and width, COLOURS from channel to channel), they are
    nearly the cosines of a discrete cosine transform (Ahmed, Natarajan and Rao, "Discrete cosine transform", 1974), for
    which no data are needed. On CIFAR-10 this brings the factor of 1000 down to about 20.

    Expects pixels normalised to mean 0 and variance 1. The first half are the components of the largest variances, the
    second half their negatives, so that a ReLU loses nothing. Raises ValueError for an odd number of filters, and for
    more than 2 C kH kW.
    """
    out, axes = shape[0], shape[1:]
    if out % 2 or out > 2 * math.prod(axes):
        raise ValueError(f"whitening: the number of filters must be even and at most {2 * math.prod(axes)}, got {out}")
    check_size(math.prod(axes), math.prod(axes))
    basis: Array = np.ones((1, 1))
    variances: Array = np.ones(1)
    for size, correlation in zip(axes, (COLOURS, PIXELS, PIXELS), strict=True):
        cosines = np.cos(np.pi / size * np.outer(np.arange(size), np.arange(size) + 0.5))
        cosines /= np.linalg.norm(cosines, axis=1, keepdims=True)
        covariance = correlation ** np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
        basis = np.kron(basis, cosines)
        variances = np.kron(variances, np.diag(cosines @ covariance @ cosines.T))
    largest = np.argsort(-variances.round(9), kind="stable")[: out // 2]  # of equal ones the first, on any machine
    filters = basis[largest] / np.sqrt(variances[largest, None])
    filters = np.rint(filters * 2**20) / 2**20  # the last bits of a cosine depend on the machine
    return np.concatenate([filters, -filters]).reshape(shape) + 0.0  # no zero is negative

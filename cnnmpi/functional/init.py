"""Initial values of weights, drawn from an explicit generator."""

import math

import numpy as np

from cnnmpi.functional.blocks import Array


def fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (fan_in, fan_out), the inputs and outputs that a weight (out, in, ...) connects at one position."""
    if len(shape) < 2:
        raise ValueError(f"a weight of shape {shape} has no fan-in and fan-out: at least 2 dimensions are needed")
    receptive = math.prod(shape[2:])
    return shape[1] * receptive, shape[0] * receptive


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

"""Floating-point operations: those that a step needs, and how many a second this machine does at best."""

import math
import time
from collections import defaultdict
from types import ModuleType
from typing import Any

import numpy as np
import threadpoolctl

from cnnmpi import functional
from cnnmpi.layers import Conv2d, ConvTranspose2d, Layer, Linear, Whitening
from cnnmpi.profile.step import Calls, Place, Step

SIZE = 2048  # of the matrices whose product is timed
TRIES = 6


def forward_flops(layer: Layer, x: Any, y: Any) -> float:
    """Return the operations of a layer's matrix products for ``x`` and its output ``y``; 0 for layers without.

    A multiplication and an addition are two. Convolutions are counted as direct ones, each output a sum over its
    window: Winograd's way, which multiplies less, may so exceed the peak.
    """
    if not isinstance(layer, Conv2d | ConvTranspose2d | Linear | Whitening):
        return 0.0
    weight = (layer.params | layer.buffers)["weight"]
    pixels = x if isinstance(layer, ConvTranspose2d) else y  # each is multiplied by so many weights, or a sum of them
    return float(2 * math.prod(weight.shape[1:]) * math.prod(pixels.shape))


def backward_factor(layer: Layer) -> int:
    """Return how many times the forward's operations backward needs: for dx and for dW, unless they are left out."""
    return int(layer.input_grad) + int(not layer.frozen)


def count_flops(step: Step) -> dict[Place, float]:
    """Do ``step`` and return the operations of each place that has any."""
    flops: dict[Place, float] = defaultdict(float)
    names = {layer: name for name, layer in step.model.walk()}
    newest: dict[Layer, float] = {}

    def seen(layer: Layer, direction: str, x: Any, y: Any) -> None:
        if direction == "forward":
            newest[layer] = forward_flops(layer, x, y)
        factor = 1 if direction == "forward" else backward_factor(layer)
        if newest[layer]:
            flops[names[layer], direction] += factor * newest[layer]

    with Calls(lambda place: None) as calls:
        calls.watch_step(step, seen)
        step()
    return dict(flops)


def matrix_peak(F: ModuleType = functional, dtype: Any = np.float32, threads: int = 1) -> float:
    """Return the most floating-point operations a second that a product of large matrices reaches, of a few tries.

    ``F`` is the engine; one of torch computes in its own precision. ``dtype`` is that of the arrays.
    """
    a = np.ones((SIZE, SIZE), dtype)
    times = []
    with threadpoolctl.threadpool_limits(threads, user_api="blas"):
        if F is not functional:
            F.set_threads(threads)
            a = F.as_array(a)
        for _ in range(TRIES):
            started = time.perf_counter()
            if F is functional:
                a @ a
            else:
                F.linear(a, a)
            times.append(time.perf_counter() - started)
    return 2 * SIZE**3 / min(times)

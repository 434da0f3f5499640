"""Ten classes of drawn shapes and patterns: data of the shape of CIFAR-10 where there is no CIFAR-10.

A class is told by its form alone: colours, brightness, place, size and angle are random, so that a linear classifier
learns little of it and a small convolutional network learns it well. Only operations that IEEE 754 rounds correctly
are used (+ - * / sqrt floor), so that a seed gives the same bytes on every machine.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from cnnmpi.common.arrays import Array, nchw
from cnnmpi.data.dataset import Dataset
from cnnmpi.rng import generator

SIZE = 32
NOISE = 40  # uniform in -NOISE..NOISE grey levels
Floats = np.ndarray[Any, np.dtype[np.float32]]
Form = Callable[[Floats, Floats, Floats, Floats], Floats]


def synthetic(seed: int = 0, train: int = 10000, test: int = 2000) -> Dataset:
    """Return ``train`` + ``test`` drawn images (N, 3, 32, 32) of ten classes, equally frequent up to one image."""
    train_images, train_labels = _draw_images(generator(seed, "synthetic", 0), train)
    test_images, test_labels = _draw_images(generator(seed, "synthetic", 1), test)
    source = f"SYNTHETIC (seed {seed}), not real images"
    dataset = Dataset(train_images, train_labels, test_images, test_labels, tuple(FORMS), source)
    dataset.check("synthetic")
    return dataset


def _draw_images(random: np.random.Generator, count: int) -> tuple[Array, Array]:
    labels = random.permutation(np.arange(count) % len(FORMS))
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for label, form in enumerate(FORMS.values()):
        chosen = np.flatnonzero(labels == label)
        images[chosen] = _paint(random, _cover(random, form, len(chosen)))
    return nchw(images), labels


def _cover(random: np.random.Generator, form: Form, n: int) -> Floats:
    """Return how much of each pixel the form covers, in 0..1, for ``n`` random places, sizes and angles: (n, H, W)."""
    x0, y0 = random.uniform(10, 22, (2, n, 1, 1)).astype(np.float32)
    radius = random.uniform(6, 11, (n, 1, 1)).astype(np.float32)
    phase = random.random((n, 1, 1), np.float32)
    tilt = random.uniform(-0.2, 0.2, (n, 1, 1)).astype(np.float32)  # the tangent of the angle
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    length = np.sqrt(1 + tilt * tilt)
    u = ((x - x0) + tilt * (y - y0)) / length
    v = ((y - y0) - tilt * (x - x0)) / length
    cover: Floats = np.clip(form(u, v, radius, phase) + np.float32(0.5), 0, 1)
    return cover


def _paint(random: np.random.Generator, cover: Floats) -> Array:
    """Return uint8 (n, H, W, 3): two random colours that differ in every channel, and noise."""
    n = len(cover)
    levels = random.integers(0, 256, (n, 1, 1, 3))
    back = levels.astype(np.float32)
    front = ((levels + random.integers(64, 193, (n, 1, 1, 3))) % 256).astype(np.float32)
    pixels = back + (front - back) * cover[..., None]
    pixels += random.integers(-NOISE, NOISE + 1, pixels.shape, np.int8)
    return np.clip(pixels, 0, 255).astype(np.uint8)


# Each form gives the distance to its edge in pixels, positive inside, from coordinates u (right) and v (down) relative
# to its middle, a radius r of about 6 to 11, and a phase in 0..1 for what repeats.


def _circle(u: Floats, v: Floats, r: Floats, phase: Floats) -> Floats:
    return r - np.sqrt(u * u + v * v)


def _square(u: Floats, v: Floats, r: Floats, phase: Floats) -> Floats:
    return r - np.maximum(np.abs(u), np.abs(v))


def _triangle(u: Floats, v: Floats, r: Floats, phase: Floats) -> Floats:
    inside: Floats = np.minimum(
        r - v, (v + r - 2 * np.abs(u)) * np.float32(0.447)
    )  # 0.447: of length 1, as all distances
    return inside


def _cross(u: Floats, v: Floats, r: Floats, phase: Floats) -> Floats:
    u, v = np.abs(u), np.abs(v)
    inside: Floats = np.minimum(r - np.maximum(u, v), r * np.float32(0.3) - np.minimum(u, v))
    return inside


def _ring(u: Floats, v: Floats, r: Floats, phase: Floats) -> Floats:
    inside: Floats = r * np.float32(0.2) - np.abs(r * np.float32(0.8) - np.sqrt(u * u + v * v))
    return inside


def _repeat(t: Floats, period: Floats, phase: Floats) -> Floats:
    """Return the distance of ``t``, with its sign, from the nearest of the points that repeat with ``period``."""
    turns = t / period + phase
    inside: Floats = period * (turns - np.floor(turns) - np.float32(0.5))
    return inside


def _stripes(t: Floats, period: Floats, phase: Floats) -> Floats:
    return period * np.float32(0.25) - np.abs(_repeat(t, period, phase))


def _horizontal(u: Floats, v: Floats, r: Floats, phase: Floats) -> Floats:
    return _stripes(v, r, phase)


def _vertical(u: Floats, v: Floats, r: Floats, phase: Floats) -> Floats:
    return _stripes(u, r, phase)


def _diagonal(u: Floats, v: Floats, r: Floats, phase: Floats) -> Floats:
    side = np.where(phase < 0.5, np.float32(0.707), np.float32(-0.707))  # rising or falling
    return _stripes(u * np.float32(0.707) + v * side, r, phase)


def _checkerboard(u: Floats, v: Floats, r: Floats, phase: Floats) -> Floats:
    across, down = _stripes(u, r, phase), _stripes(v, r, phase)
    return np.minimum(np.abs(across), np.abs(down)) * np.sign(across) * np.sign(down)


def _dots(u: Floats, v: Floats, r: Floats, phase: Floats) -> Floats:
    across, down = _repeat(u, r, phase), _repeat(v, r, phase)
    return r * np.float32(0.3) - np.sqrt(across * across + down * down)


FORMS: dict[str, Form] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
    "horizontal stripes": _horizontal,
    "vertical stripes": _vertical,
    "diagonal stripes": _diagonal,
    "checkerboard": _checkerboard,
    "dots": _dots,
}

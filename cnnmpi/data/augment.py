"""Augmentation and normalisation: pure functions of a batch and of explicit draws.

All take images (N, C, H, W), uint8 or float, and return new ones of that shape, channels-last in memory. Channels-last
images are not copied on the way in. The loops run over whole rows of W * C numbers, not over pixels of 3.
"""

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import as_strided

from cnnmpi.common.arrays import Array, nchw, nhwc


def random_horizontal_flip(images: Array, flip: Array) -> Array:
    """Mirror those images whose draw ``flip`` (N,), bool, is true."""
    N, C, H, W = images.shape
    rows = nhwc(images).reshape(N, H, W * C).copy()
    mirrored = np.arange(W * C).reshape(W, C)[::-1].ravel()
    if flip.shape != (N,) or flip.dtype != bool:
        raise ValueError(f"random_horizontal_flip: expected {N} draws of bool, got {flip.dtype} {flip.shape}")
    rows[flip] = rows[flip].take(mirrored, axis=2)
    return nchw(rows.reshape(N, H, W, C))


def random_crop(images: Array, top: Array, left: Array, padding: int) -> Array:
    """Pad with ``padding`` zeros on each side and cut out a window of the old size at ``top``, ``left``.

    The draws ``top`` and ``left``, (N,), are integers in 0..2 * padding; raises ValueError for others. A draw equal to
    ``padding`` leaves its image as it is.
    """
    N, C, H, W = images.shape
    for draws in (top, left):
        if draws.shape != (N,) or (N and not 0 <= draws.min() <= draws.max() <= 2 * padding):
            raise ValueError(f"random_crop: expected {N} draws in 0..{2 * padding}")
    padded = np.zeros((N, H + 2 * padding, W + 2 * padding, C), images.dtype)
    padded[:, padding : padding + H, padding : padding + W] = nhwc(images)
    n, h, w, c = padded.strides
    offsets = 2 * padding + 1
    windows = as_strided(padded, (N, offsets, offsets, H, W * C), (n, h, w, h, c), writeable=False)
    return nchw(windows[np.arange(N), top, left].reshape(N, H, W, C))


def cutout(images: Array, top: Array, left: Array, size: int) -> Array:
    """Set a square of ``size`` pixels, its upper left corner at ``top``, ``left``, to 0 (DeVries and Taylor, 2017).

    The draws ``top`` and ``left``, (N,), are integers in 0..H - size and 0..W - size; raises ValueError for others.
    """
    N, _, H, W = images.shape
    for draws, length in ((top, H), (left, W)):
        if draws.shape != (N,) or (N and not 0 <= draws.min() <= draws.max() <= length - size):
            raise ValueError(f"cutout: expected {N} draws in 0..{length - size}")
    pixels = nhwc(images).copy()
    for image, t, l in zip(pixels, top.tolist(), left.tolist(), strict=True):  # as ints, which t + size cannot overflow
        image[t : t + size, l : l + size] = 0
    return nchw(pixels)


def normalize(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Return (x - mean) / std for each channel, as float32; x is the image, scaled to [0, 1] if it is uint8."""
    N, C, H, W = images.shape
    mean64, std64 = np.array(mean, np.float64), np.array(std, np.float64)
    if mean64.shape != (C,) or std64.shape != (C,):
        raise ValueError(f"normalize: expected a mean and a std for each of {C} channels, got {mean} and {std}")
    if not (np.isfinite(mean64).all() and np.isfinite(std64).all() and (std64 > 0).all()):
        raise ValueError(f"normalize: means must be finite and stds positive, got {mean} and {std}")
    unit = _unit(images)
    scale = np.tile((1 / (unit * std64)).astype(np.float32), W)
    shift = np.tile((-mean64 / std64).astype(np.float32), W)
    rows = nhwc(images).reshape(N * H, W * C).astype(np.float32)
    rows *= scale
    rows += shift
    return nchw(rows.reshape(N, H, W, C))


def to_unit(images: Array) -> Array:
    """Return uint8 images as float32 in [0, 1]; float images as float32, unchanged."""
    if _unit(images) == 255:
        return nchw(np.divide(nhwc(images), np.float32(255), dtype=np.float32))
    return nchw(nhwc(images).astype(np.float32))


def _unit(images: Array) -> int:
    """Return what stands for 1 in ``images``. Raises ValueError for integers but uint8: their range is not known."""
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise ValueError(f"expected images of uint8, or of floats in 0..1, got {images.dtype}")
    return 255 if images.dtype == np.uint8 else 1

"""Pooling over windows, forward and backward. Sizes are rounded down, as torch.nn does."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from cnnmpi.functional.blocks import Array, for_each_block, nchw, nhwc, pad
from cnnmpi.sizes import Size, out_size, pair, pool_size, upsampling


def _corners(padded: Array, k: Size, stride: Size) -> Iterator[Array]:
    """Yield, for each place (i, j) in a window, the view (n, Ho, Wo, C) of what stands there in every window."""
    (kH, kW), (sH, sW) = pair(k), pair(stride)
    Ho, Wo = out_size(padded.shape[1:3], k, stride, 0)
    for i in range(kH):
        for j in range(kW):
            yield padded[:, i : i + sH * Ho : sH, j : j + sW * Wo : sW]


def _pooled_shape(x: Array, k: Size, stride: Size, padding: Size) -> tuple[int, int, int, int]:
    """Return the channels-last shape (N, Ho, Wo, C) of the windows over ``x`` (N, C, H, W)."""
    N, C, H, W = x.shape
    return N, *pool_size((H, W), k, stride, padding), C


def _inside(padded: Array, padding: Size) -> Array:
    """Return the view of a channels-last ``padded`` without its border."""
    pH, pW = pair(padding)
    return padded[:, pH : padded.shape[1] - pH, pW : padded.shape[2] - pW]


def max_pool2d(x: Array, k: Size, *, stride: Size | None = None, padding: Size = 0) -> tuple[Array, Any]:
    """Return the maximum of each window of ``x`` (N, C, H, W): y (N, C, Ho, Wo). ``stride`` is ``k`` unless given."""
    stride = k if stride is None else stride
    x = nchw(nhwc(x))
    y = np.empty(_pooled_shape(x, k, stride, padding), x.dtype)
    kH, kW = pair(k)
    where = np.empty(y.shape, np.min_scalar_type(kH * kW))  # number of the place in its window that had the maximum

    def pool(block: slice) -> None:
        best, place = y[block], where[block]
        corners = enumerate(_corners(pad(nhwc(x[block]), pair(padding), -np.inf), k, stride))
        best[...], place[...] = next(corners)[1], 0
        greater, later = np.empty(best.shape, bool), np.empty_like(place)
        for number, corner in corners:
            corner = np.ascontiguousarray(corner)  # read twice: NumPy is fast on long rows only
            np.greater(corner, best, out=greater)  # so that the first of several equal numbers wins, as in torch
            np.multiply(greater.view(np.uint8), place.dtype.type(number), out=later)
            np.maximum(place, later, out=place)
            np.maximum(best, corner, out=best)

    for_each_block(pool, len(x), 2 * x[:1].nbytes)
    return nchw(y), (x.shape, where, k, stride, padding)


def max_pool2d_backward(dy: Array, cache: Any) -> Array:
    """Give each dy to the place of its window's maximum; to the first of several equal ones."""
    (N, C, H, W), where, k, stride, padding = cache
    (pH, pW) = pair(padding)
    dx = np.empty((N, H, W, C), dy.dtype)
    disjoint = all(step >= size for step, size in zip(pair(stride), pair(k), strict=True))

    def spread(block: slice) -> None:
        place, dpeak, target = where[block], nhwc(dy[block]), dx[block]
        dpadded = np.empty((len(place), H + 2 * pH, W + 2 * pW, C), dy.dtype) if pH or pW else target
        dpadded[...] = 0
        for number, dcorner in enumerate(_corners(dpadded, k, stride)):
            hit = place == number
            if disjoint:
                np.multiply(dpeak, hit, out=dcorner)
            else:
                dcorner += dpeak * hit
        if dpadded is not target:
            target[...] = _inside(dpadded, padding)

    for_each_block(spread, N, 2 * dx[:1].nbytes)
    return nchw(dx)


def avg_pool2d(x: Array, k: Size, *, stride: Size | None = None, padding: Size = 0) -> tuple[Array, Any]:
    """Return the mean of each window of ``x`` (N, C, H, W), padding counted as zeros (torch's default)."""
    stride = k if stride is None else stride
    kH, kW = pair(k)
    y = np.zeros(_pooled_shape(x, k, stride, padding), x.dtype)

    def pool(block: slice) -> None:
        for corner in _corners(pad(nhwc(x[block]), pair(padding)), k, stride):
            y[block] += corner
        y[block] *= 1 / (kH * kW)

    for_each_block(pool, len(x), x[:1].nbytes)
    return nchw(y), (x.shape, k, stride, padding)


def avg_pool2d_backward(dy: Array, cache: Any) -> Array:
    """Give an equal share of each dy to all places of its window."""
    (N, C, H, W), k, stride, padding = cache
    (kH, kW), (pH, pW) = pair(k), pair(padding)
    dx = np.empty((N, H, W, C), dy.dtype)

    def spread(block: slice) -> None:
        share = nhwc(dy[block]) * (1 / (kH * kW))
        dpadded = np.zeros((len(share), H + 2 * pH, W + 2 * pW, C), dy.dtype)
        for dcorner in _corners(dpadded, k, stride):
            dcorner += share
        dx[block] = _inside(dpadded, padding)

    for_each_block(spread, N, dx[:1].nbytes)
    return nchw(dx)


def upsample_nearest2d(x: Array, scale: Size) -> tuple[Array, Any]:
    """Return ``x`` (N, C, H, W) with each pixel repeated: y (N, C, scale H, scale W).

    ``scale`` is one whole number or (height, width), at least 1; ValueError for others.
    """
    sH, sW = upsampling(scale)
    rows = nhwc(x)
    N, H, W, C = rows.shape
    y = np.empty((N, H, sH, W, sW, C), x.dtype)
    for_each_block(lambda block: np.copyto(y[block], rows[block, :, None, :, None]), N, y[:1].nbytes)
    return nchw(y.reshape(N, H * sH, W * sW, C)), (sH, sW)


def upsample_nearest2d_backward(dy: Array, cache: Any) -> Array:
    """Return dx: each pixel receives the sum over its copies."""
    sH, sW = cache
    rows = nhwc(dy)
    N, H, W, C = rows.shape
    copies = rows.reshape(N, H // sH, sH, W // sW, sW, C)
    dx = np.empty((N, H // sH, W // sW, C), dy.dtype)
    for_each_block(lambda block: np.sum(copies[block], axis=(2, 4), out=dx[block]), N, rows[:1].nbytes)
    return nchw(dx)


def global_avg_pool2d(x: Array) -> tuple[Array, Any]:
    """Return the mean over all positions: (N, C, H, W) -> (N, C)."""
    y: Array = nhwc(x).mean(axis=(1, 2))
    return y, x.shape


def global_avg_pool2d_backward(dy: Array, cache: Any) -> Array:
    """Give an equal share of dy (N, C) to all positions."""
    H, W = cache[2:]
    share = dy[:, None, None, :] * (1 / (H * W))
    return nchw(np.repeat(np.repeat(share, H, axis=1), W, axis=2))

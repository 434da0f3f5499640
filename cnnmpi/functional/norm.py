"""Normalisation, forward and backward: of each channel over the batch, and of groups of channels in each image.

Ioffe and Szegedy, "Batch Normalization", 2015; Wu and He, "Group Normalization", 2018.
"""

from typing import Any

import numpy as np

from cnnmpi.functional.blocks import (
    Array,
    column_sums,
    for_each_block,
    image_rows,
    nchw,
    nhwc,
    sum_over_blocks,
    wide_rows,
)
from cnnmpi.machine import one_blas_thread
from cnnmpi.sizes import check_groups


def _rows(x: Array) -> Array:
    """View (N, C) or (N, C, H, W) as wide_rows."""
    return wide_rows(np.ascontiguousarray(x) if x.ndim == 2 else nhwc(x), x.shape[1])


def _like(rows: Array, x: Array) -> Array:
    """Undo _rows."""
    if x.ndim == 2:
        return rows.reshape(x.shape)
    N, C, H, W = x.shape
    return nchw(rows.reshape(N, H, W, C))


def _channel_sums(rows: Array, channels: int) -> Array:
    """Sum each channel of _rows: (C,)."""
    return column_sums(column_sums(rows).reshape(-1, channels))


def batch_statistics(rows: Array, channels: int) -> tuple[Array, Array]:
    """Return the mean and the biased variance of each channel of _rows, both float64 (C,).

    Each block is centred on its own mean while it is in the cache, then the blocks' sums of squares are joined by
    the parallel formula of Chan, Golub and LeVeque (1979): one pass over memory, no cancellation.
    """
    repeats = rows.shape[1] // channels

    def centre(block: slice) -> tuple[int, Array, Array]:
        part = rows[block]
        size = len(part) * repeats
        rough = _channel_sums(part, channels) / part.dtype.type(size)
        centred = part - np.tile(rough, repeats)
        rest = _channel_sums(centred, channels).astype(np.float64) / size  # what float32 lost in the mean
        np.multiply(centred, centred, out=centred)
        return size, rough + rest, _channel_sums(centred, channels) - rest * rest * size

    blocks = for_each_block(centre, len(rows), 2 * rows.strides[0])
    count = rows.size // channels
    mean, squares = np.zeros(channels), np.zeros(channels)
    for size, block_mean, _ in blocks:
        mean += size / count * block_mean
    for size, block_mean, block_squares in blocks:
        squares += block_squares + size * (block_mean - mean) ** 2
    return mean, np.maximum(squares, 0) / count


@one_blas_thread()
def batch_norm(
    x: Array,
    gamma: Array,
    beta: Array,
    *,
    running_mean: Array,
    running_var: Array,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
) -> tuple[Array, Any]:
    """Return y = gamma (x - mean) / sqrt(var + eps) + beta for each channel of (N, C) or (N, C, H, W).

    With ``relu``, return max(y, 0): while a block is in the cache anyway, instead of by a pass over memory of its own.

    In training, mean and (biased) variance are those of ``x`` (a shard, in the trainer), and the running ones move in
    place towards them (the variance as unbiased estimate) by the share ``momentum``; otherwise the running ones are
    used. ``gamma``, ``beta`` and the running statistics are (C,). Raises ValueError in training where a channel has one
    value only.
    """
    rows, channels = _rows(x), x.shape[1]
    count = rows.size // channels
    if training:
        if count < 2:
            raise ValueError(f"batch normalisation in training needs more than one value per channel, got {x.shape}")
        mean, var = batch_statistics(rows, channels)
        running_mean += (momentum * (mean - running_mean)).astype(x.dtype)
        running_var += (momentum * (var * (count / (count - 1)) - running_var)).astype(x.dtype)
    else:
        mean, var = running_mean.astype(np.float64), running_var.astype(np.float64)
    inv_std = 1 / np.sqrt(var + eps)
    repeats = rows.shape[1] // channels
    centre = np.tile(mean.astype(x.dtype), repeats)
    scale = np.tile((gamma * inv_std).astype(x.dtype), repeats)
    shift, zero = np.tile(beta, repeats), np.zeros(rows.shape[1], x.dtype)
    y = np.empty_like(rows)

    def normalise(block: slice) -> None:
        part = y[block]
        np.subtract(rows[block], centre, out=part)
        part *= scale
        part += shift
        if relu:
            np.maximum(part, zero, out=part)

    for_each_block(normalise, len(rows), 2 * rows.strides[0])
    return _like(y, x), (x, y if relu else None, centre, inv_std, gamma, training)


@one_blas_thread()
def batch_norm_backward(dy: Array, cache: Any) -> tuple[Array, Array, Array]:
    """Return (dx, dgamma, dbeta).

    With xhat = (x - mean) / std over M samples per channel: dbeta = sum dy, dgamma = sum dy xhat, and in training
    dx = gamma / std * (dy - dbeta / M - xhat dgamma / M); with fixed statistics dx = gamma / std * dy. After a ReLU,
    dy counts only where y > 0.
    """
    x, y, centre, inv_std, gamma, training = cache
    rows, drows, channels = _rows(x), _rows(dy), x.shape[1]
    repeats = rows.shape[1] // channels
    count = max(len(rows) * repeats, 1)
    dx = np.empty_like(rows)
    counted = drows if y is None else dx  # the latter holds what counts of dy until the gradient takes its place

    def sums(block: slice) -> Array:
        if y is not None:
            np.multiply(drows[block], y[block] > 0, out=counted[block])
        centred = rows[block] - centre
        centred *= counted[block]
        return np.stack([_channel_sums(counted[block], channels), _channel_sums(centred, channels)]).astype(np.float64)

    dbeta, dgamma = sum_over_blocks(sums, len(rows), 3 * rows.strides[0])
    dgamma = dgamma * inv_std
    scale = np.tile((gamma * inv_std).astype(x.dtype), repeats)
    shift = np.tile((dbeta / count).astype(x.dtype), repeats)
    slope = np.tile((inv_std * dgamma / -count).astype(x.dtype), repeats)

    def gradient(block: slice) -> None:
        part = dx[block]
        if training:
            centred = rows[block] - centre
            centred *= slope
            np.add(centred, counted[block], out=part)
            part -= shift
            part *= scale
        else:
            np.multiply(counted[block], scale, out=part)

    for_each_block(gradient, len(rows), 3 * rows.strides[0])
    return _like(dx, x), dgamma.astype(x.dtype), dbeta.astype(x.dtype)


@one_blas_thread()
def group_norm(x: Array, gamma: Array, beta: Array, *, num_groups: int, eps: float = 1e-5) -> tuple[Array, Any]:
    """Return y = gamma (x - mean) / sqrt(var + eps) + beta for (N, C) or (N, C, H, W).

    Mean and (biased) variance are those of each of ``num_groups`` groups of neighbouring channels of each image, over
    all positions: no image depends on another. ``gamma`` and ``beta`` are (C,). Raises ValueError unless C is a
    multiple of ``num_groups``.
    """
    N, C = x.shape[:2]
    check_groups("group_norm", num_groups, C)
    rows = image_rows(x)
    y = np.empty_like(rows)
    count = x[:1].size // num_groups  # of values that share their statistics; 0 for no images
    centre, rest, inv_std = np.empty((N, num_groups), x.dtype), np.empty((N, num_groups)), np.empty((N, num_groups))

    def normalise(block: slice) -> None:
        centre[block] = _group_sums(_image_sums(rows[block], C), num_groups) / count
        centred = rows[block] - _spread(_each_channel(centre[block], C), rows)
        rest[block] = _group_sums(_image_sums(centred, C), num_groups) / count  # what float32 lost in the mean
        squares = _group_sums(_image_sums(centred * centred, C), num_groups) / count
        inv_std[block] = 1 / np.sqrt(np.maximum(squares - rest[block] ** 2, 0) + eps)
        scale = gamma * _each_channel(inv_std[block], C)
        np.multiply(centred, _spread(scale, rows), out=y[block])
        y[block] += _spread(beta - scale * _each_channel(rest[block], C), rows)

    for_each_block(normalise, N, 4 * rows[:1].nbytes)
    return _like(y, x), (x, centre, rest, inv_std, gamma)


@one_blas_thread()
def group_norm_backward(dy: Array, cache: Any) -> tuple[Array, Array, Array]:
    """Return (dx, dgamma, dbeta).

    With xhat = (x - mean) / std: dbeta = sum dy and dgamma = sum dy xhat over images and positions; and, with the means
    over a group of an image, dx = (gamma dy - mean(gamma dy) - xhat mean(gamma dy xhat)) / std.
    """
    x, centre, rest, inv_std, gamma = cache
    rows, drows, C, num_groups = image_rows(x), image_rows(dy), x.shape[1], centre.shape[1]
    count = x[:1].size // num_groups
    dx = np.empty_like(rows)

    def gradient(block: slice) -> Array:
        part, each_inv_std = dx[block], _each_channel(inv_std[block], C)
        centred = rows[block] - _spread(_each_channel(centre[block], C), rows)
        sums = _image_sums(drows[block], C).astype(np.float64)
        products = _image_sums(np.multiply(centred, drows[block], out=part), C)
        products = (products - _each_channel(rest[block], C) * sums) * each_inv_std  # of dy and xhat
        mean = _group_sums(gamma * sums, num_groups) / count
        slope = inv_std[block] ** 2 * _group_sums(gamma * products, num_groups) / count
        np.multiply(drows[block], _spread(gamma * each_inv_std, rows), out=part)
        centred *= _spread(_each_channel(slope, C), rows)
        part -= centred
        shift = slope * rest[block] - inv_std[block] * mean
        part += _spread(_each_channel(shift, C), rows)
        return np.stack([sums.sum(axis=0), products.sum(axis=0)])

    dbeta, dgamma = sum_over_blocks(gradient, len(x), 4 * rows[:1].nbytes)
    return _like(dx, x), dgamma.astype(x.dtype), dbeta.astype(x.dtype)


def _image_sums(rows: Array, channels: int) -> Array:
    """Sum each channel of each image of image_rows: (n, C)."""
    sums = np.ones(rows.shape[1], rows.dtype) @ rows  # (n, positions * C), as a matrix product: see column_sums
    sums = sums.reshape(len(rows), sums.shape[1] // channels, channels)
    total: Array = np.ones(sums.shape[1], rows.dtype) @ sums
    return total


def _group_sums(sums: Array, groups: int) -> Array:
    """Sum (n, C) over the channels of each group, in float64: (n, groups)."""
    total: Array = sums.reshape(len(sums), groups, sums.shape[1] // groups).sum(axis=2, dtype=np.float64)
    return total


def _each_channel(values: Array, channels: int) -> Array:
    """Repeat values of groups (n, groups) for each of their channels: (n, C)."""
    return np.repeat(values, channels // values.shape[1], axis=1)


def _spread(values: Array, rows: Array) -> Array:
    """Repeat values of channels (n, C) along image_rows, in their dtype: (n, 1, positions * C)."""
    return np.tile(values.astype(rows.dtype), rows.shape[2] // values.shape[1])[:, None]

"""Batch normalisation, alone or with ReLU, forward and backward (Ioffe and Szegedy, "Batch Normalization", 2015)."""

from typing import Any

import numpy as np

from cnnmpi.functional.blocks import Array, column_sums, for_each_block, nchw, nhwc, sum_over_blocks, wide_rows
from cnnmpi.machine import one_blas_thread


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

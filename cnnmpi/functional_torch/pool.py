"""Pooling and upsampling by torch's own kernels."""

from typing import Any

import torch
from torch import Tensor

from cnnmpi.functional_torch.arrays import channels_last
from cnnmpi.sizes import Size, pair, pool_size, upsampling

aten = torch.ops.aten


def _pool_options(x: Tensor, k: Size, stride: Size | None, padding: Size) -> tuple[tuple[int, int], ...]:
    """Return kernel size, stride and padding as pairs. Raises ValueError for what does not fit."""
    stride = k if stride is None else stride
    pool_size(x.shape[2:], k, stride, padding)
    return pair(k), pair(stride), pair(padding)


def max_pool2d(x: Tensor, k: Size, *, stride: Size | None = None, padding: Size = 0) -> tuple[Tensor, Any]:
    """Return the maximum of each window of ``x`` (N, C, H, W): y (N, C, Ho, Wo). ``stride`` is ``k`` unless given."""
    options = _pool_options(x, k, stride, padding)
    x = channels_last(x)
    y, where = aten.max_pool2d_with_indices(x, *options)
    return y, (x, options, where)


def max_pool2d_backward(dy: Tensor, cache: Any) -> Tensor:
    """Give each dy to the place of its window's maximum; to the first of several equal ones."""
    x, options, where = cache
    dx: Tensor = aten.max_pool2d_with_indices_backward(channels_last(dy), x, *options, (1, 1), False, where)
    return dx


def avg_pool2d(x: Tensor, k: Size, *, stride: Size | None = None, padding: Size = 0) -> tuple[Tensor, Any]:
    """Return the mean of each window of ``x`` (N, C, H, W), padding counted as zeros."""
    options = _pool_options(x, k, stride, padding)
    x = channels_last(x)
    return aten.avg_pool2d(x, *options), (x, options)


def avg_pool2d_backward(dy: Tensor, cache: Any) -> Tensor:
    """Give an equal share of each dy to all places of its window."""
    x, options = cache
    dx: Tensor = aten.avg_pool2d_backward(channels_last(dy), x, *options, False, True, None)
    return dx


def upsample_nearest2d(x: Tensor, scale: Size) -> tuple[Tensor, Any]:
    """Return ``x`` (N, C, H, W) with each pixel repeated: y (N, C, scale H, scale W)."""
    sH, sW = upsampling(scale)
    size = [x.shape[2] * sH, x.shape[3] * sW]
    return channels_last(aten.upsample_nearest2d(channels_last(x), size)), (size, list(x.shape))


def upsample_nearest2d_backward(dy: Tensor, cache: Any) -> Tensor:
    """Return dx: each pixel receives the sum over its copies."""
    return channels_last(aten.upsample_nearest2d_backward(channels_last(dy), *cache))


def global_avg_pool2d(x: Tensor) -> tuple[Tensor, Any]:
    """Return the mean over all positions: (N, C, H, W) -> (N, C)."""
    return channels_last(x).mean((2, 3)), x.shape


def global_avg_pool2d_backward(dy: Tensor, cache: Any) -> Tensor:
    """Give an equal share of dy (N, C) to all positions."""
    N, C, H, W = cache
    return channels_last((dy / (H * W))[:, :, None, None].expand(N, C, H, W))

"""Normalisation by torch's own kernels."""

import math
from typing import Any

import torch
from torch import Tensor

from cnnmpi.functional_torch.activation import relu_backward
from cnnmpi.functional_torch.arrays import channels_last
from cnnmpi.sizes import check_groups

aten = torch.ops.aten


def batch_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
) -> tuple[Tensor, Any]:
    """Return y = gamma (x - mean) / sqrt(var + eps) + beta for each channel of (N, C) or (N, C, H, W), or max(y, 0).

    Options, running statistics and errors are those of ``cnnmpi.functional.batch_norm``.
    """
    if training and x[:, 0].numel() < 2:
        shape = tuple(x.shape)
        raise ValueError(f"batch normalisation in training needs more than one value per channel, got {shape}")
    x = channels_last(x)
    y, mean, inv_std = aten.native_batch_norm(x, gamma, beta, running_mean, running_var, training, momentum, eps)
    if relu:
        torch.relu_(y)  # backward needs x and the sign of y
    return y, (y if relu else None, (x, gamma, running_mean, running_var, mean, inv_std, training, eps))


def batch_norm_backward(dy: Tensor, cache: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dgamma, dbeta)."""
    y, saved = cache
    dy = channels_last(dy) if y is None else relu_backward(dy, y)
    dx, dgamma, dbeta = aten.native_batch_norm_backward(dy, *saved, (True, True, True))
    return dx, dgamma, dbeta


def group_norm(x: Tensor, gamma: Tensor, beta: Tensor, *, num_groups: int, eps: float = 1e-5) -> tuple[Tensor, Any]:
    """Return y = gamma (x - mean) / sqrt(var + eps) + beta for groups of channels of (N, C) or (N, C, H, W).

    Options and errors are those of ``cnnmpi.functional.group_norm``.
    """
    N, C = x.shape[:2]
    check_groups("group_norm", num_groups, C)
    x, sizes = channels_last(x), (N, C, math.prod(x.shape[2:]), num_groups)
    y, mean, inv_std = aten.native_group_norm(x, gamma, beta, *sizes, eps)
    return channels_last(y), (x, mean, inv_std, gamma, *sizes)


def group_norm_backward(dy: Tensor, cache: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dx, dgamma, dbeta)."""
    dx, dgamma, dbeta = aten.native_group_norm_backward(channels_last(dy), *cache, (True, True, True))
    return channels_last(dx), dgamma, dbeta

"""Convolution and the linear layer, by torch's own kernels, forward and backward."""

from typing import Any

import torch
from torch import Tensor

from cnnmpi.functional_torch.arrays import channels_last
from cnnmpi.sizes import Size, conv_size, conv_transpose_size, pair, whole

aten = torch.ops.aten


def conv2d(
    x: Tensor,
    W: Tensor,
    b: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    filters: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Any]:
    """Cross-correlate ``x`` (N, C, H, W) with the filters ``W`` (O, C / groups, kH, kW), add ``b`` (O,).

    Returns y (N, O, Ho, Wo). ``filters`` stays as it is: torch's kernels take W itself.
    """
    groups = whole("groups", groups)
    conv_size(x.shape, W.shape, stride, padding, dilation, groups)
    x, W = channels_last(x), channels_last(W)
    options = pair(stride), pair(padding), pair(dilation), False, (0, 0), groups
    return channels_last(torch.convolution(x, W, b, *options)), (x, W, b, options)


def conv_transpose2d(
    x: Tensor,
    W: Tensor,
    b: Tensor | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> tuple[Tensor, Any]:
    """Spread ``x`` (N, C, H, W) by the filters ``W`` (C, O / groups, kH, kW), add ``b`` (O,): y (N, O, Ho, Wo).

    This is the transpose of conv2d (see ``cnnmpi.functional.conv_transpose2d``).
    """
    groups = whole("groups", groups)
    conv_transpose_size(x.shape, W.shape, stride, padding, output_padding, dilation, groups)
    x, W = channels_last(x), channels_last(W)
    options = pair(stride), pair(padding), pair(dilation), True, pair(output_padding), groups
    return channels_last(torch.convolution(x, W, b, *options)), (x, W, b, options)


def conv2d_backward(
    dy: Tensor, cache: Any, *, input_grad: bool = True, weight_grad: bool = True
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx, dW, db) for ``dy`` (N, O, Ho, Wo).

    dx is None unless ``input_grad``, dW and db unless ``weight_grad``; db without a bias, too.
    """
    x, W, b, options = cache
    wanted = (input_grad, weight_grad, weight_grad and b is not None)
    dx, dW, db = aten.convolution_backward(channels_last(dy), x, W, [dy.shape[1]], *options, wanted)
    return dx, dW, db


conv_transpose2d_backward = conv2d_backward


def linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> tuple[Tensor, Any]:
    """Return y = x W' + b for ``x`` (N, in), ``W`` (out, in), ``b`` (out,)."""
    return torch.nn.functional.linear(x, W, b), (x, W, b is not None)


def linear_backward(
    dy: Tensor, cache: Any, *, input_grad: bool = True, weight_grad: bool = True
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx, dW, db) = (dy W, dy' x, sum of dy over the batch); None for what is not wanted."""
    x, W, has_bias = cache
    dx = dy @ W if input_grad else None
    dW = dy.T @ x if weight_grad else None
    return dx, dW, dy.sum(0) if has_bias and weight_grad else None

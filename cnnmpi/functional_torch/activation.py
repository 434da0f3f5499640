"""Activations, and what joins, cuts and reshapes, by torch's own kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cnnmpi.common.arguments import check_choice, check_split, joined_shape
from cnnmpi.functional_torch.arrays import channels_last

aten = torch.ops.aten


def add(x: Tensor, y: Tensor) -> Tensor:
    """Return x + y. Raises ValueError unless the shapes are equal."""
    if x.shape != y.shape:
        raise ValueError(f"add: expected two arrays of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    return x + y


def concat(arrays: Sequence[Tensor]) -> Tensor:
    """Return ``arrays`` (N, C_i, ...) side by side along the channels: (N, sum of C_i, ...).

    Raises ValueError where they differ in more than their channels, and for none.
    """
    joined_shape("concat", [tuple(a.shape) for a in arrays])
    return channels_last(torch.cat(list(arrays), 1))


def split(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Cut ``x`` (N, C, ...) along the channels into tensors (N, size, ...), one for each of ``sizes``."""
    check_split("split", x.shape[1], sizes)
    return [channels_last(part) for part in aten.split_with_sizes(x, sizes, 1)]


def relu(x: Tensor) -> tuple[Tensor, Any]:
    """Return max(x, 0), element by element."""
    y = torch.relu(channels_last(x))
    return y, y


def relu_backward(dy: Tensor, cache: Any) -> Tensor:
    """Return dy where the output was positive, else 0."""
    dx: Tensor = aten.threshold_backward(channels_last(dy), cache, 0)
    return dx


def leaky_relu(x: Tensor, *, negative_slope: float = 0.01) -> tuple[Tensor, Any]:
    """Return x where it is positive, else ``negative_slope`` x, element by element."""
    x = channels_last(x)
    return torch.nn.functional.leaky_relu(x, negative_slope), (x, negative_slope)


def leaky_relu_backward(dy: Tensor, cache: Any) -> Tensor:
    """Return dy where x was positive, else ``negative_slope`` dy."""
    dx: Tensor = aten.leaky_relu_backward(channels_last(dy), *cache, False)
    return dx


def sigmoid(x: Tensor) -> tuple[Tensor, Any]:
    """Return 1 / (1 + exp(-x)), element by element."""
    y = torch.sigmoid(channels_last(x))
    return y, y


def sigmoid_backward(dy: Tensor, cache: Any) -> Tensor:
    """Return dx = dy y (1 - y)."""
    dx: Tensor = aten.sigmoid_backward(channels_last(dy), cache)
    return dx


def tanh(x: Tensor) -> tuple[Tensor, Any]:
    """Return (exp(x) - exp(-x)) / (exp(x) + exp(-x)), element by element."""
    y = torch.tanh(channels_last(x))
    return y, y


def tanh_backward(dy: Tensor, cache: Any) -> Tensor:
    """Return dx = dy (1 - y^2)."""
    dx: Tensor = aten.tanh_backward(channels_last(dy), cache)
    return dx


def silu(x: Tensor) -> tuple[Tensor, Any]:
    """Return x sigmoid(x), element by element."""
    x = channels_last(x)
    return torch.nn.functional.silu(x), x


def silu_backward(dy: Tensor, cache: Any) -> Tensor:
    """Return dx = dy s (1 + x (1 - s)) with s = sigmoid(x)."""
    dx: Tensor = aten.silu_backward(channels_last(dy), cache)
    return dx


def gelu(x: Tensor, *, approximate: str = "none") -> tuple[Tensor, Any]:
    """Return x Phi(x), element by element, with Phi the standard normal distribution or its approximation by tanh."""
    check_choice("gelu", "approximate", approximate, "none", "tanh")
    x = channels_last(x)
    return torch.nn.functional.gelu(x, approximate=approximate), (x, approximate)


def gelu_backward(dy: Tensor, cache: Any) -> Tensor:
    """Return dx = dy (Phi(x) + x phi(x)), where phi is the derivative of Phi."""
    x, approximate = cache
    dx: Tensor = aten.gelu_backward(channels_last(dy), x, approximate=approximate)
    return dx


def dropout(x: Tensor, keep: Tensor, *, p: float) -> tuple[Tensor, Any]:
    """Return x where ``keep`` (bool, of its shape) is true, scaled by 1 / (1 - p), and 0 elsewhere."""
    mask = keep.to(x.dtype) * (1 / (1 - p) if p < 1 else 0)
    return x * mask, mask


def dropout_backward(dy: Tensor, cache: Any) -> Tensor:
    """Return dy, masked and scaled as the forward pass was."""
    dx: Tensor = dy * cache
    return dx


def flatten(x: Tensor) -> tuple[Tensor, Any]:
    """Return (N, ...) as (N, features); features in the order (C, H, W)."""
    return x.flatten(1), x.shape


def flatten_backward(dy: Tensor, cache: Any) -> Tensor:
    """Return dy in the shape that went in."""
    return channels_last(dy.reshape(cache))


def softmax(x: Tensor) -> Tensor:
    """Return exp(x) / sum exp(x) along the last axis."""
    return torch.softmax(x, -1)


def softmax_backward(dy: Tensor, y: Tensor) -> Tensor:
    """Return dx = y (dy - sum dy y) for y = softmax(x)."""
    dx: Tensor = aten._softmax_backward_data(dy, y, -1, y.dtype)
    return dx

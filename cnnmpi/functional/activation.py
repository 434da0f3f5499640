"""Sums, ReLU, dropout, softmax and flattening, forward and backward."""

from typing import Any

import numpy as np

from cnnmpi.functional.blocks import Array, for_each_block, nchw, nhwc


def add(x: Array, y: Array) -> Array:
    """Return x + y, where two paths meet; the sum's gradient is that of both. Raises ValueError for unequal shapes."""
    if x.shape != y.shape:
        raise ValueError(f"add: expected two arrays of one shape, got {x.shape} and {y.shape}")
    total = np.empty_like(x, dtype=np.result_type(x, y))
    for_each_block(lambda block: np.add(x[block], y[block], out=total[block]), len(x), 3 * x[:1].nbytes)
    return total


def relu(x: Array) -> tuple[Array, Any]:
    """Return max(x, 0), element by element."""
    x = nhwc(x) if x.ndim == 4 else x
    y = np.empty_like(x)
    zero = np.zeros(x.shape[1:], x.dtype)  # a whole image: NumPy's maximum with one number takes 3 times as long
    for_each_block(lambda block: np.maximum(x[block], zero, out=y[block]), len(x), 2 * x[:1].nbytes)
    y = nchw(y) if y.ndim == 4 else y
    return y, y


def relu_backward(dy: Array, cache: Any) -> Array:
    """Return dy where the output was positive, else 0 (also at the kink, as torch does)."""
    y: Array = cache
    dx = np.empty_like(y)
    for_each_block(lambda block: np.multiply(dy[block], y[block] > 0, out=dx[block]), len(y), 3 * y[:1].nbytes)
    return dx


def dropout(x: Array, keep: Array, *, p: float) -> tuple[Array, Any]:
    """Return x where ``keep`` is true, scaled by 1 / (1 - p) so that its expectation stays, and 0 elsewhere.

    (Srivastava et al., "Dropout", 2014.) ``keep`` is bool, of the shape of ``x``.
    """
    mask = keep * x.dtype.type(1 / (1 - p) if p < 1 else 0)
    return x * mask, mask


def dropout_backward(dy: Array, cache: Any) -> Array:
    """Return dy, masked and scaled as the forward pass was."""
    dx: Array = dy * cache
    return dx


def flatten(x: Array) -> tuple[Array, Any]:
    """Return (N, ...) as (N, features); features in the order (C, H, W), as torch.nn.Flatten gives them."""
    return x.reshape(len(x), -1), x.shape


def flatten_backward(dy: Array, cache: Any) -> Array:
    """Return dy in the shape that went in."""
    dx = dy.reshape(cache)
    return nchw(nhwc(dx)) if dx.ndim == 4 else dx


def softmax(x: Array) -> Array:
    """Return exp(x) / sum exp(x) along the last axis; each row is shifted by its own maximum, so none overflows.

    -inf has the probability 0. A row of nothing else, or with inf or NaN, has none: NaN, as in torch.
    """
    with np.errstate(invalid="ignore"):  # inf - inf
        e = np.exp(x - x.max(axis=-1, keepdims=True))
    probabilities: Array = e / e.sum(axis=-1, keepdims=True)
    return probabilities


def softmax_backward(dy: Array, y: Array) -> Array:
    """Return dx = y (dy - sum dy y) for y = softmax(x)."""
    dx: Array = y * (dy - (dy * y).sum(axis=-1, keepdims=True))
    return dx

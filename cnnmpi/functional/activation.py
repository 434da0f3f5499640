"""Sums, ReLU, dropout, softmax, flattening and the cross-entropy loss, forward and backward."""

import math
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


def cross_entropy_loss(
    logits: Array, targets: Array, *, label_smoothing: float = 0.0, reduction: str = "mean"
) -> tuple[float, Array]:
    """Return the cross-entropy of ``logits`` (N, K) against the classes ``targets`` (N,) and its gradient (N, K).

    loss = logsumexp(z) - sum_k q_k z_k for each sample, with q = 1 - e + e / K at the target and e / K elsewhere, for
    e = ``label_smoothing`` (Szegedy et al., "Rethinking the Inception architecture", 2016); dlogits = softmax(z) - q.
    A logit of -inf rules its class out. ``reduction`` is "mean" over the samples or "sum". Raises ValueError unless the
    logits are float32 or float64 and the targets whole numbers, of any dtype, in 0..K-1.
    """
    logits, targets = np.asarray(logits), np.asarray(targets)
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or targets.dtype.kind not in "iu":
        raise ValueError(
            f"cross_entropy_loss: expected logits (N, K) and integer targets (N,), "
            f"got {logits.shape} and {targets.dtype} {targets.shape}"
        )
    if logits.dtype.char not in "fd":
        raise ValueError(f"cross_entropy_loss: expected logits of float32 or float64, got {logits.dtype}")
    N, K = logits.shape
    if N == 0:
        raise ValueError("cross_entropy_loss: an empty batch has no loss")
    if targets.min() < 0 or targets.max() >= K:
        raise ValueError(f"cross_entropy_loss: targets must lie in 0..{K - 1}, got {targets.min()}..{targets.max()}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy_loss: label_smoothing must lie in 0..1, got {label_smoothing}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"cross_entropy_loss: reduction must be 'mean' or 'sum', got {reduction!r}")
    at_targets = np.arange(N), targets
    q = np.full((N, K), label_smoothing / K, logits.dtype)
    q[at_targets] += 1 - label_smoothing
    with np.errstate(invalid="ignore"):  # inf - inf, which is NaN
        shifted = logits - logits.max(axis=1, keepdims=True)
    e = np.exp(shifted)
    total = e.sum(axis=1, keepdims=True)
    # without smoothing the other terms are 0, also where the logit is -inf: 0 * -inf would be NaN
    weighted = (q * shifted).sum(axis=1) if label_smoothing else shifted[at_targets]
    losses = np.log(total[:, 0]) - weighted
    dlogits = e / total - q
    loss = math.fsum(losses.tolist())
    if reduction == "mean":
        loss /= N
        dlogits /= N
    return loss, dlogits

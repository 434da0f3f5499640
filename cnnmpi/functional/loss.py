"""Losses: ``loss(logits, targets, *, reduction="mean") -> (loss, dlogits)``, a number and its gradient by the logits.

``reduction`` is "mean" over the samples of the batch or "sum", which the trainer uses: sums of shards add up. What one
sample loses is computed in the logits' dtype, float32 or float64; samples are added up in float64, exactly rounded,
so that their order does not matter.
"""

import math
from typing import Any

import numpy as np

from cnnmpi.common.arguments import check_loss, check_range, check_smoothing, check_weights, mean_divisor
from cnnmpi.functional.blocks import Array


def cross_entropy_loss(
    logits: Array, targets: Array, *, weight: Any = None, label_smoothing: float = 0.0, reduction: str = "mean"
) -> tuple[float, Array]:
    """Return the cross-entropy of ``logits`` (N, K) against ``targets`` and its gradient (N, K).

    ``targets`` are classes, integers (N,) of any dtype in 0..K-1, or the classes' probabilities, floats (N, K), finite
    and not negative. ``weight`` (K,) weighs the classes. For each sample, with q the probabilities (1 at the class, 0
    elsewhere) and e = ``label_smoothing``: q' = (1 - e) q + e / K (Szegedy et al., "Rethinking the Inception
    architecture", 2016), loss = sum_k w_k q'_k (logsumexp(z) - z_k), dlogits = softmax(z) sum_k w_k q'_k - w q'.
    A logit of -inf rules its class out; where q' or w is 0, it costs nothing.

    The mean divides by N or, of classes with weights, by the sum of the weights of the targets, as torch's does. Raises
    ValueError for other shapes, dtypes or values, and for an empty batch.
    """
    op = "cross_entropy_loss"
    logits, targets = np.asarray(logits), np.asarray(targets)
    is_classes = check_loss(op, logits, targets, reduction, classes=True)
    check_smoothing(op, label_smoothing)
    N, K = logits.shape
    mass: Any = 1  # sum_k w_k q'_k
    divisor: float = N
    if is_classes:
        check_range(op, "targets", targets, 0, K - 1)
        q = np.full((N, K), label_smoothing / K, logits.dtype)
        q[np.arange(N), targets] += 1 - label_smoothing
    else:
        check_range(op, "target probabilities", targets, least=0)
        q = targets.astype(logits.dtype) * (1 - label_smoothing) + label_smoothing / K
    if weight is not None:
        weight = np.asarray(weight, logits.dtype)
        check_weights(op, "weight", weight, K)
        q *= weight
        if is_classes and reduction == "mean":
            divisor = mean_divisor(op, math.fsum(weight[targets].tolist()))
    if weight is not None or not is_classes:
        mass = q.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # inf - inf, which is NaN
        shifted = logits - logits.max(axis=1, keepdims=True)
    e = np.exp(shifted)
    total = e.sum(axis=1, keepdims=True)
    losses = (mass * np.log(total))[:, 0] - _times(q, shifted).sum(axis=1)
    return _reduced(losses, mass * (e / total) - q, divisor, reduction)


def binary_cross_entropy_loss(
    logits: Array, targets: Array, *, pos_weight: Any = None, reduction: str = "mean"
) -> tuple[float, Array]:
    """Return the binary cross-entropy of ``logits`` (N, K), for K labels that an image may have, and its gradient.

    ``targets`` are floats (N, K) in 0..1, 1 where an image has the label. ``pos_weight`` (K,) weighs what has it. For
    each sample the loss is the mean over its labels of p y softplus(-z) + (1 - y) softplus(z), which is
    -p y log(sigmoid(z)) - (1 - y) log(1 - sigmoid(z)) without overflow; dlogits = ((p y + 1 - y) sigmoid(z) - p y) / K.
    "mean" is torch.nn.BCEWithLogitsLoss. Raises ValueError for other shapes, dtypes or values, and for an empty batch.
    """
    op = "binary_cross_entropy_loss"
    logits, targets = np.asarray(logits), np.asarray(targets)
    check_loss(op, logits, targets, reduction)
    check_range(op, "targets", targets, 0, 1)
    N, K = logits.shape
    positive = targets.astype(logits.dtype)
    negative = 1 - positive
    if pos_weight is not None:
        pos_weight = np.asarray(pos_weight, logits.dtype)
        check_weights(op, "pos_weight", pos_weight, K)
        positive = positive * pos_weight
    e = np.exp(-np.abs(logits))
    rest = np.log1p(e)
    losses = _times(positive, np.maximum(-logits, 0) + rest) + _times(negative, np.maximum(logits, 0) + rest)
    sigmoid = np.where(logits >= 0, 1, e) / (1 + e)
    dlogits = ((positive + negative) * sigmoid - positive) / K
    return _reduced(losses.mean(axis=1, dtype=np.float64), dlogits, N, reduction)


def mse_loss(outputs: Array, targets: Array, *, reduction: str = "mean") -> tuple[float, Array]:
    """Return the squared error of ``outputs`` (N, K) against ``targets`` and its gradient (N, K).

    ``targets`` are finite floats (N, K). For each sample the loss is the mean over its K outputs of (z - y)^2;
    dlogits = 2 (z - y) / K. "mean" is torch.nn.MSELoss. Raises ValueError for other shapes, dtypes or values, and for
    an empty batch.
    """
    op = "mse_loss"
    outputs, targets = np.asarray(outputs), np.asarray(targets)
    check_loss(op, outputs, targets, reduction)
    check_range(op, "targets", targets)
    N, K = outputs.shape
    with np.errstate(over="ignore"):  # of a network that diverged: inf
        difference = outputs - targets.astype(outputs.dtype)
        losses = np.square(difference).mean(axis=1, dtype=np.float64)
        dlogits = difference * (2 / K)
    return _reduced(losses, dlogits, N, reduction)


def _times(a: Array, b: Array) -> Array:
    """Return a b, and 0 where a is, even if b is infinite: what has no weight has no loss."""
    return np.multiply(a, b, out=np.zeros_like(b), where=a != 0)


def _reduced(losses: Array, dlogits: Array, divisor: float, reduction: str) -> tuple[float, Array]:
    """Return the sum of the samples' ``losses`` with its gradient, both divided by ``divisor`` for "mean"."""
    try:
        loss = math.fsum(losses.tolist())
    except OverflowError:  # finite losses, but their sum is not
        loss = math.inf
    if reduction == "mean":
        loss /= divisor
        dlogits /= divisor
    return loss, dlogits

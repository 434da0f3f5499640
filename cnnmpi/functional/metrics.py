"""Metrics: ``metric(logits, targets) -> (sum, count)``, of NumPy arrays.

The metric of a data set is the sum of all sums over the sum of all counts, however it was cut into batches. A logit
that is NaN answers nothing: what rests on it counts as wrong.
"""

import numpy as np

from cnnmpi.common.arguments import check_range
from cnnmpi.functional.blocks import Array


def accuracy(logits: Array, targets: Array) -> tuple[int, int]:
    """Return how many of N samples have their largest logit at the target, and N.

    ``logits`` are (N, K), ``targets`` classes (N,) or probabilities (N, K), of which the likeliest class counts. The
    first of several equal ones is taken.
    """
    classes = _classes("accuracy", logits, targets)
    right = (logits.argmax(axis=1) == classes) & ~np.isnan(logits).any(axis=1)
    return int(right.sum()), len(logits)


def top5_accuracy(logits: Array, targets: Array) -> tuple[int, int]:
    """Return for how many of N samples fewer than 5 logits are greater than the target's, and N.

    ``logits`` are (N, K), ``targets`` classes (N,) or probabilities (N, K), of which the likeliest class counts.
    """
    classes = _classes("top5_accuracy", logits, targets)
    own = np.take_along_axis(logits, classes[:, None], axis=1)
    right = ((logits > own).sum(axis=1) < 5) & ~np.isnan(logits).any(axis=1)
    return int(right.sum()), len(logits)


def label_accuracy(logits: Array, targets: Array) -> tuple[int, int]:
    """Return how many of N K labels are told rightly, and N K.

    ``logits`` and ``targets`` are (N, K). A label is told from a logit of 0 on, a probability of 0.5, and is there from
    a target of 0.5 on.
    """
    if logits.ndim != 2 or logits.shape != targets.shape:
        raise ValueError(f"label_accuracy: expected logits and targets (N, K), got {logits.shape} and {targets.shape}")
    right = ((logits >= 0) == (targets >= 0.5)) & ~np.isnan(logits)
    return int(right.sum()), logits.size


def _classes(metric: str, logits: Array, targets: Array) -> Array:
    """Return the targets' classes, int64 (N,). Raises ValueError for shapes and classes that do not fit the logits."""
    kind = targets.dtype.kind
    if logits.ndim == 2 and targets.shape == logits.shape and logits.shape[1] and kind == "f":
        likeliest: Array = targets.argmax(axis=1)
        return likeliest
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or kind not in "iu":
        raise ValueError(
            f"{metric}: expected logits (N, K) and classes, integers (N,), or probabilities, floats (N, K), "
            f"got {logits.shape} and {targets.dtype} {targets.shape}"
        )
    if targets.size:
        check_range(metric, "targets", targets, 0, logits.shape[1] - 1)
    return targets.astype(np.int64)

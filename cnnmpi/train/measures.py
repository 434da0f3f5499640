"""What is measured of every batch: the loss and the metrics, as sums that add up over shards and ranks."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cnnmpi.common.arrays import Array
from cnnmpi.distributed import UserError

Loss = Callable[..., tuple[float, Any]]  # loss(logits, targets, reduction="sum") -> (loss, dlogits)
Metric = Callable[[Array, Array], tuple[float, float]]  # metric(logits, targets) -> (sum, count), of NumPy arrays


class Measures:
    """The loss and the ``metrics``, {name: function}, of a run.

    Of a batch, ``sums`` are float64: the loss and the number of images, then the sum and the count of each metric.
    What is reported is the one divided by the other, over a whole epoch or data set.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.metrics = dict(metrics)
        self.names = ("loss", *self.metrics)

    def __len__(self) -> int:
        return 2 * len(self.names)

    def sums(self, loss: float, logits: Array, targets: Array) -> Array:
        """Return the sums of a batch, given its summed ``loss``. Raises UserError for a metric that returns others."""
        pairs = [(loss, float(len(targets)))]
        for name, metric in self.metrics.items():
            result = metric(logits, targets)
            try:
                total, count = result
                pairs.append((float(total), float(count)))
            except (TypeError, ValueError):
                raise UserError(f"the metric {name} returned {result!r:.100}; expected (sum, count)") from None
        return np.array(pairs, np.float64).ravel()

    def means(self, sums: Sequence[float] | Array) -> dict[str, float]:
        """Return {name: sum / count}; NaN where nothing was counted."""
        pairs = np.reshape(sums, (-1, 2)).tolist()
        return {name: total / n if n else math.nan for name, (total, n) in zip(self.names, pairs, strict=True)}


def checked(name: str, loss: Loss) -> Loss:
    """Return a person's ``loss`` that raises UserError, naming it, where it returns what no loss does."""

    def checking(logits: Any, targets: Any, reduction: str = "sum") -> tuple[float, Any]:
        result = loss(logits, targets, reduction=reduction)
        try:
            value, dlogits = result
            value = float(value)
        except (TypeError, ValueError):
            raise UserError(f"the loss {name} returned a {type(result).__name__}; expected (loss, dlogits)") from None
        shape, dtype = tuple(getattr(dlogits, "shape", ())), getattr(dlogits, "dtype", type(dlogits).__name__)
        if shape != tuple(logits.shape) or dtype != logits.dtype:
            wanted = f"{logits.dtype} {tuple(logits.shape)}, as the logits"
            raise UserError(f"the loss {name} returned a gradient {dtype} {shape}; expected {wanted}")
        return value, dlogits

    return checking

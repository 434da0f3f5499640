"""What is measured of every batch: the loss and the metrics, as sums that add up over shards and ranks."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from cnnmpi.common.arrays import Array
from cnnmpi.data import Dataset
from cnnmpi.distributed import UserError
from cnnmpi.functional import accuracy, label_accuracy, top5_accuracy
from cnnmpi.train.code import LOSSES, Code
from cnnmpi.train.config import Config

Loss = Callable[..., tuple[float, Any]]  # loss(logits, targets, reduction="sum") -> (loss, dlogits)
Metric = Callable[[Array, Array], tuple[float, float]]  # metric(logits, targets) -> (sum, count), of NumPy arrays

MANY_CLASSES = 20  # from which on the share of images counts, too, whose class is among the five likeliest


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
            if not all(map(math.isfinite, pairs[-1])):  # a step must not be left out for what only looks on
                raise UserError(
                    f"the metric {name} returned {pairs[-1]}; expected finite numbers, (0, 0) where nothing counts"
                )
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


# -- which ones a run has ---------------------------------------------------------------------------------------------


def with_loss(config: Config, dataset: Dataset) -> Config:
    """Return ``config`` with a loss: that which the targets of ``dataset`` suggest, unless it has one.

    Raises UserError where the targets do not suit the loss.
    """
    labels, both = dataset.train_labels, (dataset.train_labels, dataset.test_labels)
    classes, smallest, largest = labels.ndim == 1, min(y.min() for y in both), max(y.max() for y in both)
    if classes or (smallest >= 0 and np.allclose(labels.sum(axis=1), 1, atol=1e-3)):
        usual = "cross_entropy"  # classes, or a probability for each
    else:
        usual = "binary_cross_entropy" if smallest >= 0 and largest <= 1 else "mse"
    loss = config.loss or usual
    if classes and loss in ("binary_cross_entropy", "mse"):
        raise UserError(f"--loss {loss} needs targets (N, K), and these data have a class for each image")
    if smallest < 0 and loss == "cross_entropy":
        raise UserError(f"--loss cross_entropy needs targets of at least 0, got {smallest:g}: --loss mse takes any")
    if not 0 <= smallest <= largest <= 1 and loss == "binary_cross_entropy":
        wrong = smallest if smallest < 0 else largest
        raise UserError(f"--loss binary_cross_entropy needs targets in 0..1, got {wrong:g}: --loss mse takes any")
    if config.sample == "balanced" and not classes:
        raise UserError("--sample balanced needs a class for each image, and these data have targets (N, K)")
    if config.balance and (not classes or loss != "cross_entropy"):
        raise UserError("--balance needs the loss cross_entropy, and data with a class for each image")
    return dataclasses.replace(
        config, loss=loss, label_smoothing=config.label_smoothing if loss == "cross_entropy" else 0.0
    )


def find_losses(config: Config, code: Code, F: ModuleType, weight: Array | None = None) -> tuple[Loss, Loss]:
    """Return the loss of training, and that of evaluation, on the engine ``F``. Raises UserError.

    Label smoothing and the classes' ``weight`` (K,) are of training only, so that test losses can be compared.
    """
    name = config.loss or "cross_entropy"
    found = code.find("loss", name)
    if name not in LOSSES or name in code.given:
        return checked(name, found), checked(name, found)
    ours = getattr(F, found.__name__)  # of this engine
    options: dict[str, Any] = {"label_smoothing": config.label_smoothing} if config.label_smoothing else {}
    if weight is not None:
        options["weight"] = weight
    return functools.partial(ours, **options), ours


def class_weights(labels: Array, classes: int) -> Array:
    """Return a weight for each class, float64 (classes,), with which all classes of ``labels`` (N,) count alike.

    It is N / (number of classes that occur) / (images of the class), after King and Zeng, "Logistic regression in rare
    events data", 2001: over the N images the mean weight is 1. A class without images has the weight 1.
    """
    counts = np.bincount(labels, minlength=classes)
    present = np.count_nonzero(counts)
    return np.where(counts > 0, len(labels) / (present * np.maximum(counts, 1)), 1.0)


def make_measures(config: Config, dataset: Dataset, own: Mapping[str, Metric] | None = None) -> Measures:
    """Return the loss and the metrics that suit the data, and a person's ``own``. Raises UserError."""
    for name, metric in (own or {}).items():
        if not callable(metric) or name in ("loss", "acc"):
            raise UserError(f"metrics: {name!r} must be another name than loss and acc, and a function")
    usual: dict[str, Metric] = {}
    if config.loss == "binary_cross_entropy":
        usual = {"acc": label_accuracy}
    elif dataset.train_labels.ndim == 1 or config.loss == "cross_entropy":
        usual = {"acc": accuracy}
        if len(dataset.classes) >= MANY_CLASSES:
            usual["top5"] = top5_accuracy
    return Measures({**usual, **(own or {})})

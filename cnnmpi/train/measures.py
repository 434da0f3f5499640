"""What is measured of every batch: the loss and the metrics, as sums that add up over shards and ranks."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cnnmpi.common.arrays import Array
from cnnmpi.data import DataLoader, Dataset
from cnnmpi.distributed import UserError
from cnnmpi.functional import accuracy, label_accuracy, top5_accuracy
from cnnmpi.models import Model
from cnnmpi.train.code import Code, explained
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

LOSSES = {"cross_entropy": "cross_entropy_loss", "binary_cross_entropy": "binary_cross_entropy_loss", "mse": "mse_loss"}


def with_loss(config: Config, dataset: Dataset) -> Config:
    """Return ``config`` with a loss: that which the targets of ``dataset`` suggest, unless it has one."""
    targets = dataset.train_labels
    if targets.ndim == 1 or (targets.min() >= 0 and np.allclose(targets.sum(axis=1), 1, atol=1e-3)):
        usual = "cross_entropy"  # classes, or a probability for each
    else:
        usual = "binary_cross_entropy" if targets.min() >= 0 and targets.max() <= 1 else "mse"
    loss = config.loss or usual
    if loss in LOSSES and (loss == "cross_entropy") < (targets.ndim == 1):
        raise UserError(f"--loss {loss} needs targets (N, K), and these data have a class for each image")
    if config.sample == "balanced" and targets.ndim == 2:
        raise UserError("--sample balanced needs a class for each image, and these data have targets (N, K)")
    if config.balance and (targets.ndim == 2 or loss != "cross_entropy"):
        raise UserError("--balance needs the loss cross_entropy, and data with a class for each image")
    return dataclasses.replace(
        config, loss=loss, label_smoothing=config.label_smoothing if loss == "cross_entropy" else 0.0
    )


def find_losses(
    config: Config, code: Code, weight: Array | None = None
) -> tuple[Callable[[Any], Loss], Callable[[Any], Loss]]:
    """Return what gives the loss of training, and that of evaluation, for an engine ``F``. Raises UserError.

    Label smoothing and the classes' ``weight`` (K,) are of training only, so that test losses can be compared.
    """
    name = config.loss or "cross_entropy"
    found = code.find("--loss", name, LOSSES, "FUNCTION")
    if found != LOSSES.get(name):
        return (lambda F: checked(name, found),) * 2
    options: dict[str, Any] = {"label_smoothing": config.label_smoothing} if config.label_smoothing else {}
    if weight is not None:
        options["weight"] = weight
    return lambda F: functools.partial(getattr(F, LOSSES[name]), **options), lambda F: getattr(F, LOSSES[name])


def check_mixing(config: Config, loader: DataLoader, loss: Loss, model: Model) -> None:
    """Raise UserError where labels become probabilities (N, K), and a person's ``loss`` does not take them."""
    mixing = [entry.text for entry in loader.after if entry.mixes]
    if mixing and config.loss not in LOSSES:
        logits, targets = np.zeros((2, loader.classes), np.float32), np.eye(2, loader.classes, dtype=np.float32)
        what = f"--augment {mixing[0]} makes labels probabilities (N, K), which --loss {config.loss} does not take"
        with explained(what):
            loss(model.as_array(logits), model.as_array(targets), reduction="sum")


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

"""Exact evaluation: sums over the whole set, the same for any number of ranks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cnnmpi.common.arrays import Array
from cnnmpi.data import Views, normalize, views
from cnnmpi.distributed import Ranks
from cnnmpi.functional import softmax
from cnnmpi.models import Model
from cnnmpi.train.measures import Loss, Measures, Metric
from cnnmpi.train.team import Team

BATCH = 125  # images evaluated at a time, at most; with what follows, a function of shapes only: so are the bits
BATCH_BYTES = 64 << 20  # of a batch's largest activation; a forward pass of a thread holds several of its size at once


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The mean loss and ``metrics``, {name: value}; and what became of each image, where it has one class.

    Then ``labels`` (N,) holds its class in 0..``classes``-1 and ``guesses`` (N,) the one that it was taken for;
    ``confidence`` and ``of_label`` (N,) are the probabilities that softmax gave to the guess and to the class. All are
    empty otherwise.
    """

    loss: float
    metrics: dict[str, float]
    labels: Array
    guesses: Array
    classes: int
    confidence: Array = field(default_factory=lambda: np.zeros(0))
    of_label: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def accuracy(self) -> float:
        """The share of images that were recognised, 0..1; NaN without labels."""
        return float(np.count_nonzero(self.labels == self.guesses) / len(self.labels)) if len(self.labels) else math.nan

    @property
    def score(self) -> float:
        """What makes an evaluation the best: its accuracy or, without one, a small loss."""
        return self.metrics.get("acc", -self.loss)

    @property
    def images(self) -> Array:
        """How many images each class has, (classes,)."""
        return np.bincount(self.labels, minlength=self.classes)

    @property
    def guessed(self) -> Array:
        """How many images were taken for each class, (classes,)."""
        return np.bincount(self.guesses, minlength=self.classes)

    @property
    def hits(self) -> Array:
        """How many images of each class were recognised, (classes,)."""
        return np.bincount(self.labels[self.labels == self.guesses], minlength=self.classes)

    @property
    def confusion(self) -> Array:
        """How many images of class [row] were taken for [column], (classes, classes); 8 bytes for each of these."""
        pairs = self.labels * self.classes + self.guesses
        return np.bincount(pairs, minlength=self.classes**2).reshape(self.classes, self.classes)


def evaluate(
    model: Model | Team,
    images: Array,
    targets: Array,
    *,
    classes: int,
    mean: Any,
    std: Any,
    loss: Loss | None = None,
    metrics: dict[str, Metric] | None = None,
    ranks: Ranks | None = None,
    stop: Callable[[], bool] = lambda: False,
    tta: Views = "none",
) -> Evaluation:
    """Evaluate a model on ``images`` (N, C, H, W), uint8 or floats in 0..1.

    ``targets`` are labels (N,) in 0..classes-1, or floats (N, classes) for a ``loss`` that takes them; the loss is the
    cross-entropy unless given. ``metrics`` are functions (logits, targets) -> (sum, count) of NumPy arrays. ``mean``
    and ``std`` (C,) normalise the pixels, as in training. The ranks, and the team's threads in each, share the work;
    the models keep their mode. ``stop`` is asked after each batch of a thread, and must answer alike on all ranks.
    Logits are means over the views of an image that ``tta`` names, see ``data.views``.

    Raises Stopped once it says so, and ValueError for images, targets and classes that do not fit.
    """
    targets = _checked(images, targets, classes)
    ranks, team = ranks or Ranks(), model if isinstance(model, Team) else Team([model])
    F, measures = team.models[0].F, Measures(metrics or {})
    loss = loss or F.cross_entropy_loss
    team.spread_buffers()
    guesses = np.zeros(len(targets) if targets.ndim == 1 else 0, np.int64)  # each rank fills in its own
    sureness = np.zeros((len(guesses), 2))  # as well: of the guess, and of the label

    def evaluate_batch(model: Model, start: int) -> list[float]:
        part = slice(start, start + size)
        logits = mean_logits(model, images[part], mean, std, tta)
        if tuple(logits.shape[1:]) != (classes,):
            raise ValueError(
                f"evaluate: the model gives outputs {tuple(logits.shape[1:])}, the targets are of {classes} classes"
            )
        y = targets[part].copy()  # whatever a person's loss or metric does with it
        summed, _ = loss(logits, model.as_array(y), reduction="sum")
        outputs = F.to_numpy(logits)
        if len(guesses):
            guesses[part] = outputs.argmax(axis=1)
            probabilities, rows = softmax(outputs), np.arange(len(y))
            sureness[part] = np.stack([probabilities[rows, guesses[part]], probabilities[rows, y]], axis=1)
        sums: list[float] = measures.sums(summed, outputs, y).tolist()
        return sums

    batches: list[list[float]] = []
    with team.evaluating():
        size = batch_size(team.models[0], images.shape[1:])
        together = max(ranks.gather(len(team.models))) * ranks.size * size  # all threads of all ranks take these
        for first in range(0, len(images), together):
            starts = range(first + ranks.rank * size, min(first + together, len(images)), ranks.size * size)
            batches += team.map(evaluate_batch, starts)
            if stop():
                raise Stopped
    for ours in (guesses, sureness):
        ranks.sum(ours)
    everybody = [sums for theirs in ranks.gather(batches) for sums in theirs]
    means = measures.means([math.fsum(column) for column in zip(*everybody, strict=True)])  # the same in any order
    labels = targets if len(guesses) else guesses
    return Evaluation(means.pop("loss"), means, labels, guesses, classes, sureness[:, 0], sureness[:, 1])


class Stopped(Exception):  # noqa: N818 - it is no error
    """The evaluation was given up because it was asked to stop."""


def mean_logits(model: Model, images: Array, mean: Any, std: Any, tta: Views = "none") -> Any:
    """Return the model's outputs (N, K) for ``images`` as ``evaluate`` takes them: means over the views of ``tta``."""
    outputs = [model.F.for_loss(model.forward(model.as_array(normalize(x, mean, std)))) for x in views(images, tta)]
    return sum(outputs[1:], start=outputs[0]) / len(outputs) if len(outputs) > 1 else outputs[0]


def batch_size(model: Model, image_shape: Sequence[int]) -> int:
    """Return how many images of shape (C, H, W) to evaluate at a time: as many as BATCH_BYTES allow, BATCH at most.

    The model is shown one black image, and the largest output of its layers counts.
    """
    image = np.zeros((1, *image_shape), np.float32)
    with model.evaluating():
        model.forward(model.as_array(image))
    numbers = max(math.prod(layer.output_shape) for _, layer in model.walk())
    return max(1, min(BATCH, BATCH_BYTES // (max(image.size, numbers) * image.itemsize)))


def _checked(images: Array, targets: Array, classes: int) -> Array:
    """Return labels as int64, other targets as they are. Raises ValueError unless they fit images and classes."""
    targets = np.asarray(targets)
    labels = targets.shape == images.shape[:1] and targets.dtype.kind in "iu"
    floats = targets.shape == (*images.shape[:1], classes) and targets.dtype.kind == "f"
    if len(images.shape) != 4 or not (labels or floats):
        raise ValueError(
            f"evaluate: expected images (N, C, H, W) and integer labels (N,), or floats (N, {classes}), "
            f"got {images.shape} and {targets.dtype} {targets.shape}"
        )
    if images.dtype not in (np.uint8, np.float32, np.float64):
        raise ValueError(f"evaluate: expected images of uint8, or of floats in 0..1, got {images.dtype}")
    if len(targets) == 0:
        raise ValueError("evaluate: there are no images")
    if floats:
        return targets
    if targets.min() < 0 or targets.max() >= classes:
        raise ValueError(f"evaluate: labels must lie in 0..{classes - 1}, got {targets.min()}..{targets.max()}")
    return targets.astype(np.int64)

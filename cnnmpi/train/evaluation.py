"""Exact evaluation: counts over the whole set, the same for any number of ranks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnmpi.data import normalize
from cnnmpi.distributed import Ranks
from cnnmpi.models import Model
from cnnmpi.train.team import Team

Array = np.ndarray[Any, np.dtype[Any]]

BATCH = 125  # images evaluated at a time, at most; with what follows, a function of shapes only: so are the bits
BATCH_BYTES = 64 << 20  # of a batch's largest activation; a forward pass of a thread holds several of its size at once


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The mean loss, and for each image its class in 0..``classes``-1, ``labels`` (N,), and the guess, ``guesses``."""

    loss: float
    labels: Array
    guesses: Array
    classes: int

    @property
    def accuracy(self) -> float:
        """The share of images that were recognised, 0..1."""
        return float(np.count_nonzero(self.labels == self.guesses) / len(self.labels))

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
    model: Model | Team, images: Array, labels: Array, *, classes: int, mean: Any, std: Any, ranks: Ranks | None = None
) -> Evaluation:
    """Evaluate a model on ``images`` (N, C, H, W), uint8 or floats in 0..1, with ``labels`` (N,) in 0..classes-1.

    The ranks, and the team's threads in each, share the work. ``mean`` and ``std`` (C,) normalise the pixels, as in
    training. The models keep their mode. Raises ValueError for images, labels and classes that do not fit.
    """
    result = evaluate_unless(
        lambda: False, model, images, labels, classes=classes, mean=mean, std=std, ranks=ranks or Ranks()
    )
    assert result is not None
    return result


def evaluate_unless(
    stop: Callable[[], bool],
    model: Model | Team,
    images: Array,
    labels: Array,
    *,
    classes: int,
    mean: Any,
    std: Any,
    ranks: Ranks,
) -> Evaluation | None:
    """Do as ``evaluate``, or give up and return None once ``stop``, asked after each batch of a thread, says so.

    ``stop`` must give the same answer on all ranks.
    """
    labels = _checked(images, labels, classes)
    team = model if isinstance(model, Team) else Team([model])
    F = team.models[0].F
    team.spread_buffers()
    guesses = np.zeros(len(labels), np.int64)  # each rank fills in its own; the sum is everybody's

    def evaluate_batch(model: Model, start: int) -> float:
        part = slice(start, start + size)
        x = normalize(images[part], mean, std)
        logits = model.forward(model.as_array(x))
        if logits.shape[1] != classes:
            raise ValueError(f"evaluate: the model gives {logits.shape[1]} classes, the labels are of {classes}")
        loss: float
        loss, _ = F.cross_entropy_loss(logits, model.as_array(labels[part]), reduction="sum")
        guesses[part] = F.to_numpy(logits).argmax(axis=1)
        return loss

    losses: list[float] = []
    with team.evaluating():
        size = batch_size(team.models[0], images.shape[1:])
        together = max(ranks.gather(len(team.models))) * ranks.size * size  # all threads of all ranks take these
        for first in range(0, len(images), together):
            starts = range(first + ranks.rank * size, min(first + together, len(images)), ranks.size * size)
            losses += team.map(evaluate_batch, starts)
            if stop():
                return None
    ranks.sum(guesses)
    loss = math.fsum(loss for theirs in ranks.gather(losses) for loss in theirs)  # the same in any order
    return Evaluation(loss / len(images), labels, guesses, classes)


def batch_size(model: Model, image_shape: Sequence[int]) -> int:
    """Return how many images of shape (C, H, W) to evaluate at a time: as many as BATCH_BYTES allow, BATCH at most.

    The model is shown one black image, and the largest output of its layers counts.
    """
    image = np.zeros((1, *image_shape), np.float32)
    with model.evaluating():
        model.forward(model.as_array(image))
    numbers = max(math.prod(layer.output_shape) for _, layer in model.walk())
    return max(1, min(BATCH, BATCH_BYTES // (max(image.size, numbers) * image.itemsize)))


def _checked(images: Array, labels: Array, classes: int) -> Array:
    """Return the labels as int64. Raises ValueError unless there are as many as images, in 0..classes-1."""
    labels = np.asarray(labels)
    if images.ndim != 4 or labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"evaluate: expected images (N, C, H, W) and integer labels (N,), "
            f"got {images.shape} and {labels.dtype} {labels.shape}"
        )
    if images.dtype not in (np.uint8, np.float32, np.float64):
        raise ValueError(f"evaluate: expected images of uint8, or of floats in 0..1, got {images.dtype}")
    if len(labels) == 0:
        raise ValueError("evaluate: there are no images")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"evaluate: labels must lie in 0..{classes - 1}, got {labels.min()}..{labels.max()}")
    return labels.astype(np.int64)

"""Exact evaluation: counts over the whole set, the same for any number of ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnmpi.data import normalize
from cnnmpi.distributed import Ranks
from cnnmpi.models import Model
from cnnmpi.train.team import Team

Array = np.ndarray[Any, np.dtype[Any]]

BATCH = 125  # images evaluated at a time; fixed, so that the bits do not depend on the ranks


@dataclass(frozen=True)
class Evaluation:
    """The mean loss, and ``confusion`` (classes, classes): how many images of class [row] were taken for [column]."""

    loss: float
    confusion: Array

    @property
    def accuracy(self) -> float:
        """The share of images that were recognised, 0..1."""
        return float(np.trace(self.confusion) / self.confusion.sum())


def evaluate(
    model: Model | Team, images: Array, labels: Array, *, classes: int, mean: Any, std: Any, ranks: Ranks | None = None
) -> Evaluation:
    """Evaluate a model on uint8 ``images`` (N, C, H, W) with ``labels`` (N,) in 0..classes-1.

    The ranks, and the team's threads in each, share the work. ``mean`` and ``std`` (C,) normalise the pixels, as in
    training. The models keep their mode.
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
    team = model if isinstance(model, Team) else Team([model])
    team.spread_buffers()

    def evaluate_batch(model: Model, start: int) -> tuple[float, Array]:
        y = labels[start : start + BATCH]
        x = normalize(images[start : start + BATCH], mean, std)
        logits = model.forward(model.as_array(x))
        targets = model.as_array(y)
        loss, _ = model.F.cross_entropy_loss(logits, targets, reduction="sum")
        guesses = model.F.to_numpy(logits).argmax(axis=1)
        return loss, np.bincount(y * classes + guesses, minlength=classes * classes)

    parts: list[tuple[float, Array]] = []
    together = max(ranks.gather(len(team.models))) * ranks.size * BATCH  # images that all threads of all ranks take
    stopped = False
    with team.evaluating(), team.models[0].F.constant_filters():
        for first in range(0, len(images), together):
            starts = range(first + ranks.rank * BATCH, min(first + together, len(images)), ranks.size * BATCH)
            parts += team.map(evaluate_batch, starts)
            if stopped := stop():
                break
    if stopped:
        return None
    confusion = sum((counts for _, counts in parts), np.zeros(classes * classes, np.int64))
    ranks.sum(confusion)
    loss = math.fsum(value for losses in ranks.gather([loss for loss, _ in parts]) for value in losses)  # any order
    return Evaluation(loss / len(images), confusion.reshape(classes, classes))

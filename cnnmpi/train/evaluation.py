"""Exact evaluation: counts over the whole set, the same for any number of ranks."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnmpi.data import normalize
from cnnmpi.distributed import ExactReducer, Ranks
from cnnmpi.models import Model

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 250  # images evaluated at a time; fixed, so that the bits do not depend on the ranks


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
    model: Model, images: Array, labels: Array, *, classes: int, mean: Any, std: Any, ranks: Ranks | None = None
) -> Evaluation:
    """Evaluate ``model`` on uint8 ``images`` (N, C, H, W) with ``labels`` (N,) in 0..classes-1; ranks share the work.

    ``mean`` and ``std`` (C,) normalise the pixels, as in training. The model keeps its mode.
    """
    ranks = ranks or Ranks()
    blocks = math.ceil(len(images) / BLOCK)
    reducer = ExactReducer(ranks, blocks, [1, classes * classes])
    training = model.training
    model.eval()
    for index in range(ranks.rank, blocks, ranks.size):
        part = slice(index * BLOCK, (index + 1) * BLOCK)
        y = labels[part]
        logits = model.forward(model.F.as_array(normalize(images[part], mean, std), like=model.flat_params))
        loss, _ = model.F.cross_entropy_loss(logits, model.F.as_array(y, like=model.flat_params), reduction="sum")
        guesses = model.F.to_numpy(logits).argmax(axis=1)
        reducer.add(index, np.array([loss]), np.bincount(y * classes + guesses, minlength=classes * classes))
    model.train_mode(training)
    loss_sum, confusion = reducer.reduce()
    return Evaluation(float(loss_sum[0]) / len(images), confusion.astype(np.int64).reshape(classes, classes))

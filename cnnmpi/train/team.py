"""The threads of one rank: each works on shards, or on batches in evaluation, with a model of its own."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from cnnmpi.functional.blocks import share_out
from cnnmpi.layers import Convolution
from cnnmpi.models import Model

Item = TypeVar("Item")
Result = TypeVar("Result")


def fewest_workers(shards: int, threads: int) -> int:
    """Return how many of ``threads`` suffice to do ``shards`` in as few rounds as all of them would.

    8 shards on 5 threads take 2 rounds, for which 4 are enough: the fifth is free to help them.
    """
    rounds = math.ceil(shards / threads)
    return math.ceil(shards / rounds)


class Team:
    """Models for as many threads, with the same parameters.

    What a body returns for an item must not depend on the model that it is given; then it does not on their number.
    New threads call ``prepare`` first. ``threads``, at least as many, are those that the ops use as well.
    """

    def __init__(self, models: Sequence[Model], threads: int = 1, prepare: Callable[[], None] | None = None) -> None:
        self.models, self.threads = list(models), threads
        others = len(models) - 1
        self._pool = ThreadPoolExecutor(others, "cnnmpi-shard", initializer=prepare) if others else None

    def map(self, body: Callable[[Model, Item], Result], items: Sequence[Item]) -> list[Result]:
        """Call ``body(model, item)`` for every item, on all threads, and return the results in the items' order.

        The bodies must leave the values of parameters and fixed filters as they are.
        """
        with self.constant_weights():
            return share_out(items, [functools.partial(body, model) for model in self.models], self._pool)

    @contextlib.contextmanager
    def constant_weights(self) -> Iterator[None]:
        """Let all models share what their convolutions derive from weights, which nobody changes meanwhile.

        Within a ``with`` of the same kind, what was derived there goes on serving.
        """
        shared: dict[str, dict[str, Any]] = {}  # for each convolution
        convolutions = [
            (name, layer)
            for model in self.models
            for name, layer in model.walk()
            if isinstance(layer, Convolution) and layer.filters is None
        ]
        for name, layer in convolutions:
            layer.filters = shared.setdefault(name, {})
        try:
            yield
        finally:
            for _, layer in convolutions:
                layer.filters = None

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Have all models in evaluation within the ``with``, where their weights keep their values."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.constant_weights())
            for model in self.models:
                stack.enter_context(model.evaluating())
            yield

    def spread_buffers(self) -> None:
        """Give all models the first one's buffers."""
        first, *others = (model.named_buffers() for model in self.models)
        for buffers in others:
            for name, buffer in buffers.items():
                buffer[...] = first[name]

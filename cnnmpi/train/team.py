"""The threads of one rank: each works on shards, or on blocks of images, with a model of its own."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

from cnnmpi.models import Model

Item = TypeVar("Item")
Result = TypeVar("Result")


class Team:
    """Models for as many threads: one set of parameters between them, gradients and buffers to each.

    What a body returns for an item does not depend on the model that it is given, so neither does it on their number.
    New threads call ``prepare`` first.
    """

    def __init__(self, models: Sequence[Model], prepare: Callable[[], None] | None = None) -> None:
        self.models = list(models)
        for model in self.models[1:]:
            model.share_parameters(self.models[0])
        others = len(models) - 1
        self._pool = ThreadPoolExecutor(others, "cnnmpi-shard", initializer=prepare) if others else None

    def map(self, body: Callable[[Model, Item], Result], items: Sequence[Item]) -> list[Result]:
        """Call ``body(model, item)`` for every item, on all threads, and return the results in the items' order."""
        results: list[Any] = [None] * len(items)
        queue = iter(list(enumerate(items)))  # shared: each thread takes the next item when it is done with one

        def work(model: Model) -> None:
            try:
                for index, item in queue:
                    results[index] = body(model, item)
            except BaseException:
                list(queue)  # nobody takes another item
                raise

        others = [self._pool.submit(work, model) for model in self.models[1:]] if self._pool else []
        try:
            work(self.models[0])
        finally:
            wait(others)
        for other in others:
            other.result()
        return results

    def spread_buffers(self) -> None:
        """Give all models the first one's buffers."""
        first = self.models[0]
        for model in self.models[1:]:
            first.F.copy_into(model.flat_buffers, first.F.to_numpy(first.flat_buffers))

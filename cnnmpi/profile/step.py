"""The step that is measured, and who is running in it."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from cnnmpi.common.replaced import replaced
from cnnmpi.layers import Layer
from cnnmpi.machine import one_blas_thread
from cnnmpi.models import Model
from cnnmpi.optim import Optimizer
from cnnmpi.train.measures import Loss
from cnnmpi.train.team import Team

Place = tuple[str, str]  # what is running: (dotted name of a layer, "forward" or "backward"), or one of those below
LOSS, OPTIMIZER, REST = ("loss", ""), ("optimizer", ""), ("rest", "")
Seen = Callable[[Layer, str, Any, Any], None]  # seen(layer, "forward" or "backward", argument, result)


class Step:
    """One training step, as a rank does it that has all shards: forward, loss and backward of each, then the update.

    ``images`` float32 (N, C, H, W) and ``targets`` (N,) or (N, K) are NumPy arrays; ``loss(logits, targets,
    reduction="sum")`` and the optimizer are of the model's engine. Reading and augmenting images, and the sum over
    ranks, are no part of it. The learning rate becomes 0, so that the weights stay as they are. Raises ValueError for
    shards without images.
    """

    def __init__(
        self, model: Model, images: Any, targets: Any, loss: Loss, optimizer: Optimizer, shards: int = 1
    ) -> None:
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.images, self.targets = model.as_array(images), model.as_array(targets)
        optimizer.lr = 0.0
        self.cut(shards)
        self._team = Team([model])

    def cut(self, shards: int) -> None:
        """Have so many shards from now on, cut as the trainer cuts a batch."""
        count = len(self.targets)
        if not 1 <= shards <= count:
            raise ValueError(f"{count} images cannot be cut into {shards} shards")
        parts = np.array_split(np.arange(count), shards)
        self.shards = [slice(int(part[0]), int(part[-1]) + 1) for part in parts]

    @property
    def dtype(self) -> str:
        """The type of the model's parameters, such as "float32"."""
        return str(self.optimizer.parameters[0][0].dtype).removeprefix("torch.")

    @one_blas_thread()
    def __call__(self) -> None:
        """Do the step."""
        self._team.map(self._shard, self.shards)
        self.optimizer.step()

    @one_blas_thread()
    def first_shard(self) -> None:
        """Do the first shard alone, which is as large as any."""
        self._team.map(self._shard, self.shards[:1])

    def _shard(self, model: Model, rows: slice) -> None:
        self.optimizer.zero_grad()
        logits = model.F.for_loss(model.forward(self.images[rows]))
        _, dlogits = self.loss(logits, self.targets[rows], reduction="sum")
        model.backward(dlogits)


class Calls:
    """Within a ``with``, tells ``charge(place)``, wherever a place begins or ends, who was running up to there.

    Places lie inside each other as their calls do; between them it is REST. So what is charged adds up to the whole,
    whoever calls whom. Functions are replaced where they are watched, on this instance only, and put back at the end.
    """

    def __init__(self, charge: Callable[[Place], None]) -> None:
        self.charge = charge
        self._running = [REST]
        self._restore = ExitStack()

    def __enter__(self) -> "Calls":
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def watch(
        self, owner: Any, name: str, place: Place, seen: Callable[[Any, Any], None] = lambda argument, result: None
    ) -> None:
        """Watch the function ``owner.name`` of an instance or a module; ``seen`` is told its first argument and result.

        It must be called on one thread at a time.
        """
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.charge(self._running[-1])
            self._running.append(place)
            try:
                result = function(*args, **kwargs)
            finally:
                self.charge(self._running.pop())
            if kwargs and not args:
                args = tuple(inspect.signature(function).bind(**kwargs).arguments.values())
            seen(args[0] if args else None, result)
            return result

        self._restore.enter_context(replaced(owner, name, watched))

    def watch_step(self, step: Step, seen: Seen | None = None) -> None:
        """Watch every layer, the loss and the optimizer of ``step``; ``seen`` is told of the layers' calls."""
        for name, layer in step.model.walk():
            for direction in ("forward", "backward"):
                self.watch(layer, direction, (name, direction), *_teller(seen, layer, direction))
        self.watch(step, "loss", LOSS)
        self.watch(step.optimizer, "step", OPTIMIZER)


def _teller(seen: Seen | None, layer: Layer, direction: str) -> tuple[Callable[[Any, Any], None], ...]:
    return () if seen is None else (lambda argument, result: seen(layer, direction, argument, result),)

"""The fingerprint of a few steps: digests of all that each layer takes and gives, of every shard.

Two runs that should be equal and are not are compared by it, ``python -m cnnmpi.bisect``: it tells what each computed
first otherwise. Written by rank 0; the same bytes for any number of ranks.
"""

import contextlib
import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnmpi.checkpoint import write_atomically
from cnnmpi.common.files import append
from cnnmpi.common.lines import Line, each_line, to_line
from cnnmpi.common.replaced import replaced
from cnnmpi.distributed import UserError
from cnnmpi.layers import Layer

if TYPE_CHECKING:
    from cnnmpi.train.trainer import Trainer

FINGERPRINT = "fingerprint.jsonl"
VERSION = 1
DIGITS = 16  # of a sha256: enough to tell numbers apart; the ledger is what proves
Digests = dict[str, str | None]


class Fingerprint:
    """The file in the ``folder`` of a run; ``steps`` are the first and the last one that get lines, counted from 1.

    A line is a call: its ``place``, and digests of what it ``takes`` and ``gives``, in the order in which calls ended.
    First come those of shard 0: "batch", the layers forward, "loss", the layers backward, "shard" (its part of the
    sums); then those of the other shards; then "reduce" and "update".
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None, tell: Callable[[str], None]) -> None:
        self.path, self.steps, self.tell = folder / FINGERPRINT, steps or (0, 0), tell

    def begin(self, step: int, shaping: Line) -> None:
        """Write the first line, what shapes the run; keep the lines up to ``step`` of one that is resumed."""
        if not self.steps[1]:
            return
        head = to_line({"fingerprint": VERSION, **shaping})
        try:
            lines = [*each_line(self.path)] if self.path.exists() else []
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}; move it away") from None
        if lines and lines[0][0] != head:
            self.tell(f"note: {self.path} begins anew: what shapes the run is not what it was")
            lines = []
        kept = [blob for blob, line in lines[1:] if line and type(line.get("step")) is int and line["step"] <= step]
        write_atomically(self.path, head + b"".join(kept))

    @contextlib.contextmanager
    def of_step(self, run: "Trainer") -> Iterator[None]:
        """Write the lines of the step that is done within the ``with``, if it is one of those. Call on all ranks."""
        step = run.step + 1
        if not self.steps[0] <= step <= self.steps[1]:
            yield
            return
        witness = Witness(run.F, step)
        with contextlib.ExitStack() as stack:
            witness.watch_step(run, stack)
            yield
        digests = {name: text[:DIGITS] for name, text in run.entry().items() if name != "step"}
        witness.write(None, "update", witness.digests(lr=float(run.optimizer.lr)), digests)
        shards = run.ranks.gather({shard: lines for shard, lines in witness.lines.items() if shard is not None})
        if run.ranks.rank == 0:
            found = sorted((shard, lines) for each in shards for shard, lines in each.items())
            self._append([line for _, lines in [*found, (None, witness.lines[None])] for line in lines])

    def _append(self, lines: list[Line]) -> None:
        try:
            append(self.path, b"".join(map(to_line, lines)))
        except OSError as error:
            self.tell(f"warning: {self.path} cannot be written: {error.strerror}")
            self.steps = (0, 0)


class Witness:
    """Sees the calls of a ``step``, and keeps their ``lines``, {shard: lines in order}; None stands for all shards."""

    def __init__(self, F: ModuleType, step: int) -> None:
        self.F, self.step = F, step
        self.lines: dict[int | None, list[Line]] = defaultdict(list)
        self._here = threading.local()  # the shard on which a thread works

    def watch_step(self, run: "Trainer", stack: contextlib.ExitStack) -> None:
        """See all calls of a step of ``run``, until ``stack`` closes."""
        load, judge, contribute, sum_up = run.loader.batch, run.loss, run.reducer.add, run.reducer.reduce

        def batch(step: int, shard: int) -> Any:
            x, y = load(step, shard)
            self._here.shard = shard
            self.write(shard, "batch", {}, self.digests(images=x, labels=y))
            return x, y

        def loss(logits: Any, targets: Any, **options: Any) -> Any:
            takes = self.digests(logits=logits, targets=targets)
            value, dlogits = judge(logits, targets, **options)
            self.write(self._here.shard, "loss", takes, self.digests(loss=value, dlogits=dlogits))
            return value, dlogits

        def add(shard: int, gradient: Any, statistics: Any, sums: Any) -> None:
            if gradient is not None:
                takes = self.digests(gradient=gradient, statistics=statistics, sums=sums)
                self.write(shard, "shard", takes, {})
            contribute(shard, gradient, statistics, sums)

        def reduce(step: int) -> Any:
            gradient, statistics, sums = sum_up(step)
            gives = self.digests(gradient=gradient, statistics=statistics, sums=sums)
            self.write(None, "reduce", {}, gives)
            return gradient, statistics, sums

        watched: list[tuple[Any, str, Callable[..., Any]]] = [
            (run.loader, "batch", batch),
            (run, "loss", loss),
            (run.reducer, "add", add),
            (run.reducer, "reduce", reduce),
        ]
        for layer in (layer for model in run.team.models for _, layer in model.walk()):
            watched += [(layer, "forward", self._forward(layer)), (layer, "backward", self._backward(layer))]
        for owner, name, function in watched:
            stack.enter_context(replaced(owner, name, function))

    def write(self, shard: int | None, place: str, takes: Digests, gives: Digests) -> None:
        """Write a line down."""
        self.lines[shard].append({"step": self.step, "shard": shard, "place": place, "takes": takes, "gives": gives})

    def digests(self, arrays: Mapping[str, Any] | None = None, /, **values: Any) -> Digests:
        """Return the digest of each value."""
        return {name: digest_of(self.F, value) for name, value in (values | dict(arrays or {})).items()}

    def _forward(self, layer: Layer) -> Callable[..., Any]:
        function, place = layer.forward, f"{layer.name} {type(layer).__name__} forward".strip()

        def forward(*args: Any, **options: Any) -> Any:
            takes = self.digests(layer.params | layer.buffers, input=_one(args, options))
            result = function(*args, **options)
            self.write(self._here.shard, place, takes, self.digests(layer.buffers, output=result))
            return result

        return forward

    def _backward(self, layer: Layer) -> Callable[..., Any]:
        function, place = layer.backward, f"{layer.name} {type(layer).__name__} backward".strip()

        def backward(*args: Any, **options: Any) -> Any:
            takes = self.digests(layer.params, dout=_one(args, options))
            result = function(*args, **options)
            gradients = {f"gradient of {name}": gradient for name, gradient in layer.grads.items()}
            self.write(self._here.shard, place, takes, self.digests(gradients, dx=result))
            return result

        return backward


def _one(args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Return what a layer is given: an array, unless a person's own layer takes more."""
    values = (*args, *options.values())
    return values[0] if len(values) == 1 else values


def digest_of(F: ModuleType, value: Any) -> str | None:
    """Return the digest of an array of the engine ``F``, or of what else a call takes or gives; None for None.

    It is that of the dtype, the shape and the numbers in C order, wherever and however they lie in memory.
    """
    if value is None:
        return None
    if isinstance(value, tuple | list):
        text = json.dumps([digest_of(F, each) for each in value])
        return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
    if not hasattr(value, "dtype"):
        return value.hex() if isinstance(value, float) else str(value)
    array = value if isinstance(value, np.ndarray | np.generic) else F.to_numpy(value)
    digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:DIGITS]

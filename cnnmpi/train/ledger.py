"""The ledger of a run: what it computed, each entry bound to the one before by its hash. Written by rank 0.

Nothing in it depends on ranks, time or host: whoever computes the run again, on any number of ranks, gets the same
bytes. docs/checking.md says what is in it, and what it proves.
"""

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnmpi.checkpoint import write_atomically
from cnnmpi.common.arrays import Array
from cnnmpi.common.files import append, sync
from cnnmpi.common.lines import Line, each_line, to_line

LEDGER = "ledger.jsonl"
VERSION = 1
SKIPPED = "skipped"  # in the place of a loss


@dataclass(frozen=True)
class Entry:
    """A line of a ledger, what it says, and the hash by which the next one refers to it."""

    blob: bytes
    says: Line

    @functools.cached_property
    def hash(self) -> str:
        """The sha256 of the line, with its end."""
        return hashlib.sha256(self.blob).hexdigest()

    @property
    def step(self) -> int | None:
        """The step after which it was made; None of what is said before the first one."""
        step = self.says.get("step")
        return step if type(step) is int else None


class BrokenChainError(ValueError):
    """A ledger does not hold together: a line is no entry, or does not follow from the one before."""


class OtherVersionError(BrokenChainError):
    """A ledger was written by a version of this program whose ledgers are others."""


def entries(path: Path, torn: bool = False) -> Iterator[Entry]:
    """Yield the entries of a ledger, each checked against the one before. Raises BrokenChainError, OSError.

    With ``torn``, a last line that was cut off is left out: a run that is killed may leave one.
    """
    before = ""
    for number, (blob, line) in enumerate(each_line(path), 1):
        if line is None and torn and not blob.endswith(b"\n"):
            return
        if number == 1 and line is not None and type(line.get("ledger")) is int and line["ledger"] != VERSION:
            raise OtherVersionError(f"{path}: a ledger of version {line['ledger']!r:.20}, not {VERSION}")
        if line is None or line.get("before") != before or (number == 1 and line.get("ledger") != VERSION):
            what = "is no entry" if line is None else "does not follow from the line before"
            raise BrokenChainError(f"{path}: line {number} {what if number > 1 else 'begins no ledger'}")
        yield (entry := Entry(blob, line))
        before = entry.hash


class Ledger:
    """The ledger of a run in its ``folder``: an entry every ``every`` steps, and at the end of each epoch.

    With ``every`` 0 there is none. ``head`` is the hash of the newest entry, "" without one.
    """

    def __init__(self, folder: Path, every: int, steps_per_epoch: int, tell: Callable[[str], None]) -> None:
        self.path, self.every, self.steps_per_epoch, self.tell = folder / LEDGER, every, steps_per_epoch, tell
        self.head = ""
        self._failed = False

    def wants(self, step: int) -> bool:
        """Return whether there is an entry after ``step``, counted from 1."""
        return self.every > 0 and (step % self.every == 0 or step % self.steps_per_epoch == 0)

    def begin(self, shaping: Line, step: int = 0) -> None:
        """Write the first entry: what shapes the run, and at which step the ledger begins."""
        if self.every:
            write_atomically(self.path, b"")
            self.head = ""
            every = {"every": self.every, "steps_per_epoch": self.steps_per_epoch}
            self._add({"ledger": VERSION, **every, "begins": step, **shaping})

    def enter(self, says: Line) -> None:
        """Write the entry of a step: ``Trainer.entry``."""
        if self.every:
            self._add(says)

    def wait(self) -> None:
        """Wait until all entries have reached the disk: a checkpoint is about to name the newest of them."""
        with contextlib.suppress(OSError):  # of a file that cannot be written, which was told
            if self.head and not self._failed:
                sync(self.path)

    def go_on(self, step: int, head: str, shaping: Line) -> bool:
        """Keep the entries up to the one whose hash is ``head``, as the checkpoint says: the others will come again.

        Where there is none, as for a checkpoint of before there were ledgers, a new one begins here, and True is
        returned: an entry of this step is to follow. Where what shapes the run is no longer what it was, such as the
        kernels of another processor, an entry says that.
        """
        if not self.every and not head:
            return False
        found: list[Entry] = []
        try:
            found += entries(self.path, torn=True)
        except (OSError, BrokenChainError) as error:
            if head:
                self.tell(f"warning: {getattr(error, 'strerror', None) or error}")
        places = [index for index, entry in enumerate(found) if entry.hash == head]
        if not places:
            if head or found:
                self.tell(f"warning: {self.path} does not lead to the checkpoint: a new one begins at step {step}")
            self.every = self.every or 1
            self.begin(shaping, step)
            return True
        kept = found[: places[0] + 1]
        self.every = int(kept[0].says["every"])
        write_atomically(self.path, b"".join(entry.blob for entry in kept))
        self.head = head
        known: Line = {}
        for entry in kept:
            known |= {name: value for name, value in entry.says.items() if name in shaping}
        now = json.loads(to_line(shaping))
        if changed := {name: value for name, value in now.items() if known.get(name) != value}:
            self.tell(f"note: {', '.join(changed)} changed since the run began: {self.path.name} says so from here on")
            self._add({"changed": step, **changed})
        return False

    def _add(self, says: Line) -> None:
        entry = Entry(to_line(says | {"before": self.head}), says)
        self.head = entry.hash
        if self._failed:
            return
        try:
            append(self.path, entry.blob)
        except OSError as error:
            self._failed = True  # a chain with a gap would prove nothing
            self.tell(f"warning: {self.path} cannot be written: {error.strerror}; a resume writes what is missing")


def exact(loss: float | None) -> dict[str, str]:
    """Return the bits of a mean loss as an entry has them; "skipped" where --on-nan left the step out."""
    return {} if loss is None else {"loss": loss.hex() if math.isfinite(loss) else SKIPPED}


def digests_of(params: Array, buffers: Array, state: Mapping[str, list[Array]], steps: int) -> dict[str, str]:
    """Return the digests in an entry: sha256 of the bytes of the flat arrays, and of all the optimizer's, in order."""
    optimizer = hashlib.sha256(str(steps).encode())
    for slot, arrays in state.items():
        optimizer.update(slot.encode())
        for array in arrays:
            optimizer.update(array.ravel(order="K").data)
    weights, statistics = (hashlib.sha256(array.data).hexdigest() for array in (params, buffers))
    return {"weights": weights, "statistics": statistics, "optimizer": optimizer.hexdigest()}


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings of a run that shape it, without the places of data and code on this host."""
    kept = {name: value for name, value in settings.items() if name not in ("data", "init")}
    for name in ("model", "loss", "augment"):
        if isinstance(text := kept.get(name), str):
            kept[name] = ",".join(part.rpartition(":")[2] for part in text.split(","))
    return kept

"""Computing a run again, from a checkpoint or the seed, as its ledger says that it was shaped."""

import contextlib
import dataclasses
import os
import shutil
import signal
import tempfile
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from cnnmpi import checkpoint
from cnnmpi.audit.record import Record
from cnnmpi.audit.shaping import shown
from cnnmpi.common.arrays import Array
from cnnmpi.common.files import open_regular
from cnnmpi.distributed import Ranks, UserError
from cnnmpi.train import Config, Trainer, set_up
from cnnmpi.train.code import OURS
from cnnmpi.train.config import from_plain
from cnnmpi.train.inputs import Data, open_data
from cnnmpi.train.judging import data_of
from cnnmpi.train.ledger import LEDGER
from cnnmpi.train.state import Arrays, pack, read_saved_run, unpack

HERE = ("kernels", "versions", "sources_sha256", "code", "network")  # what may be otherwise here


@dataclass(frozen=True)
class State:
    """All that a run goes on from after ``step``: arrays as a checkpoint has them, and the scale of its loss."""

    step: int
    arrays: Arrays
    scale: tuple[float, int] | None = None

    @classmethod
    def load(cls, path: Path) -> "State":
        """Return that of a checkpoint. Raises CheckpointError."""
        arrays, attributes = checkpoint.load(path)
        run = read_saved_run(path, attributes)
        return cls(run.step, arrays, (run.loss_scale[0], int(run.loss_scale[1])) if run.loss_scale else None)


class Replay:
    """A run that is computed again; ``run`` is its Trainer, which writes nothing but into ``scratch``.

    It begins from a ``state``, or from its seed. ``given`` are settings besides those of the run, such as the places of
    a person's code. Raises UserError where that is not possible.
    """

    def __init__(
        self, record: Record, ranks: Ranks, data: Data, given: dict[str, Any], scratch: Path, state: State | None = None
    ) -> None:
        self.record, self.ranks, self.data, self.given, self.scratch = record, ranks, data, given, scratch
        self.run = self._trainer(state)

    def step(self) -> float:
        """Do the next step and return its mean loss."""
        if any(changed == self.run.step and "config" in news for changed, news in self.record.changes):
            self.run = self._trainer(self.state())
        return self.run.train_step()

    def state(self) -> State:
        """Return the state as it is now, a copy."""
        arrays = {name: array.copy() for name, array in pack(self.run.model, self.run.optimizer).items()}
        return State(self.run.step, arrays, (self.run.scale.factor, self.run.scale.steady))

    def _trainer(self, state: State | None) -> Trainer:
        known = self.record.at(state.step if state else 0)
        for name in OURS:  # nothing is imported because a file names it
            own = name in known.get("code", {}) or ":" in str(known["config"].get(name, ""))
            if own and name not in self.given:
                raise UserError(
                    f"its {name} is a person's own, {known['config'].get(name)!s:.100}: name it by --{name}"
                )
        settings = from_plain(known["config"] | self.given, LEDGER)
        if state:
            settings.pop("init", None)
        config = dataclasses.replace(
            Config(**settings), out=Path(self.ranks.on_rank0(lambda: tempfile.mkdtemp(dir=self.scratch))),
            data=self.data.dataset.source, ledger_every=0, log_every=0, report=False, quiet=True,
        )  # fmt: skip
        run = set_up(config, self.ranks, data=self.data.dataset)
        run.folder.close()
        here = run.shaping["config"]
        if other := sorted(name for name in known["config"] if here.get(name) != known["config"][name]):
            raise UserError(f"{', '.join(other)}: not those of the run, {known['config'][other[0]]!r:.100}")
        if state is not None:
            try:
                take(run, state)
            except ValueError as error:
                raise UserError(f"step {state.step}: {error}") from None
        return run


def take(run: Trainer, state: State) -> None:
    """Let a run go on from ``state``. Raises ValueError where its arrays do not fit."""
    unpack(state.arrays, run.model, run.optimizer)
    run.step = run.optimizer.steps = state.step
    if run.scale.moves and state.scale is not None:
        run.scale.factor, run.scale.steady = state.scale


def same(a: Array, b: Array) -> bool:
    """Return whether two arrays have the same bits, type and shape."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def data_of_run(record: Record, ranks: Ranks, spec: str | None, flag: str = "--data") -> Data | None:
    """Return the data of the run, or what ``spec`` means, every byte of which was looked at; None for other data.

    Raises UserError where there are none; ``flag`` is what names them.
    """

    def look() -> tuple[str, str, str]:
        where = spec
        if where is None:
            try:
                with open_regular(record.folder / "config.toml") as file:
                    settings = tomllib.loads(file.read(1 << 20).decode(errors="surrogateescape"))
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(
                    f"{record.folder / 'config.toml'} does not name the data ({error}): use {flag}"
                ) from None
            where = data_of(settings.get("data"), flag)
            if where != "synthetic" and not h5py.is_hdf5(where):  # to look at others, they would have to be converted
                raise UserError(f"its data ({where}) are no HDF5 file: name that, or them, by {flag}")
        try:
            return where, open_data(where, Ranks(), lambda text: None).dataset.digest(), ""
        except UserError as error:
            if spec is not None:  # what was named can be anything
                raise
            return where, "", str(error)

    where, digest, wrong = ranks.on_rank0(look)
    if not wrong and digest != record.opening["data_sha256"]:
        wrong = f"{where}: not those of the run"
    record.note("data", wrong, where)
    return None if wrong else open_data(where, ranks, lambda text: None)


@contextlib.contextmanager
def scratch_folder(ranks: Ranks) -> Iterator[Path]:
    """Yield a folder that is gone afterwards, also where SIGTERM ends the program; the same on all ranks of a host."""
    path = Path(ranks.on_rank0(lambda: tempfile.mkdtemp(prefix="cnnmpi-audit-")))

    def end(number: int, frame: Any) -> None:
        shutil.rmtree(path, ignore_errors=True)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    usual = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    heeds = usual and ranks.rank == 0 and threading.current_thread() is threading.main_thread()
    if heeds:
        signal.signal(signal.SIGTERM, end)
    try:
        yield path
    finally:
        if heeds:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if ranks.rank == 0:
            shutil.rmtree(path, ignore_errors=True)


def fits(record: Record, trainer: Trainer) -> str:
    """Return in words what of a ledger cannot be a run of such settings; "" if all can."""
    if record.opening["steps_per_epoch"] != trainer.steps_per_epoch:
        return f"steps_per_epoch is {record.opening['steps_per_epoch']}, with these data {trainer.steps_per_epoch}"
    if max(record.said) > trainer.total_steps:
        return f"it goes on to step {max(record.said)} of a run of {trainer.total_steps}"
    return ""


def unlike_here(record: Record, trainer: Trainer, first: int, last: int) -> dict[str, str]:
    """Return {name: words} of what shaped the steps after ``first`` up to ``last`` otherwise than it would be here."""
    found: dict[str, str] = {}
    for there in record.shaping(first, last):
        if there["config"].get("reduction") != "exact":
            found["reduction"] = "bits are promised by --reduction exact alone"
        for name in HERE:
            if there.get(name) != trainer.shaping[name]:
                found[name] = f"{shown(there.get(name))} there, {shown(trainer.shaping[name])} here"
    return found


def differing(said: dict[str, Any], computed: dict[str, Any]) -> list[str]:
    """Return the names of what an entry says otherwise than it was ``computed``."""
    return [name for name in computed if said.get(name) != computed[name]]

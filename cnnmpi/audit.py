"""Check a run by computing parts of it again, on any number of ranks: its ledger, its checkpoints and its data.

python -m cnnmpi.audit runs/simplecnn-0 --data data/cifar10.h5
mpirun -n 4 python -m cnnmpi.audit runs/simplecnn-0 --segments 3 --seed 7
"""

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import math
import secrets
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from cnnmpi import checkpoint
from cnnmpi.checkpoint import CheckpointError
from cnnmpi.common.files import open_regular
from cnnmpi.console import command, complain, printable, table
from cnnmpi.distributed import Ranks, UserError, failing_together, start
from cnnmpi.train import Config, Trainer, set_up
from cnnmpi.train.config import experiment, from_plain, to_plain
from cnnmpi.train.inputs import Data, open_data
from cnnmpi.train.judging import data_of
from cnnmpi.train.ledger import LEDGER, SKIPPED, BrokenChainError, Entry, entries, plain_settings
from cnnmpi.train.state import Arrays, read_saved_run, unpack

PROGRAM = "cnnmpi.audit"
FOUND, CANNOT = 1, 2  # exit codes: something is not as the ledger says; it cannot be told here
PLATFORM = ("kernels", "versions")  # where these are not the run's, bits are not promised
STATE = ("weights", "statistics", "optimizer")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that belongs to the ledger: the computation can begin at its ``step``. Without a path, the seed."""

    step: int
    path: Path | None = None


@dataclass
class Record:
    """What the folder of a run says, and ``rows`` of what was checked: (what, "ok" or "WRONG" or "?", words)."""

    folder: Path
    chain: list[Entry] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def note(self, what: str, wrong: str, right: str = "") -> None:
        """Write down a check: all is well unless there are words for what is ``wrong``."""
        self.rows.append((what, "WRONG" if wrong else "ok", wrong or right))

    @property
    def sound(self) -> bool:
        """Whether nothing was found."""
        return all(verdict != "WRONG" for _, verdict, _ in self.rows)

    @property
    def opening(self) -> dict[str, Any]:
        """What shapes the run."""
        return self.chain[0].says

    @property
    def said(self) -> dict[int, dict[str, Any]]:
        """Return {step: the entry of that step}."""
        return {entry.says["step"]: entry.says for entry in self.chain if entry.step is not None}

    def segments(self) -> list[tuple[Saved, Saved]]:
        """Return the parts of the run that can be computed again: from one checkpoint to the next, or to the end."""
        places = [*self.saved, Saved(max(self.said))]
        return [(first, last) for first, last in itertools.pairwise(places) if first.step < last.step]


# -- what can be checked by reading ------------------------------------------------------------------------------------


def read(folder: Path) -> Record:
    """Return the record of a run, and whether its ledger holds together, and its checkpoints and settings with it.

    Raises UserError where there is no ledger, and for a run that is still going on.
    """
    _refuse_a_running_one(folder)
    record, path = Record(folder), folder / LEDGER
    try:
        record.chain = [*entries(path)]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: only a run with a ledger can be audited") from None
    except BrokenChainError as error:
        record.note("ledger", str(error).removeprefix(f"{path}: "))
        return record
    if not record.said:
        record.note("ledger", "it has no entry of a step")
        return record
    record.note("ledger", "", f"{len(record.chain)} entries to step {max(record.said)}, {record.chain[-1].hash}")
    try:
        with open_regular(folder / "config.toml") as file:
            content = tomllib.loads(file.read(1 << 20).decode(errors="surrogateescape"))
        settings = experiment(Config(**from_plain(content, "config.toml")))
        wrong = _other(plain_settings(to_plain(settings)), record.opening["config"])
    except (OSError, ValueError, UserError, KeyError) as error:
        wrong = str(error)
    record.note("config.toml", wrong)
    if record.opening.get("begins") == 0:
        record.saved.append(Saved(0))
    names = [folder / name for name in ("last.h5", "previous.h5", "best.h5")]
    for path in [*names, *sorted((folder / "kept").glob("*.h5"))]:
        if path.exists():
            _check(record, path)
    record.saved = sorted({saved.step: saved for saved in record.saved}.values(), key=lambda saved: saved.step)
    return record


def _check(record: Record, path: Path) -> None:
    """Check that a checkpoint belongs to the ledger."""
    name = str(path.relative_to(record.folder))
    try:
        arrays, attributes = checkpoint.load(path)
        run = read_saved_run(path, attributes)
        config = experiment(Config(**from_plain(run.config, name)))
    except (CheckpointError, UserError) as error:
        record.note(name, str(error).removeprefix(f"{path}: "))
        return
    weights = {key.removeprefix("model/"): value for key, value in arrays.items() if key.startswith("model/")}
    newest = [entry for entry in record.chain if (entry.step or 0) <= run.step][-1]
    wrong = _other(plain_settings(to_plain(config)), record.opening["config"])
    if newest.hash != run.ledger:
        wrong = f"step {run.step}: it is not of this ledger"
    elif run.data_sha256 != record.opening["data_sha256"]:
        wrong = "its data are not the ledger's"
    elif checkpoint.weights_digest(weights) != attributes.get("weights_sha256"):
        wrong = "its weights are not those that it names"
    record.note(name, wrong, f"step {run.step}")
    if not wrong and run.step > record.opening["begins"]:
        record.saved.append(Saved(run.step, path))


def _other(settings: dict[str, Any], said: dict[str, Any]) -> str:
    """Return which settings are not those that the ledger begins with."""
    names = sorted(name for name in settings.keys() | said.keys() if settings.get(name) != said.get(name))
    return f"other {', '.join(names)} than the ledger's" if names else ""


def _refuse_a_running_one(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError), (folder / "lock").open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: the run is still going on: wait for its end") from None
        except OSError:
            pass  # a file system without locks


# -- what has to be computed -------------------------------------------------------------------------------------------


def unlike_here(record: Record, trainer: Trainer) -> dict[str, str]:
    """Return {name: words} of what shaped the run otherwise than it would be shaped here."""
    here = {name: value for name, value in trainer.shaping.items() if name not in ("config", "data_sha256")}
    there = record.opening
    return {name: f"{there.get(name)} there, {value} here" for name, value in here.items() if there.get(name) != value}


def check_states(record: Record, trainer: Trainer) -> None:
    """Compare what each checkpoint holds with the entry of its step."""
    for saved in record.saved:
        said = record.said.get(saved.step)
        if said is None or saved.path is None:
            continue
        arrays, _ = checkpoint.load(saved.path)
        unpack(arrays, trainer.model, trainer.optimizer)
        trainer.step = trainer.optimizer.steps = saved.step
        computed = trainer.entry()
        wrong = [name for name in STATE if said.get(name) != computed[name]]
        if wrong:
            words = f"other {', '.join(wrong)} than the ledger's entry of step {saved.step}"
            record.note(str(saved.path.relative_to(record.folder)), words)


def compute(record: Record, trainer: Trainer, last: Saved) -> tuple[str, int, float]:
    """Compute up to ``last`` again; return the first difference in words, the number of entries compared, a deviation.

    That is the largest relative difference of a loss.
    """
    first, compared, deviation = "", 0, 0.0
    while True:
        loss = None
        if (said := record.said.get(trainer.step)) is not None and trainer.step == 0:
            first, compared = _differences(said, trainer.entry()), 1
        if trainer.step >= last.step:
            break
        loss = trainer.train_step()
        if (said := record.said.get(trainer.step)) is not None:
            compared += 1
            first = first or _differences(said, trainer.entry(loss))
            theirs = said.get("loss", SKIPPED)
            if math.isfinite(loss) and theirs != SKIPPED:
                deviation = max(deviation, abs(loss - float.fromhex(theirs)) / max(abs(float.fromhex(theirs)), 1e-300))
    if last.path is not None and not first:
        kept, _ = checkpoint.load(last.path)
        first = _unequal(kept, trainer, last)
    return first, compared, deviation


def _differences(said: dict[str, Any], computed: dict[str, Any]) -> str:
    wrong = [name for name in computed if said.get(name) != computed[name]]
    return f"step {computed['step']}: other {', '.join(wrong)}" if wrong else ""


def _unequal(kept: Arrays, trainer: Trainer, last: Saved) -> str:
    """Return which array of a checkpoint is not what was computed, in words; "" if none."""
    for name, array in trainer.model.state_dict().items():
        if not np.array_equal(kept.get(f"model/{name}", np.zeros(0)), array):
            return f"step {last.step}: other {name} than in {last.path.name if last.path else 'the seed'}"
    return ""


# -- the command -------------------------------------------------------------------------------------------------------


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Audit as ``argv`` says (the command line's if None), on all ranks. Returns 0, 1 or 2: see ``run``."""
    try:
        ranks = start()
    except UserError as error:
        complain(PROGRAM, error)
        return CANNOT
    code = CANNOT
    with failing_together(ranks):
        code = tyro.cli(functools.partial(run, ranks), args=argv, prog=f"python -m {PROGRAM}", description=__doc__)
    return code


def run(
    ranks: tyro.conf.Suppress[Ranks],
    folder: Annotated[Path, tyro.conf.Positional],
    /,
    data: str | None = None,
    segments: int = 5,
    seed: int | None = None,
    model: str | None = None,
    loss: str | None = None,
    augment: str | None = None,
    threads: int = 0,
) -> int:
    """Check a run. Returns 0: all is as its ledger says; 1: something is not; 2: that cannot be told here.

    Args:
        ranks: who takes part.
        folder: of the run; nothing is written there.
        data: the data, if they are not where the run had them.
        segments: how many parts of the run, drawn at random, are computed again; 0 computes none, -1 all.
        seed: of that draw; drawn itself, and told, unless given.
        model: the network of a run of your own: FILE.py:CLASS or MODULE:CLASS.
        loss: its loss, if that is your own.
        augment: its augmentation, if that has functions of your own.
        threads: threads of each rank; 0 shares the cores out to the ranks.

    """
    begun = time.monotonic()
    seed = ranks.on_rank0(lambda: secrets.randbits(32)) if seed is None else seed
    record = ranks.on_rank0(lambda: read(folder))
    other: dict[str, str] = {}
    if record.sound:
        own = {"model": model, "loss": loss, "augment": augment}
        other = _recompute(record, ranks, data, segments, seed, own, threads)
    if ranks.rank == 0:
        print(table(("checked", "", ""), [tuple(map(printable, row)) for row in record.rows]))
        for name, words in other.items():
            print(printable(f"not as in the run: {name}: {words}"))
        if not record.sound:
            verdict = "WRONG: the run is not what its ledger says"
        elif other:
            verdict = "NOT TOLD HERE: nothing was found, but bits are promised only where the above is equal"
        else:
            verdict = "SOUND: all that was checked is as the ledger says"
        print(f"{verdict} (seed {seed}, {ranks.size} ranks, {time.monotonic() - begun:.0f} s)")
    return FOUND if not record.sound else CANNOT if other else 0


def _recompute(
    record: Record, ranks: Ranks, spec: str | None, segments: int, seed: int, own: dict[str, str | None], threads: int
) -> dict[str, str]:
    """Check the data, then compute parts of the run again; return what shaped it otherwise than here."""
    found = _data(record, ranks, spec)
    if found is None:
        return {}
    parts = record.segments()
    if segments >= 0:
        drawn = np.random.default_rng(seed).permutation(len(parts))[:segments]
        parts = [parts[index] for index in sorted(drawn.tolist())]
    other: dict[str, str] = {}
    with _scratch(ranks) as scratch:
        make = functools.partial(_trainer, record, ranks, found, own, threads, scratch)
        trainer = make(record.saved[0] if record.saved else Saved(0))
        other = unlike_here(record, trainer)
        if other.keys() - {*PLATFORM}:
            return other
        check_states(record, trainer)
        for first, last in parts:
            first_difference, compared, deviation = compute(record, make(first), last)
            what = f"steps {first.step}-{last.step}"
            if other:
                same = "the same bits" if not first_difference else f"losses differ by {deviation:.2g} of them at most"
                record.rows.append((what, "?", same))
            else:
                record.note(what, first_difference, f"{compared} entries computed again")
    return other


def _data(record: Record, ranks: Ranks, spec: str | None) -> Data | None:
    """Return the data of the run, every byte of which was looked at; None where they are not the ledger's."""

    def look() -> tuple[str, str]:
        settings = tomllib.loads((record.folder / "config.toml").read_text(errors="surrogateescape"))
        where = data_of(settings.get("data")) if spec is None else spec
        try:
            found = open_data(where, Ranks(), lambda text: None)
            return where, found.dataset.digest()
        except UserError as error:
            if spec is not None and not Path(where).exists():
                raise
            return where, str(error)

    where, digest = ranks.on_rank0(look)
    wrong = "" if digest == record.opening["data_sha256"] else "not those of the run"
    if wrong and len(digest) != 64:
        wrong = digest
    record.note("data", wrong, where)
    return None if wrong else open_data(where, ranks, lambda text: None)


def _trainer(
    record: Record, ranks: Ranks, data: Data, own: dict[str, str | None], threads: int, scratch: Path, begin: Saved
) -> Trainer:
    """Return the run as it was at ``begin``, in a folder of its own."""
    given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    if begin.path is None:  # a checkpoint brings the settings along
        given = from_plain(record.opening["config"] | given, LEDGER)
    config = dataclasses.replace(
        Config(**given), out=scratch / f"step-{begin.step}", resume=str(begin.path) if begin.path else None,
        data=data.dataset.source, ledger_every=0, log_every=0, report=False, quiet=True, threads=threads,
    )  # fmt: skip
    trainer = set_up(config, ranks, data=data.dataset)
    trainer.folder.close()
    return trainer


@contextlib.contextmanager
def _scratch(ranks: Ranks) -> Iterator[Path]:
    """Yield a folder that is gone afterwards, the same on all ranks of this host."""
    path = Path(ranks.on_rank0(lambda: tempfile.mkdtemp(prefix="cnnmpi-audit-")))
    try:
        yield path
    finally:
        if ranks.rank == 0:
            shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

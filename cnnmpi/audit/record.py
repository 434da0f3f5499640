"""What the folder of a run says: its ledger, its checkpoints, its settings, and whether they hold together."""

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cnnmpi import checkpoint
from cnnmpi.checkpoint import CheckpointError
from cnnmpi.common.files import open_regular
from cnnmpi.distributed import UserError
from cnnmpi.train import Config
from cnnmpi.train.config import experiment, from_plain, to_plain
from cnnmpi.train.ledger import LEDGER, SKIPPED, BrokenChainError, Entry, OtherVersionError, entries, plain_settings
from cnnmpi.train.settings import Execution
from cnnmpi.train.state import read_saved_run

LARGEST = 1 << 53  # step; a larger one is nobody's
MOST_CHANGES = 1000  # resumes on other hosts or with other code
NO_EXPERIMENT = {"data", "init", *(each.name for each in dataclasses.fields(Execution))}  # no settings of a ledger
NO_SHAPING = {"ledger", "every", "steps_per_epoch", "begins", "before", "changed"}  # in the lines that say what shapes
STATE = ("weights", "statistics", "optimizer")
UNKNOWN = "?"  # in the place of a verdict


@dataclass(frozen=True)
class Saved:
    """A checkpoint that belongs to the ledger: the computation can begin at its ``step``. Without a path, the seed."""

    step: int
    path: Path | None = None


@dataclass
class Record:
    """What the folder of a run says, and ``rows`` of what was checked: (what, "ok" or "WRONG" or "?", words).

    ``files`` are its checkpoints that belong to the ledger; ``init`` is what it began from, where that is at hand.
    """

    folder: Path
    init: Path | None = None
    chain: list[Entry] = field(default_factory=list)
    files: list[Saved] = field(default_factory=list)
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def note(self, what: str, wrong: str, right: str = "") -> None:
        """Write down a check: all is well unless there are words for what is ``wrong``."""
        self.rows.append((what, "WRONG" if wrong else "ok", wrong or right))

    def verdicts(self) -> set[str]:
        """Return the verdicts so far."""
        return {verdict for _, verdict, _ in self.rows}

    @property
    def opening(self) -> dict[str, Any]:
        """What shapes the run."""
        return self.chain[0].says

    @functools.cached_property
    def said(self) -> dict[int, dict[str, Any]]:
        """{step: the entry of that step}."""
        return {entry.says["step"]: entry.says for entry in self.chain if entry.step is not None}

    @functools.cached_property
    def changes(self) -> list[tuple[int, dict[str, Any]]]:
        """(step, what is otherwise from there on), in order: as after a resume on another processor."""
        changed = [entry.says for entry in self.chain if "changed" in entry.says]
        return [(says["changed"], {name: says[name] for name in says.keys() - NO_SHAPING}) for says in changed]

    def at(self, step: int) -> dict[str, Any]:
        """Return what shapes the steps after ``step``."""
        known = {name: value for name, value in self.opening.items() if name not in NO_SHAPING}
        for changed, news in self.changes:
            if changed <= step:
                known |= news
        return known

    def shaping(self, first: int, last: int) -> list[dict[str, Any]]:
        """Return all that shaped the steps after ``first`` up to ``last``: several, where it changed."""
        return [self.at(step) for step in (first, *(step for step, _ in self.changes if first < step < last))]

    def segments(self) -> list[tuple[Saved, Saved]]:
        """Return the parts of the run that can be computed again: from one checkpoint to the next, or to the end."""
        places = {saved.step: saved for saved in self.files}
        if self.opening["begins"] == 0 and (self.init or not self.opening.get("init")):
            places |= {0: Saved(0)}
        if max(self.said) > max(places, default=0):
            places[max(self.said)] = Saved(max(self.said))
        ordered = [places[step] for step in sorted(places)]
        return [*itertools.pairwise(ordered)]


def read(folder: Path, init: Path | None = None) -> Record:
    """Return the record of a run, and whether its ledger holds together, and its checkpoints and settings with it.

    Raises UserError where there is no ledger, and for a run that is still going on.
    """
    _refuse_a_running_one(folder)
    record, path = Record(folder, init), folder / LEDGER
    try:
        record.chain = [*entries(path, torn=True)]
        _check_entries(record)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: without its ledger a run cannot be checked") from None
    except OtherVersionError as error:
        raise UserError(f"{error}: it takes the version of cnnmpi that wrote it") from None
    except BrokenChainError as error:
        record.note("ledger", str(error).removeprefix(f"{path}: "))
        return record
    if not record.said:
        raise UserError(f"{path}: it has no entry of a step yet: let the run go on, by --resume")
    record.note("ledger", "", f"{len(record.chain)} entries to step {max(record.said)}, {record.chain[-1].hash}")
    if sum(len(entry.blob) for entry in record.chain) != path.stat().st_size:
        record.rows.append(("its end", UNKNOWN, "the last line was cut off, as by a kill: --resume writes it again"))
    if record.opening["begins"]:
        record.rows.append(("before", UNKNOWN, f"the ledger begins at step {record.opening['begins']}"))
    elif record.opening.get("init") and init is None:
        record.rows.append(
            ("before", UNKNOWN, "the run began from other weights, not from the seed: name them by --init")
        )
    try:
        with open_regular(folder / "config.toml") as file:
            content = tomllib.loads(file.read(1 << 20).decode(errors="surrogateescape"))
        settings = experiment(Config(**from_plain(content, "config.toml")))
        wrong = _other(plain_settings(to_plain(settings)), record.at(LARGEST)["config"])
    except (OSError, ValueError, UserError, KeyError, RecursionError) as error:
        wrong = str(error)
    record.note("config.toml", wrong)
    names = [folder / name for name in ("last.h5", "previous.h5", "best.h5")]
    for path in [*names, *sorted((folder / "kept").glob("epoch-*.h5"))]:
        if path.exists():
            _check(record, path)
    return record


def _check_entries(record: Record) -> None:
    """Raise BrokenChainError unless the ledger has just the entries that such a run writes, in their order."""
    opening = record.opening if record.chain else {}
    numbers = [opening.get(name) for name in ("every", "steps_per_epoch", "begins")]
    right = all(
        type(number) is int and least <= number < LARGEST for number, least in zip(numbers, (1, 1, 0), strict=True)
    )
    if not right or not isinstance(opening.get("data_sha256"), str) or not _shapes({"config": None} | opening):
        raise BrokenChainError("its first line does not say what shapes the run")
    newest, expected, count = int(opening["begins"]), int(opening["begins"]), 0
    for number, entry in enumerate(record.chain[1:], 2):
        if "changed" in entry.says and entry.step is None:
            changed = entry.says["changed"]
            if type(changed) is not int or not newest <= changed < expected or not _shapes(entry.says):
                raise BrokenChainError(f"line {number} is no change between its neighbours")
            newest, count = changed, count + 1
            if count > MOST_CHANGES:
                raise BrokenChainError(f"line {number} is one change more than the {MOST_CHANGES} that a run may have")
            continue
        losses = isinstance(entry.says.get("loss", SKIPPED), str)
        if entry.step != expected or not losses or not all(isinstance(entry.says.get(name), str) for name in STATE):
            raise BrokenChainError(f"line {number} is not the entry of step {expected}")
        newest, expected = expected, _next(record, expected)


def _shapes(says: dict[str, Any]) -> bool:
    """Return whether all that a line says of what shapes a run can be that; of settings, none is of how it is run."""
    texts = [says.get(name, {}) for name in ("code", "versions")]
    right = all(isinstance(each, dict) and all(isinstance(text, str) for text in each.values()) for each in texts)
    config = says.get("config", {})
    return right and isinstance(config, dict) and not {name.replace("-", "_") for name in config} & NO_EXPERIMENT


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
    places = [index for index, entry in enumerate(record.chain) if entry.hash == run.ledger]
    if run.step == record.opening["begins"] > 0 and not run.ledger:
        record.rows.append((name, UNKNOWN, f"step {run.step}, where the ledger begins: saved before there was one"))
        return
    if not min(record.said) <= run.step < _next(record, max(record.said)):
        behind = "before the ledger begins" if run.step < min(record.said) else "and the ledger does not reach there"
        record.rows.append((name, UNKNOWN, f"step {run.step}, {behind}"))
        return
    newest = max(step for step in record.said if step <= run.step)
    configs = [record.at(step)["config"] for step in (run.step - 1, run.step)]  # saved before a change, or after
    wrong = min((_other(plain_settings(to_plain(config)), said) for said in configs), key=len)
    if not places or [entry.step for entry in record.chain[: places[0] + 1] if entry.step is not None][-1:] != [newest]:
        wrong = f"step {run.step}: it is not of this ledger"
    elif run.data_sha256 != record.opening["data_sha256"]:
        wrong = "its data are not the ledger's"
    elif checkpoint.weights_digest(weights) != attributes.get("weights_sha256"):
        wrong = "its weights are not those that it names"
    if not wrong and run.step not in record.said:
        record.rows.append((name, UNKNOWN, f"step {run.step}, of which there is no entry"))
    else:
        record.note(name, wrong, f"step {run.step}")
    if not wrong:
        record.files.append(Saved(run.step, path))


def _next(record: Record, step: int) -> int:
    """Return the step of the entry after that of ``step``."""
    numbers: list[int] = [record.opening["every"], record.opening["steps_per_epoch"]]
    return min((step // each + 1) * each for each in numbers)


def _other(settings: dict[str, Any], said: dict[str, Any]) -> str:
    """Return which settings are not what the ledger says."""
    names = sorted(name for name in settings.keys() | said.keys() if settings.get(name) != said.get(name))
    return f"other {', '.join(names)} than the ledger's" if names else ""


def _refuse_a_running_one(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: name that of a run")
    with contextlib.suppress(OSError), open_regular(folder / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: the run is still going on: wait for its end") from None
        except OSError:
            pass  # a file system without locks

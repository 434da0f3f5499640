"""State an accuracy with its spread: train with several seeds, and compare settings by the same seeds.

python -m cnnmpi.study --runs 5 -- --data data/cifar10.h5
python -m cnnmpi.study --runs 5 --ranks 2 --against="--lr 0.2" -- --data data/cifar10.h5 --lr 0.06
python -m cnnmpi.study --runs 3 -- dense.py --epochs 5

What follows ``--`` is for cnnmpi.train, or is a script of your own that calls ``cnnmpi.fit``, and its arguments. A
study that was stopped goes on when it is started again.
"""

import functools
import hashlib
import json
import math
import shlex
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from cnnmpi import checkpoint
from cnnmpi.checkpoint import CheckpointError, write_atomically
from cnnmpi.common.lines import read_lines
from cnnmpi.console import command, complain, is_script, parted, printable, progress
from cnnmpi.distributed import UserError, find_launcher, split_words
from cnnmpi.machine import usable_cores
from cnnmpi.report import METRICS
from cnnmpi.train.jobs import Jobs
from cnnmpi.train.ledger import LEDGER, BrokenChainError, entries

PROGRAM = "cnnmpi.study"
STOPPED = 75  # the exit code of a run that was asked to stop, and can be resumed
MEASURES = ("val_acc", "test_acc", "val_loss", "test_loss")  # the first that a run has is compared
COMMON = {"--seed", "--out", "--resume"}  # what a study sets itself
# what must be the same in all runs of a set: of their ledgers, what is not the seed's; and the script, hooks included
SHAPING = ("config", "data_sha256", "network", "code", "script", "sources_sha256")


@dataclass(frozen=True)
class Study:
    """Train with the seeds 0, 1, ... and tell the mean, its spread, and what each run ended in."""

    runs: int = 5
    """How many seeds."""
    against: str | None = None
    """More arguments for a second set of runs with the same seeds, as --against="--lr 0.2": the difference is told."""
    out: Path = Path("runs/study")
    """Folder of the study: a folder for each run, study.md and study.json."""
    ranks: int = 1
    """Ranks of each run."""
    jobs: int = 1
    """Runs side by side, which share the cores."""
    mpirun: str = "mpirun"
    """The launcher of runs with several ranks, with any arguments of its own."""


@dataclass(frozen=True)
class Outcome:
    """What a run ended in: its ``value`` is that of the study's measure.

    ``shaped`` is what ``shaping`` finds in its ledger, and the sha256 of its script; {} without a ledger.
    """

    seed: int
    measure: str
    value: float
    minutes: float
    weights: str
    ledger: str
    shaped: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """The mean of n numbers, their standard deviation (of a sample), and half the width of the mean's 95 % interval."""

    n: int
    mean: float
    deviation: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return that of ``values``; NaN for what one number does not tell."""
        n, mean = len(values), statistics.fmean(values)
        if n < 2:
            return cls(n, mean, math.nan, math.nan)
        deviation = statistics.stdev(values)
        return cls(n, mean, deviation, student(n - 1) * deviation / math.sqrt(n))

    def __str__(self) -> str:
        if self.n < 2:
            return f"{self.mean:.4f} (one run tells no spread)"
        interval = f"95 % interval {self.mean - self.half:.4f} to {self.mean + self.half:.4f}"
        return f"mean {self.mean:.4f}, standard deviation {self.deviation:.4f}, {interval}, n = {self.n}"


@functools.cache
def student(df: int, level: float = 0.95) -> float:
    """Return t such that Student's distribution with ``df`` degrees of freedom is within -t..t with this probability.

    The density (Student, "The probable error of a mean", 1908), with x = sqrt(df) tan(u), is cos(u)^(df - 1) over a
    finite range: it is summed up there, and the place is found where ``level`` of it is reached.
    """
    u = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(u) ** (df - 1)
    reached = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(math.sqrt(df) * math.tan(np.interp(level * reached[-1], reached, u)))


class Runs:
    """The runs of one set of settings, each a job of ``jobs`` in a folder of its own below ``folder``."""

    def __init__(self, study: Study, folder: Path, arguments: Sequence[str], jobs: Jobs) -> None:
        self.study, self.folder, self.arguments, self.jobs = study, folder, list(arguments), jobs

    def train(self, seed: int) -> Outcome:
        """Return the outcome of a seed, which is trained if it has not been.

        Raises UserError, and KeyboardInterrupt where the run was asked to stop.
        """
        out, done = self.folder / f"seed-{seed}", self._done(seed)
        if not done.exists():
            out.mkdir(parents=True, exist_ok=True)
            script = self._script()
            self._start(seed, out)
            write_atomically(done, json.dumps(vars(self.look(seed, out, script)), indent=1).encode())
            self.compare()
        return self._read(done)

    def compare(self) -> None:
        """Compare what shaped those runs that are done. Raises UserError where that was not the same throughout."""
        paths = [self._done(seed) for seed in range(self.study.runs)]
        done = [outcome for path in paths if path.exists() and (outcome := self._read(path)).shaped]
        changed = [name for name in SHAPING if len({each for outcome in done for each in _texts(outcome, name)}) > 1]
        if not changed:
            return
        alike: dict[str, list[int]] = {}
        for outcome in done:
            alike.setdefault(json.dumps(outcome.shaped, sort_keys=True), []).append(outcome.seed)
        within = [outcome.seed for outcome in done if any(len(values) > 1 for values in outcome.shaped.values())]
        names = ", ".join(changed)
        if within:
            what = f"{names} changed while {_seeds(within)} ran"
        else:
            what = f"{' and '.join(map(_seeds, alike.values()))} differ in {names}"
        raise UserError(
            f"{self.folder}: {what}: remove seed-N and seed-N.json of those that are to be trained again, or name "
            "another --out"
        )

    def _done(self, seed: int) -> Path:
        return self.folder / f"seed-{seed}.json"

    def _read(self, done: Path) -> Outcome:
        try:
            return Outcome(**json.loads(done.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{done}: cannot be used ({error}): remove it, and the run is looked at again") from None

    def _script(self) -> dict[str, list[Any]]:
        path = Path(self.arguments[0]) if is_script(self.arguments) else None
        return {"script": [hashlib.sha256(path.read_bytes()).hexdigest()]} if path and path.is_file() else {}

    def _start(self, seed: int, out: Path) -> None:
        study = self.study
        words = [*find_launcher(study.mpirun), "-n", str(study.ranks)] if study.ranks > 1 else []
        words += [sys.executable, *([] if is_script(self.arguments) else ["-m", "cnnmpi.train"]), *self.arguments]
        words += ["--seed", str(seed), "--out", str(out), "--resume"]
        if not any(word.startswith("--threads") for word in self.arguments):
            words += ["--threads", str(max(1, usable_cores() // (study.ranks * study.jobs)))]
        with (self.folder / f"seed-{seed}.log").open("ab") as log:
            try:
                code = self.jobs.run(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            except OSError as error:
                raise UserError(f"{words[0]} cannot be started: {error.strerror}") from None
        if code == STOPPED or (code and self.jobs.asked):
            raise KeyboardInterrupt
        if code:
            said = (self.folder / f"seed-{seed}.log").read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"seed {seed} ended with code {code}: {' '.join(said)} ({log.name} has all of it)")

    def look(self, seed: int, out: Path, script: dict[str, list[Any]]) -> Outcome:
        """Return what the run in the folder ``out`` has left, now that it is done. Raises UserError."""
        try:
            lines, _ = read_lines(out / METRICS)
            _, attributes = checkpoint.load(out / "last.h5")
            last = lines[-1]
            measure = next(name for name in MEASURES if isinstance(last.get(name), float | int))
        except (OSError, CheckpointError, IndexError, StopIteration) as error:
            raise UserError(f"{out}: the run left no result: {error}") from None
        try:
            shaped = shaping(out / LEDGER) | script if (out / LEDGER).exists() else {}
        except (OSError, BrokenChainError) as error:
            raise UserError(f"{error}: remove {out}, and it is trained again") from None
        minutes = sum(float(line.get("seconds", 0)) for line in lines) / 60
        weights, ledger = (str(attributes.get(name, "")) for name in ("weights_sha256", "ledger"))
        return Outcome(seed, measure, float(last[measure]), minutes, weights, ledger, shaped)


def shaping(ledger: Path) -> dict[str, list[Any]]:
    """Return for each name of SHAPING its values in a ledger: more than one if a resumed run was shaped otherwise.

    Raises BrokenChainError and OSError.
    """
    found: dict[str, list[Any]] = {}
    for entry in entries(ledger, torn=True):
        for name in [name for name in SHAPING if name in entry.says]:
            value = entry.says[name]
            if name == "config":
                value = {setting: each for setting, each in value.items() if setting != "seed"}
            found.setdefault(name, []).append(value)
    return found


def _texts(outcome: Outcome, name: str) -> list[str]:
    return [json.dumps(value, sort_keys=True) for value in outcome.shaped.get(name, [])]


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def conduct(study: Study, arguments: Sequence[str]) -> str:
    """Do a study and return what it found, as Markdown; study.md and study.json hold it, too.

    Raises UserError, and KeyboardInterrupt where a signal asked for a stop: its runs have ended then.
    """
    _check(study, arguments)
    more = split_words("--against", study.against) if study.against is not None else None
    _claim(study, arguments)
    jobs = Jobs()
    sets = [Runs(study, study.out / "a", arguments, jobs)]
    if more is not None:
        sets.append(Runs(study, study.out / "b", [*arguments, *more], jobs))
    for runs in sets:
        runs.compare()
    pairs = [(runs, seed) for seed in range(study.runs) for runs in sets]
    outcomes: list[Outcome] = []
    stop = threading.Event()

    def one(runs: Runs, seed: int) -> Outcome | None:
        if stop.is_set() or jobs.asked:
            return None
        try:
            return runs.train(seed)
        except BaseException:
            stop.set()
            raise

    with jobs, ThreadPoolExecutor(study.jobs) as pool, progress(len(pairs), PROGRAM, "runs") as advance:
        try:
            for future in [pool.submit(one, runs, seed) for runs, seed in pairs]:
                if (outcome := future.result()) is not None:
                    outcomes.append(outcome)
                advance(1)
        except BaseException:  # no further run begins
            stop.set()
            raise
    if len(outcomes) < len(pairs):
        raise KeyboardInterrupt
    if len(measures := {outcome.measure for outcome in outcomes}) > 1:
        raise UserError(f"the runs have {' and '.join(sorted(measures))}, which cannot be compared")
    found = [outcomes[index :: len(sets)] for index in range(len(sets))]
    text = told(arguments, more, found)
    write_atomically(study.out / "study.md", text.encode(errors="backslashreplace"))
    content = {"arguments": list(arguments), "against": more, "runs": [[vars(each) for each in runs] for runs in found]}
    write_atomically(study.out / "study.json", json.dumps(content, indent=1).encode())
    return text


def _check(study: Study, arguments: Sequence[str]) -> None:
    against = split_words("--against", study.against or "")
    if study.runs < 1 or study.ranks < 1 or study.jobs < 1:
        raise UserError("--runs, --ranks and --jobs must be at least 1")
    if taken := sorted({word.partition("=")[0] for word in [*arguments, *against]} & COMMON):
        raise UserError(f"a study sets {', '.join(taken)} itself: leave them out")
    if study.ranks > 1:
        find_launcher(study.mpirun)


def _claim(study: Study, arguments: Sequence[str]) -> None:
    """Make the folder this study's; refuse that of another one."""
    wanted: dict[str, Any] = {"arguments": list(arguments), "against": study.against, "ranks": study.ranks}
    path = study.out / "arguments.json"
    try:
        study.out.mkdir(parents=True, exist_ok=True)
        if path.exists() and json.loads(path.read_text()) != wanted:
            raise UserError(f"--out {study.out} holds a study of other arguments ({path}): name another folder")
    except (OSError, ValueError) as error:
        raise UserError(f"--out {study.out} cannot be used: {getattr(error, 'strerror', None) or error}") from None
    write_atomically(path, json.dumps(wanted).encode())


def told(arguments: Sequence[str], more: Sequence[str] | None, found: Sequence[Sequence[Outcome]]) -> str:
    """Return the study as Markdown: a table of each set, its spread, and the paired difference of two sets."""
    parts = []
    for outcomes, words in zip(found, ([], more or []), strict=False):
        measure = outcomes[0].measure
        head = f"| seed | {measure} | minutes | weights_sha256 | ledger |\n|---|---|---|---|---|"
        rows = [
            f"| {o.seed} | {o.value:.4f} | {o.minutes:.1f} | {o.weights[:16]} | {o.ledger[:16]} |" for o in outcomes
        ]
        spread = Spread.of([outcome.value for outcome in outcomes])
        title = f"`{shlex.join([*arguments, *words])}`" if [*arguments, *words] else "the default settings"
        parts.append("\n".join([f"### {title}", "", head, *rows, "", f"{measure}: {spread}."]))
    if len(found) == 2:
        spread = Spread.of([second.value - first.value for first, second in zip(*found, strict=True)])
        words = ""
        if spread.n > 1:
            shown = abs(spread.mean) > spread.half
            words = f"; the interval {'leaves out 0' if shown else 'holds 0: no difference is shown'}"
        parts.append(f"Difference with the same seeds, second less first: {spread}{words}.")
    return "\n\n".join(parts) + "\n"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Conduct the study that ``argv`` asks for (the command line's if None). Returns the exit code."""
    own, arguments = parted(sys.argv[1:] if argv is None else argv)
    study = tyro.cli(Study, args=own, prog=f"python -m {PROGRAM}", description=__doc__)
    try:
        print(printable_lines(conduct(study, arguments)), end="")
    except (UserError, CheckpointError) as error:
        complain(PROGRAM, error)
        return 2
    except KeyboardInterrupt:
        complain(PROGRAM, f"stopped: start it again, and it goes on in {study.out}")
        return STOPPED
    return 0


def printable_lines(text: str) -> str:
    """Return ``text`` as a terminal may show it, line by line."""
    return "".join(f"{printable(line)}\n" for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())

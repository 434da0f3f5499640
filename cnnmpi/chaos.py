"""Prove that faults change nothing: train undisturbed, then again under random faults, and compare the weights.

python -m cnnmpi.chaos --faults 200 --ranks 4
python -m cnnmpi.chaos -- --model nets.py:Net             # a network of your own
python -m cnnmpi.chaos -- flowers.py                      # a script that calls cnnmpi.fit

Each fault strikes one rank while it computes a step, evaluates or saves; then the run is resumed on another number of
ranks. What strikes whom and when is drawn from ``--seed``; only the very instant is the machine's.
"""

import dataclasses
import hashlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tyro

from cnnmpi.checkpoint import weights_digest
from cnnmpi.console import command, is_script, parted, table
from cnnmpi.data import synthetic, write_hdf5
from cnnmpi.distributed import UserError, find_launcher
from cnnmpi.rng import generator
from cnnmpi.train import Trainer
from cnnmpi.train.__main__ import main as train
from cnnmpi.train.folder import find_checkpoint
from cnnmpi.train.ledger import LEDGER

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "usr1": signal.SIGUSR1}
KINDS = (*SIGNALS, "exception", "exit")
PLACES = ("step", "step", "save", "evaluation")  # steps twice as often
HANG_WARNING_S, HANG_LIMIT_S = 2.0, 5.0
ENDING = 10  # steps
JOB_S = 120  # no job may take longer
MARK = "CNNMPI_CHAOS"  # in the environment of all processes that a chaos run starts


@dataclass(frozen=True)
class Chaos:
    """Train under random faults and compare the result with that of an undisturbed run."""

    faults: int = 20
    """How many faults to inflict."""
    ranks: int = 4
    """Most ranks to start; each time a number from 1 to this is drawn."""
    seed: int = 0
    """Of what strikes whom and when."""
    minutes: float = 30.0
    """Inflict no more faults after this time."""
    mpirun: str = "mpirun"
    """The launcher, with any arguments of its own."""


@dataclass(frozen=True)
class Fault:
    """``kind`` strikes ``rank`` at the first ``place`` of its work from ``step`` on, ``delay`` seconds later."""

    kind: str
    place: str
    rank: int
    step: int
    delay: float


def arm(fault: Fault) -> None:
    """Let the fault strike this process, once: before the work of its rank at its place."""
    struck = False

    def meet(place: str, run: Trainer) -> None:
        nonlocal struck
        if struck or place != fault.place or run.ranks.rank != fault.rank or run.step < fault.step:
            return
        if fault.kind == "stop" and run.step > run.last_step - ENDING:
            return  # a process that stops after its work is done keeps mpirun waiting for ever
        struck = True
        if fault.kind == "exception":
            raise RuntimeError("chaos")
        if fault.kind == "exit":
            os._exit(3)
        strike = threading.Timer(fault.delay, os.kill, (os.getpid(), SIGNALS[fault.kind]))
        strike.daemon = True
        strike.start()

    def meeting(place: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def met(run: Trainer, *arguments: Any) -> Any:
            meet(place, run)
            return method(run, *arguments)

        return met

    for name, place in {"train_step": "step", "_evaluate": "evaluation", "_save": "save"}.items():
        setattr(Trainer, name, meeting(place, getattr(Trainer, name)))


def worker(fault: str, arguments: Sequence[str]) -> int:
    """Be a rank: train as ``arguments`` say, and be struck by the ``fault`` that is described in JSON."""
    arm(Fault(**json.loads(fault)))
    if not is_script(arguments):
        return train(arguments)
    sys.argv = list(arguments)
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")
    return 0


def draw_faults(seed: int, most_ranks: int) -> Iterator[tuple[int, Fault]]:
    """Yield (number of ranks, fault) without end; a fault's step counts from where its job begins."""
    draw = generator(seed, "chaos")
    while True:
        ranks = int(draw.integers(1, most_ranks + 1))
        kinds = [kind for kind in KINDS if ranks > 1 or kind != "stop"]  # a single process waits for nobody
        kind, place = str(draw.choice(kinds)), str(draw.choice(PLACES))
        yield ranks, Fault(kind, place, int(draw.integers(ranks)), int(draw.integers(6)), float(draw.uniform(0, 0.03)))


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    code: int
    seconds: float
    output: str


class Arena:
    """A small data set, and the jobs that train on it."""

    def __init__(self, folder: Path, mpirun: Sequence[str], arguments: Sequence[str] = ()) -> None:
        self.folder, self.mpirun, self.arguments, self.mark = folder, list(mpirun), list(arguments), uuid.uuid4().hex
        self.data = folder / "data.h5"
        write_hdf5(self.data, synthetic(train=400, test=600))

    def run(self, out: Path, ranks: int, fault: Fault) -> Outcome:
        """Start or resume the run in ``out``. Raises UserError for a job that hangs or leaves a process behind."""
        usual = {"data": self.data, "batch-size": 40, "epochs": 5, "threads": 1}
        given = {argument.split("=")[0].removeprefix("--") for argument in self.arguments}
        settings = {name: value for name, value in usual.items() if name not in given} | {
            "out": out, "checkpoint-every": 2, "agree-every": 3, "hang-warning": HANG_WARNING_S,
            "hang-limit": HANG_LIMIT_S, "resume": "auto",
        }  # fmt: skip
        words = [*self.mpirun, "-n", str(ranks)] if ranks > 1 else []
        words += [sys.executable, "-m", "cnnmpi.chaos", "--worker", json.dumps(dataclasses.asdict(fault))]
        words += self.arguments
        words += [f"--{name}={value}" for name, value in settings.items()]
        started = time.monotonic()
        job = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True, env=os.environ | {MARK: self.mark},
        )  # fmt: skip
        try:
            output, _ = job.communicate(timeout=JOB_S)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise UserError(f"a job with {ranks} ranks hung under {fault}") from None
        seconds = time.monotonic() - started
        if left := self.processes(patience=5):
            self.kill_all()
            raise UserError(f"{len(left)} processes were left behind by {fault}")
        return Outcome(job.returncode, seconds, output)

    def processes(self, patience: float = 0) -> list[psutil.Process]:
        """Return the processes of this arena that are still there after ``patience`` seconds."""
        deadline = time.monotonic() + patience
        while (left := [p for p in psutil.process_iter() if self._is_ours(p)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return bool(process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.Error:
            return False

    def kill_all(self) -> None:
        """Kill what is left."""
        for process in self.processes():
            process.kill()


NO_FAULT = Fault("none", "nowhere", 0, 0, 0)


def step_of(out: Path) -> int:
    """Return the step of the newest good checkpoint; 0 where there is none yet."""
    saved = find_checkpoint("auto", out, lambda text: None)
    return saved.run.step if saved else 0


def result_of(outcome: Outcome, out: Path) -> str | None:
    """Return the digests of the weights and of the ledger that a complete run has left in ``out``; None before that."""
    saved = find_checkpoint("auto", out, lambda text: None) if "\ndone: test_" in outcome.output else None
    if saved is None:
        return None
    weights = {name.removeprefix("model/"): array for name, array in saved.arrays.items() if name.startswith("model/")}
    ledger = out / LEDGER
    entries = f", and its ledger, {hashlib.sha256(ledger.read_bytes()).hexdigest()}" if ledger.exists() else ""
    return weights_digest(weights) + entries


def undisturbed(arena: Arena, out: Path, ranks: int) -> str:
    """Return the digests in which the run in ``out`` ends if nothing strikes it any more. Raises UserError."""
    outcome = arena.run(out, ranks, NO_FAULT)
    result = result_of(outcome, out)
    if outcome.code or result is None:
        raise UserError(f"a run that nothing struck ended with code {outcome.code}:\n{outcome.output[-3000:]}")
    return result


def chaos(config: Chaos, arguments: Sequence[str] = ()) -> int:
    """Do what ``Chaos`` says, print what was done, and return 0 if every run ended in the undisturbed weights."""
    mpirun = find_launcher(config.mpirun)
    begun = time.monotonic()
    head = ("fault", "ranks", "what", "rank", "at", "from step", "code", "seconds")
    rows: list[tuple[object, ...]] = []
    results: list[str] = []
    inflicted = 0
    with tempfile.TemporaryDirectory() as name:
        arena = Arena(Path(name), mpirun, arguments)
        expected = undisturbed(arena, Path(name) / "undisturbed", 1)
        faults = draw_faults(config.seed, config.ranks)
        while inflicted < config.faults and time.monotonic() - begun < 60 * config.minutes:
            out = Path(name) / f"run-{len(results)}"
            result: str | None = None
            while result is None and inflicted < config.faults and time.monotonic() - begun < 60 * config.minutes:
                ranks, fault = next(faults)
                first = step_of(out) if out.exists() else 0
                fault = dataclasses.replace(fault, step=first + fault.step)
                outcome = arena.run(out, ranks, fault)
                result = result_of(outcome, out)
                if outcome.code:  # otherwise the run was over before the fault
                    inflicted += 1
                    row = (inflicted, ranks, fault.kind, fault.rank, fault.place, first, outcome.code)
                    rows.append((*row, f"{outcome.seconds:.1f}"))
                    if result is None:
                        _check(fault, outcome)
            results.append(result or undisturbed(arena, out, config.ranks))
            if left := [path.name for path in out.iterdir() if path.name.endswith(".tmp")]:
                raise UserError(f"temporary files were left behind: {', '.join(left)}")
    print(table(head, rows))
    equal = sum(result == expected for result in results)
    minutes = (time.monotonic() - begun) / 60
    print(
        f"{inflicted} faults in {len(results)} runs, {minutes:.1f} minutes: {equal} of {len(results)} runs ended in "
        f"the weights of the undisturbed one, {expected}"
    )
    return 0 if equal == len(results) else 1


def _check(fault: Fault, outcome: Outcome) -> None:
    """Raise UserError unless a struck job ended as it should."""
    if fault.kind in ("term", "usr1") and outcome.code != 75:
        raise UserError(f"{fault} ended with code {outcome.code} rather than 75:\n{outcome.output[-3000:]}")
    if fault.kind == "stop" and f"rank {fault.rank} of" not in outcome.output:
        raise UserError(f"{fault}: the silent rank was not named:\n{outcome.output[-3000:]}")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (the process's if None). Returns 0, 1 for other weights, 2 for any failure."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["--worker"]:
        return worker(args[1], args[2:])
    own, arguments = parted(args)
    config = tyro.cli(Chaos, args=own, prog="cnnmpi.chaos", description=__doc__)
    try:
        return chaos(config, arguments)
    except UserError as error:
        print(f"cnnmpi: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

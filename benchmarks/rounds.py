"""Competitors take turns, so that a machine whose speed drifts slows all of them alike; medians are compared."""

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from cnnmpi.machine import FORCING_BLAS, blas_kernels, processor
from cnnmpi.models import MODELS


class Competitor:
    """A worker process; ``mpirun`` is put before its command."""

    def __init__(
        self, kind: str, model: str, batch: int, threads: int, mpirun: tuple[str, ...] = (), device: str = "cpu"
    ) -> None:
        command = [*mpirun, sys.executable, "-m", "benchmarks.worker", kind, model, str(batch), str(threads), device]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        self.steps = 1  # in a turn
        self.seconds: list[float] = []  # of a step, one for each turn
        self.failure = ""
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
            )
        except OSError as error:
            self.failure = str(error)
        else:
            self._answer()

    def ask(self, request: str) -> Any:
        """Send a request and wait for its answer; None once the process has failed."""
        if self.failure:
            return None
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended: the answer will say so
            print(request, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("answer "):  # others are the trainer's own words
                return json.loads(line.removeprefix("answer "))
        self.process.wait()
        self.errors.seek(0)
        self.failure = (self.errors.read().strip() or f"exit code {self.process.returncode}").splitlines()[-1]
        return None

    def close(self) -> None:
        """Let the process end."""
        if not self.failure:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait()


def take_turns(competitors: dict[str, Competitor], rounds: int, seconds: float) -> None:
    """Time every competitor ``rounds`` times in turn; a turn takes about ``seconds``."""
    for side in competitors.values():
        once = side.ask("steps 1")
        side.steps = max(1, round(seconds / once)) if once else 1
    for _ in range(rounds):
        for side in competitors.values():
            taken = side.ask(f"steps {side.steps}")
            if taken:
                side.seconds.append(taken / side.steps)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Lay out a table that Markdown understands and people can read."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in [header, *rows]]  # fmt: skip
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def ratios(sides: dict[str, Competitor], of: str, against: list[str]) -> str:
    """Say how many times as fast ``of`` was as each of ``against``: the median of the rounds' ratios."""
    words = []
    for name in against:
        if sides[of].seconds and sides[name].seconds:
            pairs = zip(sides[of].seconds, sides[name].seconds, strict=False)
            ratio = statistics.median(theirs / ours for ours, theirs in pairs)
            words.append(f"{ratio:.2f} times as fast as {name}")
    return f"{of} is " + ", ".join(words) if words else ""


def spread(seconds: list[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return f"{middle * 1e3:.1f} ({low * 1e3:.1f}-{high * 1e3:.1f})"


def options(about: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that all comparisons have."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="smallresnet")
    parser.add_argument("--batch", type=int, default=128, help="of all ranks together")
    parser.add_argument("--rounds", type=int, default=10)
    return parser


def refuse_slow_blas() -> None:
    """End where the environment forces OpenBLAS to kernels that it would not choose: the comparison would be unfair."""
    forced = [f"{name}={os.environ[name]}" for name in FORCING_BLAS if name in os.environ]
    if forced:
        sys.exit(
            f"{' '.join(forced)} forces OpenBLAS to other kernels than this processor's: the comparison would be "
            "unfair to NumPy. Run it again with: "
            f"env {' '.join('-u ' + name for name in FORCING_BLAS)} python -m benchmarks"
        )


def hardware() -> str:
    """Name the machine, the packages and the BLAS kernels that run."""
    try:
        import torch

        pytorch = f"PyTorch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})"
    except ImportError:
        pytorch = "no PyTorch"
    locked = getattr(sys, "_is_gil_enabled", lambda: True)()  # since Python 3.13
    python = platform.python_version() + ("" if locked else " without GIL")
    return (
        f"{datetime.date.today()}, {processor()}, {len(os.sched_getaffinity(0))} cores; Python {python}, "
        f"NumPy {np.__version__} with {blas_kernels()}, {pytorch}"
    )

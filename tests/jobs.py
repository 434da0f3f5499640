"""Starting the program as people do: command lines, mpirun, the processes of its ranks."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnmpi.train import Trainer

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
HANGS_S = 240  # no test waits longer; deadlines are there against hangs only, for machines may be busy
needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="no mpirun here: pip install 'cnnmpi[mpich]'")


def command(ranks: int, data: Path, out: Path, *extra: str) -> list[str]:
    start = [MPIRUN, "-n", str(ranks)] if ranks > 1 else []
    module = [sys.executable, "-m", "cnnmpi.train"]
    options = ["--data", str(data), "--out", str(out), "--batch-size", "40", "--epochs", "3", "--threads", "1"]
    options += ["--no-report"]  # a second of each job's time; test_report.py has its own
    return [*start, *module, *options, *extra]


def run(*args: str | Path, timeout: float = HANGS_S) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=timeout, check=False)


def digest(output: str) -> str:
    return re.search(
        r"^done: test_acc=0\.\d{4} weights_sha256=([0-9a-f]{64}) ledger=[0-9a-f]{64}$", output, re.MULTILINE
    )[1]


def start_and_wait(args: list[str], out: Path, name: str = "last.h5") -> subprocess.Popen[str]:
    """Start a job and wait for its first checkpoint, or for ``name``; previous.h5 comes with the second one."""
    job = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: (out / name).exists(), job)
    return job


def wait_until(condition: Callable[[], Any], job: subprocess.Popen[str]) -> None:
    """Wait while the ``job`` runs, until ``condition`` is true."""
    deadline = time.monotonic() + HANGS_S
    while not condition():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.02)


def rank_pids(out: Path) -> list[int]:
    """The processes that train into ``out``, but for mpirun and its helpers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0] == sys.executable.encode() and str(out).encode() in words:
            found.append(int(folder.name))
    return sorted(found)


def signal_all(pids: list[int], number: int) -> None:
    """Send a signal to processes, of which some may end as others receive it: mpirun ends what is left of a job."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def all_gone(out: Path) -> bool:
    """Whether the ranks that train into ``out`` end, now that mpirun has."""
    deadline = time.monotonic() + HANGS_S
    while (left := rank_pids(out)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left


def one_ulp(monkeypatch: pytest.MonkeyPatch, steps: range, rank: int = 0) -> None:
    """Let one weight of a ``rank`` be another one after the update of these steps, as by failing memory."""
    step = Trainer.train_step

    def altered(run: Trainer) -> float:
        loss = step(run)
        if run.step in steps and run.ranks.rank == rank:
            run.flat.params[7] = np.nextafter(run.flat.params[7], np.float32(9))
        return loss

    monkeypatch.setattr(Trainer, "train_step", altered)

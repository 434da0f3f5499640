"""The quick benchmarks run: what they measure is asserted nowhere."""

import os
import sys
from pathlib import Path

import pytest

from tests.jobs import MPIRUN, needs_mpirun, run

pytest.importorskip("torch")
pytestmark = pytest.mark.mpi_skip
QUICK = {"depthwise": ["--batch", "4"], "safety": ["--model", "simplecnn", "--steps", "1"]}  # the others take minutes


@needs_mpirun
@pytest.mark.parametrize("name", QUICK)
def test_a_benchmark_runs(name, monkeypatch):
    for variable in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):  # with which they refuse to compare
        monkeypatch.delenv(variable, raising=False)
    start = [MPIRUN, "-n", "2"] if name == "safety" else []
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    result = run(*start, sys.executable, "-m", f"benchmarks.{name}", *QUICK[name])
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout

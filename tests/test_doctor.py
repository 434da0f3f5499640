"""The doctor finds what is wrong, and says what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from cnnmpi import doctor
from cnnmpi.distributed import Ranks
from tests.jobs import MPIRUN, needs_mpirun, run

pytestmark = pytest.mark.mpi_skip


def diagnose(*args: str | Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    start = [MPIRUN, "-n", str(ranks)] if ranks > 1 else []
    return run(*start, sys.executable, "-m", "cnnmpi.doctor", "--mpirun", MPIRUN, *args)


@needs_mpirun
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_healthy_machine(ranks, data, tmp_path):
    result = diagnose("--data", data, "--out", tmp_path / "runs", ranks=ranks)
    lines = result.stdout.splitlines()
    subjects = [line.split()[1] for line in lines if line.startswith(("ok", "FAIL"))]
    assert {"ranks", "cores", "memory", "watchdog", "BLAS", "folder", "space", "data"} <= set(subjects)
    assert len(subjects) == len(set(subjects)), "rank 0 alone speaks"
    for subject in ("ranks", "watchdog", "folder", "space", "data"):
        assert any(line.startswith(f"ok   {subject}") for line in lines), result.stdout
    assert not (tmp_path / "runs").exists()


@needs_mpirun
def test_each_failure_has_a_remedy_and_sets_the_exit_code(tmp_path):
    result = diagnose("--data", "nowhere.h5", "--out", "/proc/nowhere")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    lines = result.stdout.splitlines()
    for index, line in enumerate(lines):
        if line.startswith("FAIL"):
            assert lines[index + 1].strip().startswith("-> ")
    assert any(line.startswith("FAIL data") and "nowhere.h5" in line for line in lines)
    assert any(line.startswith("FAIL folder") and "/proc/nowhere" in line for line in lines)


def test_an_mpirun_of_another_mpi_is_found(tmp_path):
    mpirun = tmp_path / "mpirun"
    mpirun.write_text('#!/bin/sh\nshift 2\n"$@"\n"$@"\n')  # starts two processes that know nothing of each other
    mpirun.chmod(0o755)
    assert "each of two processes is alone" in doctor.check_mpirun(str(mpirun)).text
    assert "no such command" in doctor.check_mpirun(str(tmp_path / "none")).text
    mpirun.write_text("#!/bin/sh\necho out of luck >&2\nexit 1\n")
    assert "out of luck" in doctor.check_mpirun(str(mpirun)).text


def test_forced_blas_kernels_are_told(monkeypatch):
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    assert not doctor.check_blas(Ranks()).remedy
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert doctor.check_blas(Ranks()).remedy.startswith("unset it")


def test_too_little_space_and_memory(monkeypatch, tmp_path):
    usage = type("usage", (), {"free": 1 << 20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert doctor.check_space(tmp_path / "deep" / "runs").remedy
    monkeypatch.setattr(doctor, "RANK_MIB", 1 << 40)
    assert doctor.check_memory(Ranks()).remedy

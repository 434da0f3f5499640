"""The doctor finds what is wrong, and says what to do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cnnmpi import doctor
from cnnmpi.distributed import Ranks
from cnnmpi.machine import Allowance
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


NETWORK = """
import cnnmpi
from cnnmpi.layers import Conv2d, Flatten, GlobalAvgPool2d, Linear, Sequential

class Net(cnnmpi.Model):
    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.body = Sequential(Conv2d(in_channels, 4, 3), GlobalAvgPool2d(), Linear(4, num_classes))

class Wrong(Net):
    def __init__(self, in_channels, num_classes):
        super().__init__(in_channels, num_classes + 1)

class Slip(Net):
    def backward(self, dout):
        return dout.missing
"""


@needs_mpirun
def test_a_network_of_ones_own_is_tried_with_the_data(data, tmp_path):
    (tmp_path / "nets.py").write_text(NETWORK)
    result = diagnose("--data", data, "--out", tmp_path, "--model", f"{tmp_path}/nets.py:Net", ranks=2)
    assert f"ok   sources   {tmp_path}/nets.py:Net is the same on all ranks" in result.stdout
    weights = 4 * 3 * 9 + 4 + 4 * 10 + 10
    assert f"ok   network   {tmp_path}/nets.py:Net: {weights} weights learn; a shard of 16 images" in result.stdout
    assert "which take up to 1 MiB" in result.stdout, "the checkpoints of this network, not of the largest one"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Wrong", r"--model \S*: its forward gives \(2, 11\) for images .*; expected \(2, 10\)"),
        ("Slip", r"--model \S* fails on images .*: AttributeError: .* \(\S*nets.py, line 16\)"),
        ("None", r"--model \S*: \S* has no None; it has Net, Wrong, Slip"),
    ],
)
def test_a_network_that_cannot_be_trained_is_named_with_its_line(data, tmp_path, name, text):
    (tmp_path / "nets.py").write_text(NETWORK)
    finding, size = doctor.check_network(f"{tmp_path}/nets.py:{name}", str(data))
    assert re.match(text, finding.text) and finding.remedy and size == 0


def test_a_network_that_differs_between_ranks_is_found(tmp_path):
    class Two(Ranks):
        def gather(self, value):
            return [value, "another"]

    (tmp_path / "nets.py").write_text(NETWORK)
    finding = doctor.check_sources(Two(), f"{tmp_path}/nets.py:Net")
    assert "not the same on all ranks" in finding.text and "copy the file" in finding.remedy


def test_an_mpirun_of_another_mpi_is_found(tmp_path):
    mpirun = tmp_path / "mpirun"
    mpirun.write_text('#!/bin/sh\nshift 2\n"$@"\n"$@"\n')  # starts two processes that know nothing of each other
    mpirun.chmod(0o755)
    assert "each of two processes is alone" in doctor.check_mpirun(str(mpirun)).text
    for text, words in ((str(tmp_path / "none"), "no such command"), ("a 'b", "no closing quotation")):
        finding = doctor.check_mpirun(text)
        assert words in finding.text and "name one with --mpirun" in finding.remedy
    mpirun.write_text('#!/bin/sh\necho out of luck: "$1" >&2\nexit 1\n')
    assert "out of luck: --quiet" in doctor.check_mpirun(f"{mpirun} --quiet").text


@needs_mpirun
def test_what_two_ranks_print_at_the_same_time_is_no_finding(tmp_path, monkeypatch):
    noise = "import os; [os.write(1, b'size 1 \\xff\\xfe\\n') for _ in range(3)]"
    (tmp_path / "sitecustomize.py").write_text(noise)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    assert not doctor.check_mpirun(MPIRUN).remedy
    torch = doctor.check_torch()
    assert torch.text.startswith("PyTorch ") and not torch.remedy


def test_a_launcher_that_cannot_be_started_or_speaks_another_encoding(tmp_path):
    mpirun = tmp_path / "mpirun"
    mpirun.write_bytes(b"\x00\x01 no program")
    mpirun.chmod(0o755)
    assert "cannot be started" in doctor.check_mpirun(str(mpirun)).text
    mpirun.write_bytes(b"#!/bin/sh\nprintf 'k\\366nnte nicht\\n' >&2\nexit 1\n")
    assert "nnte nicht" in doctor.check_mpirun(str(mpirun)).text


def test_cores_tell_of_quotas_and_of_more_cores_than_shards(monkeypatch):
    monkeypatch.setattr("cnnmpi.distributed.ranks.allowance", lambda: Allowance(frozenset(range(64))))
    monkeypatch.setattr(doctor, "allowance", lambda: Allowance(frozenset(range(64)), "/jobs/7", 2.5))
    text = doctor.check_cores(Ranks()).text
    assert "64 are seen, of whose time /jobs/7 grants 2.5" in text and "up to 8 ranks (--shards 8)" in text
    monkeypatch.setattr("cnnmpi.distributed.ranks.allowance", lambda: Allowance(frozenset(range(64)), "/jobs/7", 2.5))
    assert doctor.check_cores(Ranks()).text.startswith("2 cores: 64 are seen")
    assert Ranks().default_threads() == 2


def test_inside_the_shell_of_a_slurm_allocation_it_asks_for_mpirun(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    doctor.main(["--mpirun", str(tmp_path / "none"), "--data", "synthetic", "--out", str(tmp_path / "runs")])
    assert "mpirun" in capsys.readouterr().out.splitlines()[0]


def test_forced_blas_kernels_are_told(monkeypatch):
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    assert not doctor.check_blas(Ranks()).remedy
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert doctor.check_blas(Ranks()).remedy.startswith("unset it")


def test_too_little_space_and_memory(monkeypatch, tmp_path):
    usage = type("usage", (), {"free": 1 << 20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert doctor.check_space(tmp_path / "deep" / "runs", 0).remedy, "of the largest reference model"
    assert doctor.check_space(tmp_path / "deep" / "runs", 10**6).remedy
    assert not doctor.check_space(tmp_path / "deep" / "runs", 1000).remedy
    monkeypatch.setattr(doctor, "RANK_MIB", 1 << 40)
    assert doctor.check_memory(Ranks()).remedy

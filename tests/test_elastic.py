"""The supervisor: restarts after a lost rank, hosts that do not answer, and when it gives up."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cnnmpi import Config, elastic, set_up
from cnnmpi.checkpoint import load
from cnnmpi.distributed import Ranks, UserError
from cnnmpi.elastic import Elastic, answering, launcher, main, read_hosts, supervise
from cnnmpi.train.jobs import Jobs
from tests.jobs import HANGS_S, MPIRUN, all_gone, command, digest, needs_mpirun, rank_pids, run, wait_until

pytestmark = pytest.mark.mpi_skip


def job(data: Path, out: Path, *extra: str) -> list[str]:
    training = command(1, data, out, "--checkpoint-every", "1", "--epochs", "3")[3:]
    return [sys.executable, "-m", "cnnmpi.elastic", "--mpirun", MPIRUN, "--pause", "0", *extra, "--", *training]


@pytest.mark.fault
@needs_mpirun
def test_lost_ranks_are_replaced_and_the_result_is_the_undisturbed_one(data, tmp_path, undisturbed):
    out = tmp_path / "run"
    process = subprocess.Popen(job(data, out, "--ranks", "3"), stdout=subprocess.PIPE, text=True)
    killed: set[int] = {process.pid}
    for _ in range(2):
        wait_until(lambda: len(set(rank_pids(out)) - killed) >= 3 and (out / "previous.h5").exists(), process)
        pids = sorted(set(rank_pids(out)) - killed)
        os.kill(pids[1], signal.SIGKILL)
        killed.update(pids)
    output, _ = process.communicate(timeout=HANGS_S)
    assert process.returncode == 0 and digest(output) == undisturbed
    assert "restart 2 of 10" in output and "done; 2 restarts" in output


@needs_mpirun
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_and_ends_the_supervision(number, data, tmp_path, undisturbed):
    out = tmp_path / "run"
    rarely = ["--checkpoint-every", "1000"]  # so that what is saved after a few steps is saved for the signal's sake
    process = subprocess.Popen([*job(data, out, "--ranks", "2"), *rarely], stdout=subprocess.PIPE, text=True)
    wait_until((out / "last.h5").exists, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=HANGS_S)
    assert process.returncode != 0 and "0 restarts" in output and all_gone(out)
    assert 1 <= load(out / "last.h5")[1]["step"] < 30
    assert digest(run(*command(1, data, out, "--resume")).stdout) == undisturbed


COUNTS = """
import signal, sys, time
def count(number, frame):
    open(sys.argv[1], "a").write("x")
signal.signal(signal.SIGINT, count)
open(sys.argv[1], "w").close()
while True:
    time.sleep(1)
"""


def test_a_job_that_heeds_no_ctrl_c_is_killed_after_the_second(tmp_path, monkeypatch):
    monkeypatch.setattr("cnnmpi.train.jobs.AGAIN_S", 0.1)
    monkeypatch.setattr("cnnmpi.train.jobs.ENDING_S", 0.5)
    heard, ended = tmp_path / "heard", threading.Event()

    def press() -> None:
        while not heard.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
        if not ended.wait(1.0):  # the first one alone kills nothing
            os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=press)
    with Jobs() as jobs:
        pressing.start()
        code = jobs.run([sys.executable, "-c", COUNTS, str(heard)])
        ended.set()
        pressing.join()
    assert code == -signal.SIGKILL and heard.read_text() == "xx" and jobs.asked == [signal.SIGINT] * 2


@needs_mpirun
def test_what_a_restart_cannot_mend_is_not_restarted(tmp_path, capfd):
    arguments = ["--mpirun", MPIRUN, "--ranks", "2", "--", "--data", "nowhere.h5", "--out", str(tmp_path / "run")]
    assert main(arguments) == 2
    output = capfd.readouterr()
    assert "refused; 0 restarts" in output.out and output.err.count("nowhere.h5: no such file") == 1


def test_it_gives_up_after_max_restarts(tmp_path):
    count = tmp_path / "count"
    launcher = tmp_path / "mpirun"
    launcher.write_text(f"#!/bin/sh\necho x >> {count}\nexit 9\n")
    launcher.chmod(0o755)
    with pytest.raises(UserError, match="--max-restarts 3 is reached"):
        supervise(Elastic(ranks=2, max_restarts=3, mpirun=str(launcher), pause=0), [])
    assert count.read_text().count("x") == 4


def test_hosts_are_read_in_both_forms_and_those_that_do_not_answer_are_left_out(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two\nnode1:4  # four\nnode2 slots=2\nnode3\n")
    hosts = read_hosts(path)
    assert hosts == {"node1": 4, "node2": 2, "node3": 1}
    probe = shlex.join([sys.executable, "-c", "import sys; sys.exit(sys.argv[1] == 'node2')", "{host}"])
    assert answering(hosts, probe) == {"node1": 4, "node3": 1}
    with pytest.raises(UserError, match="only 5 ranks can be started, --min-ranks is 6"):
        supervise(Elastic(hosts=path, probe=probe, min_ranks=6, mpirun=sys.executable), [])
    path.write_text("node1 4\n")
    with pytest.raises(UserError, match="line 1: expected"):
        read_hosts(path)
    path.write_text("# none\n")
    with pytest.raises(UserError, match="names no host"):
        read_hosts(path)


@pytest.mark.parametrize(
    "says, option, line", [("mpirun (Open MPI) 5.0", "--hostfile", "a slots=2"), ("HYDRA", "-f", "a:2")]
)
def test_the_host_list_is_written_as_the_launcher_reads_it(says, option, line, tmp_path):
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(f"#!/bin/sh\necho '{says}'\n")
    mpirun.chmod(0o755)
    args = launcher(Elastic(mpirun=f"{mpirun} --quiet"), 2, {"a": 2}, tmp_path)
    assert args == [str(mpirun), "--quiet", "-n", "2", option, str(tmp_path / "hosts")]
    assert (tmp_path / "hosts").read_text() == f"{line}\n"


def starts(tmp_path: Path, *extra: str, **settings) -> int:
    """How many ranks a launcher is asked for that notes it and is content."""
    launcher, note = tmp_path / "mpirun", tmp_path / "note"
    launcher.write_text(f'#!/bin/sh\necho "$2" > {note}\n')
    launcher.chmod(0o755)
    arguments = ["--out", str(tmp_path / "run"), *extra]
    assert supervise(Elastic(mpirun=str(launcher), probe="true", **settings), arguments) == 0
    return int(note.read_text())


def test_as_many_ranks_start_as_there_are_cores_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(elastic, "usable_cores", lambda: 64)
    assert starts(tmp_path) == 8
    assert starts(tmp_path, "--shards", "12") == starts(tmp_path, "--shards=12") == 12
    settings, hosts = tmp_path / "settings.toml", tmp_path / "hosts"
    settings.write_text("shards = 24\n")
    assert starts(tmp_path, "--config", str(settings)) == 24
    assert starts(tmp_path, "--shards", "100") == 64
    assert starts(tmp_path, ranks=9) == 9, "what is asked for is left to cnnmpi.train"
    hosts.write_text("a:16\nb:16\n")
    assert starts(tmp_path, hosts=hosts) == 8
    monkeypatch.setattr(elastic, "usable_cores", lambda: 3)
    assert starts(tmp_path) == 3


def test_a_resumed_run_has_the_shards_of_its_checkpoint(tmp_path, data, monkeypatch):
    monkeypatch.setattr(elastic, "usable_cores", lambda: 64)
    set_up(Config(data=str(data), out=tmp_path / "run", batch_size=40, shards=5, max_steps=0), Ranks()).run()
    assert starts(tmp_path) == 5


def test_a_bad_command_line_or_launcher_ends_in_one_line(tmp_path, capsys):
    launcher = tmp_path / "mpirun"
    launcher.write_bytes(b"\x00\x01 no program")
    launcher.chmod(0o755)
    (tmp_path / "hosts").write_text("a\n")
    hosts = ["--hosts", str(tmp_path / "hosts")]
    for arguments, text in [
        (["--mpirun", str(launcher), "--", "--out", str(tmp_path / "run")], "cannot be started"),
        (["--mpirun", "gone -n"], "--mpirun gone -n: no such command"),
        (["--mpirun", "a 'b"], "--mpirun a 'b: no closing quotation"),
        ([*hosts, "--probe", "a 'b"], "--probe a 'b: no closing quotation"),
        ([*hosts, "--probe", ""], "--probe is empty"),
        (["--mpirun", str(launcher), "--", "--shards", "0"], "--shards must be"),
        (["--mpirun", str(launcher), "--", "--config", "nowhere.toml"], "nowhere.toml"),
    ]:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1


def test_resume_is_its_own_to_give(capsys):
    assert main(["--", "--resume", "x"]) == 2
    assert "leave --resume out" in capsys.readouterr().err

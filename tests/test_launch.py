"""The program as people start it: command lines, mpirun, ranks that die, Ctrl-C. Each has a hard time limit."""

import os
import re
import select
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnnmpi.__main__ import main as cnnmpi
from cnnmpi.checkpoint import load
from cnnmpi.evaluate import main as evaluate
from cnnmpi.predict import main as predict
from cnnmpi.train.__main__ import main as train
from tests.jobs import (
    HANGS_S,
    MPIRUN,
    all_gone,
    command,
    digest,
    needs_mpirun,
    rank_pids,
    run,
    signal_all,
    start_and_wait,
)

pytestmark = pytest.mark.mpi_skip  # mpirun does not start inside mpirun


@needs_mpirun
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_mpirun_ends_in_the_digest_of_one_process(ranks, data, tmp_path, undisturbed):
    result = run(*command(ranks, data, tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert digest(result.stdout) == undisturbed
    assert result.stdout.count("epoch 1 ") == 1, "rank 0 alone speaks"


HELD = """
import sys, time
from pathlib import Path
from cnnmpi.train.__main__ import main
from cnnmpi.train.trainer import Trainer
step = Trainer.train_step
def held(self):
    while self.step == 5 and self.ranks.rank == 0 and not Path({go!r}).exists():
        time.sleep(0.01)
    return step(self)
Trainer.train_step = held
sys.exit(main(sys.argv[1:]))
"""


def held(ranks: int, data: Path, out: Path, *extra: str) -> list[str]:
    """The command line of a job that waits at step 5 for ``let_go``: so it cannot end before the test has acted."""
    args = command(ranks, data, out, *extra)
    at = args.index("-m")
    args[at : at + 2] = ["-c", HELD.format(go=f"{out}.go")]
    return args


def let_go(out: Path) -> None:
    Path(f"{out}.go").touch()


@pytest.mark.fault
@needs_mpirun
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_kill_9_of_any_rank_ends_the_job_and_resume_on_other_ranks_is_exact(victim, data, tmp_path, undisturbed):
    out = tmp_path / "run"
    job = start_and_wait(held(3, data, out, "--checkpoint-every", "1"), out, "previous.h5")  # with a momentum
    pids = rank_pids(out)
    assert len(pids) == 3
    os.kill(pids[victim], signal.SIGKILL)
    job.communicate(timeout=HANGS_S)
    assert job.returncode != 0 and all_gone(out)
    resumed = run(*command(2, data, out, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert digest(resumed.stdout) == undisturbed


FAILING = """
import os, signal, sys
from cnnmpi.train import trainer
from cnnmpi.train.__main__ import main
step = trainer.Trainer.train_step
def failing(self):
    if self.step == 5 and self.ranks.rank == 1:
        {failure}
    return step(self)
trainer.Trainer.train_step = failing
if {unprotected}:
    import contextlib
    import cnnmpi.distributed.job as d, cnnmpi.train.entry as m
    m.failing_together = lambda ranks: contextlib.nullcontext()
    d._install_hooks = lambda ranks: None
sys.exit(main(sys.argv[1:]))
"""


def failing(failure: str, data: Path, out: Path, unprotected: bool = False) -> list[str]:
    args = command(3, data, out)
    at = args.index("-m")
    args[at : at + 2] = ["-c", FAILING.format(failure=failure, unprotected=unprotected)]
    return args


@pytest.mark.fault
@needs_mpirun
@pytest.mark.parametrize(
    "failure, text",
    [
        ("raise RuntimeError('lost my marbles')", "lost my marbles"),
        ("sys.exit(3)", "rank 1"),
        ("os._exit(3)", ""),
        ("os.kill(os.getpid(), signal.SIGSEGV)", ""),
    ],
)
def test_a_failure_on_one_rank_ends_the_job_and_is_explained_once(failure, text, data, tmp_path):
    result = run(*failing(failure, data, tmp_path / "run"))
    assert result.returncode != 0
    assert text in result.stderr and result.stderr.count("Traceback") == int("raise" in failure)


@pytest.mark.fault
@needs_mpirun
def test_without_the_protection_an_exception_hangs_the_job(data, tmp_path):
    out = tmp_path / "run"
    job = start_and_wait(failing("raise RuntimeError('lost')", data, out, unprotected=True), out)
    assert job.stderr is not None
    while "RuntimeError: lost" not in job.stderr.readline():
        assert job.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        job.communicate(timeout=5)  # ten times as long as the protection takes
    signal_all(rank_pids(out), signal.SIGKILL)
    job.communicate(timeout=HANGS_S)


ABORTING = """
import os, sys, types
from cnnmpi.distributed import Ranks, ranks as module
module.READ_S = float(sys.argv[1])
ranks = Ranks()
ranks.comm, ranks.size = types.SimpleNamespace(Abort=os._exit), 2
print("the explanation", file=sys.stderr, flush=True)
ranks.abort(3)
"""


@pytest.mark.fault
def test_an_abort_waits_until_the_launcher_has_read_what_was_said():
    """mpirun forgets what it has not read when it hears of the abort: on a busy machine, all of it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    waiting = subprocess.Popen([sys.executable, "-c", ABORTING, "100"], **pipes)
    assert waiting.stderr is not None
    select.select([waiting.stderr], [], [], HANGS_S)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(timeout=1)
    assert waiting.communicate(timeout=HANGS_S)[1] == "the explanation\n" and waiting.returncode == 3
    with subprocess.Popen([sys.executable, "-c", ABORTING, "0.1"], **pipes) as unread:
        assert unread.wait(timeout=HANGS_S) == 3, "but not for ever"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_resume(number, data, tmp_path, undisturbed):
    out = tmp_path / "run"
    job = start_and_wait(held(1, data, out, "--checkpoint-every", "1"), out)
    job.send_signal(number)
    let_go(out)
    output, errors = job.communicate(timeout=HANGS_S)
    assert job.returncode == 75, errors
    assert f"--resume --out {out}" in output
    assert digest(run(*command(1, data, out, "--resume")).stdout) == undisturbed


def test_a_hangup_that_nohup_ignores_stays_ignored(data, tmp_path, undisturbed):
    out = tmp_path / "run"
    job = start_and_wait(["nohup", *held(1, data, out)], out)
    job.send_signal(signal.SIGHUP)
    let_go(out)
    output, errors = job.communicate(timeout=HANGS_S)
    assert job.returncode == 0 and digest(output) == undisturbed, errors


DEAF = """
import hashlib, sys
from cnnmpi.data import DataLoader
from cnnmpi.train import inputs, signals
from cnnmpi.train.__main__ import main
def call_a_library():
    print("deaf", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # half an hour, without Python's lock
signals.PATIENCE_S, signals.TIMES = 1.0, 0
batch, read = DataLoader.batch, inputs.read_hdf5
def deaf_batch(self, step, shard):
    if (step, shard) == (5, 7):
        call_a_library()
    return batch(self, step, shard)
def deaf_read(*args, **options):
    call_a_library()
{place}
sys.exit(main(sys.argv[1:]))
"""


def start_deaf(ranks: int, data: Path, out: Path, place: str) -> subprocess.Popen[str]:
    """Start a job and wait until its last rank is inside a library call that does not return."""
    args = command(ranks, data, out, "--checkpoint-every", "1")
    at = args.index("-m")
    args[at : at + 2] = ["-c", DEAF.format(place=place)]
    job = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert any("deaf" in line for line in job.stdout)
    return job


@pytest.mark.fault
@needs_mpirun
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_ends_a_job_in_which_a_library_call_does_not_return(ranks, data, tmp_path, undisturbed):
    out = tmp_path / "run"
    job = start_deaf(ranks, data, out, "DataLoader.batch = deaf_batch")
    os.kill(rank_pids(out)[-1], signal.SIGTERM)
    _, errors = job.communicate(timeout=HANGS_S)
    assert job.returncode != 0 and "SIGTERM asked to stop, but step 5 does not end" in errors
    assert all_gone(out)
    assert digest(run(*command(2, data, out, "--resume")).stdout) == undisturbed


@pytest.mark.fault
def test_sigterm_ends_a_process_whose_data_never_come(data, tmp_path):
    job = start_deaf(1, data, tmp_path / "run", "inputs.read_hdf5 = deaf_read")
    job.terminate()
    job.communicate(timeout=HANGS_S)
    assert job.returncode == -signal.SIGTERM and not (tmp_path / "run").exists()


@pytest.mark.fault
@pytest.mark.parametrize("shell", ["{} > /dev/full", "{} >&-", "{} 2>&- >&-", "{} | head -1"])
def test_a_run_goes_on_whatever_becomes_of_its_output(shell, data, tmp_path, undisturbed):
    out = tmp_path / "run"
    line = shell.format(shlex.join(command(1, data, out)))
    result = run("bash", "-c", f"set -o pipefail; {line}")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert load(out / "last.h5")[1]["weights_sha256"] == undisturbed
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.fault
@needs_mpirun
def test_a_signal_to_one_rank_stops_all(data, tmp_path, undisturbed):
    out = tmp_path / "run"
    job = start_and_wait(held(2, data, out, "--checkpoint-every", "1"), out)
    os.kill(rank_pids(out)[1], signal.SIGUSR1)
    let_go(out)
    output, _ = job.communicate(timeout=HANGS_S)
    assert job.returncode != 0 and "saved" in output
    assert digest(run(*command(3, data, out, "--resume")).stdout) == undisturbed


@pytest.mark.fault
@needs_mpirun
@pytest.mark.parametrize(
    "extra, text",
    [
        (["--modle", "x"], "--modle"),
        (["--model", "vgg"], "vgg"),
        (["--lr", "fast"], "fast"),
        (["--shards", "1"], "--shards 2"),
        (["--data", "nowhere.h5"], "nowhere.h5"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--out", "/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_bad_command_lines_are_explained_once_without_a_traceback(extra, text, data, tmp_path):
    result = run(*command(2, data, tmp_path / "run", *extra))
    assert result.returncode != 0
    everything = result.stdout + result.stderr
    assert text in everything and "Traceback" not in everything
    assert len(re.findall("cnnmpi: error|Unrecognized|invalid choice|Error parsing", everything)) <= 2


@needs_mpirun
def test_help_under_mpirun_is_shown_once_and_ends_well(data, tmp_path):
    result = run(*command(2, data, tmp_path / "run", "--help"))
    assert result.returncode == 0 and result.stdout.count("--checkpoint-every") == 1
    assert "Abort" not in result.stderr


def test_help_and_the_console_entry(capsys):
    assert cnnmpi([]) == 2 and cnnmpi(["fly"]) == 2 and cnnmpi(["--help"]) == 0
    assert "evaluate" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        train(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    flags = "model epochs max-steps batch-size shards optimizer lr seed backend device threads data out resume"
    for flag in [*flags.split(), "checkpoint-every", "config"]:
        assert f"--{flag}" in text


def test_evaluate_and_predict(data, tmp_path, capsys):
    out = tmp_path / "run"
    code = train(["--data", str(data), "--out", str(out), "--epochs", "1", "--batch-size", "40", "--threads", "1"])
    accuracy = re.search(r"test_acc=(\S+)", capsys.readouterr().out)[1]
    assert code == 0
    assert evaluate([str(out / "last.h5"), "--data", str(data)]) == 0
    text = capsys.readouterr().out
    assert f"accuracy {accuracy}" in text and "confusion matrix" in text
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)).save(picture)
    assert predict([str(out / "last.h5"), str(picture), "--top", "10"]) == 0
    line = capsys.readouterr().out
    shares = [float(share) for share in re.findall(r"([\d.]+)%", line)]
    assert line.startswith(str(picture)) and len(shares) == 10 and abs(sum(shares) - 100) < 1
    (tmp_path / "text.png").write_text("no image")
    for arguments in (
        [str(out / "last.h5"), str(tmp_path / "text.png")],
        [str(out / "last.h5"), str(tmp_path / "missing.png")],
        [str(data), str(picture)],
    ):
        assert predict(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert evaluate([str(tmp_path / "none.h5"), "--data", str(data)]) == 2
    assert "none.h5" in capsys.readouterr().err


# -- the files in launch/ ----------------------------------------------------------------------------------------------

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPT = """
import sys
import cnnmpi
sys.exit(cnnmpi.fit(cnnmpi.SimpleCNN))
"""


def launched(name: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a file of launch/ with the words ``python`` and ``mpirun`` meaning those of the tests."""
    path = os.pathsep.join([str(Path(sys.executable).parent), str(Path(MPIRUN).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path} | environment
    words = ["bash", str(LAUNCH / name), *map(str, arguments)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=HANGS_S, check=False)


@needs_mpirun
def test_local_sh_starts_the_trainer_or_a_script(data, tmp_path):
    (tmp_path / "own.py").write_text(SCRIPT)
    options = ["--data", data, "--batch-size", "40", "--epochs", "1", "--threads", "1", "--out"]
    trainer = launched("local.sh", "2", *options, tmp_path / "trainer")
    script = launched("local.sh", "3", tmp_path / "own.py", *options, tmp_path / "script")
    assert trainer.returncode == script.returncode == 0, trainer.stderr + script.stderr
    assert "; 2 ranks " in trainer.stdout and "; 3 ranks " in script.stdout
    assert digest(trainer.stdout) == digest(script.stdout)


def test_the_slurm_file_starts_the_trainer_or_a_script_and_requeues_what_was_stopped(tmp_path):
    for name, code in ("srun", 75), ("scontrol", 0):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    slurm = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    stopped = launched("slurm.sbatch", "--epochs", "2", **slurm)
    assert stopped.returncode == 75
    srun, scontrol = stopped.stdout.splitlines()
    assert srun.endswith(" python -m cnnmpi.train --out runs/slurm-7 --resume auto --epochs 2")
    assert scontrol == "scontrol requeue 7"
    script = launched("slurm.sbatch", "own.py", "--epochs", "2", **slurm)
    assert script.stdout.splitlines()[0].endswith(" python own.py --out runs/slurm-7 --resume auto --epochs 2")

"""What happens to real jobs, and what must come of it: the same weights, or a clear end within seconds.

Jobs run as people start them, each with a hard time limit. The faults that need no job - damaged files, failing writes,
hostile archives - are beside the modules that meet them, with the marker ``fault`` as here.
"""

import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import psutil
import pytest

from cnnmpi import checkpoint
from cnnmpi.chaos import main as chaos
from cnnmpi.distributed import DisagreementError
from cnnmpi.train import watchdog
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
    wait_until,
)

pytestmark = [pytest.mark.fault, needs_mpirun]
elsewhere = pytest.mark.mpi_skip  # mpirun does not start inside mpirun

STRIKING = """
import os, re, signal, sys, time
from pathlib import Path
import numpy as np
from cnnmpi.train import Trainer
from cnnmpi.train.__main__ import main
from cnnmpi.train.watchdog import Watchdog
SAID = Path({said!r})
say = Watchdog._say
def noted(self, text):
    with SAID.open("a") as file:
        file.write(text + "\\n")
    say(self, text)
Watchdog._say = noted
def was_said(pattern):
    return SAID.exists() and re.search(pattern, SAID.read_text())
class Struck:
    usual = dict(vars(Trainer))
    def train_step(self):
        self.place = "step"
        {step}
        return Struck.usual["train_step"](self)
    def _evaluate(self, part):
        {evaluation}
        return Struck.usual["_evaluate"](self, part)
    def _save(self, name):
        {save}
        Struck.usual["_save"](self, name)
for name in ("train_step", "_evaluate", "_save"):
    setattr(Trainer, name, getattr(Struck, name))
sys.exit(main(sys.argv[1:]))
"""


def struck(ranks: int, data: Path, out: Path, *extra: str, step="pass", evaluation="pass", save="pass") -> list[str]:
    """The command line of a job whose trainer first executes these statements.

    What the watchdog says is also in ``said(out)``; the statements may ask ``was_said``.
    """
    args = command(ranks, data, out, *extra)
    at = args.index("-m")
    code = STRIKING.format(step=step, evaluation=evaluation, save=save, said=f"{out}.said")
    args[at : at + 2] = ["-c", code]
    return args


def said(out: Path) -> str:
    path = Path(f"{out}.said")
    return path.read_text() if path.exists() else ""


# -- a rank that stops -------------------------------------------------------------------------------------------------


@elsewhere
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_stopped_rank_is_named_and_the_job_ends_with_all_stacks(victim, data, tmp_path):
    out = tmp_path / "run"
    stop = f"if self.step == 5 and self.ranks.rank == {victim}: os.kill(os.getpid(), signal.SIGSTOP)"
    result = run(*struck(3, data, out, "--hang-warning", "2", "--hang-limit", "5", step=stop))
    assert result.returncode != 0
    warned, ended, stacks = result.stderr.partition("error: nothing goes on for 5 s")
    assert ended and re.search(rf"warning: rank {victim} of 3 on \S+ gives no sign of life for \d+ s; last", warned)
    assert [stacks.count(f"--- rank {rank} of 3") for rank in range(3)] == [1, 1, 1] and "trainer.py" in stacks
    assert all_gone(out)


@elsewhere
def test_a_rank_that_is_alive_but_late_is_named_with_its_layer(data, tmp_path, undisturbed):
    late = """
        if self.step == 5 and self.ranks.rank == 1:
            usual = self.model.classifier.forward
            def forward(x, self=self.model.classifier):
                while not was_said("rank 1 of 2 .* is not where the others wait"): time.sleep(0.1)
                self.forward = usual
                return usual(x)
            self.model.classifier.forward = forward"""
    result = run(*struck(2, data, tmp_path / "run", "--hang-warning", "1", step=late))
    layer = ", classifier Linear" if getattr(sys, "_is_gil_enabled", lambda: True)() else ""
    assert re.search(
        rf"warning: rank 1 of 2 on \S+ is not where the others wait for it .* step 5{layer}", result.stderr
    )
    assert re.search(r"rank 1 of 2 on \S+ goes on", result.stderr.partition("is not where the others wait")[2])
    assert digest(result.stdout) == undisturbed


@elsewhere
def test_a_rank_that_goes_on_in_time_changes_nothing(data, tmp_path, undisturbed):
    out = tmp_path / "run"
    stop = "if self.step == 5 and self.ranks.rank == 1: os.kill(os.getpid(), signal.SIGSTOP)"
    args = struck(2, data, out, "--hang-warning", "1", "--hang-limit", "100", step=stop)
    job = start_and_wait(args, out)
    wait_until(lambda: any(psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in rank_pids(out)), job)
    wait_until(lambda: re.search("rank 1 of 2 .* gives no sign of life.*\n$", said(out)), job)
    signal_all(rank_pids(out), signal.SIGCONT)
    output, errors = job.communicate(timeout=HANGS_S)
    assert digest(output) == undisturbed
    assert re.search(r"rank 1 of 2 on \S+ goes on", errors.partition("gives no sign of life")[2])


@elsewhere
def test_a_slow_save_raises_no_alarm(data, tmp_path, undisturbed):
    slow = """
        if self.step == 10 and self.ranks.rank == 0:
            from cnnmpi import checkpoint
            write = checkpoint.save
            def slow(*args, **options):
                checkpoint.save = write
                time.sleep(2)
                write(*args, **options)
            checkpoint.save = slow"""
    result = run(*struck(2, data, tmp_path / "run", "--hang-warning", "1", save=slow))
    assert digest(result.stdout) == undisturbed and not re.search("is not where .* saving", result.stderr)


class Alone:
    """The watchdog of one of ``size`` ranks, told what to hear and what time it is."""

    def __init__(self, monkeypatch, rank=0, size=3, warning_s=2.0, limit_s=5.0):
        self.now, self.lines, self.codes = 0.0, [], []
        monkeypatch.setattr(watchdog, "time", types.SimpleNamespace(monotonic=lambda: self.now))
        ranks = types.SimpleNamespace(rank=rank, size=size, abort=self.codes.append)
        self.dog = watchdog.Watchdog(ranks, warning_s, limit_s)
        self.dog._say = self.lines.append
        self.dog._ticked = 0.0
        self.dog._statuses = [watchdog.RankStatus(self.sign(r, "start"), 0.0, 0.0) for r in range(size)]

    def sign(self, rank, doing, waiting=False, notes=0):
        return watchdog.Heartbeat(rank, f"host{rank}", doing, "", waiting, False, notes, f"stack of {rank}")

    def tick(self, *signs, after=0.5):
        self.now += after
        for sign in signs:
            self.dog._hear(sign)
        self.dog._judge()

    def said(self):
        said, self.lines[:] = list(self.lines), []
        return said


def test_a_rank_that_was_late_and_falls_silent_is_named_again(monkeypatch):
    """On a busy machine a rank may be late before it is stopped: that must not hide its silence."""
    alone = Alone(monkeypatch, limit_s=20)
    others = [alone.sign(r, "step 5", waiting=True, notes=1) for r in (0, 2)]
    for _ in range(6):
        alone.tick(*others, alone.sign(1, "step 4"))
    late = "warning: rank 1 of 3 on host1 is not where the others wait for it for 2 s; last seen in step 4"
    assert alone.said() == [late]
    for _ in range(6):
        alone.tick(*others)
    assert alone.said() == ["warning: rank 1 of 3 on host1 gives no sign of life for 2 s; last seen in step 4"]
    alone.tick(*others, alone.sign(1, "step 4"))
    assert alone.said() == [], "it is still late, as was said"
    alone.tick(*others, alone.sign(1, "step 5", waiting=True, notes=1))  # all wait for a moment: no reason for alarm
    assert alone.said() == ["rank 1 of 3 on host1 goes on"]
    assert alone.codes == []


def test_all_stacks_are_shown_by_one_rank_before_the_job_ends(monkeypatch, capsys):
    judges = []
    for rank in (0, 1):
        alone = Alone(monkeypatch, rank)
        for _ in range(11):
            alone.tick(alone.sign(0, "step 5"), alone.sign(1, "step 5"))
        judges.append(alone)
    assert judges[1].lines == judges[1].codes == [], "rank 0 is there, and speaks"
    assert judges[0].codes == [1]
    assert judges[0].lines[-1] == "error: nothing goes on for 5 s: the job is ended. Where the ranks were:"
    shown = capsys.readouterr().err
    assert [shown.count(f"--- rank {rank} of 3 on host{rank}") for rank in range(3)] == [1, 1, 1]
    assert [shown.count(f"stack of {rank}") for rank in range(3)] == [1, 1, 1]


def test_rank_1_speaks_where_rank_0_is_silent(monkeypatch):
    alone = Alone(monkeypatch, rank=1)
    for _ in range(11):
        alone.tick(alone.sign(1, "step 5"), alone.sign(2, "step 5"))
    assert "rank 0 of 3 on host0 gives no sign of life for 2 s" in alone.lines[0] and alone.codes == [1]


def test_the_time_in_which_the_watching_process_was_stopped_is_nobodys_silence(monkeypatch):
    alone = Alone(monkeypatch)
    everyone = [alone.sign(rank, "step 5") for rank in range(3)]
    alone.tick(*everyone)
    alone.tick(*everyone, after=100)
    alone.tick(everyone[0], after=100)  # what the others sent meanwhile has not been read yet
    alone.tick(*everyone)
    assert alone.lines == [] and alone.codes == []
    for _ in range(4):
        alone.tick(
            everyone[0], after=3
        )  # nor does a machine so busy that no tick comes in time hide a silence for ever
    assert "gives no sign of life" in alone.lines[0]


# -- signals -----------------------------------------------------------------------------------------------------------


@elsewhere
@pytest.mark.parametrize(
    "when, number",
    [
        *((when, signal.SIGTERM) for when in ("before step 0", "in the evaluation", "in a save", "twice")),
        *(("in a step", number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)),
    ],
)
def test_a_signal_at_any_time_stops_all_ranks_with_one_checkpoint(number, when, data, tmp_path, undisturbed):
    out = tmp_path / "run"
    send = f"os.kill(os.getpid(), {int(number)})"
    places = {
        "before step 0": {"step": f"if self.step == 0 and self.ranks.rank == 1: {send}"},
        "in a step": {"step": f"if self.step == 5 and self.ranks.rank == 1: {send}"},
        "in the evaluation": {"evaluation": f"if self.ranks.rank == 1: {send}"},
        "in a save": {"save": f"if self.step == 10 and self.ranks.rank == 0: {send}"},
        "twice": {"step": f"if self.step in (5, 6): {send}"},
    }
    result = run(*struck(3, data, out, **places[when]))
    assert result.returncode == 75, result.stderr
    assert result.stdout.count("stopped at step") == 1 and "Traceback" not in result.stderr
    step = checkpoint.load(out / "last.h5")[1]["step"]
    assert step == {"before step 0": 1, "in a step": 6, "in the evaluation": 10, "in a save": 11, "twice": 6}[when]
    assert digest(run(*command(2, data, out, "--resume")).stdout) == undisturbed


@elsewhere
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_mpirun_stops_all_ranks(number, data, tmp_path, undisturbed):
    out = tmp_path / "run"
    job = start_and_wait(
        struck(2, data, out, step="while self.step == 5 and not self.signals.asked: time.sleep(0.01)"), out
    )
    job.send_signal(number)
    job.communicate(timeout=HANGS_S)
    assert job.returncode != 0 and all_gone(out)
    assert checkpoint.load(out / "last.h5")[1]["step"] < 30, "stopped, not finished"
    assert digest(run(*command(3, data, out, "--resume")).stdout) == undisturbed


# -- disks -------------------------------------------------------------------------------------------------------------


@elsewhere
def test_a_vanished_folder_ends_all_ranks_with_one_clear_line(data, tmp_path):
    out = tmp_path / "run"
    vanish = f"if self.step == 5 and self.ranks.rank == 0: import shutil; shutil.rmtree({str(out)!r})"
    result = run(*struck(3, data, out, step=vanish))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.count("cannot be written") == 1 and str(out) in result.stderr


@pytest.fixture
def small(tmp_path):
    """Mount a file system of a given size, such as "64k", and return its folder."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(size: str) -> Path:
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
        ).returncode:
            pytest.skip("only root can mount a small file system here")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


@elsewhere
def test_a_full_disk_is_found_at_the_start(data, small):
    folder = small("64k")
    result = run(*command(2, data, folder / "run"))
    assert result.returncode == 2 and "No space left" in result.stderr and "Traceback" not in result.stderr
    assert "step 0 of" not in result.stdout, "found before the first step"
    assert not list((folder / "run").glob("*.h5")) and not list((folder / "run").glob(".*.tmp"))


@elsewhere
def test_a_resume_on_a_full_disk_or_in_a_read_only_folder_is_refused_in_one_line(data, small, undisturbed):
    folder = small("8m")
    out = folder / "run"
    assert run(*command(1, data, out, "--max-steps", "13")).returncode == 0
    filler = folder / "filler"

    def refused(reason: str) -> None:
        result = run(*command(2, data, out, "--resume"))
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and reason in result.stderr, result.stderr

    filler.write_bytes(bytes(shutil.disk_usage(folder).free))
    refused("0 KiB free, a checkpoint takes 481: make room")
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    refused("Read-only file system")
    subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
    assert digest(run(*command(2, data, out, "--resume")).stdout) == undisturbed


@elsewhere
@pytest.mark.parametrize("step", [10, 20])
def test_a_failing_save_is_told_to_all_ranks_and_leaves_the_old_checkpoint(step, data, tmp_path, undisturbed):
    out = tmp_path / "run"
    fail = f"""
        if self.step == {step} and self.ranks.rank == 0:
            import errno
            def full(*args): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync = full"""
    result = run(*struck(2, data, out, "--checkpoint-every", "3", save=fail))
    assert result.returncode == 2 and result.stderr.count("No space left on device") == 1
    assert "mpi_abort" not in result.stderr.lower(), "all were told, so nobody has to be aborted"
    assert checkpoint.load(out / "last.h5")[1]["step"] in (step - 1, step - 2)
    assert digest(run(*command(3, data, out, "--resume")).stdout) == undisturbed


# -- numbers -----------------------------------------------------------------------------------------------------------

POISON = """
        if self.step == 7 and self.ranks.rank == self.ranks.size - 1:
            original = self.loader.batch
            def batch(step, shard):
                x, y = original(step, shard)
                if step == 7 and shard == 7: x[0, 0, 0, 0] = {value}
                return x, y
            self.loader.batch = batch"""


@elsewhere
@pytest.mark.parametrize("value", ["np.nan", "np.inf"])
def test_a_number_that_is_not_finite_stops_all_ranks(value, data, tmp_path):
    out = tmp_path / "run"
    result = run(*struck(3, data, out, "--checkpoint-every", "1", step=POISON.format(value=value)))
    assert result.returncode == 2 and "step 7, shard 7: the loss, a metric or a running" in result.stderr
    arrays, attributes = checkpoint.load(out / "last.h5")
    assert attributes["step"] == 7 and all(np.isfinite(array).all() for array in arrays.values())


@elsewhere
def test_a_skipped_step_is_skipped_on_any_number_of_ranks(data, tmp_path, undisturbed):
    poison, skip = POISON.format(value="np.nan"), ("--on-nan", "skip")
    results = [run(*struck(ranks, data, tmp_path / str(ranks), *skip, step=poison)) for ranks in (1, 2, 3)]
    digests = {digest(result.stdout) for result in results}
    assert len(digests) == 1 and undisturbed not in digests
    assert all(result.stdout.count("step 7, shard 7: ") == 1 for result in results)


@elsewhere
@pytest.mark.parametrize("every, step", [("4", 8), ("0", 10)])
def test_one_bit_on_one_rank_is_noticed_at_the_next_check_or_checkpoint(every, step, data, tmp_path):
    flip = """
        if self.step == 6 and self.ranks.rank == 2:
            w = self.model.classifier.params["weight"]
            largest = np.unravel_index(abs(w).argmax(), w.shape)
            w[largest] = np.nextafter(w[largest], np.float32(0))"""
    # a small rate, so that no update moves the weight to another power of two, where the bit would be rounded away
    options = ("--agree-every", every, "--lr", "1e-4")
    result = run(*struck(3, data, tmp_path / "run", *options, step=flip))
    assert result.returncode == 1 and result.stderr.count("rank 2 (") == 1
    assert f"step {step}: " in result.stderr and "in model/classifier.weight" in result.stderr


@pytest.mark.mpi(min_size=3)
def test_agree_on_arrays_names_the_minority_and_the_first_array(ranks):
    arrays = {"a": np.zeros(3, np.float32), "b": np.zeros((2, 2), np.float32)}
    ranks.agree_on_arrays("step 1", arrays)
    if ranks.rank == 0:
        arrays["b"][1, 1] = 1e-45
    with pytest.raises(DisagreementError, match=r"^step 2: .*: rank 0 \(\S+\) in b from the others"):
        ranks.agree_on_arrays("step 2", arrays)


# -- ranks that are not alike ------------------------------------------------------------------------------------------


@elsewhere
def test_ranks_with_different_command_lines_are_refused(data, tmp_path):
    one = command(1, data, tmp_path / "run")
    args = [MPIRUN, "-n", "1", *one, "--lr", "0.1", ":", "-n", "1", *one, "--lr", "0.2"]
    result = run(*args)
    assert result.returncode != 0 and "differ in their command lines: rank 1" in result.stderr
    assert not (tmp_path / "run").exists() and "Traceback" not in result.stderr


@elsewhere
def test_ranks_with_different_programs_are_refused(data, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(Path(checkpoint.__file__).parents[1], copy / "cnnmpi", ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "cnnmpi" / "optim.py").open("a") as file:
        file.write("# changed\n")
    one = command(1, data, tmp_path / "run")
    source = f"import sys; sys.path.insert(0, {str(copy)!r}); from cnnmpi.train.__main__ import main; sys.exit(main())"
    other = [sys.executable, "-c", source, *one[one.index("cnnmpi.train") + 1 :]]
    result = run(MPIRUN, "-n", "1", *one, ":", "-n", "1", *other)
    assert result.returncode != 0 and "differ in the programs that they run: rank 1" in result.stderr
    assert "Traceback" not in result.stderr


# -- everything at once ------------------------------------------------------------------------------------------------


@elsewhere
def test_chaos_with_a_small_budget(capsys):
    assert chaos(["--faults", "4", "--ranks", "3", "--seed", "1", "--mpirun", f"env {MPIRUN}"]) == 0
    assert re.search(r"4 faults in \d+ runs, .* \d+ of \d+ runs ended", capsys.readouterr().out)

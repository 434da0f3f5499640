"""What a run writes down of its course: each line once, whatever kills it, and the same for TensorBoard."""

import math
import re
import signal
import sys
from pathlib import Path

import pytest

from cnnmpi import checkpoint
from cnnmpi.common.lines import LONGEST, read_lines, to_line
from cnnmpi.report.__main__ import main as report
from cnnmpi.train.closing import time_table
from cnnmpi.train.records import Records
from cnnmpi.train.terminal import Terminal, in_words
from tests.jobs import command, digest, run

pytestmark = pytest.mark.mpi_skip
CLOCKS = ("seconds", "images_per_s", "time_", "ranks")  # what differs between runs that are the same

# ends the process as a power cut would, half-way through a write of the file whose name it is given
KILLER = """
import os, signal, sys
from pathlib import Path
import cnnmpi.train.records as records, cnnmpi.common.files as files, cnnmpi.checkpoint.atomic as atomic
from cnnmpi.train.entry import train
name, at = sys.argv[1], int(sys.argv[2])
count = 0

def die(path, blob):
    with open(path, "ab") as file:
        file.write(blob[: len(blob) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

def counted(path, blob):
    global count
    count += name in str(path)
    if count > at:
        die(path, blob)

append, write = records.Records._append, files.write

def appending(self, file, values, sync=False):
    counted(self.folder / file, records.to_line(values).encode())
    append(self, file, values, sync)

def writing(path, blob):
    counted(path, blob)
    write(path, blob)

records.Records._append, atomic.write = appending, writing
if name == "tfevents":
    from tensorboardX.event_file_writer import EventsWriter
    event = EventsWriter.write_event
    def write_event(self, what):
        self.flush()
        counted(self._file_name, what.SerializeToString())
        return event(self, what)
    EventsWriter.write_event = write_event
train(sys.argv[3:])
"""


def lines(path: Path) -> list[dict]:
    found, damaged = read_lines(path)
    assert not damaged, path
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in found]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader sees."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={accumulator.SCALARS: 0, accumulator.IMAGES: 0})
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    found["images"] = [
        (e.step, 0.0) for tag in events.Tags()["images"] if "confusion" in tag for e in events.Images(tag)
    ]
    return found


def same_as_records(out: Path) -> None:
    """Every number of metrics.jsonl and steps.jsonl is there once, and no other."""
    seen = scalars(out / "tensorboard")
    epochs, steps = (read_lines(out / f"{name}.jsonl")[0] for name in ("metrics", "steps"))
    for tag, key, records in (
        ("train/loss", "train_loss", epochs), ("test/acc", "test_acc", epochs), ("epoch/lr", "lr", epochs),
        ("step/loss", "loss", steps), ("step/lr", "lr", steps), ("step/grad_norm", "grad_norm", steps),
    ):  # fmt: skip
        expected = [(line["step"], line[key]) for line in records]
        assert [step for step, _ in seen[tag]] == [step for step, _ in expected], tag
        for (_, value), (_, wanted) in zip(seen[tag], expected, strict=True):
            assert math.isclose(value, wanted, rel_tol=1e-6), tag  # events hold float32
    assert [step for step, _ in seen["images"]] == [line["step"] for line in epochs]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    result = run(*command(1, data, out, "--log-every", "3", "--tensorboard"))
    assert result.returncode == 0, result.stderr
    return out


def test_steps_and_epochs_of_a_run(whole):
    epochs, steps = lines(whole / "metrics.jsonl"), lines(whole / "steps.jsonl")
    assert [line["step"] for line in epochs] == [10, 20, 30] and [line["step"] for line in steps] == [*range(3, 31, 3)]
    assert [line["epoch"] for line in steps] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in steps)
    rates = [line["lr"] for line in steps]
    assert rates[0] < rates[1] == max(rates) and rates[1:] == sorted(rates[1:], reverse=True)  # 6 steps of warm-up
    (start,) = lines(whole / "starts.jsonl")
    assert start["step"] == 0 and start["threads"] == 1 and start["versions"]["numpy"]
    times = read_lines(whole / "metrics.jsonl")[0]
    for line in times:  # the phases are all of an epoch's time, and its steps no more than that
        spent = sum(value for key, value in line.items() if key.startswith("time_"))
        assert spent > line["seconds"] * 0.999 and line["time_computing"] > 0 and line["time_evaluating"] > 0


def test_tensorboard_sees_what_the_records_say(whole):
    same_as_records(whole)


@pytest.mark.fault
@pytest.mark.parametrize(
    "name, at", [("metrics.jsonl", 1), ("steps.jsonl", 4), ("starts.jsonl", 0), ("tfevents", 40), ("report.html", 0)]
)
def test_a_run_killed_within_a_write_resumes_and_reports(name, at, data, whole, tmp_path):
    out = tmp_path / "run"
    args = command(1, data, out, "--log-every", "3", "--tensorboard", "--checkpoint-every", "4")[3:]
    args = [arg for arg in args if arg != "--no-report"]
    killed = run(sys.executable, "-c", KILLER, name, str(at), *args)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert report([str(out), "--data", "none"]) == 0  # of what is there
    resume = ["--resume", "--no-report"] if (out / "last.h5").exists() else ["--no-report"]
    result = run(sys.executable, "-m", "cnnmpi.train", *args, *resume)
    assert result.returncode == 0, result.stderr
    assert digest(result.stdout) == weights_digest_of(whole)
    for file in ("metrics.jsonl", "steps.jsonl"):
        assert lines(out / file) == lines(whole / file)
    same_as_records(out)
    assert report([str(out), "--data", "none"]) == 0


def weights_digest_of(out: Path) -> str:
    return checkpoint.load(out / "last.h5")[1]["weights_sha256"]


def test_curves_begin_where_tensorboard_was_asked_for_only_on_resume(data, whole, tmp_path):
    out = tmp_path / "run"
    assert run(*command(1, data, out, "--log-every", "3", "--max-steps", "14")).returncode == 0
    assert not (out / "tensorboard").exists()
    assert run(*command(1, data, out, "--log-every", "3", "--resume", "--tensorboard")).returncode == 0
    seen, all_of_it = scalars(out / "tensorboard"), scalars(whole / "tensorboard")
    for tag in ("train/loss", "step/loss", "step/grad_norm"):
        assert seen[tag] == all_of_it[tag]


def test_an_end_within_an_epoch_is_forgotten_when_the_run_goes_on(data, whole, tmp_path):
    out = tmp_path / "run"
    for more in (["--max-steps", "15"], ["--resume", "--max-steps", "18"], ["--resume"]):
        assert run(*command(1, data, out, "--log-every", "3", "--tensorboard", *more)).returncode == 0
        same_as_records(out)
    assert lines(out / "metrics.jsonl") == lines(whole / "metrics.jsonl")
    assert lines(out / "steps.jsonl") == lines(whole / "steps.jsonl")
    assert [line["step"] for line in lines(out / "starts.jsonl")] == [0, 15, 18]


@pytest.mark.fault
def test_a_full_disk_is_told_once_and_the_run_goes_on(tmp_path):
    told: list[str] = []
    records = Records(tmp_path, 1, told.append)
    (tmp_path / "steps.jsonl").symlink_to("/dev/full")
    for step in (1, 2, 3):
        records.step({"step": step, "loss": 0.5}, images=8)
    records.epoch({"step": 3})
    records.close()
    assert len(told) == 1 and "steps.jsonl cannot be written: No space left on device" in told[0]
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 3}]


def test_lines_that_are_none(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n[1]\nNaN\n{"b": NaN}\n\xff\n' + b"x" * (3 * LONGEST) + b'\n{"c": 2}\n{"torn": ')
    found, damaged = read_lines(path)
    assert found == [{"a": 1}, {"c": 2}] and damaged >= 6
    assert to_line({"a": math.nan, "b": {"c": math.inf}, "d": 1.5}) == '{"a": null, "b": {"c": null}, "d": 1.5}\n'


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_a_log_file_hears_every_minute_how_far_the_run_is(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    shown = Terminal()
    shown.begin(100, 500)
    for step in range(101, 301):
        now[0] += 0.5
        shown.step("1/2", step, 500, 0.25, 128)
    told = capsys.readouterr().out.splitlines()
    assert told == ["step 221 of 500 (44%)  epoch 1/2  loss 0.250  256 images/s  2 min left"]


def test_the_last_table_says_where_the_time_of_the_ranks_went():
    usual = {"loading": 1.0, "computing": 10.0, "reducing": 2.0, "updating": 0.5, "evaluating": 4.0, "saving": 0.0}
    slow = usual | {"computing": 12.0, "reducing": 0.0}
    one, two = time_table([usual], 20.0), time_table([usual, slow], 20.0)
    rows = dict(re.findall(r"^(\S.*?) +[\d.]+ +([\d.]+%)$", one, re.MULTILINE))
    assert rows["forward and backward"] == "50.0%" and rows["start, hooks and the rest"] == "12.5%"
    assert sum(float(share[:-1]) for share in rows.values()) == pytest.approx(100, abs=0.5) and "ranks did" not in one
    assert "2 ranks did the work of 1.60; of the rest 12.5% start" in two and "5.0% sum over the ranks" in two
    assert "rank 1 computed 8% longer than the mean of all" in two
    assert "longer" not in time_table([usual, usual], 20.0)


@pytest.mark.parametrize("columns", [30, 70, 140])
def test_the_progress_of_a_terminal_keeps_to_its_width(columns, monkeypatch, capsys):
    monkeypatch.setattr("cnnmpi.train.terminal.is_terminal", lambda stream: True)
    for name, value in (("COLUMNS", str(columns)), ("TERM", "xterm"), ("FORCE_COLOR", "1")):
        monkeypatch.setenv(name, value)
    shown = Terminal()
    shown.begin(0, 500)
    shown.evaluated("test loss 1.2345 acc 0.5000")
    shown.speed = 256.0  # as after half a second
    for step in range(1, 251):
        shown.step("1/2", step, 500, 0.25, 128)
    shown.progress.refresh()
    shown.close()
    out = capsys.readouterr().out
    assert "50%" in out and "loss 0.250" in out
    assert ("images/s" in out) == (columns >= 60) and ("acc 0.5000" in out) == (columns >= 100)


@pytest.mark.parametrize(
    "seconds, text",
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5900, "98 min"), (7500, "2 h 05 min"), (900000, "10 d 10 h")],
)
def test_times_in_words(seconds, text):
    assert in_words(seconds) == text

"""What a run writes down of its course: each line once, whatever kills it, and the same for TensorBoard."""

import errno
import importlib
import math
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from cnnmpi import checkpoint
from cnnmpi.common.files import append
from cnnmpi.common.lines import LONGEST, read_lines, to_line
from cnnmpi.report.__main__ import main as report
from cnnmpi.train.board import Board
from cnnmpi.train.closing import time_table
from cnnmpi.train.records import Records
from cnnmpi.train.terminal import Terminal, in_words
from tests.jobs import command, digest, run

pytestmark = pytest.mark.mpi_skip
CLOCKS = ("seconds", "images_per_s", "time_", "ranks")  # what differs between runs that are the same

# ends the process as a power cut would, half-way through a write of the file whose name it is given
KILLER = """
import os, signal, sys
import cnnmpi.common.files as files, cnnmpi.checkpoint.atomic as atomic
import cnnmpi.train.board as board, cnnmpi.train.records as records
from cnnmpi.train.entry import train
name, at, count = sys.argv[1], int(sys.argv[2]), 0

def counted(write):
    def writing(path, blob, *options):
        global count
        count += name in str(path)
        if count > at:
            with open(path, "ab") as file:
                file.write(blob[: len(blob) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, blob, *options)
    return writing

records.append, board.append, atomic.write = counted(files.append), counted(files.append), counted(files.write)
train(sys.argv[3:])
"""


def lines(path: Path) -> list[dict]:
    found, damaged = read_lines(path)
    assert not damaged, path
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in found]


def scalars(folder: Path, reader: str = "plugin_event_accumulator") -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader sees: {tag: (step, value) of each point}; pictures have no value."""
    module = importlib.import_module(f"tensorboard.backend.event_processing.{reader}")
    events = module.EventAccumulator(str(folder))
    events.Reload()
    if reader == "event_accumulator":  # the older one
        found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        return found | {tag: [(e.step, math.nan) for e in events.Images(tag)] for tag in events.Tags()["images"]}
    found = {}
    make_ndarray = importlib.import_module("tensorboard.util.tensor_util").make_ndarray
    for tag in events.Tags()["tensors"]:
        points = [(e.step, make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)]
        found[tag] = [(step, float(value) if value.dtype.kind == "f" else math.nan) for step, value in points]
    return found


# prints the steps of a curve as the program sees them that TensorBoard starts to read faster, once there are enough
FASTER = """
import json, os, sys, time
from tensorboard import context
from tensorboard.data import provider, server_ingester
from tensorboard.util.grpc_util import ChannelCredsType
folder, tag, enough = sys.argv[1], sys.argv[2], int(sys.argv[3])
ingester = server_ingester.SubprocessServerDataIngester(
    server_ingester.get_server_binary(), folder, reload_interval=1, channel_creds_type=ChannelCredsType.LOCAL
)
ingester.start()
steps, end = [], time.monotonic() + 60
while len(steps) < enough and time.monotonic() < end:
    time.sleep(0.1)
    curves = ingester.data_provider.read_scalars(
        context.RequestContext(), experiment_id="", plugin_name="scalars", downsample=10_000,
        run_tag_filter=provider.RunTagFilter(tags=[tag]),
    )
    steps = [point.step for tags in curves.values() for point in tags.get(tag, [])]
print(json.dumps(steps), flush=True)
os._exit(0)
"""


def in_records(out: Path) -> dict[str, list[tuple[int, float]]]:
    """What the records say, under the names that TensorBoard is given."""
    found: dict[str, list[tuple[int, float]]] = {}
    epochs, steps = (read_lines(out / f"{name}.jsonl")[0] for name in ("metrics", "steps"))
    for line in epochs:
        for key, value in line.items():
            tag = key.replace("_", "/", 1) if key.startswith(("train_", "test_", "time_")) else f"epoch/{key}"
            if key not in ("step", "data") and value is not None:
                found.setdefault(tag, []).append((line["step"], value))
    for line in steps:
        for key in ("loss", "lr", "grad_norm", "images_per_s"):
            if line[key] is not None:
                found.setdefault(f"step/{key}", []).append((line["step"], line[key]))
    return found


def same_as_records(out: Path) -> None:
    """Every number of metrics.jsonl and steps.jsonl is there once, and no other."""
    expected, steps = in_records(out), [line["step"] for line in lines(out / "metrics.jsonl")]
    for reader in ("plugin_event_accumulator", "event_accumulator"):
        seen = scalars(out / "tensorboard", reader)
        assert [step for step, _ in seen.pop("test/confusion")] == steps
        assert [step for step, _ in seen.pop("train/images")] == [0]
        assert seen.keys() == expected.keys()
        for tag, points in expected.items():
            assert [step for step, _ in seen[tag]] == [step for step, _ in points], (reader, tag)
            for (_, value), (_, wanted) in zip(seen[tag], points, strict=True):
                assert math.isclose(value, wanted, rel_tol=1e-6, abs_tol=1e-9), (reader, tag)  # events hold float32


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
    "name, at", [("metrics.jsonl", 1), ("steps.jsonl", 4), ("starts.jsonl", 0), ("tfevents", 9), ("report.html", 0)]
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


def test_the_faster_reader_of_tensorboard_sees_the_same(data, tmp_path):
    pytest.importorskip("tensorboard_data_server")
    out = tmp_path / "run"
    for more in (["--max-steps", "15"], ["--resume", "--max-steps", "18"], ["--resume"]):
        assert run(*command(1, data, out, "--log-every", "3", "--tensorboard", *more)).returncode == 0
    for tag, steps in (("test/acc", [10, 20, 30]), ("step/loss", [*range(3, 31, 3)])):
        seen = run(sys.executable, "-c", FASTER, out / "tensorboard", tag, str(len(steps)))
        assert seen.stdout.splitlines()[-1:] == [str(steps)], seen.stderr


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
    assert len(told) == 1 and "steps.jsonl cannot be written: No space left on device" in told[0]
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 3}]
    (tmp_path / "steps.jsonl").unlink()  # now there is room
    records.step({"step": 4, "loss": 0.5}, images=8)
    assert [line["step"] for line in lines(tmp_path / "steps.jsonl")] == [1, 2, 3, 4] and len(told) == 1


@pytest.mark.fault
def test_a_line_that_was_torn_does_not_swallow_the_next(tmp_path):
    (tmp_path / "starts.jsonl").write_bytes(b'{"step": 0}\n{"ste')
    Records(tmp_path, 1, print).start({"step": 7})
    found, damaged = read_lines(tmp_path / "starts.jsonl")
    assert found == [{"step": 0}, {"step": 7}] and damaged == 1


@pytest.mark.fault
@pytest.mark.parametrize("wait", [False, True])
def test_what_is_added_to_a_file_is_there_whole_or_not_at_all(wait, tmp_path, monkeypatch):
    path, write, fsync = tmp_path / "file", os.write, os.fsync

    def little(descriptor, blob):
        return write(descriptor, blob[:3])  # a system may take less than it is given

    def full(descriptor, blob=b""):
        if len(blob) > 3:
            return write(descriptor, blob[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", little)
    append(path, b"12345", wait)
    monkeypatch.setattr(os, "write", write if wait else full)
    monkeypatch.setattr(os, "fsync", full if wait else fsync)
    with pytest.raises(OSError, match="No space left"):
        append(path, b"67890", wait)
    assert path.read_bytes() == b"12345"


@pytest.mark.fault
def test_a_board_on_a_full_disk_is_told_once(tmp_path):
    told: list[str] = []
    board = Board(tmp_path / "tensorboard", told.append)
    board.step({"step": 1, "loss": 0.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.unlink()
    file.symlink_to("/dev/full")
    for step in (2, 3):
        board.step({"step": step, "loss": 0.5})
    assert len(told) == 1 and "No space left on device; the run goes on without it" in told[0]


def test_lines_that_are_none(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n[1]\nNaN\n{"b": NaN}\n\xff\n' + b"x" * (3 * LONGEST) + b'\n{"c": 2}\n{"torn": ')
    found, damaged = read_lines(path)
    assert found == [{"a": 1}, {"c": 2}] and damaged >= 6
    assert to_line({"a": math.nan, "b": {"c": math.inf}, "d": 1.5}) == b'{"a": null, "b": {"c": null}, "d": 1.5}\n'
    assert to_line({"a": np.float32(0.5), "b": np.int64(3)}) == b'{"a": 0.5, "b": 3}\n'


def test_of_many_lines_some_are_read_evenly(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"".join(to_line({"step": step}) for step in range(1000)))
    steps = [line["step"] for line in read_lines(path, most=100)[0]]
    assert 50 < len(steps) <= 101 and steps[0] == 0 and len(set(np.diff(steps))) == 1 and steps[-1] > 980


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
    assert "2 ranks did the work of 1.60; the rest of their time: 12.5% start" in two
    assert "5.0% sum over the ranks" in two
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

"""Studies: means and their spread over seeds, runs that are resumed, and settings that are compared."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cnnmpi.distributed import UserError
from cnnmpi.study import SHAPING, Outcome, Runs, Spread, Study, main, shaping, student, told
from cnnmpi.train.jobs import Jobs
from cnnmpi.train.ledger import Ledger
from tests.jobs import HANGS_S, command, needs_mpirun, rank_pids, run, wait_until

pytestmark = pytest.mark.mpi_skip


def arguments(data: Path, *more: str) -> list[str]:
    """What a study hands on: a small run of a second."""
    words = command(1, data, Path("nowhere"), *more)[3:]
    at = words.index("--out")
    return words[:at] + words[at + 2 :]


@pytest.mark.parametrize(
    "df, t", [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423), (100, 1.9840), (10_000, 1.9602)]
)
def test_students_t_is_that_of_the_tables(df, t):
    assert student(df) == pytest.approx(t, abs=1e-4)


def test_the_interval_holds_the_mean_as_often_as_it_says():
    draw, held = np.random.default_rng(0), 0
    for sample in draw.normal(3.0, 2.0, (2000, 5)):
        spread = Spread.of(sample.tolist())
        held += abs(spread.mean - 3.0) <= spread.half
        assert spread.deviation == pytest.approx(sample.std(ddof=1))
    assert 0.93 < held / 2000 < 0.97  # three standard errors of 0.95 are 0.015
    assert math.isnan(Spread.of([1.0]).half) and str(Spread.of([0.5])) == "0.5000 (one run tells no spread)"


def test_a_table_and_the_paired_difference():
    def outcomes(values):
        return [Outcome(seed, "test_acc", value, 1.5, "f" * 64, "e" * 64) for seed, value in enumerate(values)]

    text = told(["--lr", "0.1"], ["--lr", "0.2"], [outcomes([0.70, 0.72, 0.74]), outcomes([0.71, 0.735, 0.755])])
    assert "### `--lr 0.1`" in text and "### `--lr 0.1 --lr 0.2`" in text
    assert "| 1 | 0.7200 | 1.5 | ffffffffffffffff | eeeeeeeeeeeeeeee |" in text
    assert "test_acc: mean 0.7200, standard deviation 0.0200, 95 % interval 0.6703 to 0.7697, n = 3." in text
    assert "second less first: mean 0.0133" in text and "the interval leaves out 0." in text
    level = told([], ["--lr", "0.2"], [outcomes([0.70, 0.72]), outcomes([0.71, 0.71])])
    assert "### the default settings" in level and "the interval holds 0: no difference is shown." in level


@needs_mpirun
def test_a_study_trains_each_seed_once(data, tmp_path, capsys):
    out = tmp_path / "study"
    short = ("--max-steps", "2")
    words = ["--runs", "2", "--out", str(out), "--ranks", "2", "--against=--lr 0.001", "--", *arguments(data, *short)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed == (out / "study.md").read_text() and printed.count("### ") == 2
    content = json.loads((out / "study.json").read_text())
    assert [[each["seed"] for each in runs] for runs in content["runs"]] == [[0, 1], [0, 1]]
    digests = [each["weights"] for runs in content["runs"] for each in runs]
    assert len(set(digests)) == 4 and all(len(each["ledger"]) == 64 for runs in content["runs"] for each in runs)
    alone = run(*command(1, data, tmp_path / "alone", "--seed", "1", *short))
    assert f"weights_sha256={digests[1]}" in alone.stdout
    logs = {path: path.stat().st_mtime_ns for path in out.rglob("*.log")}
    assert main(words) == 0 and capsys.readouterr().out == printed
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.log")} == logs, "nothing was trained again"
    assert main(["--runs", "3", "--jobs", "2", *words[2:]]) == 0  # one more seed
    assert capsys.readouterr().out.count("\n| 2 | ") == 2


# pauses after each step as long as it is told to
SCRIPT = """
import os, sys, time, cnnmpi
if __name__ == "__main__":
    sys.exit(cnnmpi.fit("simplecnn", on_step=lambda run, loss: time.sleep(float(os.environ.get("PAUSE", "0")))))
"""


@pytest.mark.fault
@pytest.mark.parametrize("number, side_by_side", [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_study_that_is_stopped_stops_its_runs_and_goes_on(number, side_by_side, data, tmp_path, monkeypatch):
    out, script = tmp_path / "study", tmp_path / "script.py"
    script.write_text(SCRIPT)
    training = [str(script), *arguments(data, "--epochs", "1", "--checkpoint-every", "1")]
    words = [sys.executable, "-m", "cnnmpi.study", "--runs", "2", "--out", str(out), "--jobs", str(side_by_side)]
    begun = [out / "a" / f"seed-{seed}" for seed in range(side_by_side)]
    with monkeypatch.context() as slow:
        slow.setenv("PAUSE", "0.5")
        job = subprocess.Popen([*words, "--", *training], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: all((folder / "previous.h5").exists() for folder in begun), job)
    job.send_signal(number)
    _, err = job.communicate(timeout=HANGS_S)
    assert job.returncode == 75 and err == f"cnnmpi.study: error: stopped: start it again, and it goes on in {out}\n"
    assert not any(rank_pids(folder) for folder in begun) and not (out / "study.md").exists()
    assert [folder.name for folder in sorted((out / "a").glob("seed-?"))] == [folder.name for folder in begun]
    result = run(*words, "--", *training)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n| ") == 3
    assert all(len((folder / "starts.jsonl").read_text().splitlines()) == 2 for folder in begun)


@pytest.mark.fault
def test_a_run_that_a_signal_ends_before_it_can_save_is_no_error(tmp_path):
    script, up = tmp_path / "script.py", tmp_path / "up"
    script.write_text(f"import time\nopen({str(up)!r}, 'w').close()\ntime.sleep(600)\n")
    words = [sys.executable, "-m", "cnnmpi.study", "--out", str(tmp_path / "study"), "--", str(script)]
    job = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    wait_until(up.exists, job)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=HANGS_S)
    assert job.returncode == 75 and "stopped: start it again" in err and err.count("\n") == 1


@pytest.mark.fault
@pytest.mark.parametrize(
    "words, message",
    [
        (["--runs", "0"], "--runs, --ranks and --jobs must be at least 1"),
        (["--", "--seed", "3"], "a study sets --seed itself: leave them out"),
        (["--against=--out=x"], "a study sets --out itself"),
        (["--ranks", "2", "--mpirun", "gone"], "--mpirun gone: no such command"),
        (["--ranks", "2", "--mpirun", "a 'b"], "--mpirun a 'b: no closing quotation"),
        (["--against=a 'b"], "--against a 'b: no closing quotation"),
        (["--", "--lr", "-1"], "seed 0 ended with code 2: cnnmpi: error: --lr must be a number of at least 0"),
    ],
)
def test_bad_input_gets_one_line(words, message, tmp_path, capsys):
    assert main(["--out", str(tmp_path / "s"), *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.fixture(scope="module")
def short(data, tmp_path_factory) -> tuple[Path, list[str]]:
    """A study of two seeds, and its arguments."""
    out, training = tmp_path_factory.mktemp("short") / "study", arguments(data, "--max-steps", "1")
    assert main(["--runs", "2", "--out", str(out), "--", *training]) == 0
    return out, training


@pytest.mark.fault
def test_the_folder_of_another_study_is_refused(short, capsys):
    out, training = short
    assert main(["--runs", "1", "--out", str(out), "--", *training, "--max-steps", "2"]) == 2
    assert "holds a study of other arguments" in capsys.readouterr().err


# -- runs that are not alike -------------------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize(
    "shaped, message",
    [
        ({}, ""),
        (None, ""),  # as written before there was the field
        (
            {"sources_sha256": ["0"], "network": ["1"]},
            "seed 0 and seed 1 differ in network, sources_sha256",
        ),
        ({"data_sha256": ["1", "2"]}, "data_sha256 changed while seed 0 ran"),
    ],
)
def test_runs_that_were_shaped_otherwise_are_not_summed_up(shaped, message, short, tmp_path, capsys):
    out, training = shutil.copytree(short[0], tmp_path / "study"), short[1]
    path = out / "a" / "seed-0.json"
    says = json.loads(path.read_text())
    says["shaped"] = says["shaped"] | shaped if shaped else {}
    if shaped is None:
        del says["shaped"]
    path.write_text(json.dumps(says))
    capsys.readouterr()
    assert main(["--runs", "2", "--out", str(out), "--", *training]) == (2 if message else 0)
    remedy = "remove seed-N and seed-N.json of those that are to be trained again, or name another --out"
    assert capsys.readouterr().err == (f"cnnmpi.study: error: {out}/a: {message}: {remedy}\n" if message else "")


@pytest.mark.fault
def test_a_run_of_a_script_that_was_changed_begins_no_further_one(data, tmp_path, capsys):
    out, script = tmp_path / "study", tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = ["--out", str(out), "--", str(script), *arguments(data, "--max-steps", "1")]
    assert main(["--runs", "1", *words]) == 0
    script.write_text(SCRIPT + "# changed\n")
    capsys.readouterr()
    assert main(["--runs", "3", *words]) == 2
    assert f"{out}/a: seed 0 and seed 1 differ in script: remove" in capsys.readouterr().err
    assert not (out / "a" / "seed-2").exists()


def test_what_shaped_a_run_is_read_from_its_ledger(short, tmp_path):
    out = Path(shutil.copytree(short[0] / "a" / "seed-0", tmp_path / "run"))
    runs = Runs(Study(), tmp_path, [], Jobs())
    outcome = runs.look(0, out, {"script": ["0"]})
    assert all(len(values) == 1 for values in outcome.shaped.values()) and set(outcome.shaped) == set(SHAPING)
    assert outcome.shaped["config"][0]["batch_size"] == 40 and "seed" not in outcome.shaped["config"][0]
    book = Ledger(out, 10, 10, print)
    says = {"config": {"lr": 0.1, "seed": 0}, "sources_sha256": "1", "kernels": "SkylakeX", "frozen": "0"}
    book.begin(says)
    book.go_on(0, book.head, says | {"sources_sha256": "2", "kernels": "Haswell"})
    assert shaping(out / "ledger.jsonl") == {"config": [{"lr": 0.1}], "sources_sha256": ["1", "2"]}
    (out / "ledger.jsonl").write_text("damaged\n")
    with pytest.raises(
        UserError, match=f"ledger.jsonl: line 1 begins no ledger: remove {out}, and it is trained again"
    ):
        runs.look(0, out, {})
    (out / "ledger.jsonl").unlink()  # as with --ledger-every 0
    assert runs.look(0, out, {"script": ["0"]}).shaped == {}

"""Reports: what a page shows of a run, of several, and of folders that are damaged."""

import dataclasses
import html.parser
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from cnnmpi import page
from cnnmpi.data import synthetic, write_hdf5
from cnnmpi.report import Judged, Run, confusion_pixels, grid, one_run, read_run, several_runs
from cnnmpi.report.__main__ import main
from cnnmpi.report.charts import MOST_POINTS, Curve, chart, thinned
from cnnmpi.report.run import Counts
from cnnmpi.train.closing import what_now
from tests.jobs import command, needs_mpirun, run

pytestmark = pytest.mark.mpi_skip
HOSTILE = "<script>alert(1)</script>\x1b[2J\"'&$x_{1}$"


class Reader(html.parser.HTMLParser):
    """The tags and the text of a page; an error where tags do not close in order."""

    VOID = ("meta", "link", "br", "img", "path", "use", "rect", "circle", "line")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] not in ("style", "script") else ""


def made_up(classes: int, tmp_path: Path, images: int = 600, name: str = "run") -> Run:
    """A run of so many classes, as its records and an evaluation would have it."""
    draw = np.random.default_rng(classes)
    labels = draw.integers(0, classes, images)
    guesses = np.where(draw.random(images) < 0.6, labels, draw.integers(0, classes, images))
    pixels = draw.integers(0, 256, (images, 24, 32, 3), np.uint8)
    sure, truth = draw.random(images), draw.random(images) / 2
    names = [f"class {k}" for k in range(classes)]
    whole = Run(tmp_path, name=name, attributes={"classes": names, "weights_sha256": "0" * 64})
    whole.settings = {"model": "simplecnn", "lr": 0.05, "data": "auto"}
    whole.epochs = [
        {"epoch": e, "step": 50 * e, "train_loss": 2 / e, "test_loss": 2.2 / e, "train_acc": 1 - 1 / (e + 1),
         "test_acc": 1 - 1.1 / (e + 1), "lr": 0.1 / e, "images_per_s": 1000.0, "seconds": 2.0, "ranks": 2,
         "time_computing": 1.5, "time_loading": 0.25, "time_other": 0.25} for e in range(1, 6)
    ]  # fmt: skip
    whole.steps = [
        {"step": s, "loss": 2 / s, "lr": 0.1, "grad_norm": 1 / s, "images_per_s": 1e3} for s in range(10, 251, 10)
    ]
    whole.judged = Judged("test", labels, guesses, sure, truth, pixels.__getitem__, {"loss": 0.5})
    whole.filters = draw.standard_normal((16, 3, 3, 3))
    return whole


# -- one run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 10, 200])
def test_a_page_shows_all_that_is_known(classes, tmp_path):
    known = made_up(classes, tmp_path)
    read = Reader(one_run(known))
    assert read.tags.count("img") == (36 if classes > 1 else 0) + 1 + (classes > 20)
    assert len(read.ids) == len(set(read.ids)), "every name on the page is there once"
    for title in ("Loss", "Accuracy", "Learning rate", "Norm of the gradient", "Images a second", "Most wrong"):
        assert title in read.text
    assert "78.00%" not in read.text and f"{1 - 1.1 / 6:.2%}" in read.text
    assert "forward and backward" in read.text and "75.0%" in read.text
    assert "script" not in read.tags


def test_the_most_wrong_images_come_first_with_what_the_model_thought(tmp_path):
    known = made_up(3, tmp_path, images=5)
    zeros = np.zeros((5, 8, 8, 3), np.uint8)
    known.judged = Judged(
        "test",
        labels=np.array([0, 1, 2, 0, 1]),
        guesses=np.array([0, 2, 0, 1, 1]),
        confidence=np.array([0.99, 0.5, 0.9, 0.7, 1.0]),
        of_label=np.array([0.99, 0.4, 0.05, 0.01, 1.0]),
        pixels=zeros.__getitem__,
    )
    text = Reader(one_run(known)).text
    shown = re.findall(r"class (\d) ([\d.]+)%is class (\d) ([\d.]+)%image (\d)", text)
    assert shown == [("0", "90.0", "2", "5.0", "2"), ("1", "70.0", "0", "1.0", "3"), ("2", "50.0", "1", "40.0", "1")]
    assert "Of 5 test images 3 were mistaken" in text


def test_recall_precision_and_mistakes_of_a_class(tmp_path):
    known = made_up(2, tmp_path)
    labels, guesses = np.array([0] * 10 + [1] * 10), np.array([0] * 7 + [1] * 3 + [1] * 9 + [0])
    known.judged = dataclasses.replace(
        known.judged, labels=labels, guesses=guesses, confidence=np.ones(20), of_label=np.zeros(20)
    )
    text = Reader(one_run(known)).text
    assert "0 class 01070.00%87.50%class 1 3" in text.replace("\n", "")
    assert "1 class 11090.00%75.00%class 0 1" in text.replace("\n", "")


def test_names_from_anywhere_are_only_text(tmp_path):
    known = made_up(3, tmp_path, name=HOSTILE)
    known.attributes["classes"] = [HOSTILE, "日本" * 50, "\ud800"]
    known.settings |= {"model": HOSTILE, "augment": HOSTILE}
    known.starts = [{"processor": HOSTILE, "versions": {"numpy": HOSTILE}}, {"versions": "none"}, {}]
    known.notes = [HOSTILE]
    for text in (one_run(known), several_runs([known, made_up(3, tmp_path)])):
        read = Reader(text)
        assert "script" not in read.tags and "<script>alert(1)</script>" in read.text and "\x1b" not in text


@pytest.mark.parametrize("missing", ["epochs", "steps", "judged", "filters", "attributes", "settings"])
def test_what_is_missing_is_left_out(missing, tmp_path):
    known = made_up(10, tmp_path)
    value = getattr(known, missing)
    setattr(known, missing, type(value)() if isinstance(value, dict | list) else None)
    assert "Course" in Reader(one_run(known)).text
    Reader(several_runs([known, known]))


def test_numbers_that_are_none(tmp_path):
    known = made_up(10, tmp_path)
    for line in known.epochs[2:] + known.steps[3:]:
        line |= {"train_loss": None, "loss": None, "grad_norm": None, "lr": "high", "images_per_s": True, "epoch": None}
    known.epochs.append({"test_acc": None, "step": 10**400, "epoch": {}})
    Reader(one_run(known))
    Reader(several_runs([known, known]))
    Reader(one_run(Run(tmp_path)))


# -- several -----------------------------------------------------------------------------------------------------------


def test_runs_are_compared(tmp_path):
    runs = [made_up(10, tmp_path, name=name) for name in ("a", "b", "c")]
    runs[1].settings["lr"] = 0.2
    runs[2].attributes["weights_sha256"] = "1" * 64
    runs[2].epochs[3]["test_acc"] = 0.99
    text = Reader(several_runs(runs)).text
    assert "a and b ended with the same weights" in text and "99.00% (epoch 4)" in text
    table = text[text.index("What differs") : text.index("Course")]
    assert "lr0.050.20.05" in table.replace("\n", "") and "model" not in table
    assert "Nothing in their settings" in Reader(several_runs([runs[0], runs[2]])).text


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    args = [word for word in command(1, data, out, "--log-every", "2") if word != "--no-report"]
    result = run(*args)
    assert result.returncode == 0, result.stderr
    assert f"to look at:  {out / 'report.html'}" in result.stdout
    return out


def test_a_run_ends_with_its_report_and_the_command_writes_the_same(trained, tmp_path, capsys):
    written = (trained / "report.html").read_text()
    read = Reader(written)
    assert read.tags.count("img") > 10 and "Starts" in read.text
    line = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"loss {line['test_loss']:.4f}, acc {line['test_acc']:.4f}" in read.text
    assert main([str(trained), "--out", str(tmp_path / "again.html")]) == 0
    assert written == (tmp_path / "again.html").read_text()
    assert capsys.readouterr().out == f"{tmp_path / 'again.html'}: {len(written) >> 10} KiB\n"


@pytest.fixture
def no_charts(monkeypatch) -> None:
    """Pages without curves, whose drawing takes most of the time."""
    monkeypatch.setattr("cnnmpi.report.one.chart", lambda title, *_, **__: f"<p>{title}</p>")


def copied(trained: Path, out: Path) -> Path:
    out.mkdir()
    for path in trained.iterdir():
        if path.is_file():
            (out / path.name).write_bytes(path.read_bytes())
    return out


@pytest.mark.fault
@pytest.mark.parametrize("name", ["metrics.jsonl", "steps.jsonl", "starts.jsonl", "config.toml", "last.h5"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "noise", "a folder"])
def test_a_damaged_run_gives_what_it_has(name, damage, trained, tmp_path, capsys, no_charts):
    out = copied(trained, tmp_path / "run")
    path, content = out / name, (out / name).read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "gone":
        noise = bytes(range(256)) * 20
        path.write_bytes({"empty": b"", "cut": content[: len(content) * 2 // 3], "noise": noise}[damage])
    assert main([str(out), "--out", str(tmp_path / "page.html")]) == 0
    read = Reader((tmp_path / "page.html").read_text())
    if name == "last.h5":
        assert "previous.h5" in read.text
    if damage == "noise":
        assert name in read.text and name in capsys.readouterr().err


@pytest.mark.fault
@pytest.mark.parametrize(
    "argv, message",
    [
        (["nowhere"], "nowhere: not a folder: name the folder of a run"),
        ([], "name the folder of at least one run"),
        (["run", "--out", "no/page.html"], "no/page.html: cannot be written: No such file or directory"),
    ],
)
def test_bad_input_gets_one_line(argv, message, trained, tmp_path, monkeypatch, capsys):
    copied(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error") == 1


def test_other_data_and_data_that_are_gone_are_said(trained, tmp_path, capsys):
    write_hdf5(tmp_path / "other.h5", synthetic(seed=5, train=40, test=30))
    assert main([str(trained), "--data", str(tmp_path / "other.h5"), "--out", str(tmp_path / "p.html")]) == 0
    assert "of other data than the run's" in capsys.readouterr().err
    out = copied(trained, tmp_path / "run")
    text = (out / "config.toml").read_text()
    (out / "config.toml").write_text(text)
    from cnnmpi import checkpoint

    arrays, attributes = checkpoint.load(out / "last.h5")
    config = json.loads(attributes["config"]) | {"data": str(tmp_path / "gone.h5")}
    checkpoint.save(out / "last.h5", arrays, attributes | {"config": json.dumps(config)})
    assert main([str(out), "--out", str(tmp_path / "p.html")]) == 0
    assert "gone.h5) are not here: name them by --data" in capsys.readouterr().err
    assert "Most wrong" not in Reader((tmp_path / "p.html").read_text()).text


@pytest.mark.fault
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=needs_mpirun)])
@pytest.mark.parametrize("hindrance", ["a folder in its place", "a library that fails"])
def test_a_report_that_cannot_be_written_is_a_warning(hindrance, ranks, data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    if hindrance == "a folder in its place":
        (out / "report.html").mkdir(parents=True)
    else:
        monkeypatch.setenv("MPLBACKEND", "nonsense")
    args = [word for word in command(ranks, data, out, "--max-steps", "2") if word != "--no-report"]
    result = run(*args)
    assert result.returncode == 0 and result.stdout.splitlines()[-1].startswith("done: "), result.stderr
    assert result.stdout.count("warning: no report was written: ") == 1 and "Traceback" not in result.stderr


@needs_mpirun
def test_a_report_is_the_same_from_any_number_of_ranks(trained, data, tmp_path):
    args = [word for word in command(2, data, tmp_path / "run", "--log-every", "2") if word != "--no-report"]
    assert run(*args).returncode == 0
    one, two = ((folder / "report.html").read_text() for folder in (trained, tmp_path / "run"))
    for title in ("Classes", "Most wrong", "First filters"):
        begin, end = f'<h2 id="{title.lower().replace(" ", "-")}">', "<h2"
        assert one.split(begin)[1].split(end)[0] == two.split(begin)[1].split(end)[0]


def test_matplotlib_starts_no_program_which_mpi_forbids(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))  # without a cache of fonts
    code = (
        "import sys; from cnnmpi.report.charts import Curve, chart\n"
        "sys.addaudithook(lambda event, args: sys.exit(f'{event} {args}') if event in ('subprocess.Popen', 'os.fork') "
        "else None)\n"
        "print(len(chart('A', [Curve('x', [(0, 1), (1, 2)])], 'step')))"
    )
    result = run(sys.executable, "-c", code)
    assert result.returncode == 0 and int(result.stdout) > 1000 and result.stderr == ""


def test_the_last_lines_name_what_is_there_as_a_shell_takes_it(tmp_path):
    out = tmp_path / "my runs"
    out.mkdir()
    said = what_now(out, {"last.h5": 2}, "python net.py --resume", "my nets/net.py:Net", None).splitlines()
    assert said[0] == f"checkpoints: last.h5 2 times, in {out}" and said[1] == "to go on:    python net.py --resume"
    assert said[2] == f"to evaluate: python -m cnnmpi.evaluate '{out}' --model 'my nets/net.py:Net'"
    assert said[3] == f"to look at:  python -m cnnmpi.report '{out}' --model 'my nets/net.py:Net'"
    (out / "best.h5").touch()
    assert f"'{out}/best.h5'" in what_now(out, {}, "", None, out / "report.html")


def test_a_table_of_many_classes_takes_memory_for_images_not_for_pairs(tmp_path, monkeypatch):
    known = made_up(5000, tmp_path)
    monkeypatch.setattr(Counts, "confusion", property(lambda self: pytest.fail("25 million numbers")))
    text = Reader(one_run(known)).text
    assert "The 40 of 5000 classes" in text and "taken for" in text


def test_counts_are_those_of_the_confusion_matrix(tmp_path):
    judged = made_up(7, tmp_path).judged
    counts, matrix = Counts.of(judged, 7), np.zeros((7, 7), int)
    np.add.at(matrix, (judged.labels, judged.guesses), 1)
    assert (counts.confusion == matrix).all() and counts.times.tolist() == sorted(counts.times, reverse=True)
    assert (counts.images == matrix.sum(axis=1)).all() and (counts.guessed == matrix.sum(axis=0)).all()
    off = matrix[counts.mistakes[:, 0], counts.mistakes[:, 1]]
    assert (off == counts.times).all() and counts.times.sum() == matrix.sum() - np.trace(matrix)


@pytest.mark.fault
@pytest.mark.parametrize(
    "text", ["a = 0x" + "f" * 5000, "a = " + "9" * 5000, "a = [" + "[" * 5000, "\x00", "data = 5\nmodel = {x = 1}"]
)
def test_settings_that_nobody_could_mean(text, trained, tmp_path, no_charts):
    out = copied(trained, tmp_path / "run")
    (out / "config.toml").write_text(text)
    assert main([str(out), "--data", "none", "--out", str(tmp_path / "page.html")]) == 0


@pytest.mark.fault
@pytest.mark.parametrize("name", ["metrics.jsonl", "steps.jsonl", "config.toml", "last.h5"])
def test_a_pipe_in_the_place_of_a_file_lets_nobody_wait(name, trained, tmp_path, no_charts):
    out = copied(trained, tmp_path / "run")
    (out / name).unlink()
    os.mkfifo(out / name)
    assert main([str(out), "--data", "none", "--out", str(tmp_path / "page.html")]) == 0


def test_several_folders_of_the_same_name_are_told_apart(trained, tmp_path):
    for parent in ("one", "two"):
        (tmp_path / parent).mkdir()
        copied(trained, tmp_path / parent / "run")
    folders = [str(tmp_path / parent / "run") for parent in ("one", "two")]
    assert main([*folders, "--out", str(tmp_path / "both.html")]) == 0
    assert "one/run and two/run ended with the same weights" in Reader((tmp_path / "both.html").read_text()).text
    assert read_run(tmp_path / "one" / "run").per_epoch == 10


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_a_chart_keeps_the_peaks_of_a_long_curve():
    points = [(float(i), math.sin(i / 50)) for i in range(20_000)]
    points[7001] = (7001.0, 99.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS + 2 and (7001.0, 99.0) in kept and kept == sorted(kept)
    assert kept[0] == points[0] and kept[-1] == points[-1]


def test_a_chart_takes_its_colours_from_the_page():
    text = chart("A", [Curve("x", [(0, 1), (1, 2)], 3), Curve("y", [(0, 1), (1, 3)], 9)], "step", per_epoch=2)
    assert set(re.findall(r"var\(--(c\d)\)", text)) == {"c3", "c1"} and "6 3" in text
    assert not re.findall(r"#0[0-9a-f]{5}", text)
    assert chart("A", [Curve("x", [(0, math.nan)])], "step") == ""


def test_confusion_pixels_are_darker_where_more_of_a_row_is():
    pixels = confusion_pixels(np.array([[90, 10, 0], [0, 0, 0], [1, 0, 1]]))
    side = len(pixels) // 3
    cells = pixels[side // 2 :: side, side // 2 :: side].sum(axis=2)
    assert cells[0, 0] < cells[0, 1] < cells[0, 2] == 765 and (cells[1] == 765).all() and cells[2, 0] == cells[2, 2]


def test_images_side_by_side():
    images = np.arange(5, dtype=np.float32)[:, None, None, None] / 4 * np.ones((5, 1, 4, 6), np.float32)
    pixels = grid(images, gap=1)
    assert pixels.shape == (2 * 5 - 1, 3 * 7 - 1, 3)
    places = ((0, 0), (0, 7), (5, 0), (5, 7), (5, 14), (4, 0))
    assert [int(pixels[y, x, 0]) for y, x in places] == [0, 64, 191, 255, 128, 128]


def test_a_picture_is_scaled_down_but_not_up():
    large = page.picture(np.zeros((300, 600, 3), np.uint8), "a")
    assert 'width="128" height="64"' in large
    assert 'width="5" height="7"' in page.picture(np.zeros((7, 5, 1), np.uint8), "a")

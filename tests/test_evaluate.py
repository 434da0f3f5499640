"""Evaluation: exact counts for any labels and numbers of classes, in bounded memory; and what the command prints."""

import re
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cnnmpi import Conv2d, Flatten, GlobalAvgPool2d, Linear, Model, SimpleCNN, SmallResNet, checkpoint, functional
from cnnmpi.data import Dataset, normalize, read_hdf5, write_hdf5
from cnnmpi.evaluate import main
from cnnmpi.functional import cross_entropy_loss
from cnnmpi.train import Evaluation, evaluate, load_checkpoint
from cnnmpi.train.evaluation import BATCH, batch_size
from cnnmpi.train.state import model_attributes, pack

MEAN, STD = (0.5,), (0.25,)
NASTY = ("a[/b]", "[red]", ":smile:", "línea\nzwei", "\x1b[2J", "猫", "e\u0301", "{0}", "x" * 66, "%s")


def drawn(count: int, classes: int, size: int = 16, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (count, size, size, channels), np.uint8).transpose(0, 3, 1, 2)
    return images, draw.integers(0, classes, count)


def a_run(folder: Path, classes: Sequence[str], *, count: int = 40, size: int = 16) -> tuple[Path, Path, Evaluation]:
    """A checkpoint, a data file, and the evaluation that the command is to print."""
    images, labels = drawn(count, len(classes), size)
    data, saved = folder / "data.h5", folder / "model.h5"
    write_hdf5(data, Dataset(images, labels, images, labels, tuple(classes), "drawn at random"))
    options = {"in_channels": 1, "num_classes": len(classes), "image_size": size}
    model = SimpleCNN(**options)
    described = model_attributes("simplecnn", options, model)
    checkpoint.save(saved, pack(model), described | {"classes": list(classes), "mean": list(MEAN), "std": list(STD)})
    return saved, data, evaluate(model, images, labels, classes=len(classes), mean=MEAN, std=STD)


# -- counts ------------------------------------------------------------------------------------------------------------


class Teller(Model):
    """Takes each image for the class that its first two pixels name, 256 a + b."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.out = Linear(1, 1)
        self.classes = classes

    def forward(self, x: np.ndarray) -> np.ndarray:
        named = np.rint(x[:, 0, 0, 0] * 255).astype(int) * 256 + np.rint(x[:, 0, 0, 1] * 255).astype(int)
        return np.eye(1, self.classes, dtype=np.float32)[0] * 0 + (np.arange(self.classes) == named[:, None]).astype(
            "f"
        )


def telling(guesses: np.ndarray) -> np.ndarray:
    images = np.zeros((len(guesses), 1, 1, 2), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = guesses // 256, guesses % 256
    return images


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "uint64"])
def test_narrow_labels_do_not_wrap(dtype):
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 100, 300)
    guesses = np.where(draw.random(300) < 0.4, labels, draw.integers(0, 100, 300))
    result = evaluate(Teller(100), telling(guesses), labels.astype(dtype), classes=100, mean=(0.0,), std=(1.0,))
    assert result.accuracy == (labels == guesses).sum() / 300
    expected = np.zeros((100, 100), int)
    np.add.at(expected, (labels, guesses), 1)
    assert np.array_equal(result.confusion, expected)
    assert np.array_equal(result.images, expected.sum(axis=1)) and np.array_equal(result.hits, expected.diagonal())
    assert np.array_equal(result.guessed, expected.sum(axis=0))


def test_counts_of_a_hundred_thousand_classes_take_memory_for_the_images_only():
    labels = np.random.default_rng(2).integers(0, 60_000, 6)
    guesses = np.where(np.arange(6) % 2, labels, 7)
    tracemalloc.start()
    result = evaluate(Teller(100_000), telling(guesses), labels, classes=100_000, mean=(0.0,), std=(1.0,))
    shares = result.accuracy, result.images[labels].min(), result.hits.sum(), result.guessed[7]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert shares == (0.5, 1, 3, 3)
    assert peak < 50e6  # 6 rows of logits and what the loss makes of them; a matrix of the classes has 80 GB


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 10], r"labels must lie in 0\.\.9, got 0\.\.10"),
        ([0, -1, 9], r"labels must lie in 0\.\.9, got -1\.\.9"),
        ([0, 1], r"got \(3, 1, 16, 16\) and int64 \(2,\)"),
        ([0.0, 1.0, 2.0], "integer labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    images, _ = drawn(3, 10)
    model = SimpleCNN(1, 10, 16)
    with pytest.raises(ValueError, match=message):
        evaluate(model, images, np.array(labels), classes=10, mean=MEAN, std=STD)
    assert model.training


def test_images_and_classes_that_do_not_fit_are_refused():
    images, labels = drawn(3, 10)
    model = SimpleCNN(1, 10, 16)
    for given, classes, message in (
        (images.astype(np.uint16), 10, "got uint16"),
        (images[:0], 10, "there are no images"),
        (images, 11, "the targets are of 11 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(model, given, labels[: len(given)], classes=classes, mean=MEAN, std=STD)
    assert model.training


def test_floats_in_0_to_1_are_images_too():
    images, labels = drawn(30, 10)
    model = SimpleCNN(1, 10, 16)
    whole, unit = (
        evaluate(model, x, labels, classes=10, mean=MEAN, std=STD) for x in (images, images.astype(np.float32) / 255)
    )
    assert np.array_equal(whole.guesses, unit.guesses)


# -- memory ------------------------------------------------------------------------------------------------------------


class Chain(Model):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv2d(3, width, 3, padding=1)
        self.pool = GlobalAvgPool2d()
        self.out = Linear(width, 10)


class Bare(Model):
    def __init__(self) -> None:
        super().__init__()
        self.flat, self.out = Flatten(), Linear(3 * 512 * 512, 2)


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (lambda: SimpleCNN(), (3, 32, 32), BATCH),  # so that results stay as they were
        (lambda: SmallResNet(), (3, 32, 32), BATCH),
        (lambda: SmallResNet(num_classes=100), (3, 32, 32), BATCH),
        (lambda: SmallResNet(image_size=224), (3, 224, 224), 5),  # 64 MiB for 64 channels of float32: 12.8 MB each
        (lambda: Chain(200), (3, 64, 64), 20),  # 3.3 MB each
        (lambda: Bare(), (3, 512, 512), 21),  # the image itself
        (lambda: Chain(10), (3, 2000, 2000), 1),  # never none
    ],
)
def test_a_batch_is_as_large_as_its_largest_activation_allows(model, shape, expected):
    made = model()
    made.eval()
    state = made.state_dict()
    assert batch_size(made, shape) == expected
    assert all(layer._cache is None for _, layer in made.walk())  # it left nothing behind
    assert all(np.array_equal(state[name], array) for name, array in made.state_dict().items())


def test_larger_images_take_no_more_memory():
    """By tracemalloc, which counts what NumPy asks for: the same on any machine."""
    functional.set_threads(1)
    peaks = {}
    for size, count in ((32, 125), (128, 40)):
        model = SmallResNet(image_size=size)
        images, labels = drawn(count, 10, size=size, channels=3)
        tracemalloc.start()
        evaluate(model, images, labels, classes=10, mean=3 * MEAN, std=3 * STD)
        peaks[size] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # 125 images of 32x32 have 33 MB in their largest activation, batches of larger images up to 64 MiB; 40 images of
    # 128x128 at a time would have 168 MB there, 5 times as much as the small ones
    assert peaks[128] < 3 * peaks[32]


# -- the command -------------------------------------------------------------------------------------------------------


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_the_command_prints_all_counts_of_twenty_classes(tmp_path, capsys):
    saved, data, result = a_run(tmp_path, [f"class-{k}" for k in range(20)], count=400)
    assert main([str(saved), "--data", str(data)]) == 0
    out = capsys.readouterr().out
    top5 = re.search(rf"^accuracy {result.accuracy:.4f}  top5 (0\.\d{{4}})  loss {result.loss:.4f}$", out, re.MULTILINE)
    assert result.accuracy <= float(top5[1]) < 0.6, "five of twenty, by chance"
    table, matrix = out.split("confusion matrix")
    rows = cells(matrix)[2:]
    assert [[int(count) for count in row[2:]] for row in rows] == result.confusion.tolist()
    assert [row[:2] for row in rows] == [[str(k), f"class-{k}"] for k in range(20)]
    counts = [int(row[2]) for row in cells(table) if row and row[0].isdecimal()]
    assert counts == result.images.tolist() and sum(counts) == 400


def test_the_command_evaluates_in_the_precision_that_it_is_told(tmp_path, capsys):
    pytest.importorskip("torch")
    saved, data, _ = a_run(tmp_path, ["a", "b", "c"])
    whole = read_hdf5(data)
    model = load_checkpoint(saved).to_torch(precision="bfloat16")
    scaling = {"classes": 3, "mean": MEAN, "std": STD}
    low = evaluate(model, whole.test_images, whole.test_labels, **scaling)
    exact = evaluate(model.to_numpy(), whole.test_images, whole.test_labels, **scaling)
    assert 1e-6 < abs(low.loss / exact.loss - 1) < 2.0**-7, "products of 8 bits"
    seen = {}
    for precision in ("float32", "bfloat16"):
        assert main([str(saved), "--data", str(data), "--backend", "torch", "--precision", precision]) == 0
        seen[precision] = float(re.search(r"loss (\S+)", capsys.readouterr().out)[1])
    assert seen == {"float32": pytest.approx(exact.loss, abs=1e-4), "bfloat16": round(low.loss, 4)}
    assert main([str(saved), "--data", str(data), "--precision", "bfloat16"]) == 2
    assert capsys.readouterr().err.endswith("--precision bfloat16 needs --backend torch: NumPy computes in float32\n")


def test_logits_are_means_over_the_views_that_are_named(tmp_path, capsys):
    saved, data, plain = a_run(tmp_path, ["a", "b", "c"])
    model, (images, labels) = load_checkpoint(saved), drawn(40, 3)

    def logits(x: np.ndarray) -> np.ndarray:
        return model.forward(normalize(np.ascontiguousarray(x), MEAN, STD))

    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), "edge")
    all_six = [v for x in (images, padded[:, :, 2:, 2:], padded[:, :, :-2, :-2]) for v in (x, x[:, :, :, ::-1])]
    losses = {"none": plain.loss}
    for tta, seen in (("flip", all_six[:2]), ("flip+shift", all_six)):
        expected = sum(logits(x) for x in seen) / len(seen)
        losses[tta], _ = cross_entropy_loss(expected, labels)
        result = evaluate(model, images, labels, classes=3, mean=MEAN, std=STD, tta=tta)
        assert result.loss == pytest.approx(losses[tta], rel=1e-6) and (result.guesses == expected.argmax(1)).all()
        assert main([str(saved), "--data", str(data), "--tta", tta]) == 0
        out = capsys.readouterr().out
        assert f", logits averaged over the views {tta}\n" in out and f"loss {result.loss:.4f}" in out
    assert len({round(loss, 5) for loss in losses.values()}) == 3
    with pytest.raises(ValueError, match="expected none, flip or flip"):
        evaluate(model, images, labels, classes=3, mean=MEAN, std=STD, tta="rotate")


def test_names_are_printed_as_they_are(tmp_path, capsys):
    saved, data, result = a_run(tmp_path, NASTY)
    assert main([str(saved), "--data", str(data)]) == 0
    out = capsys.readouterr().out
    for number, name in enumerate(NASTY):
        shown = name.replace("\n", "\\n").replace("\x1b", "\\x1b")
        assert len(re.findall(rf"^{number} {re.escape(shown)} ", out, re.MULTILINE)) == 2
    assert "\x1b" not in out
    rows = cells(out.split("confusion matrix")[1])[2:]
    assert [[int(count) for count in row[-10:]] for row in rows] == result.confusion.tolist()


@pytest.mark.parametrize(
    ("classes", "size", "message"),
    [
        (("a", "b", "c"), 20, "16x16 pixels of 1 channels and the classes a, b, c; --data"),
        (("a", "b"), 16, "has 16x16 pixels of 1 channels and the classes a, b"),
        (("a", "x", "c"), 16, "the classes a, x, c"),
        ([f"c{k}" for k in range(1000)], 16, "c9, ... (1000 in all)"),
    ],
)
def test_data_that_the_model_does_not_know_are_refused_in_one_line(tmp_path, capsys, classes, size, message):
    (tmp_path / "other").mkdir()
    saved, own, _ = a_run(tmp_path, ("a", "b", "c"))
    _, data, _ = a_run(tmp_path / "other", classes, size=size)
    assert main([str(saved), "--data", str(data)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) < 1000
    for swapped in ([str(own), "--data", str(own)], [str(saved), "--data", str(saved)]):
        assert main(swapped) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_class_far_down_the_list_is_compared_too(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    names = [f"c{k}" for k in range(15)]
    saved, _, _ = a_run(tmp_path, names)
    _, data, _ = a_run(tmp_path / "other", [*names[:12], "x", *names[13:]])
    assert main([str(saved), "--data", str(data)]) == 2
    error = capsys.readouterr().err
    assert f"class 12 of {saved} is c12, that of --data {data} is x" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "config",
    ["[]", "5", "{", '{"loss": 5}', '{"validation": "x"}', '{"validation": -0.5}', '{"seed": NaN}', "[" * 5000],
)
def test_a_configuration_that_cannot_be_one_is_refused_in_one_line(tmp_path, capsys, config):
    saved, data, _ = a_run(tmp_path, ("a", "b"))
    arrays, attributes = checkpoint.load(saved)
    checkpoint.save(saved, arrays, attributes | {"config": config})
    assert main([str(saved), "--data", str(data)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{saved}: its configuration" in line or re.search("--(validation|loss) must be", line)

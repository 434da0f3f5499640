"""A person's own network, loss, augmentation, metrics and hooks: by ``fit``, by name, and what wrong ones are told."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import cnnmpi
from cnnmpi import checkpoint
from cnnmpi.checkpoint import CheckpointError
from cnnmpi.data import DataError, Dataset, read_hdf5, write_hdf5
from cnnmpi.distributed import Ranks, UserError
from cnnmpi.train import Config, set_up
from cnnmpi.train.code import Code
from tests.jobs import digest, needs_mpirun, run

pytestmark = pytest.mark.mpi_skip  # fit() would train on all ranks, but each has a folder of its own

NET = """
import sys
import numpy as np
import cnnmpi
from cnnmpi import Concat, Conv2d, Dropout, GlobalAvgPool2d, GroupNorm, Identity, Linear, Model, ReLU, Sequential


def loss(logits, targets, reduction="sum"):
    total, dlogits = cnnmpi.cross_entropy_loss(logits, targets, reduction=reduction)
    penalty = 0.01 * float((logits * logits).sum()) / (1 if reduction == "sum" else len(logits))
    return total + penalty, dlogits + 0.02 * logits / (1 if reduction == "sum" else np.float32(len(logits)))


def darker(images, labels, draw):
    return images // draw("darker").integers(1, 4, (len(images), 1, 1, 1)).astype(np.uint8)


def confident(logits, targets):
    return (logits.max(axis=1) > 1).sum(), len(targets)


class Net(Model):
    recipe = {
        "loss": loss, "augment": ["flip", darker], "metrics": {"confident": confident},
        "lr": 0.1, "batch_size": 40, "epochs": 2,
    }

    def __init__(self, in_channels=3, num_classes=10, width=8):
        super().__init__()
        self.stem = Conv2d(in_channels, width, 3, 2)
        self.dense = Concat(Identity(), Sequential(GroupNorm(2, width), ReLU(), Conv2d(width, 4, 3, padding=1)))
        self.drop = Dropout(0.1)
        self.pool = GlobalAvgPool2d()
        self.head = Linear(width + 4, num_classes)


class Wide(Net):
    def __init__(self, **options):
        super().__init__(**options, width=12)


if __name__ == "__main__":
    sys.exit(cnnmpi.fit(Net))
"""


def images(train: int = 80, test: int = 40, size: int = 16) -> Dataset:
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (train + test, 3, size, size), np.uint8)
    y = draw.integers(0, 10, train + test)
    return Dataset.of((x[:train], y[:train], x[train:], y[train:]))


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> Path:
    """A folder with the script net.py and data.h5, and nothing else."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "net.py").write_text(NET)
    write_hdf5(folder / "data.h5", images())
    return folder


@pytest.fixture
def here(nets, monkeypatch) -> Path:
    monkeypatch.chdir(nets)
    return nets


def python(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, *words)


def refusal(*words: str | Path) -> str:
    """Return the one line with which a command ends."""
    result = python(*words)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    return line


# -- scripts and names -------------------------------------------------------------------------------------------------


@needs_mpirun
def test_a_script_and_its_name_end_in_one_digest_on_any_number_of_ranks(here, tmp_path):
    from tests.jobs import MPIRUN

    data = ["--data", "data.h5"]
    alone = python("net.py", *data, "--out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    assert "test loss" in alone.stdout and "confident" in alone.stdout
    by_name = ["-m", "cnnmpi.train", "--model", "net.py:Net", *data]
    three = run(MPIRUN, "-n", "3", sys.executable, *by_name, "--out", tmp_path / "three")
    assert digest(three.stdout) == digest(alone.stdout), three.stderr
    part = run(MPIRUN, "-n", "2", sys.executable, "net.py", *data, "--out", tmp_path / "part", "--max-steps", "3")
    assert part.returncode == 0, part.stderr
    rest = python(*by_name, "--out", tmp_path / "part", "--resume")
    assert digest(rest.stdout) == digest(alone.stdout), rest.stderr
    line = json.loads((tmp_path / "part" / "metrics.jsonl").read_text().splitlines()[-1])
    whole = json.loads((tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("train_loss", "train_acc", "train_confident", "test_loss", "test_acc", "test_confident"):
        assert line[name] == whole[name], name


def test_a_module_names_a_network_and_options_reach_it(here, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{here}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    result = python(
        "-m", "cnnmpi.train", "--model", "net:Net", "--model-options", '{"width": 6}', "--data", here / "data.h5",
        "--out", tmp_path / "run", "--max-steps", "1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    arrays, attributes = checkpoint.load(tmp_path / "run" / "last.h5")
    assert arrays["model/stem.weight"].shape == (6, 3, 3, 3) and attributes["model"] == "net:Net"
    assert json.loads(attributes["model_options"])["width"] == 6


def test_help_shows_the_defaults_of_the_network(here):
    text = python("-m", "cnnmpi.train", "--help", "--model", "net.py:Net").stdout
    words = " ".join(text.replace("│", " ").split())
    assert "(default: net.py:loss)" in words and "(default: 40)" in words and "(default: 0.1)" in words


# -- in a notebook -----------------------------------------------------------------------------------------------------


class Small(cnnmpi.Model):
    """A network that draws its weights without a generator."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv, self.pool = cnnmpi.Conv2d(3, 4, 3, 2), cnnmpi.GlobalAvgPool2d()
        self.drop, self.head = cnnmpi.Dropout(0.2), cnnmpi.Linear(4, num_classes)


QUICK = {"batch_size": 40, "epochs": 2, "threads": 1, "shards": 4}


def test_fit_returns_the_model_and_its_metrics_and_repeats_itself(tmp_path):
    data = images()
    arrays = (data.train_images / np.float32(255), data.train_labels, data.test_images, data.test_labels)
    one = cnnmpi.fit(Small, data=data, out=tmp_path / "one", **QUICK)
    two = cnnmpi.fit(Small, data=arrays, out=tmp_path / "two", **QUICK)
    assert one == two == 0 and not one.model.training and len(one.metrics) == 2
    assert checkpoint.weights_digest(one.model.state_dict()) == checkpoint.weights_digest(two.model.state_dict())
    other = cnnmpi.fit(Small, data=data, out=tmp_path / "other", seed=1, **QUICK)
    assert not np.array_equal(other.model.state_dict()["conv.weight"], one.model.state_dict()["conv.weight"])
    result = cnnmpi.train.evaluate(
        one.model, data.test_images, data.test_labels, classes=10, mean=one.model.info.mean, std=one.model.info.std
    )
    assert result.accuracy == one.metrics[-1]["test_acc"]
    loaded = cnnmpi.load_checkpoint(one.out / "last.h5", model=Small)
    assert checkpoint.weights_digest(loaded.state_dict()) == checkpoint.weights_digest(one.model.state_dict())


def test_fit_goes_on_where_it_was(tmp_path):
    data = images()
    whole = cnnmpi.fit(Small, data=data, out=tmp_path / "whole", **QUICK)
    cnnmpi.fit(Small, data=data, out=tmp_path / "part", max_steps=3, **QUICK)
    rest = cnnmpi.fit(Small, data=data, out=tmp_path / "part", resume="auto")
    assert checkpoint.weights_digest(rest.model.state_dict()) == checkpoint.weights_digest(whole.model.state_dict())


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "mse"])
def test_targets_of_several_numbers_train_and_evaluate(tmp_path, loss):
    data = images()
    draw = np.random.default_rng(1)
    y = [draw.random((len(part), 3), np.float32) for part in (data.train_labels, data.test_labels)]
    if loss == "cross_entropy":
        y = [part / part.sum(axis=1, keepdims=True) for part in y]
    if loss == "mse":
        y = [part * 4 - 2 for part in y]
    arrays = (data.train_images, y[0], data.test_images, y[1])
    write_hdf5(tmp_path / "soft.h5", Dataset.of(arrays))
    again = read_hdf5(tmp_path / "soft.h5")
    assert np.array_equal(again.train_labels, y[0]) and again.digest() == Dataset.of(arrays).digest()
    result = cnnmpi.fit(Small, data=tmp_path / "soft.h5", out=tmp_path / "run", augment="flip", **QUICK)
    assert json.loads(checkpoint.load(result.out / "last.h5")[1]["config"])["loss"] == loss, "what suits the targets"
    x = cnnmpi.DataLoader(
        data.test_images, y[1], 40, shuffle=False, mean=result.model.info.mean, std=result.model.info.std
    ).batch(0)[0]
    logits = result.model.forward(x)
    expected, _ = getattr(cnnmpi, "mse_loss" if loss == "mse" else f"{loss}_loss")(logits, y[1])
    metrics = result.metrics[-1]
    np.testing.assert_allclose(metrics["test_loss"], expected, rtol=1e-5)  # batches of float32 in another order
    right = (logits >= 0) == (y[1] >= 0.5) if loss == "binary_cross_entropy" else logits.argmax(1) == y[1].argmax(1)
    assert ("test_acc" not in metrics) if loss == "mse" else metrics["test_acc"] == right.mean()
    assert result.metrics[0]["train_loss"] > result.metrics[1]["train_loss"], "it learns"


def test_top5_is_reported_from_twenty_classes_on(tmp_path):
    data = images()
    labels = np.arange(80) % 20
    result = cnnmpi.fit(Small, data=(data.train_images, labels, data.train_images, labels), out=tmp_path / "r", **QUICK)
    assert 0 <= result.metrics[0]["test_acc"] <= result.metrics[0]["test_top5"] < 0.6
    fewer = cnnmpi.fit(Small, data=(*(data.train_images, labels % 19) * 2,), out=tmp_path / "s", **QUICK)
    assert "test_top5" not in fewer.metrics[0]


# -- fine-tuning -------------------------------------------------------------------------------------------------------


class Tuned(Small):
    """The body stays as it is."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.conv.freeze()


def test_a_frozen_body_from_a_checkpoint_stays_and_needs_no_optimizer_state(tmp_path, capsys):
    data = images()
    base = cnnmpi.fit(Small, data=data, out=tmp_path / "base", **QUICK)
    three = (data.train_images, data.train_labels % 3, data.test_images, data.test_labels % 3)
    capsys.readouterr()
    tuned = cnnmpi.fit(Tuned, data=three, init=str(base.out / "last.h5"), out=tmp_path / "tuned", **QUICK)
    said = capsys.readouterr().out
    assert "2 of the model's 4 arrays start from there" in said
    assert "of another shape: head.bias (10,), not (3,), head.weight (10, 4), not (3, 4)" in said
    before, after = base.model.state_dict(), tuned.model.state_dict()
    assert np.array_equal(before["conv.weight"], after["conv.weight"])
    names = set(checkpoint.load(tuned.out / "last.h5")[0])
    assert "model/conv.weight" in names and {n for n in names if n.startswith("optimizer")} == {
        "optimizer/momentum/head.weight", "optimizer/momentum/head.bias",
    }  # fmt: skip
    whole = checkpoint.weights_digest(after)
    cnnmpi.fit(Tuned, data=three, init=str(base.out / "last.h5"), out=tmp_path / "part", max_steps=3, **QUICK)
    rest = cnnmpi.fit(Tuned, data=three, out=tmp_path / "part", resume="auto")
    assert checkpoint.weights_digest(rest.model.state_dict()) == whole
    with pytest.raises(UserError, match="none of its 4 arrays fits"):
        cnnmpi.fit(cnnmpi.SimpleCNN, data=data, init=str(base.out / "last.h5"), out=tmp_path / "x", **QUICK)


# -- hooks -------------------------------------------------------------------------------------------------------------


def test_hooks_see_every_step_epoch_and_save_and_change_nothing(tmp_path):
    data, steps, epochs, saves = images(), [], [], []
    plain = cnnmpi.fit(Small, data=data, out=tmp_path / "plain", **QUICK)
    hooked = cnnmpi.fit(
        Small,
        data=data,
        out=tmp_path / "hooked",
        on_step=[lambda run, loss: steps.append((run.step, loss)), lambda run, loss: None],
        on_epoch=lambda run, metrics: epochs.append(metrics["epoch"]),
        on_save=lambda run, path: saves.append((path.name, checkpoint.load(path)[1]["step"])),
        **QUICK,
    )
    assert [step for step, _ in steps] == [1, 2, 3, 4] and all(np.isfinite(loss) for _, loss in steps)
    assert epochs == [1, 2] and saves[0] == ("last.h5", 0) and saves[-1] == ("last.h5", 4)
    assert checkpoint.weights_digest(plain.model.state_dict()) == checkpoint.weights_digest(hooked.model.state_dict())


def test_two_partials_or_lambdas_of_one_name_stay_apart(tmp_path):
    def weighed(weight, logits, targets, reduction="sum"):
        loss, dlogits = cnnmpi.cross_entropy_loss(logits, targets, reduction=reduction)
        return weight * loss, np.float32(weight) * dlogits

    class Light(Small):
        recipe: ClassVar = {"loss": functools.partial(weighed, 1.0)}

    light = cnnmpi.fit(Light, data=images(), out=tmp_path / "a", **QUICK)
    heavy = cnnmpi.fit(Light, data=images(), loss=functools.partial(weighed, 9.0), out=tmp_path / "b", **QUICK)
    assert heavy.metrics[0]["train_loss"] > 5 * light.metrics[0]["train_loss"]
    both = {"loss": lambda z, y, reduction: weighed(1, z, y, reduction), "augment": lambda x, y, draw: x}
    cnnmpi.fit(functools.partial(Light), data=images(), out=tmp_path / "c", **QUICK, **both)


def test_what_is_ours_keeps_its_name(tmp_path):
    data, options = images(), {**QUICK, "label_smoothing": 0.1, "max_steps": 1}
    result = cnnmpi.fit(
        cnnmpi.SimpleCNN, data=data, loss=cnnmpi.cross_entropy_loss, out=str(tmp_path / "run"), **options
    )
    assert "test_acc" in result.metrics[0]
    attributes = checkpoint.load(tmp_path / "run" / "last.h5")[1]
    config = json.loads(attributes["config"])
    assert (attributes["model"], config["loss"], config["label_smoothing"]) == ("simplecnn", "cross_entropy", 0.1)
    assert isinstance(cnnmpi.load_checkpoint(tmp_path / "run" / "last.h5"), cnnmpi.SimpleCNN)


class Seeded(Small):
    def __init__(self, in_channels, num_classes, seed):
        super().__init__(num_classes)
        self.head = cnnmpi.Linear(4, num_classes, rng=np.random.default_rng(seed))


def test_a_network_that_needs_the_seed_comes_back_from_its_checkpoint(tmp_path):
    result = cnnmpi.fit(Seeded, data=images(), out=tmp_path / "run", seed=2**40, **QUICK)
    loaded = cnnmpi.load_checkpoint(result.out / "last.h5", Seeded)
    assert loaded.info.attributes["weights_sha256"] == result.model.info.attributes["weights_sha256"]
    assert result.model.info.attributes["step"] == 4
    assert result.model.info.attributes["weights_sha256"] == checkpoint.weights_digest(result.model.state_dict())


def test_a_trained_model_learns_on_with_all_its_gradients(tmp_path):
    result = cnnmpi.fit(Small, data=images(), out=tmp_path / "run", **QUICK)
    model = result.model
    model.train()
    x = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    dx = model.backward(model.forward(x))
    assert dx.shape == x.shape and np.abs(dx).max() > 0


def test_a_metric_that_writes_into_its_targets_spoils_nothing(tmp_path):
    def spoiling(logits, targets):
        targets *= 0
        return 0, 1

    x, y = images().train_images, np.random.default_rng(0).random((80, 3)).astype(np.float32)
    before = y.copy()
    cnnmpi.fit(Small, data=(x, y, x, y), metrics={"m": spoiling}, out=tmp_path / "run", **QUICK)
    np.testing.assert_array_equal(y, before)


def test_a_loss_that_ignores_the_reduction_is_named(tmp_path, capsys):
    def mean(logits, targets, reduction="sum"):
        return cnnmpi.cross_entropy_loss(logits, targets, reduction="mean")

    cnnmpi.fit(Small, data=images(), loss=mean, out=tmp_path / "run", **QUICK)
    assert "is not the sum of those of its halves" in capsys.readouterr().out
    cnnmpi.fit(Small, data=images(), out=tmp_path / "other", **QUICK)
    assert "halves" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "targets, loss, message",
    [
        (-1.0, "cross_entropy", "--loss cross_entropy needs targets of at least 0, got -1"),
        (-1.0, "binary_cross_entropy", r"--loss binary_cross_entropy needs targets in 0\.\.1, got -1"),
        (1.5, "binary_cross_entropy", r"--loss binary_cross_entropy needs targets in 0\.\.1, got 1.5"),
    ],
)
def test_targets_that_do_not_suit_the_loss_are_refused_at_the_start(tmp_path, targets, loss, message):
    x, y = images().train_images, np.full((80, 3), 0.5, np.float32)
    y_test = y.copy()
    y_test[7, 1] = targets  # of the test images: it would be met after an epoch only
    with pytest.raises(UserError, match=message):
        cnnmpi.fit(Small, data=(x, y, x, y_test), loss=loss, out=tmp_path / "run", **QUICK)


@pytest.mark.parametrize(
    "arrays, message",
    [
        (lambda x, y: (x, y.astype(str), x, y), "labels must be whole numbers"),
        (lambda x, y: (x, [None] * len(y), x, y), "labels must be whole numbers"),
        (lambda x, y: (x, y + 20_000_000, x, y), "a label of 20000009, with fewer images"),
        (lambda x, y: (x, y, x), "expected four arrays, x_train, y_train, x_test, y_test, got 3 of them"),
    ],
)
def test_arrays_that_are_no_data_are_refused_in_one_line(arrays, message):
    data = images()
    with pytest.raises(DataError, match=message) as error:
        Dataset.of(arrays(data.train_images, data.train_labels))
    assert "\n" not in str(error.value)


def test_a_notebook_is_told_how_it_goes_on(tmp_path, capsys):
    def stop(run, loss):
        run.signals.asked = True

    result = cnnmpi.fit(Small, data=images(), out=tmp_path / "run", on_step=stop, **QUICK)
    assert result == 75
    assert f'to go on: call fit() as before, with out="{tmp_path / "run"}" and resume="auto"' in capsys.readouterr().out
    assert cnnmpi.fit(Small, data=images(), out=tmp_path / "run", resume="auto", **QUICK) == 0


def test_a_hook_that_freezes_layers_is_told_that_it_is_too_late(tmp_path):
    with pytest.raises(UserError, match="layers were frozen or unfrozen during the run"):
        cnnmpi.fit(
            Small, data=images(), out=tmp_path / "run", on_epoch=lambda run, metrics: run.model.conv.freeze(), **QUICK
        )


# -- what wrong code is told -------------------------------------------------------------------------------------------

WRONG = {
    "class Net: pass": r"Net cannot be built|makes a Net; expected a subclass of cnnmpi.Model",
    "Net = 3": "expected a class, got a int",
    "def Net(): return 3": "makes a int; expected a subclass of cnnmpi.Model",
    "import nowhere": r"ModuleNotFoundError: No module named 'nowhere' \(wrong\.py, line 3\)",
    "class Net(Model\n": r"SyntaxError: .* \(.*wrong\.py, line 3\)",
    "raise SystemExit(3)": "it ends the program: put what it runs below if __name__ == '__main__'",
    "cnnmpi.fit(SimpleCNN)": r"fit\(\) is called while wrong\.py:Net is imported",
    """class Net(Model):
    def __init__(self):
        super().__init__()
        self.head = Linear(3, 10)""": r"fails on images \(2, 3, 16, 16\): ValueError: head Linear\(3, 10\): expected",
    """class Net(Model):
    def __init__(self):
        super().__init__()
        self.layers = [Flatten(), Linear(768, 10)]""": "layers is a list of layers, which would not learn",
    """class Net(Model):
    def __init__(self):
        super().__init__()
        self.flatten, self.head = Flatten(), Linear(768, 7)""": r"its forward gives \(2, 7\) .*; expected \(2, 10\)",
    """class Net(Model):
    def __init__(self):
        super().__init__()
        self.flatten, self.head = Flatten(), Linear(768, 10)
    def forward(self, x):
        return self.head.forward(self.flatten.forward(x))""": "it must define the backward that belongs to it",
    """class Net(Model):
    def __init__(self):
        self.head = Linear(768, 10)""": r"call super\(\).__init__\(\) before head is assigned \(wrong\.py, line 5\)",
    """class Net(Model):
    def __init__(self, depth):
        super().__init__()""": "missing a required argument: 'depth'; --model-options gives it other arguments",
    """class Net(SimpleCNN):
    recipe = {"rate": 3}""": "its recipe has rate; the settings are",
    """class Net(SimpleCNN):
    recipe = {"lr": "fast"}""": "--lr must be float, got 'fast'",
    """class Net(SimpleCNN):
    recipe = {"metrics": {"acc": len}}""": "metrics: 'acc' must be another name than loss and acc",
    "class Other(Model): pass": "wrong.py has no Net; it has Other",
    """class Net(SimpleCNN):
    recipe = [3]""": "its recipe, and the metrics in it, must be dictionaries",
    """class Net(SimpleCNN):
    recipe = {"metrics": [len]}""": "its recipe, and the metrics in it, must be dictionaries",
    """class Net(SimpleCNN):
    recipe = {"loss": mse_loss, "label_smoothing": 0.1}""": "--label-smoothing belongs to the loss cross_entropy",
    """import numpy as np
class Scale(Layer):
    def __init__(self):
        super().__init__()
        self.add_parameter("w", np.ones(3))
        self.setup()
    def setup(self): pass
    def forward(self, x): return x
    def backward(self, dout): return dout
class Net(SimpleCNN):
    def __init__(self, in_channels, num_classes, image_size):
        super().__init__(in_channels, num_classes, image_size)
        self.features[0] = Sequential(Moving(), self.features[0])
class Moving(Scale):
    def backward(self, dout):
        self.grads["w"] = np.ones(3, np.float32)
        return dout""": r"Moving\(\) puts another array in the place of its 'w'",
    """import numpy as np
class Kept(Layer):
    def __init__(self):
        super().__init__()
        self.add_parameter("w", np.ones(3))
        self.w = self.params["w"]
class Net(SimpleCNN):
    def __init__(self, in_channels, num_classes, image_size):
        super().__init__(in_channels, num_classes, image_size)
        self.features[0] = Sequential(Kept(), self.features[0])""": r"Kept\(\) keeps its 'w' as self\.w too",
    """import numpy as np
class Bare(Layer):
    def __init__(self):
        super().__init__()
        self.params["w"] = np.ones(3)
class Net(SimpleCNN):
    def __init__(self, in_channels, num_classes, image_size):
        super().__init__(in_channels, num_classes, image_size)
        self.features[0] = Bare()""": r"w has no gradient: define it by add_parameter\(\)",
    """import numpy as np
class Net(SimpleCNN):
    def __init__(self, in_channels, num_classes, image_size):
        super().__init__(in_channels, num_classes, image_size)
        self.shift = np.random.standard_normal()
    def forward(self, x): return super().forward(x) + np.float32(self.shift)
    def backward(self, dout): return super().backward(dout)""": "two networks built with the same seed",
}


@pytest.mark.parametrize("source, message", WRONG.items())
def test_a_network_that_cannot_be_trained_is_told_why_in_one_line(tmp_path, monkeypatch, source, message):
    (tmp_path / "wrong.py").write_text(f"import cnnmpi\nfrom cnnmpi import *\n{source}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        set_up(Config(model="wrong.py:Net", out=tmp_path / "run", **QUICK), Ranks(), data=images())
    assert "\n" not in str(error.value)


class Normed(Small):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.drop = cnnmpi.BatchNorm(4)


def test_a_last_shard_too_small_for_batch_norm_is_known_before_the_first_step(tmp_path):
    few = {**QUICK, "batch_size": 39}  # 80 images: 2 in the last batch, so that two shards have one and two none
    with pytest.raises(UserError, match=r"fails on images \(1, 3, 16, 16\): ValueError: drop BatchNorm\(4\)"):
        cnnmpi.fit(Normed, data=images(), out=tmp_path / "run", **few)
    assert cnnmpi.fit(Normed, data=images(), out=tmp_path / "run", **QUICK) == 0


def test_what_is_no_network_is_refused_by_name(tmp_path):
    for model, message in {
        "vgg": "--model must be one of simplecnn, smallresnet, .*or FILE.py:CLASS or MODULE:CLASS, got 'vgg'",
        "nowhere.py:Net": "nowhere.py: no such file",
        "no.where:Net": "cannot be imported: ModuleNotFoundError",
        "cnnmpi:Nothing": "cnnmpi has no Nothing",
    }.items():
        with pytest.raises(UserError, match=message):
            set_up(Config(model=model, out=tmp_path / "run"), Ranks(), data=images())
    with pytest.raises(UserError, match="needs the class Small, not an object of it"):
        cnnmpi.fit(Small(), data=images())
    for network, settings in ((None, {}), (3, {}), (Small, {"model": "simplecnn"})):
        with pytest.raises(UserError, match=r"fit\(\) needs a network first"):
            cnnmpi.fit(network, data=images(), **settings)
    with pytest.raises(UserError, match="got learning_rate, which are no settings"):
        cnnmpi.fit(Small, data=images(), learning_rate=0.1)
    with pytest.raises(UserError, match=r"images must be uint8, or floats in 0\.\.1, got int64"):
        cnnmpi.fit(Small, data=(np.zeros((4, 3, 8, 8), int), np.zeros(4, int)) * 2, out=tmp_path / "run")


def labels_only(logits, targets, reduction):
    """A loss that takes classes (N,) and no probabilities."""
    return -float(logits[np.arange(len(logits)), targets].sum()), -np.eye(logits.shape[1], dtype="f")[targets]


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"loss": lambda z, y, reduction: 3.0}, r"the loss .* returned a float; expected \(loss, dlogits\)"),
        ({"loss": lambda z, y, reduction: (3.0, z[:1])}, r"returned a gradient float32 \(1, 10\); expected float32"),
        ({"loss": lambda z, y, reduction: (3.0, z.astype(float))}, "returned a gradient float64"),
        ({"loss": lambda z, y, reduction: ("high", z)}, "the loss .* returned a tuple"),
        ({"augment": lambda x, y, draw: x[:, :, 1:]}, r"the augmentation .* returned uint8 \(\d+, 3, 15, 16\)"),
        ({"augment": lambda x, y, draw: None}, "the augmentation .* returned NoneType"),
        ({"augment": lambda x, y, draw: (x, y[1:])}, r"returned labels int64 \(9,\); expected int64 \(10,\), or prob"),
        (
            {"augment": ["cutout=2", lambda x, y, draw: x.astype(float)]},
            r"returned float64 .*; expected float32 of the",
        ),
        ({"augment": lambda x, rng: x}, "--augment .*lambda> must take three arguments: images, labels, draw"),
        (
            {"augment": [lambda *three: three[0], lambda *three: three[1]]},
            r"the augmentation .*lambda>#2 returned int64 \(10,\) for images uint8",
        ),
        ({"augment": 3}, "--augment .*: expected a function, got a int"),
        ({"crop": 4}, r"fit\(\) got crop, which are no settings; flip, crop and cutout are part of augment"),
        (
            {"augment": "mixup=1", "loss": labels_only},
            r"--loss .* with the probabilities .* that --augment mixup=1 makes of labels fails on .*IndexE",
        ),
        ({"metrics": {"m": lambda z, y: 3}}, r"the metric m returned 3; expected \(sum, count\)"),
        ({"metrics": {"m": 3}}, "metrics: 'm' must be"),
        ({"metrics": [len]}, r"metrics must be a dictionary \{name: function\}, got a list"),
        ({"metrics": {"m": lambda z, y: (np.nan, 1)}}, r"the metric m returned \(nan, 1\.0\); expected finite numbers"),
        ({"model_options": {"width": np.int64(3)}}, "--model-options must be what JSON can hold"),
        ({"model_options": {"width": float("inf")}}, "--model-options must be what JSON can hold"),
        ({"model_options": {"seed": 3}}, "--model-options cannot set seed"),
        ({"model_options": {"num_classes": 3}}, "--model-options cannot set num_classes"),
        ({"on_step": lambda run, loss: 3}, "the on_step hook .* returned 3; a hook returns nothing"),
        ({"on_save": 3}, "on_save: expected a function, got a int"),
        ({"loss": "nowhere"}, "--loss must be one of cross_entropy, binary_cross_entropy, mse, or FILE.py:FUNCTION"),
        ({"loss": "mse"}, r"--loss mse needs targets \(N, K\)"),
        ({"loss": lambda z, y, reduction: (0, z), "label_smoothing": 0.1}, "--label-smoothing belongs to"),
        ({"augment": "mirror"}, "--augment 'mirror' is none of flip, crop=NUMBER, .* and no FILE.py:FUNCTION"),
    ],
)
def test_code_that_returns_nonsense_is_named(tmp_path, parts, message):
    with pytest.raises(UserError, match=message) as error:
        cnnmpi.fit(Small, data=images(), out=tmp_path / "run", **{**QUICK, **parts})
    assert "\n" not in str(error.value)


def test_an_error_of_a_persons_code_keeps_its_traceback(tmp_path):
    def loss(logits, targets, reduction):
        if len(targets) > 4:  # in the first step: the trial before it has fewer
            raise ZeroDivisionError("mine")
        return cnnmpi.cross_entropy_loss(logits, targets, reduction=reduction)

    with pytest.raises(ZeroDivisionError, match="mine"):
        cnnmpi.fit(Small, data=images(), loss=loss, out=tmp_path / "run", **QUICK)


def test_mistakes_on_the_command_line_are_one_line(here, tmp_path):
    train = ["-m", "cnnmpi.train", "--data", "data.h5", "--out", tmp_path / "run"]
    assert "has no Nothing; it has" in refusal(*train, "--model", "net.py:Nothing")
    assert "unexpected keyword argument 'depth'" in refusal(
        *train, "--model", "net.py:Net", "--model-options", '{"depth": 3}'
    )
    assert python(*train, "--model", "net.py:Net", "--max-steps", "1").returncode == 0
    assert "name it, as --model net.py:Net" in refusal(*train, "--resume")
    assert "--model simplecnn (the run has net.py:Net)" in refusal(*train, "--resume", "--model", "simplecnn")
    other = refusal(
        *train, "--resume", "--model", "net.py:Wide", "--loss", "net.py:loss", "--augment", "flip,net.py:darker"
    )
    assert "the weights do not fit Wide: stem.weight has shape (8, 3, 3, 3), expected (12, 3, 3, 3)" in other


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_names_its_network_and_takes_no_other(here, tmp_path):
    code = Code()
    run = set_up(Config(model="net.py:Net", data="data.h5", out=tmp_path / "run", max_steps=1), Ranks(), code)
    assert run.run() == 0
    path = tmp_path / "run" / "last.h5"
    net, wide = type(run.model), code.find("model", "net.py:Wide")
    attributes = checkpoint.load(path)[1]
    sources = json.loads(attributes["sources"])
    assert attributes["model"] == "net.py:Net" and set(sources) == {"model", "loss", "augment"}
    assert cnnmpi.load_checkpoint(path, model=net).info.classes == [str(k) for k in range(10)]
    with pytest.raises(CheckpointError, match=r"holds the model net\.py:Net, .* give its class"):
        cnnmpi.load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"does not fit Wide: .*stem\.weight has shape \(8, 3, 3, 3\)"):
        cnnmpi.load_checkpoint(path, model=wide)
    arrays, attributes = checkpoint.load(path)
    checkpoint.save(path, arrays, attributes | {"sources": json.dumps({"model": "0" * 64})})
    with pytest.warns(UserWarning, match="the source of Net has changed"):
        cnnmpi.load_checkpoint(path, model=net)


def test_no_code_is_imported_because_a_checkpoint_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("trap.py").write_text("raise RuntimeError('imported')\nNet = f = None\n")
    run = set_up(Config(out=tmp_path / "run", max_steps=1, **QUICK), Ranks(), Code({"simplecnn": Small}), data=images())
    assert run.run() == 0
    path = tmp_path / "run" / "last.h5"
    arrays, attributes = checkpoint.load(path)
    for setting in ("model", "loss", "augment"):
        config = json.loads(attributes["config"]) | {setting: "trap.py:Net"}
        changed = {"config": json.dumps(config)} | ({"model": "trap.py:Net"} if setting == "model" else {})
        checkpoint.save(path, arrays, attributes | changed)
        with pytest.raises(UserError, match="of your own: name it"):
            set_up(Config(out=tmp_path / "run", resume="auto"), Ranks(), Code({"simplecnn": Small}), data=images())
    with pytest.raises(CheckpointError, match="give its class"):
        checkpoint.save(path, arrays, attributes | {"model": "trap.py:Net"})
        cnnmpi.load_checkpoint(path)

"""What a checkpoint must hold for a model, or a run, to come back from it."""

import json
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnmpi import checkpoint
from cnnmpi.checkpoint import CheckpointError
from cnnmpi.models import MODELS
from cnnmpi.train.state import load_checkpoint, model_attributes, pack, read_saved_run

OPTIONS: dict[str, Any] = {"in_channels": 2, "num_classes": 3, "image_size": [6, 4]}
RUN: dict[str, Any] = {
    "config": '{"lr": 0.1}',
    "step": 3,
    "epoch_sums": '{"loss": [1.5, 3.0], "acc": [2.0, 3.0], "top5": [2.5, 3.0]}',
    "best_test_acc": 0.5,
    "data_sha256": "0" * 64,
    "data_source": "somewhere",
}
DEEP = "[" * 100_000


def saved(path: Path, name: str = "simplecnn", options: dict[str, Any] = OPTIONS, **changed: Any) -> Path:
    """Save a model; ``changed`` attributes take the place of the right ones, None leaves one out."""
    model = MODELS[name](**options)
    right = {"classes": ["cat", "dog", "mouse"], "mean": [0.5, 0.5], "std": [0.25, 0.25], **RUN}
    attributes = {**model_attributes(name, options, model), **right, **changed}
    checkpoint.save(path, pack(model), {key: value for key, value in attributes.items() if value is not None})
    return path


def refusal(path: Path, read: Any = load_checkpoint) -> str:
    """Return the one line with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2000
    return str(caught.value)


def progress(path: Path) -> Any:
    """Read what a checkpoint says of its run."""
    return read_saved_run(path, checkpoint.load(path)[1])


@pytest.mark.parametrize("name", ["simplecnn", "smallresnet"])
def test_a_model_comes_back(tmp_path: Path, name: str) -> None:
    options = {**OPTIONS, "image_size": 16}
    model = load_checkpoint(saved(tmp_path / "a.h5", name, options))
    expected = MODELS[name](**options)
    assert checkpoint.weights_digest(model.state_dict()) == checkpoint.weights_digest(expected.state_dict())
    assert model.info.options == options
    assert model.info.classes == ["cat", "dog", "mouse"]
    assert not model.training


@pytest.mark.fault
@pytest.mark.parametrize("name", ["simplecnn", "smallresnet"])
@pytest.mark.parametrize(
    "asked",
    [
        {"image_size": 2**30},
        {"image_size": [2**20, 2**10]},
        {"image_size": [16, 16, 16]},
        {"in_channels": 2**30},
        {"num_classes": 2**30},
        {"widths": [24, 2**15, 2**15, 2**15]},
        {"widths": [2**30, 2**30, 2**30, 2**30]},
        {"seed": -1},
        {"in_channels": 0},
        {"in_channels": -1},
        {"in_channels": True},
        {"in_channels": 2.0},
        {"in_channels": "2"},
        {"in_channels": None},
        {"image_size": []},
        {"image_size": [[4, 4], 4]},
        {"image_size": {"a": 1}},
        {"num_classes": 2},
        {"unknown": 1},
        {"image_size": 8},
    ],
    ids=str,
)
def test_options_that_the_file_does_not_fill_are_refused_before_memory_is_taken(
    tmp_path: Path, name: str, asked: dict[str, Any]
) -> None:
    options = {**OPTIONS, "image_size": 16}
    if name == "smallresnet" and asked == {"image_size": 8}:
        pytest.skip("its weights do not depend on the size")
    path = saved(tmp_path / "a.h5", name, options, model_options=json.dumps(options | asked))
    tracemalloc.start()
    refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * path.stat().st_size + (64 << 20), (
        "the file, its arrays, the model, and what a few layers may take"
    )


@pytest.mark.fault
def test_channels_and_classes_that_a_small_file_lists_do_not_make_a_large_model(tmp_path: Path) -> None:
    many = 20_000  # a whitening layer of as many channels would take (9 * 20,000)**2 numbers
    path = tmp_path / "a.h5"
    attributes = {
        "model": "smallresnet",
        "model_options": json.dumps({"in_channels": many, "num_classes": many, "image_size": 16}),
        "classes": ["x"] * many,
        "mean": [0.5] * many,
        "std": [0.5] * many,
    }
    for name in MODELS:
        checkpoint.save(path, {"model/w": np.zeros(3)}, attributes | {"model": name})
        tracemalloc.start()
        assert "numbers allowed here" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
        tracemalloc.stop()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": 3}, "holds no model"),
        ({"model": ["simplecnn"]}, "holds no model"),
        ({"model": None}, "holds no model"),
        ({"model": "x" * 5000}, "holds the model"),
        ({"model_options": None}, "lacks model_options"),
        ({"model_options": DEEP}, "nested too deeply"),
        ({"model_options": "[]"}, "no JSON object"),
        ({"model_options": "{"}, "model_options cannot be used"),
        ({"model_options": 3}, "it is no text"),
        ({"model_options": ["a", "b"]}, "it is no text"),
        ({"model_options": "{}"}, "expected sizes"),
        ({"model_options": '{"in_channels": 1' + "0" * 5000 + "}"}, "model_options cannot be used"),
        ({"model_options": '{"in_channels": NaN}'}, "NaN is no number"),
        ({"classes": None}, "lacks classes"),
        ({"classes": [1, 2, 3]}, "classes is"),
        ({"classes": ["a", "b"]}, "classes is"),
        ({"classes": "abc"}, "classes is"),
        ({"mean": [0.5]}, "mean is"),
        ({"mean": 0.5}, "mean is"),
        ({"mean": [0.5, float("nan")]}, "mean is"),
        ({"mean": ["a", "b"]}, "mean is"),
        ({"std": [0.5, 0.0]}, "std is"),
        ({"std": [0.5, float("inf")]}, "std is"),
        ({"std": None}, "lacks std"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_does_not_describe_a_model_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    assert said in refusal(saved(tmp_path / "a.h5", **changed))


def test_the_progress_of_a_run_comes_back(tmp_path: Path) -> None:
    read = progress(saved(tmp_path / "a.h5"))
    assert (read.config, read.step) == ({"lr": 0.1}, 3)
    assert read.epoch_sums == {"loss": [1.5, 3.0], "acc": [2.0, 3.0], "top5": [2.5, 3.0]}
    assert (read.best, read.data_sha256, read.data_source) == (0.5, "0" * 64, "somewhere")
    assert progress(saved(tmp_path / "a.h5", best_test_acc=-1.0)).best == -1


def test_the_progress_of_a_run_without_accuracy_comes_back(tmp_path: Path) -> None:
    assert progress(saved(tmp_path / "a.h5", best_test_acc=None, best_test_loss=0.25)).best == -0.25
    assert progress(saved(tmp_path / "a.h5", best_test_acc=None)).best == -math.inf


def test_the_progress_of_a_run_of_version_0_1_comes_back(tmp_path: Path) -> None:
    read = progress(saved(tmp_path / "a.h5", epoch_sums=None, epoch_counts=[1.5, 2.0, 3.0]))
    assert read.epoch_sums == {"loss": [1.5, 3.0], "acc": [2.0, 3.0]}


@pytest.mark.fault
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        *[({name: None}, f"lacks {name}") for name in RUN if name != "best_test_acc"],
        ({"epoch_sums": "{"}, "epoch_sums cannot be used"),
        ({"epoch_sums": '{"loss": 3}'}, "epoch_sums is"),
        ({"epoch_sums": '{"loss": [1, 2, 3]}'}, "epoch_sums is"),
        ({"epoch_sums": '{"loss": [1, -2]}'}, "epoch_sums is"),
        ({"epoch_sums": '{"loss": ["a", "b"]}'}, "epoch_sums is"),
        ({"sources": '{"model": 3}'}, "sources is"),
        ({"loss_scale": [3.0, 0.0]}, "loss_scale is"),
        ({"loss_scale": [0.5, 0.0]}, "loss_scale is"),
        ({"loss_scale": [2.0**60, 0.0]}, "loss_scale is"),
        ({"loss_scale": [2.0, -1.0]}, "loss_scale is"),
        ({"loss_scale": [float("nan"), 0.0]}, "loss_scale is"),
        ({"loss_scale": [2.0]}, "loss_scale is"),
        ({"loss_scale": "2"}, "loss_scale is"),
        ({"best_test_acc": None, "best_test_loss": "low"}, "best_test_loss is"),
        ({"config": DEEP}, "nested too deeply"),
        ({"config": '{"a": 1' + "0" * 5000 + "}"}, "config cannot be used"),
        ({"config": '{"lr": Infinity}'}, "Infinity is no number"),
        ({"config": '{"lr": 1e999}'}, "1e999 is no number"),
        ({"config": '{"lr": 1' + "0" * 400 + "}"}, "is no number"),
        ({"epoch_sums": '{"loss": [1' + "0" * 400 + ", 1]}"}, "is no number"),
        ({"config": "null"}, "no JSON object"),
        ({"config": 3}, "it is no text"),
        ({"step": -1}, "step is -1"),
        ({"step": 1e300}, "step is 1e+300"),
        ({"step": 3.0}, "step is 3.0"),
        ({"step": True}, "step is True"),
        ({"step": "3"}, "step is '3'"),
        ({"step": 2**62}, "step is"),
        ({"step": [3]}, "step is"),
        ({"epoch_counts": [1.0, 2.0]}, "epoch_counts is"),
        ({"epoch_counts": [1.0, 2.0, 3.0, 4.0]}, "epoch_counts is"),
        ({"epoch_counts": [1.0, 4.0, 3.0]}, "epoch_counts is"),
        ({"epoch_counts": [float("nan"), 2.0, 3.0]}, "epoch_counts is"),
        ({"epoch_counts": 3}, "epoch_counts is 3"),
        ({"epoch_counts": ["a", "b", "c"]}, "epoch_counts is"),
        ({"epoch_counts": "abc"}, "epoch_counts is"),
        ({"best_test_acc": float("nan")}, "best_test_acc is nan"),
        ({"best_test_acc": 2.0}, "best_test_acc is 2.0"),
        ({"best_test_acc": "0.5"}, "best_test_acc is"),
        ({"data_sha256": 3}, "data_sha256 is 3"),
        ({"data_source": ["a"]}, "data_source is"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_does_not_describe_a_run_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    assert said in refusal(saved(tmp_path / "a.h5", **changed), progress)

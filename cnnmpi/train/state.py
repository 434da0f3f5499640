"""What a checkpoint holds, and how a trained model comes back from one."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from cnnmpi import checkpoint
from cnnmpi.checkpoint import CheckpointError
from cnnmpi.common.text import read_json
from cnnmpi.functional.init import at_most
from cnnmpi.models import MODELS, Model
from cnnmpi.optim import Optimizer

Arrays = dict[str, np.ndarray[Any, Any]]

MOST_PIXELS = 1 << 26  # of an image; what is to be predicted is scaled to the size that a file names
FEW = 1 << 20  # numbers that may be allocated for a model whatever its file holds: 8 MB


def pack(model: Model, optimizer: Optimizer | None = None) -> Arrays:
    """Return the arrays of a checkpoint: model/<dotted name> and optimizer/<slot>/<dotted name>."""
    arrays = {f"model/{name}": array for name, array in model.state_dict().items()}
    if optimizer is not None:
        names = list(model.named_parameters())
        for slot, states in optimizer.state.items():
            for name, state in zip(names, states, strict=True):
                arrays[f"optimizer/{slot}/{name}"] = model.F.to_numpy(state)
    return arrays


def unpack(arrays: Arrays, model: Model, optimizer: Optimizer | None = None) -> None:
    """Copy the arrays of a checkpoint into model and optimizer. Raises ValueError listing what does not fit."""
    model.load_state_dict(_below("model/", arrays))
    if optimizer is not None:
        names = list(model.named_parameters())
        for slot, states in optimizer.state.items():
            saved = _below(f"optimizer/{slot}/", arrays)
            shapes = {name: tuple(state.shape) for name, state in zip(names, states, strict=True)}
            wrong = [name for name in names if name not in saved or saved[name].shape != shapes[name]]
            if wrong:
                raise ValueError(f"the optimizer's {slot} is missing or of another shape for {', '.join(wrong)}")
            for name, state in zip(names, states, strict=True):
                model.F.copy_into(state, saved[name])


def _below(prefix: str, arrays: Arrays) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def model_attributes(name: str, options: dict[str, Any], model: Model) -> dict[str, Any]:
    """Return the attributes from which ``load_checkpoint`` builds the model again."""
    return {
        "model": name,
        "model_options": json.dumps(options),
        "weights_sha256": checkpoint.weights_digest(model.state_dict()),
        "cnnmpi_version": version_of("cnnmpi"),
    }


def version_of(package: str) -> str:
    """Return the version of an installed package; "unknown" for one that is not there, or a checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class SavedRun:
    """How far a run had come when it was saved, and what shaped it: what the attributes of a checkpoint must say."""

    config: dict[str, Any]
    step: int  # updates done since the beginning of the run
    epoch_counts: list[float]  # summed loss, correct answers and samples of the current epoch so far
    best_test_acc: float  # -1 before the first evaluation
    data_sha256: str
    data_source: str


def read_saved_run(path: str | Path, attributes: dict[str, Any]) -> SavedRun:
    """Return what the attributes of a checkpoint say of the run. Raises CheckpointError for what cannot be so."""
    missing = sorted(
        {"config", "step", "epoch_counts", "best_test_acc", "data_sha256", "data_source"} - set(attributes)
    )
    if missing:
        raise CheckpointError(f"{path}: not a checkpoint of cnnmpi.train: it lacks {', '.join(missing)}")
    step, counts, best = (attributes[name] for name in ("step", "epoch_counts", "best_test_acc"))
    _check(path, "step", _whole(step) and 0 <= step < 2**53, step, "a number of steps")
    right = _numbers(counts) and len(counts) == 3 and 0 <= counts[1] <= counts[2]
    _check(path, "epoch_counts", right, counts, "loss, correct answers and samples")
    _check(path, "best_test_acc", _numbers([best]) and (best == -1 or 0 <= best <= 1), best, "-1, or from 0 to 1")
    for name in ("data_sha256", "data_source"):
        _check(path, name, isinstance(attributes[name], str), attributes[name], "a text")
    config = _json(path, "config", attributes["config"])
    return SavedRun(config, step, counts, float(best), attributes["data_sha256"], attributes["data_source"])


@dataclass(frozen=True)
class Info:
    """What a checkpoint says of its model besides the weights: how to feed it and what its outputs mean."""

    classes: list[str]
    mean: list[float]
    std: list[float]
    options: dict[str, Any]
    attributes: dict[str, Any]


def load_checkpoint(path: str | Path) -> Model:
    """Return the trained model of a checkpoint, ready to use: in evaluation mode, computing with NumPy.

    ``model.info`` says how to feed it: ``mean`` and ``std`` for the pixels in 0..1, and the names of the ``classes``.
    Raises CheckpointError, naming the file, where it is damaged or holds no model of this package.
    """
    arrays, attributes = checkpoint.load(path)
    name = attributes.get("model")
    if not isinstance(name, str) or name not in MODELS:
        raise CheckpointError(f"{path}: holds the model {name!r:.100}; this version knows {', '.join(MODELS)}")
    info = _info(path, name, attributes)
    held = sum(array.size for array in _below("model/", arrays).values())
    try:
        with at_most(max(held, FEW)):  # the options may ask for any size: no more is built than the file could fill
            model = MODELS[name](**info.options)
        unpack(arrays, model)
    except Exception as error:  # options from a file can make a constructor raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: does not describe a {name} completely: {reason:.1000}") from None
    model.info = info
    model.eval()
    return model


def _info(path: str | Path, name: str, attributes: dict[str, Any]) -> Info:
    """Return what the attributes say of the model. Raises CheckpointError where they are missing, or do not fit."""
    missing = sorted({"model_options", "classes", "mean", "std"} - set(attributes))
    if missing:
        raise CheckpointError(f"{path}: does not describe a {name} completely: it lacks {', '.join(missing)}")
    options = _json(path, "model_options", attributes["model_options"])
    sizes = {key: value if isinstance(value, list) else [value] for key, value in options.items()}
    right = all(_whole(number) and 0 <= number < 2**31 for numbers in sizes.values() for number in numbers)
    right = right and {"in_channels", "num_classes", "image_size"} <= set(options)
    right = right and len(sizes["image_size"]) <= 2 and math.prod(sizes["image_size"]) <= MOST_PIXELS
    _check(path, "model_options", right, options, "sizes: in_channels, num_classes, image_size")
    classes, mean, std = (attributes[key] for key in ("classes", "mean", "std"))
    right = isinstance(classes, list) and all(isinstance(text, str) for text in classes)
    _check(path, "classes", right and len(classes) == options["num_classes"], classes, "a name for each output")
    for key, values, least in (("mean", mean, -math.inf), ("std", std, 0)):
        right = _numbers(values) and len(values) == options["in_channels"] and all(value > least for value in values)
        _check(path, key, right, values, "a number for each channel")
    return Info(classes, mean, std, options, attributes)


def _json(path: str | Path, name: str, text: Any) -> dict[str, Any]:
    try:
        return read_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: its attribute {name} cannot be used: {error}") from None


def _check(path: str | Path, name: str, right: bool, value: Any, expected: str) -> None:
    if not right:
        raise CheckpointError(f"{path}: its attribute {name} is {value!r:.60}; expected {expected}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(values: Any) -> bool:
    """Return whether ``values`` is a list of finite numbers."""
    return isinstance(values, Sequence) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )

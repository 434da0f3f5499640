"""What a checkpoint holds, and how a trained model comes back from one."""

import inspect
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from cnnmpi import checkpoint
from cnnmpi.checkpoint import CheckpointError
from cnnmpi.common.text import read_json
from cnnmpi.distributed import UserError
from cnnmpi.functional.init import at_most
from cnnmpi.models import MODELS, Model
from cnnmpi.optim import Optimizer
from cnnmpi.train.code import reason, source_sha256
from cnnmpi.train.scaling import LARGEST

Arrays = dict[str, np.ndarray[Any, Any]]

MOST_PIXELS = 1 << 26  # of an image; what is to be predicted is scaled to the size that a file names
INPUTS = ("in_channels", "num_classes", "image_size", "seed")  # what any network is told that asks for it
FEW = 1 << 20  # numbers that may be allocated for a model whatever its file holds: 8 MB


def pack(model: Model, optimizer: Optimizer | None = None) -> Arrays:
    """Return the arrays of a checkpoint: model/<dotted name> and optimizer/<slot>/<dotted name>."""
    arrays = {f"model/{name}": array for name, array in model.state_dict().items()}
    if optimizer is not None:
        names = list(model.named_parameters())
        for slot, states in optimizer.state.items():
            if len(states) != len(names):
                raise UserError("layers were frozen or unfrozen during the run, as by a hook: do it before it begins")
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


def model_attributes(name: str, options: Mapping[str, Any], model: Model) -> dict[str, Any]:
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
    epoch_sums: dict[str, list[float]]  # {loss or metric: its sum and count in the current epoch so far}
    best: float  # the evaluation of best.h5, as ``trainer.score`` gives it; -inf or -1 before the first one
    data_sha256: str
    data_source: str
    sources: dict[str, str]  # {setting that named a person's code: sha256 of its source}
    ledger: str  # the hash of the ledger's newest entry; "" without one
    loss_scale: list[float]  # of a float16 run: the factor, and the steps in a row without an overflow; else empty


def read_saved_run(path: str | Path, attributes: dict[str, Any]) -> SavedRun:
    """Return what the attributes of a checkpoint say of the run. Raises CheckpointError for what cannot be so."""
    sums_name = "epoch_counts" if "epoch_counts" in attributes else "epoch_sums"  # the former until version 0.1
    missing = sorted({"config", "step", sums_name, "data_sha256", "data_source"} - set(attributes))
    if missing:
        raise CheckpointError(f"{path}: not a checkpoint of cnnmpi.train: it lacks {', '.join(missing)}")
    step, sums = attributes["step"], attributes[sums_name]
    _check(path, "step", _whole(step) and 0 <= step < 2**53, step, "a number of steps")
    if sums_name == "epoch_counts":
        right = _numbers(sums) and len(sums) == 3 and 0 <= sums[1] <= sums[2]
        _check(path, sums_name, right, sums, "loss, correct answers and samples")
        sums = {"loss": [sums[0], sums[2]], "acc": [sums[1], sums[2]]}
    else:
        sums = _json(path, sums_name, sums)
        right = all(_numbers(pair) and len(pair) == 2 and pair[1] >= 0 for pair in sums.values())
        _check(path, sums_name, right, sums, "a sum and a count for each name")
    best = _best(path, attributes)
    for name in ("data_sha256", "data_source"):
        _check(path, name, isinstance(attributes[name], str), attributes[name], "a text")
    config = _json(path, "config", attributes["config"])
    sources = _sources(path, attributes)
    scale = _loss_scale(path, attributes)
    data = attributes["data_sha256"], attributes["data_source"]
    ledger = attributes.get("ledger", "")
    _check(path, "ledger", isinstance(ledger, str), ledger, "a sha256")
    return SavedRun(config, step, sums, float(best), *data, sources, ledger, scale)


def _best(path: str | Path, attributes: dict[str, Any]) -> float:
    """Return the evaluation of best.h5: an accuracy, or minus a loss; -inf or -1 before the first one."""
    for part in ("val", "test"):
        if (name := f"best_{part}_acc") in attributes:
            best = attributes[name]
            _check(path, name, _numbers([best]) and (best == -1 or 0 <= best <= 1), best, "-1, or from 0 to 1")
            return float(best)
        if (name := f"best_{part}_loss") in attributes:
            loss = attributes[name]
            _check(path, name, _numbers([loss]), loss, "a loss")
            return -float(loss)
    return -math.inf


def _loss_scale(path: str | Path, attributes: dict[str, Any]) -> list[float]:
    """Return the factor of a float16 run's loss and its steady steps, or nothing."""
    scale = attributes.get("loss_scale", [])
    right = isinstance(scale, list) and _numbers(scale) and len(scale) in (0, 2)
    right = right and (not scale or (1 <= scale[0] <= LARGEST and math.frexp(scale[0])[0] == 0.5 and scale[1] >= 0))
    _check(path, "loss_scale", right, scale, "a power of two, and a number of steps")
    return [float(value) for value in scale]


def _sources(path: str | Path, attributes: dict[str, Any]) -> dict[str, str]:
    sources = _json(path, "sources", attributes.get("sources", "{}"))
    right = all(isinstance(value, str) for value in sources.values())
    _check(path, "sources", right, sources, "a sha256 for each setting")
    return sources


@dataclass(frozen=True)
class Info:
    """What a checkpoint says of its model besides the weights: how to feed it and what its outputs mean."""

    classes: list[str]
    mean: list[float]
    std: list[float]
    options: dict[str, Any]
    attributes: dict[str, Any]

    @classmethod
    def of(cls, attributes: dict[str, Any]) -> "Info":
        """Return what the ``attributes`` of a checkpoint say."""
        classes, mean, std = (attributes[name] for name in ("classes", "mean", "std"))
        return cls(classes, mean, std, json.loads(attributes["model_options"]), attributes)


def load_checkpoint(path: str | Path, model: Callable[..., Model] | None = None) -> Model:
    """Return the trained model of a checkpoint, ready to use: in evaluation mode, computing with NumPy.

    A network of your own is given as ``model``, its class: no code is imported because a file names it. Where its
    source is not what it was, a UserWarning says so. ``model.info`` says how to feed it: ``mean`` and ``std`` for the
    pixels in 0..1, and the names of the ``classes``. Raises CheckpointError, naming the file, where it is damaged, or
    holds weights of other names or shapes than the model has.
    """
    return model_of(path, *checkpoint.load(path), model)


def model_of(
    path: str | Path, arrays: Arrays, attributes: dict[str, Any], model: Callable[..., Model] | None = None
) -> Model:
    """Return the trained model that the contents of the file ``path`` describe; see ``load_checkpoint``."""
    name = attributes.get("model")
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: holds no model: it was not written by cnnmpi.train")
    if model is None and name not in MODELS:
        raise CheckpointError(
            f"{path}: holds the model {name:.100}, which is none of {', '.join(MODELS)}: give its class, in code by "
            "load_checkpoint(path, model=Net), on the command line by --model FILE.py:Net"
        )
    network = MODELS[name] if model is None else model
    called = getattr(network, "__qualname__", name)
    info = _info(path, name, attributes, free=network not in MODELS.values())
    if model is not None:
        saved, now = _sources(path, attributes).get("model", ""), source_sha256(network)
        if saved and now and saved != now:
            warnings.warn(f"{path}: the source of {called} has changed since this was saved", stacklevel=2)
    held = sum(array.size for array in _below("model/", arrays).values())
    try:
        with at_most(max(held, FEW)):  # the options may ask for any size: no more is built than the file could fill
            built = network(**accepted(network, info.options))
        if not isinstance(built, Model):
            raise TypeError(f"{called} makes a {type(built).__name__}, and no cnnmpi.Model")
        unpack(arrays, built)
    except Exception as error:  # options from a file can make a constructor raise anything
        raise CheckpointError(f"{path}: does not fit {called}: {reason(error)}") from None
    built.info = info
    built.eval()
    return built


def accepted(network: Callable[..., Model], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``options`` but for those of INPUTS that the constructor of ``network`` does not take.

    One that passes on all that it is given (``**options``) takes what its base class takes.
    """
    classes = inspect.getmro(network) if isinstance(network, type) else ()
    constructors = [vars(cls)["__init__"] for cls in classes if "__init__" in vars(cls)] or [network]
    taken: set[str] = set()
    for constructor in constructors:
        parameters = inspect.signature(constructor).parameters
        taken |= parameters.keys()
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return {name: value for name, value in options.items() if name in taken or name not in INPUTS}


def _info(path: str | Path, name: str, attributes: dict[str, Any], free: bool) -> Info:
    """Return what the attributes say of the model, whose other options are ``free``.

    Raises CheckpointError where they are missing, or do not fit.
    """
    missing = sorted({"model_options", "classes", "mean", "std"} - set(attributes))
    if missing:
        raise CheckpointError(f"{path}: does not describe a {name} completely: it lacks {', '.join(missing)}")
    options = _json(path, "model_options", attributes["model_options"])
    sizes = {
        key: value if isinstance(value, list) else [value]
        for key, value in options.items()
        if key != "seed" and (key in INPUTS or not free)
    }
    right = all(_whole(number) and 0 <= number < 2**31 for numbers in sizes.values() for number in numbers)
    right = right and _whole(options.get("seed", 0)) and options.get("seed", 0) >= 0
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

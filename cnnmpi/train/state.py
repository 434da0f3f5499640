"""What a checkpoint holds, and how a trained model comes back from one."""

import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from cnnmpi import checkpoint
from cnnmpi.checkpoint import CheckpointError
from cnnmpi.models import MODELS, Model
from cnnmpi.optim import Optimizer

Arrays = dict[str, np.ndarray[Any, Any]]


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
    if name not in MODELS:
        raise CheckpointError(f"{path}: holds the model {name!r}; this version knows {', '.join(MODELS)}")
    try:
        options = json.loads(attributes["model_options"])
        model = MODELS[name](**options)
        unpack(arrays, model)
        model.info = Info(attributes["classes"], attributes["mean"], attributes["std"], options, attributes)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: does not describe a {name} completely: {error}") from None
    model.eval()
    return model

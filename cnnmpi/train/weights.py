"""The weights of a model in other programs' files: safetensors, and the pickled state_dict of torch.

What a checkpoint of ours says besides (the network, its classes, ...) goes along in safetensors' metadata, so that such
a file becomes a checkpoint again; torch's holds the arrays alone.
"""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cnnmpi import checkpoint
from cnnmpi.checkpoint import CheckpointError
from cnnmpi.common.arrays import Array
from cnnmpi.common.text import read_json
from cnnmpi.distributed import UserError
from cnnmpi.models import MODELS
from cnnmpi.train.code import Code
from cnnmpi.train.state import Info, model_attributes, model_of, pack

FORMATS = (".safetensors", ".pt")
DESCRIPTION = "cnnmpi"  # the key of our JSON in safetensors' metadata
KEPT = ("model", "model_options", "classes", "mean", "std", "config", "data_fit", "data_source", "weights_sha256")


def to_bytes(suffix: str, state: Mapping[str, Array], info: Info) -> bytes:
    """Return the file of ``state``, {dotted name: array}, as ``suffix`` (one of FORMATS) wants it."""
    _need(suffix)
    if suffix == ".safetensors":
        from safetensors.numpy import save

        told = {name: info.attributes[name] for name in KEPT if name in info.attributes}
        plain = {name: np.ascontiguousarray(array) for name, array in state.items()}
        return bytes(save(plain, {"format": "pt", DESCRIPTION: json.dumps(told)}))
    from cnnmpi.functional_torch.files import save_state

    return save_state(state)


def from_file(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the arrays of a file in one of the FORMATS, and what it says besides, if it is a safetensors file of ours.

    A pickle is read with torch's ``weights_only``, which builds nothing but tensors. torch's counters
    ``num_batches_tracked``, which nothing here uses, are left out. Raises CheckpointError for what cannot be read.
    """
    _need(path.suffix)
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="np") as file:
                told = (file.metadata() or {}).get(DESCRIPTION, "{}")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
        else:
            from cnnmpi.functional_torch.files import load_state

            arrays, told = load_state(path), "{}"
        described = read_json(told)
    except Exception as error:  # each library has kinds of its own
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: cannot be read: {why}") from None
    return {name: array for name, array in arrays.items() if not name.endswith("num_batches_tracked")}, described


def _need(suffix: str) -> None:
    """Raise UserError for another suffix, and where the package that it takes is missing."""
    if suffix not in FORMATS:
        ending = suffix or "nothing"
        raise UserError(f"expected a file that ends in {' or '.join(FORMATS)}, got one that ends in {ending}")
    package, extra = {".safetensors": ("safetensors", "export"), ".pt": ("torch", "torch")}[suffix]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{suffix} needs the package {package}: pip install 'cnnmpi[{extra}]'")


def import_weights(path: Path, out: Path, name: str | None, like: Path | None) -> str:
    """Write the checkpoint ``out`` of the weights in ``path``; return their digest.

    ``name`` is the network, as --model gives it: what the file itself says of a reference network, unless given. What
    it does not say (the network's options, classes, mean and deviation) comes from the checkpoint ``like``. Raises
    UserError for what is missing, CheckpointError for files that cannot be read and weights that do not fit.
    """
    arrays, told = from_file(path)
    if like is not None:
        _, attributes = checkpoint.load(like)
        told = {key: attributes[key] for key in KEPT if key in attributes} | told
    name = name or told.get("model")
    if missing := [key for key in ("model_options", "classes", "mean", "std") if key not in told]:
        raise UserError(f"{path} does not say {', '.join(missing)}: name a checkpoint that does with --like")
    if not isinstance(name, str):
        raise UserError(f"{path} does not say of which network it is: name it with --model")
    named = {f"model/{key}": array for key, array in arrays.items()}
    built = model_of(path, named, told | {"model": name}, network_of(name))
    attributes = {key: told[key] for key in KEPT if key in told} | model_attributes(name, built.info.options, built)
    checkpoint.save(out, pack(built), attributes)
    return str(attributes["weights_sha256"])


def network_of(name: str) -> Any:
    """Return the class of a person's network, as --model names it; None for a reference network."""
    return None if name in MODELS else Code().find("model", name)

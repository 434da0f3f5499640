"""The weights of a model in other programs' files: safetensors, and the pickled state_dict of torch.

What a checkpoint of ours says besides (the network, its classes, ...) goes along in safetensors' metadata, so that such
a file becomes a checkpoint again; torch's holds the arrays alone.
"""

import importlib.util
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cnnmpi import checkpoint
from cnnmpi.checkpoint import CheckpointError
from cnnmpi.common.arrays import Array
from cnnmpi.common.files import open_regular
from cnnmpi.common.text import read_json
from cnnmpi.distributed import UserError
from cnnmpi.train.code import Code
from cnnmpi.train.state import Info, model_attributes, model_of, pack

FORMATS = (".safetensors", ".pt")
DESCRIPTION = "cnnmpi"  # the key of our JSON in safetensors' metadata
OF_MODEL = ("model", "model_options", "classes", "mean", "std", "weights_sha256")
OF_RUN = ("config", "sources", "data_source", "data_sha256", "data_archive_sha256", "data_fit")
KEPT = (*OF_MODEL, *OF_RUN)  # of a checkpoint's attributes: what is true of the weights without the run's progress
DTYPES = {  # of safetensors that are read: as NumPy calls them
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


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
        with open_regular(path) as file:
            if path.suffix == ".safetensors":
                arrays, told = _from_safetensors(file.read())
            else:
                from cnnmpi.functional_torch.files import load_state

                arrays, told = load_state(file), {}
        if wrong := [f"{name} is {array.dtype}" for name, array in arrays.items() if array.dtype.kind not in "fiub"]:
            raise ValueError(f"{wrong[0]:.200}; layers compute with real numbers")
    except Exception as error:  # each library has kinds of its own
        why = (str(getattr(error, "strerror", None) or error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: cannot be read: {why}") from None
    return {name: array for name, array in arrays.items() if not name.endswith("num_batches_tracked")}, told


def _from_safetensors(blob: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the arrays in the bytes of a safetensors file, and what we said of them; bfloat16 becomes float32."""
    import safetensors

    deserialize: Any = safetensors.deserialize
    arrays = {}
    for name, tensor in deserialize(blob):  # which checks the header, too
        kind = tensor["dtype"]
        if kind not in DTYPES:
            raise ValueError(f"{name:.200} is {kind}; what is read are {', '.join(DTYPES)}")
        array = np.frombuffer(tensor["data"], DTYPES[kind]).reshape(tensor["shape"])
        # bfloat16 is the upper half of a float32
        arrays[name] = (array.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else array
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    return arrays, read_json((header.get("__metadata__") or {}).get(DESCRIPTION, "{}"))


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

    ``name`` is the network, as --model gives it: only that imports code. Unless given it is the reference network that
    the file names. What the file does not say (the network's options, classes, mean and deviation) comes from the
    checkpoint ``like``. A UserWarning says where the weights are not those of which the file tells. Raises UserError
    for what is missing, CheckpointError for files that cannot be read and weights that do not fit.
    """
    for option, other in (("the file that is imported", path), ("what --like names", like)):
        if other is not None and os.path.realpath(out) == os.path.realpath(other):
            raise UserError(f"--out {out}: is {option}: name another file")
    arrays, told = from_file(path)
    sha256 = told.get("weights_sha256")
    if like is not None:
        _, attributes = checkpoint.load(like)
        told = {key: attributes[key] for key in KEPT if key in attributes} | told
    network = Code().find("model", name) if name else None
    name = name or told.get("model")
    if missing := [key for key in ("model_options", "classes", "mean", "std") if key not in told]:
        raise UserError(f"{path} does not say {', '.join(missing)}: name a checkpoint that does with --like")
    if not isinstance(name, str):
        raise UserError(f"{path} does not say of which network it is: name it with --model")
    named = {f"model/{key}": array for key, array in arrays.items()}
    built = model_of(path, named, told | {"model": name}, network)
    attributes = {key: told[key] for key in KEPT if key in told} | model_attributes(name, built.info.options, built)
    checkpoint.save(out, pack(built), attributes)
    if sha256 not in (None, attributes["weights_sha256"]):
        warnings.warn(f"{path}: its weights are not those that its weights_sha256 is of", stacklevel=2)
    return str(attributes["weights_sha256"])

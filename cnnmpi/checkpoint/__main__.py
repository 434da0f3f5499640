"""Look into checkpoints from the command line.

python -m cnnmpi.checkpoint show runs/simplecnn-0/last.h5
python -m cnnmpi.checkpoint verify runs/*/*.h5
python -m cnnmpi.checkpoint verify own.h5 --model nets.py:Net
python -m cnnmpi.checkpoint diff a/last.h5 b/last.h5
python -m cnnmpi.checkpoint import model.safetensors --out model.h5
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from cnnmpi.checkpoint.atomic import CheckpointError
from cnnmpi.checkpoint.format import load, weights_digest
from cnnmpi.common.arrays import Array
from cnnmpi.console import command, complain, printable, table, told_warnings
from cnnmpi.distributed import UserError
from cnnmpi.train.setup import load_trained
from cnnmpi.train.weights import import_weights

PROGRAM = "cnnmpi.checkpoint"
LONGEST_LIST = 20  # of an attribute, shown whole


@dataclass
class Show:
    """Print the attributes and a table of the arrays of each file."""

    files: tyro.conf.Positional[tuple[Path, ...]]


@dataclass
class Verify:
    """Check every byte of each file; the exit code is 1 if any is bad."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    model: str | None = None
    """Check that the weights fit this network, too: FILE.py:CLASS, MODULE:CLASS, or a reference network's name."""


@dataclass
class Diff:
    """Compare two files; the exit code is 0 if the arrays of model and optimizer are equal to the bit, else 1."""

    a: tyro.conf.Positional[Path]
    b: tyro.conf.Positional[Path]


@dataclass
class Import:
    """Make a checkpoint of the weights in a .safetensors or .pt file, such as ``cnnmpi export`` writes."""

    file: tyro.conf.Positional[Path]
    out: Path
    """Where the checkpoint is written."""
    model: str | None = None
    """The network: a reference network's name, FILE.py:CLASS or MODULE:CLASS; by default what the file says."""
    like: Path | None = None
    """A checkpoint that says what the file does not: options of the network, classes, mean and deviation."""


Command = (
    Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Diff, tyro.conf.subcommand("diff")]
    | Annotated[Import, tyro.conf.subcommand("import")]
)


@command
def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; 2 stands for an error, told in one line."""
    wanted = tyro.cli(Command, args=argv, prog=f"python -m {PROGRAM}", description="Look into checkpoints.")
    try:
        return run(wanted)
    except (CheckpointError, UserError) as error:
        complain(PROGRAM, error)
        return 2


def run(wanted: Show | Verify | Diff | Import) -> int:
    """Do what is ``wanted``; return the exit code."""
    if isinstance(wanted, Import):
        with told_warnings():
            digest = import_weights(wanted.file, wanted.out, wanted.model, wanted.like)
        print(printable(f"{wanted.out}: weights_sha256={digest}"))
        return 0
    if isinstance(wanted, Diff):
        return diff(wanted.a, wanted.b)
    if not wanted.files:
        raise CheckpointError("no file is named; name at least one checkpoint")
    if isinstance(wanted, Verify):
        verdicts = [verify(path, wanted.model) for path in wanted.files]
        return 0 if all(verdicts) else 1
    for path in wanted.files:
        show(path)
    return 0


def show(path: Path) -> None:
    """Print what a checkpoint holds."""
    arrays, attributes = load(path)
    print(printable(path))
    for name, value in sorted(attributes.items()):
        print(f"  {printable(name)}: {shortened(value)}")
    head = ("  name", "shape", "dtype", "min", "max", "norm")
    rows = [
        (f"  {name}", shape_text(array), array.dtype.name, *(f"{value:.4g}" for value in summary(array)))
        for name, array in sorted(arrays.items())
    ]
    print(table(head, rows))
    for group in sorted({name.split("/")[0] for name in arrays}):
        members = [array for name, array in arrays.items() if name.split("/")[0] == group]
        count, size = sum(array.size for array in members), sum(array.nbytes for array in members)
        print(f"  {printable(group)}: {len(members)} arrays, {count:,} numbers, {size:,} bytes")


def verify(path: Path, model: str | None = None) -> bool:
    """Print the digest of a checkpoint's weights if all is well, else the reason to stderr; return which.

    With ``model``, its weights must fit the network of that name.
    """
    try:
        arrays, attributes = load(path)
        if model is not None:
            load_trained(path, model)
    except CheckpointError as error:
        complain(PROGRAM, error)
        return False
    weights = {name.removeprefix("model/"): array for name, array in arrays.items() if name.startswith("model/")}
    digest = weights_digest(weights)
    if attributes.get("weights_sha256", digest) != digest:
        complain(
            PROGRAM, f"{path}: its weights give {digest}, its attribute weights_sha256 says otherwise; do not use it"
        )
        return False
    print(f"ok {printable(path)} weights_sha256={digest}")
    return True


def diff(path_a: Path, path_b: Path) -> int:
    """Print what differs between two checkpoints; return 0 if the arrays of model and optimizer are bit-equal."""
    (arrays_a, attributes_a), (arrays_b, attributes_b) = load(path_a), load(path_b)
    for name in sorted(attributes_a.keys() | attributes_b.keys()):
        a, b = (json.dumps(side[name]) if name in side else "-" for side in (attributes_a, attributes_b))
        if a != b:
            print(f"attribute {printable(name)}: {a} | {b}")
    names = sorted(arrays_a.keys() | arrays_b.keys())
    differences = {name: difference(arrays_a.get(name), arrays_b.get(name)) for name in names}
    differing = {name: text for name, text in differences.items() if text}
    for name, text in differing.items():
        print(f"array {printable(name)}: {text}")
    print(f"{len(names) - len(differing)} of {len(names)} arrays are equal to the bit")
    return int(any(name.startswith(("model/", "optimizer/")) for name in differing))


def difference(a: Array | None, b: Array | None) -> str:
    """Return in words how two arrays differ; "" if every bit is equal."""
    if a is None or b is None:
        return "only in the first file" if b is None else "only in the second file"
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{shape_text(a)} {a.dtype} | {shape_text(b)} {b.dtype}"
    if a.tobytes() == b.tobytes():
        return ""
    with np.errstate(all="ignore"):
        return f"max abs difference {np.abs(a.astype(np.float64) - b.astype(np.float64)).max():.4g}"


def summary(array: Array) -> tuple[float, float, float]:
    """Return (min, max, Euclidean norm), computed in float64; NaN for the extremes of an empty array."""
    flat = array.astype(np.float64).ravel()
    with np.errstate(all="ignore"):
        norm = float(np.sqrt(flat @ flat))
    return (float(flat.min()), float(flat.max()), norm) if flat.size else (np.nan, np.nan, 0.0)


def shape_text(array: Array) -> str:
    """Return a shape as 64x3x3x3, or "scalar"."""
    return "x".join(map(str, array.shape)) or "scalar"


def shortened(value: Any) -> str:
    """Return an attribute's value in one line; of a long list, how it begins and how long it is."""
    if isinstance(value, list) and len(value) > LONGEST_LIST:
        beginning = ", ".join(map(repr, value[:LONGEST_LIST]))
        return f"[{beginning}, ...] of {len(value)}"
    return printable(value)


if __name__ == "__main__":
    sys.exit(main())

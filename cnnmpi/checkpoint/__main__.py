"""Look into checkpoints from the command line.

python -m cnnmpi.checkpoint show runs/simplecnn-0/last.h5
python -m cnnmpi.checkpoint verify runs/*/*.h5
python -m cnnmpi.checkpoint diff a/last.h5 b/last.h5
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from cnnmpi.checkpoint.atomic import CheckpointError
from cnnmpi.checkpoint.format import Array, load, weights_digest
from cnnmpi.common.text import printable

PROGRAM = "cnnmpi.checkpoint"


@dataclass
class Show:
    """Print the attributes and a table of the arrays of each file."""

    files: tyro.conf.Positional[tuple[Path, ...]]


@dataclass
class Verify:
    """Check every byte of each file; the exit code is 1 if any is bad."""

    files: tyro.conf.Positional[tuple[Path, ...]]


@dataclass
class Diff:
    """Compare two files; the exit code is 0 if the arrays of model and optimizer are equal to the bit, else 1."""

    a: tyro.conf.Positional[Path]
    b: tyro.conf.Positional[Path]


Command = (
    Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Diff, tyro.conf.subcommand("diff")]
)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; 2 stands for an error, told in one line."""
    command = tyro.cli(Command, args=argv, prog=f"python -m {PROGRAM}", description="Look into checkpoints.")
    try:
        code = run(command)
        sys.stdout.flush()
        return code
    except CheckpointError as error:
        complain(str(error))
        return 2
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


def run(command: Show | Verify | Diff) -> int:
    """Run ``command``; return its exit code."""
    if isinstance(command, Diff):
        return diff(command.a, command.b)
    if not command.files:
        raise CheckpointError("no file is named; name at least one checkpoint")
    if isinstance(command, Verify):
        verdicts = [verify(path) for path in command.files]
        return 0 if all(verdicts) else 1
    for path in command.files:
        show(path)
    return 0


def show(path: Path) -> None:
    """Print what a checkpoint holds."""
    arrays, attributes = load(path)
    print(printable(str(path)))
    for name, value in sorted(attributes.items()):
        print(f"  {printable(name)}: {printable(value) if isinstance(value, str) else value}")
    width = max([len(printable(name)) for name in arrays], default=4)
    print(f"  {'name':{width}}  {'shape':>18}  {'dtype':7}  {'min':>11}  {'max':>11}  {'norm':>11}")
    for name, array in sorted(arrays.items()):
        numbers = "  ".join(f"{value:11.4g}" for value in summary(array))
        print(f"  {printable(name):{width}}  {shape_text(array):>18}  {array.dtype.name:7}  {numbers}")
    for group in sorted({name.split("/")[0] for name in arrays}):
        members = [array for name, array in arrays.items() if name.split("/")[0] == group]
        count, size = sum(array.size for array in members), sum(array.nbytes for array in members)
        print(f"  {printable(group)}: {len(members)} arrays, {count:,} numbers, {size:,} bytes")


def verify(path: Path) -> bool:
    """Print the digest of a checkpoint's weights if all is well, else the reason to stderr; return which."""
    try:
        arrays, attributes = load(path)
    except CheckpointError as error:
        complain(str(error))
        return False
    weights = {name.removeprefix("model/"): array for name, array in arrays.items() if name.startswith("model/")}
    digest = weights_digest(weights)
    if attributes.get("weights_sha256", digest) != digest:
        complain(f"{path}: its weights give {digest}, its attribute weights_sha256 says otherwise; do not use it")
        return False
    print(f"ok {printable(str(path))} weights_sha256={digest}")
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


def complain(text: str) -> None:
    """Print one line of error."""
    print(f"{PROGRAM}: error: {printable(text)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

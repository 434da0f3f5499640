"""Hand a trained model to other programs: as ONNX, safetensors, or a torch state_dict.

python -m cnnmpi.export runs/simplecnn-0/best.h5 --to model.onnx
"""

import copy
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from cnnmpi.checkpoint import CheckpointError, weights_digest, write_atomically
from cnnmpi.common.arrays import Array
from cnnmpi.console import command, complain, printable
from cnnmpi.distributed import UserError
from cnnmpi.models import Model
from cnnmpi.sizes import pair
from cnnmpi.train.code import explained
from cnnmpi.train.evaluation import mean_logits
from cnnmpi.train.setup import load_trained
from cnnmpi.train.weights import FORMATS, to_bytes

PROGRAM = "cnnmpi.export"
COUNT = 4  # random images, on which an ONNX model is compared with ours
IMAGES, LOGITS = "images", "logits"  # what goes in and comes out
LARGEST = (1 << 31) - (1 << 20)  # bytes of weights: a protobuf message ends at 2 GiB, and the nodes take some


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Export as ``argv`` says (the command line's if None). Returns the exit code."""
    try:
        tyro.cli(run, args=argv, prog=PROGRAM)
    except (CheckpointError, UserError) as error:
        complain(PROGRAM, error)
        return 2
    return 0


def run(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    to: Path,
    kind: Annotated[Literal["uint8", "float32"], tyro.conf.arg(name="input")] = "uint8",
    model: str | None = None,
) -> None:
    """Write the model of a checkpoint as another program reads it, by the ending of the file's name.

    Args:
        checkpoint: a checkpoint of cnnmpi.train.
        to: .onnx, a graph from pixels to logits, normalisation inside; .safetensors or .pt, the weights under the
            names of the equivalent torch module, as docs/checkpoint-format.md says.
        kind: what the ONNX model takes, images (N, C, H, W): uint8, or float32 in 0..1.
        model: the network of a checkpoint of your own: FILE.py:CLASS or MODULE:CLASS.

    """
    if to.suffix not in (".onnx", *FORMATS):
        raise UserError(f"--to {to}: expected a name that ends in .onnx, {', '.join(FORMATS)}")
    if os.path.realpath(to) == os.path.realpath(checkpoint):
        raise UserError(f"--to {to}: is the checkpoint: name another file")
    trained = load_trained(checkpoint, model)
    if to.suffix != ".onnx":
        blob = to_bytes(to.suffix, trained.state_dict(), trained.info)
        write_atomically(to, blob)
        print(printable(f"{to}: {len(trained.state_dict())} arrays, {len(blob):,} bytes"))
        return
    if importlib.util.find_spec("onnx") is None:
        raise UserError("--to model.onnx needs the package onnx: pip install 'cnnmpi[export]'")
    blob = onnx_bytes(trained, kind)
    comparison = compared(blob, trained, kind)
    write_atomically(to, blob)
    print(printable(f"{to}: {kind} images to logits, {len(blob):,} bytes; {comparison}"))


def onnx_bytes(model: Model, kind: str = "uint8") -> bytes:
    """Return an ONNX model: images of ``kind`` ("uint8", or "float32" in 0..1), (N, C, H, W), to "logits" (N, K).

    ``model`` is one that ``load_checkpoint`` returned. Raises UserError for a forward that a graph cannot hold.
    """
    from cnnmpi.functional_onnx import Graph

    info, traced = model.info, copy.deepcopy(model).to_numpy()
    arrays = traced.named_arrays()
    if (size := 4 * sum(array.size for array in arrays.values())) > LARGEST:
        raise UserError(f"an ONNX file has at most 2 GiB, the weights are {size:,} bytes: export them to .safetensors")
    graph = Graph({id(array): f"/{name}" if name in (IMAGES, LOGITS) else name for name, array in arrays.items()})
    for _, layer in traced.walk():
        vars(layer)["F"] = graph
    images = graph.input(IMAGES, (info.options["in_channels"], *pair(info.options["image_size"])), kind)
    scale, shift = scaling(info.mean, info.std, 255 if kind == "uint8" else 1)
    told = {"classes": info.classes, "weights_sha256": weights_digest(model.state_dict())}
    with explained(f"{type(model).__name__} cannot be written as ONNX"):
        return graph.model(traced.forward(images * scale + shift), LOGITS, told)


def scaling(mean: Sequence[float], std: Sequence[float], unit: int) -> tuple[Array, Array]:
    """Return the factor and the summand, each (C, 1, 1), by which ``data.normalize`` maps pixels 0..``unit``."""
    mean64, std64 = np.array(mean, np.float64), np.array(std, np.float64)
    factor, summand = 1 / (unit * std64), -mean64 / std64
    return factor.astype(np.float32)[:, None, None], summand.astype(np.float32)[:, None, None]


def compared(blob: bytes, model: Model, kind: str) -> str:
    """Say how far the logits of an ONNX model are from ours on random images, if there is a program to run it.

    Raises UserError where they differ by more than rounding, or are not finite.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return "not run here, where onnxruntime is missing"
    shape = (COUNT, model.info.options["in_channels"], *pair(model.info.options["image_size"]))
    pixels: Array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    images = pixels if kind == "uint8" else (pixels / np.float32(255)).astype(np.float32)
    with explained(f"{type(model).__name__} and its ONNX model cannot be compared"), np.errstate(all="ignore"):
        ours = model.F.to_numpy(mean_logits(model, images, model.info.mean, model.info.std))
        if not np.isfinite(ours).all():
            raise UserError(f"{type(model).__name__} gives logits that are not finite: they cannot be compared")
        error = float(np.abs(run_onnx(blob, images) - ours).max() / max(1.0, np.abs(ours).max()))
    if not error < 1e-3:
        raise UserError(f"onnxruntime gives other logits, off by {error:.2g} of the largest: please report this")
    return f"logits in onnxruntime within {error:.1g} of ours"


def run_onnx(blob: bytes, images: Array) -> Any:
    """Return the logits (N, K) that onnxruntime computes of ``images``."""
    import onnxruntime

    session = onnxruntime.InferenceSession(blob, providers=["CPUExecutionProvider"])
    return session.run([LOGITS], {IMAGES: images})[0]


if __name__ == "__main__":
    sys.exit(main())

"""Hand a trained model to other programs: as ONNX, safetensors, or a torch state_dict.

python -m cnnmpi.export runs/simplecnn-0/best.h5 --to model.onnx
"""

import copy
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from cnnmpi.checkpoint import CheckpointError, write_atomically
from cnnmpi.common.arrays import Array
from cnnmpi.console import command, complain, printable
from cnnmpi.data import normalize
from cnnmpi.distributed import UserError
from cnnmpi.models import Model
from cnnmpi.sizes import pair
from cnnmpi.train.setup import load_trained
from cnnmpi.train.weights import FORMATS, to_bytes

PROGRAM = "cnnmpi.export"
IMAGES = 4  # random ones, on which an ONNX model is compared with ours


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
    input: Literal["uint8", "float32"] = "uint8",
    model: str | None = None,
) -> None:
    """Write the model of a checkpoint as another program reads it, by the ending of the file's name.

    Args:
        checkpoint: a checkpoint of cnnmpi.train.
        to: .onnx, a graph from pixels to logits, normalisation inside; .safetensors or .pt, the weights under the
            names of the equivalent torch module, as docs/checkpoint-format.md says.
        input: what the ONNX model takes, images (N, C, H, W): uint8, or float32 in 0..1.
        model: the network of a checkpoint of your own: FILE.py:CLASS or MODULE:CLASS.

    """
    if to.suffix not in (".onnx", *FORMATS):
        raise UserError(f"--to {to}: expected a name that ends in .onnx, {', '.join(FORMATS)}")
    trained = load_trained(checkpoint, model)
    if to.suffix != ".onnx":
        blob = to_bytes(to.suffix, trained.state_dict(), trained.info)
        write_atomically(to, blob)
        print(printable(f"{to}: {len(trained.state_dict())} arrays, {len(blob):,} bytes"))
        return
    if importlib.util.find_spec("onnx") is None:
        raise UserError("--to model.onnx needs the package onnx: pip install 'cnnmpi[export]'")
    blob = onnx_bytes(trained, input)
    write_atomically(to, blob)
    print(printable(f"{to}: {input} images to logits, {len(blob):,} bytes; {compared(blob, trained, input)}"))


def onnx_bytes(model: Model, kind: str = "uint8") -> bytes:
    """Return an ONNX model: images of ``kind`` ("uint8", or "float32" in 0..1), (N, C, H, W), to "logits" (N, K).

    ``model`` is one that ``load_checkpoint`` returned. Raises UserError for a forward that a graph cannot hold.
    """
    from cnnmpi.functional_onnx import Graph

    info, traced = model.info, copy.deepcopy(model).to_numpy()
    graph = Graph({id(array): name for name, array in traced.named_arrays().items()})
    traced.eval()
    for _, layer in traced.walk():
        vars(layer)["F"] = graph
    images = graph.input("images", (info.options["in_channels"], *pair(info.options["image_size"])), kind)
    scale, shift = scaling(info.mean, info.std, 255 if kind == "uint8" else 1)
    try:
        logits = traced.forward(images * scale + shift)
        told = {"classes": info.classes, "weights_sha256": info.attributes["weights_sha256"]}
        return graph.model(logits, "logits", told)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{type(model).__name__} cannot be written as ONNX: {error}") from None


def scaling(mean: Sequence[float], std: Sequence[float], unit: int) -> tuple[Array, Array]:
    """Return the factor and the summand, each (C, 1, 1), by which ``data.normalize`` maps pixels 0..``unit``."""
    mean64, std64 = np.array(mean, np.float64), np.array(std, np.float64)
    factor, summand = 1 / (unit * std64), -mean64 / std64
    return factor.astype(np.float32)[:, None, None], summand.astype(np.float32)[:, None, None]


def compared(blob: bytes, model: Model, kind: str) -> str:
    """Say how far the logits of an ONNX model are from ours on random images, if there is a program to run it.

    Raises UserError where they differ by more than rounding.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return "not run here, where onnxruntime is missing"
    shape = (IMAGES, model.info.options["in_channels"], *pair(model.info.options["image_size"]))
    pixels: Array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    images = pixels if kind == "uint8" else (pixels / np.float32(255)).astype(np.float32)
    theirs = run_onnx(blob, images)
    ours = model.F.to_numpy(model.forward(model.as_array(normalize(images, model.info.mean, model.info.std))))
    error = float(np.abs(theirs - ours).max() / max(1.0, np.abs(ours).max()))
    if not error < 1e-3:
        raise UserError(f"onnxruntime gives other logits, off by {error:.2g} of the largest: please report this")
    return f"logits in onnxruntime within {error:.1g} of ours"


def run_onnx(blob: bytes, images: Array) -> Any:
    """Return the logits (N, K) that onnxruntime computes of ``images``."""
    import onnxruntime

    session = onnxruntime.InferenceSession(blob, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


if __name__ == "__main__":
    sys.exit(main())

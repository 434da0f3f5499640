"""Say what image files show, by a trained checkpoint.

python -m cnnmpi.predict runs/simplecnn-0/best.h5 cat.jpg dog.png
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from cnnmpi.checkpoint import CheckpointError
from cnnmpi.common.arrays import Array, nchw
from cnnmpi.common.text import read_json
from cnnmpi.console import command, complain, printable
from cnnmpi.data import DataError, Views
from cnnmpi.data.images import FITS, read_fitted
from cnnmpi.distributed import UserError
from cnnmpi.functional import sigmoid, softmax
from cnnmpi.models import Model
from cnnmpi.sizes import pair
from cnnmpi.train.config import Backend, Config, Precision
from cnnmpi.train.evaluation import batch_size, mean_logits
from cnnmpi.train.setup import load_trained, to_engine

PROGRAM = "cnnmpi.predict"
TOP = 3  # classes printed of each image


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Predict as ``argv`` says (the command line's if None). Returns 0; 2 for errors, after the readable images."""
    try:
        return tyro.cli(run, args=argv, prog=PROGRAM)
    except (CheckpointError, UserError) as error:
        complain(PROGRAM, error)
        return 2


def run(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    images: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    top: int | None = None,
    model: str | None = None,
    backend: Backend = "numpy",
    device: str = "cpu",
    precision: Precision = "float32",
    tta: Views = "none",
) -> int:
    """Print the most probable classes of each image, or those with the largest numbers.

    Args:
        checkpoint: a checkpoint of cnnmpi.train.
        images: image files of any kind and size; scaled as the training images were, else cut to the middle first.
        top: how many classes to print; 3 unless given.
        model: the network of a checkpoint of your own: FILE.py:CLASS or MODULE:CLASS.
        backend: engine under the layers, whatever the run had.
        device: where torch computes: cpu, cuda, cuda:N.
        precision: of torch's convolutions and matrix products.
        tta: views of each image over which outputs are averaged: none but itself, flip (2), or flip+shift (6).

    """
    if not images:
        raise UserError("name at least one image")
    trained = load_trained(checkpoint, model)
    to_engine(trained, Config(backend=backend, device=device, precision=precision))
    classes = trained.info.classes
    if top is not None and not 1 <= top <= len(classes):
        raise UserError(f"--top {top}: the model knows {len(classes)} classes; name a number from 1 to {len(classes)}")
    channels, (height, width) = trained.info.options["in_channels"], pair(trained.info.options["image_size"])
    if channels not in (1, 3):
        raise UserError(f"{checkpoint} takes images of {channels} channels: an image file has 1 or 3")
    recorded = trained.info.attributes.get("data_fit")  # how the training images were made of larger ones, if known
    how = next((name for name in FITS if name == recorded), FITS[0])
    unreadable: list[Path] = []

    def read() -> Iterator[tuple[Path, Array]]:
        for path in images:
            try:
                yield path, read_fitted(path, channels, height, width, how)
            except DataError as error:
                complain(PROGRAM, error)
                unreadable.append(path)

    shown = "{:.3g}".format if loss_of(trained) == "mse" else "{:.1%}".format
    pictures, together = read(), batch_size(trained, (channels, height, width))
    while batch := list(itertools.islice(pictures, together)):
        for (path, _), row in zip(batch, predictions(trained, [pixels for _, pixels in batch], tta), strict=True):
            best = np.argsort(-row, kind="stable")[: top or TOP]
            print(f"{printable(path)}: " + "  ".join(f"{printable(classes[k])} {shown(row[k])}" for k in best))
    return 2 if unreadable else 0


def predictions(model: Model, images: Sequence[Array], tta: Views = "none") -> Array:
    """Return what the model says of uint8 ``images`` (H, W, C): a number for each class, (N, classes).

    It is the probability that this is the class or, where an image may have several, that it has this one; a model that
    was trained by squared errors predicts numbers.
    """
    pixels = nchw(np.stack(images))
    logits: Array = model.F.to_numpy(mean_logits(model, pixels, model.info.mean, model.info.std, tta))
    loss = loss_of(model)
    if loss == "mse":
        return logits
    return sigmoid(logits)[0] if loss == "binary_cross_entropy" else softmax(logits)


def loss_of(model: Model) -> str:
    """Return the name of the loss that a model from a checkpoint was trained with."""
    try:
        loss = read_json(model.info.attributes["config"]).get("loss")
    except (KeyError, ValueError):  # written by another program
        loss = None
    return loss if isinstance(loss, str) else "cross_entropy"


if __name__ == "__main__":
    sys.exit(main())

"""Say what image files show, by a trained checkpoint.

python -m cnnmpi.predict runs/simplecnn-0/best.h5 cat.jpg dog.png
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image, UnidentifiedImageError

from cnnmpi.checkpoint import CheckpointError
from cnnmpi.data import normalize
from cnnmpi.distributed import UserError
from cnnmpi.functional import softmax
from cnnmpi.functional.conv import pair
from cnnmpi.train import load_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Predict as ``argv`` says (the command line's if None). Returns the exit code."""
    try:
        tyro.cli(run, args=argv, prog="cnnmpi.predict")
    except (CheckpointError, UserError) as error:
        print(f"cnnmpi.predict: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    images: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    top: int = 3,
) -> None:
    """Print the most probable classes of each image.

    Args:
        checkpoint: a checkpoint of cnnmpi.train.
        images: PNG or JPEG files of any size; cut to the middle and scaled to the size the model knows.
        top: how many classes to print.

    """
    if not images:
        raise UserError("name at least one image")
    model = load_checkpoint(checkpoint)
    options = model.info.options
    size = pair(tuple(options["image_size"]) if isinstance(options["image_size"], list) else options["image_size"])
    batch = np.stack([read_image(path, size, options["in_channels"]) for path in images])
    x = normalize(batch.transpose(0, 3, 1, 2), model.info.mean, model.info.std)
    for path, row in zip(images, softmax(model.forward(x)), strict=True):
        best = np.argsort(-row, kind="stable")[: max(top, 1)]
        print(f"{path}: " + "  ".join(f"{model.info.classes[k]} {row[k]:.1%}" for k in best))


def read_image(path: Path, size: tuple[int, int], channels: int) -> np.ndarray[Any, Any]:
    """Return an image as uint8 (height, width, channels). Raises UserError where the file holds no image."""
    if channels not in (1, 3):
        raise UserError(f"the model takes images of {channels} channels: an image file has 1 or 3")
    height, width = size
    try:
        with Image.open(path) as file:
            image = file.convert("RGB" if channels == 3 else "L")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "not a readable image"
        raise UserError(f"{path}: {reason}") from None
    scale = min(image.width / width, image.height / height)
    cut_w, cut_h = width * scale, height * scale
    left, top = (image.width - cut_w) / 2, (image.height - cut_h) / 2
    box = (left, top, left + cut_w, top + cut_h)
    resized = image.resize((width, height), Image.Resampling.BOX if scale > 1 else Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized).reshape(height, width, channels)


if __name__ == "__main__":
    sys.exit(main())

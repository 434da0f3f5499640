"""Image files -> pixels: whatever a file holds, upright, on white, with 8 bits a channel; and to a given size.

Not among what ``cnnmpi.data`` gives at its door: only who reads image files needs Pillow.
"""

import contextlib
import logging
import stat
import warnings
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cnnmpi.common.arrays import Array
from cnnmpi.common.files import open_regular
from cnnmpi.data.dataset import DataError

Fit = Literal["crop", "pad", "stretch"]
FITS: tuple[Fit, ...] = get_args(Fit)
RANGES = (1, 255, 65535)  # of numbers that say by no other way what white is

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs of damaged files, DataError says


def read_fitted(path: str | Path, channels: int, height: int, width: int, how: Fit = "crop") -> Array:
    """Return an image file as uint8 (height, width, channels): as models see it in training and in prediction.

    Raises DataError as ``read_image`` does.
    """
    least = 2 * max(height, width)  # so that what is left to scale averages at least four pixels
    return fit(read_image(path, channels, least), height, width, how)


def read_image(path: str | Path, channels: int = 3, least: int | None = None) -> Array:
    """Return an image file as uint8 (height, width, channels), for 1 channel (gray) or 3 (RGB).

    Where sides of ``least`` pixels suffice, a large JPEG file is decoded at a half, a quarter or an eighth of its size,
    which libjpeg does several times as fast, and from the file alone: the same file gives the same pixels.

    It is turned as its EXIF orientation says, what is transparent shows white, more than 8 bits a channel are scaled to
    8, and of several frames the first is taken. Raises DataError, in one line that begins with ``path``, for a file
    that cannot be read or holds no such image, and for more pixels than twice Pillow's MAX_IMAGE_PIXELS.
    """
    if channels not in (1, 3):
        raise DataError(f"{path}: an image file gives 1 or 3 channels, not {channels}")
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # a pipe would let us wait for ever
            raise DataError(f"{path}: not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and of oddities: they are read, or refused below
            with Image.open(path) as image:
                if image.format == "EPS":  # its reader starts Ghostscript, on a program that the file brings
                    raise DataError(f"{path}: EPS is refused: convert it to PNG")
                if least:
                    image.draft(None, (least, least))
                image.load()
                with contextlib.suppress(Exception):  # an orientation that cannot be read is none
                    ImageOps.exif_transpose(image, in_place=True)
                pixels = np.asarray(_flat(image).convert("RGB" if channels == 3 else "L"))
    except DataError:
        raise
    except Exception as error:  # Pillow's readers report damage by whatever a parser can run into
        raise DataError(f"{path}: {_reason(error)}") from None
    if pixels.size == 0:
        raise DataError(f"{path}: an image without pixels")
    return pixels.reshape(*pixels.shape[:2], channels)


def is_image(path: str | Path) -> bool:
    """Return whether a file begins as those of an image format do, or is none of which one could know that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with open_regular(Path(path)) as file:
                Image.open(file).close()
        except UnidentifiedImageError:
            return False
        except Exception:  # such as too many pixels
            return True
    return True


def fit(image: Array, height: int, width: int, how: Fit = "crop") -> Array:
    """Return a uint8 ``image`` (H, W, C), of 1 or 3 channels, scaled to (height, width, C).

    ``how`` says what becomes of other proportions: "crop" cuts the middle out, "pad" keeps everything and fills up with
    black, as the random crop of training does, "stretch" distorts.
    """
    H, W, channels = image.shape
    box, size = (0.0, 0.0, float(W), float(H)), (width, height)
    if how == "crop":
        scale = min(W / width, H / height)
        cut_w, cut_h = min(width * scale, W), min(height * scale, H)  # rounding may have made it larger than the image
        left, top = (W - cut_w) / 2, (H - cut_h) / 2
        box = (left, top, left + cut_w, top + cut_h)
    elif how == "pad":
        scale = max(W / width, H / height)
        size = min(width, max(1, round(W / scale))), min(height, max(1, round(H / scale)))
    shrinks = box[2] - box[0] > size[0] or box[3] - box[1] > size[1]
    resampling = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    resized = Image.fromarray(image if channels == 3 else image[:, :, 0]).resize(size, resampling, box=box)
    pixels = np.asarray(resized).reshape(size[1], size[0], channels)
    if size == (width, height):
        return pixels
    whole = np.zeros((height, width, channels), np.uint8)
    y, x = (height - size[1]) // 2, (width - size[0]) // 2
    whole[y : y + size[1], x : x + size[0]] = pixels
    return whole


def _flat(image: Image.Image) -> Image.Image:
    """Return an image without transparency, and with 8 bits a channel."""
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(image))
    if "transparency" in image.info or "A" in image.getbands():
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA"))
    return image


def _eight_bits(image: Image.Image) -> Array:
    """Return gray pixels of 16 bits, of 32, or of floating point, scaled to uint8."""
    values = np.asarray(image).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are no numbers")
    black, white = values.min(), values.max()
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        black, white = 0, 65535
    elif black >= 0:
        ranges = RANGES if image.mode == "F" else RANGES[1:]
        black, white = 0, next((top for top in ranges if white <= top), white)
    values -= black
    values *= 255 / (white - black) if white > black else 0
    return np.rint(values, out=values).astype(np.uint8)


def _reason(error: Exception) -> str:
    """Return in a few words why a file could not be read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of a kind that Pillow does not know"
    if isinstance(error, MemoryError):
        return "the image does not fit into memory"
    return f"not a readable image ({' '.join(str(error).split())[:150] or type(error).__name__})"

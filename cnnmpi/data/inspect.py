"""Looking into data files: what they hold, whether it is what was written, and what the images look like."""

import zlib
from pathlib import Path

import h5py
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cnnmpi.common.arrays import Array
from cnnmpi.common.text import printable
from cnnmpi.console import table
from cnnmpi.data.dataset import (
    DataError,
    check_labels,
    content_digest,
    index_digest,
    level_counts,
    mean_and_std,
)
from cnnmpi.data.hdf5 import Opened, opened, reason
from cnnmpi.data.images import fit

TILE, GAP, MARGIN = 64, 4, 160  # pixels of a sheet: an image, what is between two, and the name of a class
SHEET_COLUMNS, MOST_ROWS = 10, 100
LONGEST_TITLE = 24  # letters of a class in a sheet
MOST_NAMED = 5  # of many wrong images


def describe(path: Path) -> str:
    """Return in some lines what a data file holds. Raises DataError for one that cannot be used."""
    with opened(path) as file:
        (_, images, _), (_, test_images, _) = file.parts
        mean, std = file.numbers("mean"), file.numbers("std")
        if mean is None or std is None:  # of a file that records none
            mean, std = map(list, mean_and_std(level_counts(images)))
        N, C, H, W = images.shape
        facts = {
            "source": file.source,
            "images": f"{C} channels of {H}x{W}, {N} for training and {len(test_images)} for testing",
            "fit": file.text("fit"),
            "mean": " ".join(f"{value:.4f}" for value in mean),
            "std": " ".join(f"{value:.4f}" for value in std),
            "sha256 of the archive": file.sha256,
            "sha256 of the content": file.text("data_sha256"),
        }
        labels = [_labels(file, name, stored) for name, _, stored in file.parts]
    lines = [printable(path), *(f"  {name}: {printable(value)}" for name, value in facts.items() if value)]
    if labels[0].ndim == 2:
        return "\n".join([*lines, f"  targets: {len(file.classes)} numbers for each image"])
    counts = [np.bincount(values, minlength=len(file.classes)) for values in labels]
    rows = [(f"  {name}", *numbers) for name, *numbers in zip(file.classes, *counts, strict=True)]
    return "\n".join([*lines, table(("  class", "train", "test"), rows)])


def verify(path: Path) -> tuple[str, bool]:
    """Read every byte of a data file; return the digest of its content, and whether digests were recorded in it.

    Raises DataError, which says what differs, where it is not what was recorded.
    """
    with opened(path) as file:
        recorded = {name: file.text(name) for name in ("data_sha256", "index_sha256")}
        parts, indexed = [], []
        for name, images, stored in file.parts:
            labels, crc32 = _labels(file, name, stored), file.crc32(name)
            parts.append((_Watched(f"{path}: {name}", images, crc32), labels))
            indexed.append((images.shape, labels, np.zeros(0, np.uint32) if crc32 is None else crc32))
        digest = content_digest(file.classes, parts)
        for images, _ in parts:
            images.complain()
        if recorded["index_sha256"] not in ("", index_digest(file.described(), indexed)):
            raise DataError(f"{path}: attributes, labels or checksums are not what was written (index_sha256)")
        if recorded["data_sha256"] not in ("", digest):
            raise DataError(f"{path}: its content gives {digest}, not what was written (data_sha256)")
        statistics = mean_and_std(parts[0][0].counts)
        for name, values in zip(("mean", "std"), statistics, strict=True):
            if file.numbers(name) not in (None, list(values)):
                raise DataError(f"{path}: the attribute {name} is not that of the training images")
    return digest, all(recorded.values())


class _Watched:
    """Images of an open file that are compared with their checksums, and whose levels are counted, as they are read."""

    def __init__(self, name: str, images: h5py.Dataset, crc32: Array | None) -> None:
        self._name, self._images, self._crc32 = name, images, crc32
        self.shape: tuple[int, ...] = images.shape
        self.counts = np.zeros((self.shape[1], 256), np.int64)
        self._wrong: list[int] = []

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, block: slice) -> Array:
        try:
            pixels: Array = self._images[block]
        except (OSError, RuntimeError) as error:
            where = f"{block.start}..{block.stop - 1}"
            raise DataError(f"{self._name} images {where} are damaged: {reason(error)}") from None
        if self._crc32 is not None:
            sums = np.array([zlib.crc32(image) for image in pixels], np.uint32)
            self._wrong += (block.start + np.flatnonzero(sums != self._crc32[block])).tolist()
        self.counts += level_counts(pixels)
        return pixels

    def complain(self) -> None:
        """Raise DataError if any image differed."""
        if self._wrong:
            named = ", ".join(map(str, self._wrong[:MOST_NAMED])) + (", ..." if len(self._wrong) > MOST_NAMED else "")
            raise DataError(f"{self._name} images {named} are not what was written (crc32): {len(self._wrong)} in all")


def make_sheet(path: Path, out: Path) -> None:
    """Draw the first images for training of each class, in rows that begin with its name, as the picture file ``out``.

    Each image is 64 pixels wide and high, with black around it where it is not square. Raises DataError.
    """
    with opened(path) as file:
        (name, images, stored), _ = file.parts
        labels = _labels(file, name, stored)
        if labels.ndim == 2:
            labels = labels.argmax(axis=1)
        classes = file.classes[:MOST_ROWS]
        size = (MARGIN + SHEET_COLUMNS * (TILE + GAP), GAP + len(classes) * (TILE + GAP))
        sheet = Image.new("RGB", size, "white")
        pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
        for row, title in enumerate(classes):
            y = GAP + row * (TILE + GAP)
            text = printable(title)[:LONGEST_TITLE]
            if isinstance(font, ImageFont.ImageFont):  # without FreeType: it has the letters of Latin-1 alone
                text = text.encode("latin-1", "replace").decode("latin-1")
            pen.text((GAP, y + TILE // 2 - GAP), text, "black", font)
            for column, index in enumerate(np.flatnonzero(labels == row)[:SHEET_COLUMNS]):
                sheet.paste(_tile(images[int(index)]), (MARGIN + column * (TILE + GAP), y))
    try:
        sheet.save(out)
    except (OSError, ValueError) as error:
        raise DataError(f"{out}: cannot be written: {getattr(error, 'strerror', None) or error}") from None


def _tile(image: Array) -> Image.Image:
    """Return an image (C, H, W) as it stands in a sheet; of other numbers of channels than 3, the first one in gray."""
    shown = image if len(image) == 3 else image[:1].repeat(3, axis=0)
    return Image.fromarray(fit(np.ascontiguousarray(shown.transpose(1, 2, 0)), TILE, TILE, "pad"))


def _labels(file: Opened, name: str, stored: h5py.Dataset) -> Array:
    """Return the labels of a part as int64, or its targets as float32."""
    labels: Array = stored[()].astype(np.float32 if stored.dtype.kind == "f" else np.int64)
    check_labels(f"{file.path}: {name}", labels, len(file.classes))
    return labels

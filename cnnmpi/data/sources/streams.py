"""Bytes from files that may come from anyone: as many as a header promises, in small memory, or one line of error."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cnnmpi.common.arrays import Array
from cnnmpi.common.files import open_regular
from cnnmpi.data.dataset import DataError, blocks, images_per_block

LARGEST = 1 << 42  # bytes of one array
LARGEST_ROW = 1 << 28  # bytes of one image
SUSPICIOUS = 1 << 26  # bytes, from which on it is asked how well they were packed
LARGEST_RATIO = 200  # of unpacked to packed bytes: images never pack so well, what is to fill a disk does (up to 1032)


class Stream(Protocol):
    """What can be read from, once and forwards."""

    def read(self, count: int = ..., /) -> bytes:
        """Return up to ``count`` bytes; fewer, or none, at the end."""


def names_in(folder: Path) -> list[str]:
    """Return the names of what a folder holds; none of what is no folder. Raises DataError where it cannot be read."""
    try:
        return [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None


def files_sha256(paths: Iterable[Path]) -> str:
    """Return the sha256 of the contents of files, one after the other. Raises DataError."""
    sha = hashlib.sha256()
    for path in paths:
        try:
            with open_regular(path) as file:
                while block := file.read(1 << 20):
                    sha.update(block)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return sha.hexdigest()


def check_claim(name: str, claimed: int, stored: int) -> None:
    """Raise DataError if ``claimed`` bytes are more than anyone wants, or than ``stored`` bytes of images unpack to."""
    if claimed > LARGEST:
        raise DataError(f"{name}: refused: claims {claimed} bytes, more than {LARGEST}")
    if claimed > max(SUSPICIOUS, LARGEST_RATIO * stored):
        raise DataError(f"{name}: refused: claims to unpack {stored} bytes to {claimed}, as no images do")


def read_exactly(name: str, stream: Stream, count: int) -> bytes:
    """Return the next ``count`` bytes. Raises DataError where there are fewer."""
    pieces = []
    while count:
        piece = stream.read(count)
        if not piece:
            raise DataError(f"{name}: truncated: {count} bytes fewer than its header says")
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def read_blocks(name: str, stream: Stream, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Array]:
    """Yield an array of ``shape`` (N, ...) that ``stream`` holds to its end, some rows at a time.

    Raises DataError where the stream holds fewer or more bytes.
    """
    row = math.prod(shape[1:]) * dtype.itemsize
    if row > LARGEST_ROW:
        raise DataError(f"{name}: refused: claims images of {row} bytes each")
    for block in blocks(0, shape[0], images_per_block((1, max(row, 1)))):
        rows = block.stop - block.start
        yield np.frombuffer(read_exactly(name, stream, rows * row), dtype).reshape(rows, *shape[1:])
    if stream.read(1):
        raise DataError(f"{name}: holds more bytes than its header says")

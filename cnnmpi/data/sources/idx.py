"""MNIST and its relatives (Fashion-MNIST, KMNIST, EMNIST, ...): the four IDX files, packed by gzip or not.

The format is described at http://yann.lecun.com/exdb/mnist/: two zero bytes, one that says the type of the numbers, one
that says the number of dimensions, the length of each as 4 bytes, highest first, and then the numbers.
"""

import contextlib
import gzip
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cnnmpi.common.arrays import Array
from cnnmpi.common.text import printable
from cnnmpi.data.dataset import DataError, check_alike, check_declared
from cnnmpi.data.sources.streams import Stream, check_claim, files_sha256, names_in, read_blocks, read_exactly
from cnnmpi.data.writer import Piece, Source

NAME = re.compile(r"(?:.*-)?(train|t10k|test)-(images|labels)[-.]idx\d-ubyte(?:\.gz)?")
UINT8 = 0x08  # the type of numbers
DIMENSIONS = {"images": 3, "labels": 1}
LONGEST_LABELS = 1 << 28


def read_idx(folder: Path) -> Source:
    """Return the images of a folder that holds the four files of MNIST or of a relative: uint8 (n, 1, H, W).

    Classes are called "0", "1", .... Raises DataError where files are missing, damaged or suspicious.
    """
    files = _files(folder)
    labels = {part: _labels(files[part, "labels"]) for part in ("train", "test")}
    shapes = {part: _shape(files[part, "images"]) for part in labels}
    classes = tuple(str(k) for k in range(1 + max(int(values.max(initial=0)) for values in labels.values())))
    parts = [(part, np.broadcast_to(np.uint8(0), shape), labels[part]) for part, shape in shapes.items()]
    for part, declared, values in parts:
        check_declared(f"{folder}: {part}", declared, values, len(classes))
    check_alike(str(folder), parts)

    def pieces() -> Iterator[Piece]:
        for part, shape in shapes.items():
            at = 0
            for images in _numbers(files[part, "images"], (shape[0], *shape[2:])):
                yield part, images[:, None], labels[part][at : at + len(images)]
                at += len(images)

    return Source(classes, f"IDX files of {printable(folder)}", pieces(), idx_sha256(folder))


def holds_idx(folder: Path) -> bool:
    """Return whether any file of a folder is called as those of MNIST are."""
    return any(NAME.fullmatch(name) for name in names_in(folder))


def idx_sha256(folder: Path) -> str:
    """Return the sha256 of the files that would be read, one after the other. Raises DataError."""
    return files_sha256(path for _, path in sorted(_files(folder).items()))


def _files(folder: Path) -> dict[tuple[str, str], Path]:
    """Return the file of each (part, "images" or "labels"); of a packed and an unpacked one the unpacked."""
    files: dict[tuple[str, str], Path] = {}
    try:
        paths = sorted(path for path in folder.iterdir() if path.is_file())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for path in paths:
        if not (match := NAME.fullmatch(path.name)):
            continue
        key = ("train" if match[1] == "train" else "test", match[2])
        other = files.setdefault(key, path)
        if other.name.removesuffix(".gz") != path.name.removesuffix(".gz"):
            raise DataError(f"{folder}: holds more than one set: {other.name} and {path.name}; give each its folder")
    wanted = {
        ("train", "images"): "train-images-idx3-ubyte",
        ("train", "labels"): "train-labels-idx1-ubyte",
        ("test", "images"): "t10k-images-idx3-ubyte",
        ("test", "labels"): "t10k-labels-idx1-ubyte",
    }
    if missing := [name for key, name in wanted.items() if key not in files]:
        raise DataError(f"{folder}: {', '.join(missing)} missing, with or without .gz")
    return files


def _shape(path: Path) -> tuple[int, int, int, int]:
    """Return the shape of a file of images as (N, 1, H, W)."""
    with _opened(path) as stream:
        N, H, W = _header(path, stream, "images")
    return N, 1, H, W


def _labels(path: Path) -> Array:
    """Return the labels in a file as int64 (N,)."""
    with _opened(path) as stream:
        (N,) = _header(path, stream, "labels")
        if N > LONGEST_LABELS:
            raise DataError(f"{path}: refused: claims {N} labels")
        pieces = list(read_blocks(str(path), stream, (N,), np.dtype(np.uint8)))
    return np.concatenate(pieces or [np.zeros(0, np.uint8)]).astype(np.int64)


def _numbers(path: Path, shape: tuple[int, ...]) -> Iterator[Array]:
    """Yield the images in a file, (n, H, W), of which its header says the ``shape``."""
    with _opened(path) as stream:
        if _header(path, stream, "images") != shape:
            raise DataError(f"{path}: changed while it was read")
        yield from read_blocks(str(path), stream, shape, np.dtype(np.uint8))


def _header(path: Path, stream: Stream, what: str) -> tuple[int, ...]:
    """Return the lengths that a file's header claims. Raises DataError for a claim that its bytes cannot fill."""
    dimensions = DIMENSIONS[what]
    magic = read_exactly(str(path), stream, 4)
    if magic != bytes([0, 0, UINT8, dimensions]):
        raise DataError(f"{path}: is no IDX file of {what}: it begins with {magic.hex()}, not 000008{dimensions:02x}")
    shape = tuple(np.frombuffer(read_exactly(str(path), stream, 4 * dimensions), ">u4").tolist())
    claimed, stored = math.prod(shape), path.stat().st_size
    if _is_packed(path):
        check_claim(str(path), claimed, stored)
    elif claimed + 4 + 4 * dimensions != stored:
        raise DataError(f"{path}: its header claims {claimed} numbers, but the file has {stored} bytes")
    return shape


def _is_packed(path: Path) -> bool:
    return path.name.endswith(".gz")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Stream]:
    """Open a file for reading; what its reading raises becomes a DataError."""
    try:
        with gzip.open(path) if _is_packed(path) else path.open("rb") as file:
            yield file
    except EOFError:
        raise DataError(f"{path}: truncated") from None
    except zlib.error:
        raise DataError(f"{path}: damaged gzip") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None

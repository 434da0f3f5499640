"""A file of NumPy's, .npz -> images and labels. What is pickled in it is refused; arrays are read in pieces.

An .npz file is a zip archive of .npy files, whose header says dtype and shape (numpy.lib.format). Neither is believed
until the bytes are there.
"""

import contextlib
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from cnnmpi.common.arrays import Array
from cnnmpi.common.files import open_regular
from cnnmpi.common.text import printable
from cnnmpi.data.dataset import DataError, check_alike, check_count, check_declared, to_levels
from cnnmpi.data.sources.split import drawn_for_test
from cnnmpi.data.sources.streams import Stream, check_claim, files_sha256, read_blocks
from cnnmpi.data.writer import Piece, Source

SPLIT = ("x_train", "y_train", "x_test", "y_test")
TEST_SHARE = 0.1  # of x and y
LARGEST_LABELS = 1 << 30  # bytes
LONGEST_HEADER = 1 << 17  # bytes before the numbers of an array


@dataclass(frozen=True)
class Member:
    """An array in the file: what its header says."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def read_arrays(path: Path, test: float | None = None, seed: int = 0) -> Source:
    """Return the images of an .npz file with x_train, y_train, x_test, y_test, or with x and y.

    Images are uint8, or floats in 0..1, (N, C, H, W), or (N, H, W) where they are gray; y is whole numbers from 0 (N,),
    or floats (N, K). Classes are called "0", "1", .... Of x and y the share ``test`` of each class, 0.1 unless given,
    is drawn by ``seed``. Raises DataError for anything else, and for files that are damaged or suspicious.
    """
    if test is not None and not 0 < test < 1:
        raise DataError(f"--test {test}: expected a share of the images, above 0 and below 1")
    with _opened(path) as file:
        names = {name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy")}
        if set(SPLIT) <= names:
            if test is not None:
                raise DataError(f"{path}: has x_test and y_test already: leave --test away")
            pairs = {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")}
        elif {"x", "y"} <= names:
            pairs = {"x": ("x", "y")}
        else:
            held = ", ".join(printable(name)[:40] for name in sorted(names)[:10]) or "nothing"
            raise DataError(f"{path}: expected {', '.join(SPLIT)}, or x and y; it holds {held}")
        images = {part: _header(path, file, x) for part, (x, _) in pairs.items()}
        labels = {part: _labels(path, file, y) for part, (_, y) in pairs.items()}
    for part, member in images.items():
        x = pairs[part][0]
        if 0 in member.shape:
            raise DataError(f"{path}: {x} is empty: {member.shape}")
        if len(member.shape) not in (3, 4):
            raise DataError(f"{path}: {x} needs images (N, C, H, W), or gray (N, H, W), got {member.shape}")
    first = next(iter(labels.values()))
    count = first.shape[1] if first.ndim == 2 else 1 + max(int(y.max(initial=0)) for y in labels.values())
    if first.ndim == 1:
        check_count(str(path), count, sum(map(len, labels.values())))
    classes = tuple(map(str, range(count)))
    parts = []
    for part, member in images.items():
        to_levels(f"{path}: {pairs[part][0]}", np.zeros(1, member.dtype))  # a dtype that will do, or DataError
        declared = np.broadcast_to(np.uint8(0), _with_channel(member.shape))
        check_declared(f"{path}: {part}", declared, labels[part], count)
        parts.append((part, declared, labels[part]))
    if len(parts) > 1:
        check_alike(str(path), parts)
    drawn = _drawn(first, TEST_SHARE if test is None else test, seed) if "x" in pairs else None
    return Source(classes, printable(path), _pieces(path, pairs, labels, drawn), files_sha256([path]))


def _pieces(
    path: Path, pairs: dict[str, tuple[str, str]], labels: dict[str, Array], drawn: Array | None
) -> Iterator[Piece]:
    """Yield the images with their labels; of x and y those that are ``drawn`` for testing as such."""
    with _opened(path) as file:
        for part, (x, _) in pairs.items():
            at = 0
            for values in _values(path, file, x):
                here = slice(at, at + len(values))
                images = to_levels(f"{path}: {x}", values.reshape(_with_channel(values.shape)))
                if drawn is None:
                    yield part, images, labels[part][here]
                else:
                    for name, chosen in (("train", ~drawn[here]), ("test", drawn[here])):
                        if chosen.any():
                            yield name, images[chosen], labels[part][here][chosen]
                at += len(values)


def _drawn(labels: Array, share: float, seed: int) -> Array:
    """Return which images are drawn for testing: a share of each class or, of targets (N, K), of all."""
    drawn = np.zeros(len(labels), bool)
    kinds = labels if labels.ndim == 1 else np.zeros(len(labels), np.int64)
    for kind in np.unique(kinds):
        members = np.flatnonzero(kinds == kind)
        drawn[members] = drawn_for_test([f"{kind}/{index}" for index in members], share, seed)
    return drawn


def _with_channel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of images as (N, C, H, W), where (N, H, W) is gray."""
    return (shape[0], 1, *shape[1:]) if len(shape) == 3 else shape


def _labels(path: Path, file: zipfile.ZipFile, name: str) -> Array:
    """Return labels as int64, or targets as float32. Raises DataError for what is neither."""
    member = _header(path, file, name)
    if member.dtype.kind not in "iuf" or len(member.shape) != (2 if member.dtype.kind == "f" else 1):
        raise DataError(
            f"{path}: {name} must be integers (N,), or floats (N, K), got {member.dtype} of shape {member.shape}"
        )
    if math.prod(member.shape) * member.dtype.itemsize > LARGEST_LABELS:
        raise DataError(f"{path}: {name} claims more than {LARGEST_LABELS} bytes")
    blocks = list(_values(path, file, name))
    labels = np.concatenate(blocks) if blocks else np.zeros(member.shape, member.dtype)
    if labels.dtype.kind != "f" and labels.size and not 0 <= labels.min() <= labels.max() < 1 << 24:
        raise DataError(f"{path}: {name} must count classes from 0, got {labels.min()}..{labels.max()}")
    return labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64)


def _values(path: Path, file: zipfile.ZipFile, name: str) -> Iterator[Array]:
    """Yield the rows of an array, some at a time."""
    with file.open(f"{name}.npy") as stream:
        member = _read_header(f"{path}: {name}", stream)
        yield from read_blocks(f"{path}: {name}", stream, member.shape, member.dtype)


def _header(path: Path, file: zipfile.ZipFile, name: str) -> Member:
    """Return what the header of an array says. Raises DataError where the archive says otherwise, or a bomb is near."""
    info = file.getinfo(f"{name}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a bound
        raise DataError(f"{path}: {name} is packed as numpy.savez does not")
    check_claim(f"{path}: {name}", info.file_size, info.compress_size)
    with file.open(info) as stream:
        member = _read_header(f"{path}: {name}", stream)
    claimed = math.prod(member.shape) * member.dtype.itemsize
    if not 0 <= info.file_size - claimed <= LONGEST_HEADER:
        raise DataError(f"{path}: {name} claims {claimed} bytes, but the archive holds {info.file_size}")
    return member


def _read_header(name: str, stream: Stream) -> Member:
    """Read up to where the numbers begin."""
    try:
        version = npy.read_magic(stream)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran, dtype = read(stream)
    except Exception as error:  # NumPy's reader of headers raises nearly anything for damaged ones
        raise DataError(f"{name}: is no array of NumPy's ({' '.join(str(error).split())[:100]})") from None
    if dtype.hasobject:
        raise DataError(f"{name}: refused: holds pickled objects: save numbers instead")
    if not all(length >= 0 for length in shape):
        raise DataError(f"{name}: claims the shape {shape}")
    if not shape or (fortran and len(shape) > 1):
        raise DataError(
            f"{name}: has {'columns first' if shape else 'no rows'}: save numpy.ascontiguousarray(...) of it"
        )
    return Member(tuple(shape), dtype)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive; what its reading raises becomes a DataError."""
    try:
        with open_regular(path) as raw, zipfile.ZipFile(raw) as file:
            yield file
    except DataError:
        raise
    except Exception as error:  # zipfile raises nearly anything for damaged files
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        what = " ".join(str(error).split())[:100] or type(error).__name__
        raise DataError(f"{path}: truncated, damaged, or no .npz file ({what})") from None

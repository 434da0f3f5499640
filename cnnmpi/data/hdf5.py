"""Reading a data set from an HDF5 file: /train/images uint8 (N, C, H, W), /train/labels, /test/images, /test/labels.

Labels are whole numbers (N,), or floats (N, K) where an image has no single class.

The root's attributes are ``classes``, ``source`` and ``sha256``; names of classes that fill more than an attribute may
hold are the dataset /classes. Images are stored in chunks of about 1 MB with a checksum each (fletcher32),
uncompressed, so that any part is quick to read. Files are read with distrust: what HDF5 can use to reach outside a
file, or to claim more than a file holds, is refused by name before anything is allocated.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cnnmpi.common import hdf5
from cnnmpi.common.arrays import Array, nchw
from cnnmpi.common.files import open_regular
from cnnmpi.common.text import printable
from cnnmpi.data.dataset import (
    SMALLEST_STD,
    DataError,
    Dataset,
    Recorded,
    blocks,
    check_alike,
    check_declared,
    check_labels,
    images_per_block,
    index_digest,
    part_of,
)
from cnnmpi.data.rows import InFile
from cnnmpi.data.stored import FLETCHER32, check_stored

LARGEST = 64 << 30  # bytes of one array
ELSEWHERE = "cannot be read in place: use --data-in memory, or write the file again by python -m cnnmpi.data"
Empty = Callable[[tuple[int, ...], Any], Array]


@dataclass(frozen=True)
class Opened:
    """An open data file: what describes it, and its datasets, whose structure has been checked, but not their bytes."""

    path: Path
    reader: hdf5.Reader
    classes: tuple[str, ...]
    source: str
    sha256: str
    parts: list[tuple[str, h5py.Dataset, h5py.Dataset]]  # "train" and "test", images and labels

    def text(self, name: str) -> str:
        """Return a root attribute that is a text; "" where it is missing. Raises DataError for any other."""
        return _text(self.path, self.reader, name)

    def numbers(self, name: str) -> list[float] | None:
        """Return a root attribute that is a list of numbers; None where it is missing or something else."""
        try:
            value = self.reader.attribute(name)
        except ValueError:
            return None
        return value if isinstance(value, list) and all(isinstance(number, float) for number in value) else None

    def crc32(self, part: str) -> Array | None:
        """Return the recorded CRC-32 of each image of "train" or "test", uint32 (N,); None where it is missing."""
        group = self.reader.root[part]  # kept in a variable: what stands for its links does not keep it open
        if not group.id.links.exists(b"crc32"):
            return None
        stored = _open(self.path, self.reader, f"{part}/crc32")
        count = next(len(images) for name, images, _ in self.parts if name == part)
        if stored.dtype != np.uint32 or stored.shape != (count,):
            raise DataError(f"{self.path}: {part}/crc32 must be uint32 ({count},), got {stored.dtype} {stored.shape}")
        values: Array = stored[()]
        return values

    def described(self) -> dict[str, Any]:
        """Return what ``index_digest`` takes of the attributes. Raises DataError for any of a wrong type."""
        texts = {name: self.text(name) for name in ("fit", "data_sha256")}
        numbers = {name: self.numbers(name) for name in ("mean", "std")}
        return {"classes": self.classes, "source": self.source, "sha256": self.sha256, **texts, **numbers}


def read_hdf5(path: str | Path, *, part: tuple[int, int] = (0, 1), empty: Empty = np.empty) -> Dataset:
    """Read a data set; images come channels-last in memory, labels as int64.

    With ``part=(i, n)`` only the i-th of n contiguous parts of each array is read, into the same part of arrays of the
    full size that ``empty(shape, dtype)`` makes: for train images, train labels, test images, test labels, in this
    order, images as (N, H, W, C). So n processes that share the memory behind ``empty`` read a file together.

    Raises DataError, naming file and dataset, for whatever is damaged, suspicious or does not fit together.
    """
    with opened(path) as file:
        arrays: list[Array] = []
        for name, images, _ in file.parts:
            if math.prod(images.shape) > LARGEST:
                raise DataError(f"{path}: {name}/images are more than {LARGEST} bytes: too many for memory")
        for name, images, labels in file.parts:
            arrays.append(_read_images(images, part, empty))
            arrays.append(_read_labels(f"{path}: {name}", labels, part, empty, len(file.classes)))
        return Dataset(
            arrays[0], arrays[1], arrays[2], arrays[3], file.classes, file.source, file.sha256, file.text("fit")
        )


def read_in_place(path: str | Path) -> Dataset:
    """Return the data set of a file whose images are left there, to be read when they are asked for (``InFile``).

    Labels are read, and compared with what is recorded. Raises DataError as read_hdf5 does, and NotInPlace for images
    that cannot be read where they lie.
    """
    with opened(path, in_place=True) as file:
        (train, y_train), (test, y_test) = (_in_place(file, *part) for part in file.parts)
        dataset = Dataset(train, y_train, test, y_test, file.classes, file.source, file.sha256, file.text("fit"))
        recorded = _recorded(file, [(images.shape, labels) for images, labels in ((train, y_train), (test, y_test))])
        return dataclasses.replace(dataset, recorded=recorded)


def declared_size(path: str | Path) -> int:
    """Return how many bytes the images of a data file take in memory, as it declares them. Raises DataError."""
    with _opened(Path(path)) as reader:
        return sum(math.prod(_find(Path(path), reader, f"{name}/images").shape) for name in ("train", "test"))


def recorded_digest(path: str | Path) -> str:
    """Return the digest of the content that a file was written with; "" where it says none. Raises DataError."""
    with _opened(Path(path)) as reader:
        return _text(Path(path), reader, "data_sha256")


def _text(path: Path, reader: hdf5.Reader, name: str) -> str:
    try:
        value = reader.attribute(name, heap=True)
    except ValueError as error:
        raise DataError(f"{path}: refused: {error}") from None
    if not isinstance(value, str | None):
        raise DataError(f"{path}: the attribute {name} must be a text")
    return value or ""


class NotInPlace(DataError):  # noqa: N818 - it says what the data are
    """Images that cannot be read where they lie in their file."""


def _in_place(file: Opened, name: str, images: h5py.Dataset, labels: h5py.Dataset) -> tuple[InFile, Array]:
    """Return the images of a part, which stay in the file, and its labels."""
    chunks = images.chunks or images.shape
    if images.chunks:
        starts = np.zeros(-(-len(images) // chunks[0]), np.int64)

        def note(chunk: Any) -> None:
            starts[chunk.chunk_offset[0] // chunks[0]] = chunk.byte_offset

        images.id.chunk_iter(note)
    else:
        starts = np.array([images.id.get_offset()], np.int64)
    crc32 = file.crc32(name)
    rows = InFile(file.path, images.shape, starts, chunks[0], crc32)
    for row in (0, len(images) - 1) if crc32 is None else ():  # that the file is laid out as was thought
        if not np.array_equal(rows[row : row + 1][0], images[row]):
            raise NotInPlace(f"{file.path}: {name}/images {ELSEWHERE}")
    return rows, _read_labels(f"{file.path}: {name}", labels, (0, 1), np.empty, len(file.classes))


def _recorded(file: Opened, parts: list[tuple[tuple[int, ...], Array]]) -> Recorded | None:
    """Return what is recorded of the content; None in a file of another program, or of an earlier version.

    Raises DataError where labels, names or checksums are not what was recorded with it.
    """
    index_sha256, described, channels = file.text("index_sha256"), file.described(), parts[0][0][1]
    crc32 = [file.crc32(name) for name, _, _ in file.parts]
    if not (index_sha256 and described["data_sha256"]) or any(sums is None for sums in crc32):
        return None
    indexed = [(shape, labels, sums) for (shape, labels), sums in zip(parts, crc32, strict=True) if sums is not None]
    mean, std = described["mean"] or [], described["std"] or []
    right = len(mean) == len(std) == channels and np.isfinite([*mean, *std]).all() and min(std) >= SMALLEST_STD
    if not right or index_digest(described, indexed) != index_sha256:
        raise DataError(
            f"{file.path}: attributes, labels or checksums are not what was written: python -m cnnmpi.data verify"
        )
    return Recorded(described["data_sha256"], tuple(mean), tuple(std))


@contextlib.contextmanager
def opened(path: str | Path, in_place: bool = False) -> Iterator[Opened]:
    """Open a data file: everything is checked that can be before anything is allocated.

    Raises DataError, naming file and dataset; what reading raises within the ``with`` becomes one, too. With
    ``in_place``, NotInPlace for images that cannot be read where they lie: before their bytes are looked at.
    """
    path = Path(path)
    with _opened(path) as reader:
        classes, source, sha256 = _descriptions(path, reader)
        parts = []
        for name in ("train", "test"):
            images = _open(path, reader, f"{name}/images", in_place, math.inf)
            labels = _open(path, reader, f"{name}/labels")
            check_declared(f"{path}: {name}", images, labels, len(classes))
            parts.append((name, images, labels))
        check_alike(str(path), parts)
        yield Opened(path, reader, classes, source, sha256, parts)


def is_hdf5(path: Path) -> bool:
    """Return whether the file at ``path`` begins as HDF5 does, whatever it is called."""
    try:
        with path.open("rb", buffering=0) as file:
            return hdf5.find_signature(_reading(file), os.fstat(file.fileno()).st_size) is not None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def read_descriptions(path: str | Path) -> tuple[tuple[str, ...], str, str]:
    """Return the names of the classes, the source, and the sha256 of the archive that a file was made from, or ""."""
    with _opened(Path(path)) as reader:
        return _descriptions(Path(path), reader)


def _read_images(images: h5py.Dataset, part: tuple[int, int], empty: Empty) -> Array:
    N, C, H, W = images.shape
    array = empty((N, H, W, C), np.dtype(np.uint8))
    mine = part_of(N, *part)
    chunk = images.chunks[0] if images.chunks else 1
    for block in blocks(mine.start, mine.stop, max(1, images_per_block(images.shape) // chunk) * chunk):
        array[block] = images[block].transpose(0, 2, 3, 1)
    return nchw(array)


def _read_labels(name: str, labels: h5py.Dataset, part: tuple[int, int], empty: Empty, classes: int) -> Array:
    array = empty(labels.shape, np.dtype(np.int64 if len(labels.shape) == 1 else np.float32))
    mine = part_of(len(array), *part)
    values = labels[mine]
    check_labels(name, values, classes)
    array[mine] = values
    return array


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[hdf5.Reader]:
    """Open for reading; whatever HDF5 raises, then or later, becomes a DataError."""
    try:
        with open_regular(path) as raw:
            read, size = _reading(raw), os.fstat(raw.fileno()).st_size
            if _written_here(path):
                raise DataError(f"{path}: is open for writing elsewhere in this program: close it first")
            if hdf5.find_signature(read, size) is None:
                raise DataError(f"{path}: is no HDF5 file, or damaged in its first bytes")
            # by way of Python's file: libhdf5 would refuse a path that is open in this process in another manner
            with h5py.File(raw, "r") as file:
                yield hdf5.Reader(file, read, size)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # libhdf5 and h5py report a malformed file by many types
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"{path}: cannot be read: {reason(error)}") from error
        raise DataError(f"{path}: truncated, damaged or not readable HDF5: {reason(error)}") from error


def _reading(raw: Any) -> hdf5.Read:
    return lambda at, count: os.pread(raw.fileno(), count, at)


def _written_here(path: Path) -> bool:
    """Return whether this very process has the file open for writing, by h5py: the disk may not hold all of it yet."""
    for file in h5py.h5f.get_obj_ids(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE):
        with contextlib.suppress(OSError, ValueError):
            if file.get_intent() & h5py.h5f.ACC_RDWR and path.samefile(os.fsdecode(file.name)):
                return True
    return False


def _find(path: Path, reader: hdf5.Reader, name: str) -> h5py.Dataset:
    """Return a dataset that hard links of this very file lead to."""
    node: Any = reader.root
    for component in name.split("/"):
        if not isinstance(node, h5py.Group) or not node.id.links.exists(component.encode()):
            raise DataError(f"{path}: {name} is missing")
        try:
            node = reader.child(node, component)
        except ValueError as error:
            raise DataError(f"{path}: refused: {name} {error}") from None
    if not isinstance(node, h5py.Dataset):
        raise DataError(f"{path}: {name} is not a dataset")
    if node.shape is None:
        raise DataError(f"{path}: {name} is empty")
    return node


def _open(path: Path, reader: hdf5.Reader, name: str, in_place: bool = False, largest: float = LARGEST) -> h5py.Dataset:
    """Open a dataset by way of hard links only, with all its bytes, at most ``largest``, in this very file."""
    node = _find(path, reader, name)
    if in_place and (why := _not_in_place(node)):
        raise NotInPlace(f"{path}: {name} are stored {why}: they {ELSEWHERE}")
    check_stored(f"{path}: refused: {name}", node, reader.size, largest)
    return node


def _not_in_place(images: h5py.Dataset) -> str:
    """Return how images are stored that cannot be read where they lie; "" of others."""
    properties = images.id.get_create_plist()
    if {properties.get_filter(i)[0] for i in range(properties.get_nfilters())} - {FLETCHER32}:
        return "compressed"
    if images.chunks and images.chunks[1:] != images.shape[1:]:
        return "in chunks of parts of images"
    return "among the file's headers" if not images.chunks and images.id.get_offset() is None else ""


def _descriptions(path: Path, reader: hdf5.Reader) -> tuple[tuple[str, ...], str, str]:
    """Return classes, source and sha256; only the first must be there."""
    wrong = f"{path}: the attribute classes must be a list of names"
    try:
        classes = reader.attribute("classes", heap=True)
        source, sha256 = (reader.attribute(name, heap=True) for name in ("source", "sha256"))
    except ValueError as error:
        raise DataError(f"{path}: refused: {error}") from None
    if classes is None and reader.root.id.links.exists(b"classes"):  # more than an attribute holds
        names = _open(path, reader, "classes")
        if names.dtype.kind != "S" or len(names.shape) != 1:
            raise DataError(f'{path}: /classes must be a list of texts of fixed length: numpy.array(..., dtype="S")')
        classes = hdf5.to_python(names[()])
    if classes is None:
        raise DataError(f"{path}: the attribute classes, the list of the classes' names, is missing")
    classes = classes if isinstance(classes, list) else [classes]
    if not classes or not all(isinstance(name, str) for name in classes):
        raise DataError(wrong)
    source, sha256 = printable(path) if source is None else source, "" if sha256 is None else sha256
    if not isinstance(source, str) or not isinstance(sha256, str):
        raise DataError(f"{path}: the attributes source and sha256 must be texts")
    return tuple(classes), source, sha256


def reason(error: Exception) -> str:
    """Return the system's reason if there is one, else HDF5's, on one line."""
    if isinstance(error, OSError) and error.errno:
        return str(error.strerror) if error.filename else os.strerror(error.errno)  # of HDF5, whose words are longer
    return " ".join(str(error).split()) or type(error).__name__

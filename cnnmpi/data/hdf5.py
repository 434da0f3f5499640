"""A data set as an HDF5 file: /train/images uint8 (N, C, H, W), /train/labels, /test/images, /test/labels.

The root's attributes are ``classes``, ``source`` and ``sha256``. Images are stored in chunks of about 1 MB with a
checksum each (fletcher32), uncompressed, so that any part is quick to read. Files are read with distrust: what HDF5 can
use to reach outside a file, or to claim more than a file holds, is refused by name before anything is allocated.
"""

import contextlib
import errno
import math
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cnnmpi.console import printable
from cnnmpi.data.dataset import (
    BLOCK,
    Array,
    DataError,
    Dataset,
    blocks,
    check_declared,
    check_labels,
    check_same_image_shape,
    nchw,
    part_of,
)

LARGEST = 64 << 30  # bytes of one array
LARGEST_CHUNK = 1 << 30
LARGEST_RATIO = 2000  # of declared to stored bytes, where a filter compresses; deflate reaches 1032
Empty = Callable[[tuple[int, ...], Any], Array]


def write_hdf5(path: str | Path, dataset: Dataset) -> None:
    """Write ``dataset`` to ``path``, whole or not at all: beside it first, synced to disk, then renamed.

    Raises DataError for a data set that fails its check, and where the file cannot be written.
    """
    path = Path(path)
    dataset.check(str(path))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(temporary, "w", locking=False) as file:
            _write_part(file, "train", dataset.train_images, dataset.train_labels)
            _write_part(file, "test", dataset.test_images, dataset.test_labels)
            file.attrs["classes"] = list(dataset.classes)
            file.attrs["source"] = dataset.source
            file.attrs["sha256"] = dataset.sha256
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be written: {_reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_hdf5(path: str | Path, *, part: tuple[int, int] = (0, 1), empty: Empty = np.empty) -> Dataset:
    """Read a data set; images come channels-last in memory, labels as int64.

    With ``part=(i, n)`` only the i-th of n contiguous parts of each array is read, into the same part of arrays of the
    full size that ``empty(shape, dtype)`` makes: for train images, train labels, test images, test labels, in this
    order, images as (N, H, W, C). So n processes that share the memory behind ``empty`` read a file together.

    Raises DataError, naming file and dataset, for whatever is damaged, suspicious or does not fit together.
    """
    path = Path(path)
    with _opened(path) as file:
        classes, source, sha256 = _attributes(path, file)
        pairs = []
        for name in ("train", "test"):  # everything is checked before anything is allocated
            images, labels = _open(path, file, f"{name}/images"), _open(path, file, f"{name}/labels")
            check_declared(f"{path}: {name}", images, labels)
            pairs.append((images, labels))
        check_same_image_shape(str(path), pairs[0][0], pairs[1][0])
        arrays: list[Array] = []
        for (images, labels), name in zip(pairs, ("train", "test"), strict=True):
            arrays.append(_read_images(images, part, empty))
            arrays.append(_read_labels(f"{path}: {name}", labels, part, empty, len(classes)))
    return Dataset(arrays[0], arrays[1], arrays[2], arrays[3], classes, source, sha256)


def recorded_sha256(path: str | Path) -> str:
    """Return the sha256 of the archive that the file at ``path`` was made from; "" if it was not."""
    with _opened(Path(path)) as file:
        return _attributes(Path(path), file)[2]


def _write_part(file: h5py.File, name: str, images: Array, labels: Array) -> None:
    N, C, H, W = images.shape
    chunk = min(N, max(1, (1 << 20) // (C * H * W)))
    stored = file.create_dataset(f"{name}/images", images.shape, np.uint8, chunks=(chunk, C, H, W), fletcher32=True)
    for block in blocks(0, N, chunk):
        stored[block] = np.ascontiguousarray(images[block])
    file.create_dataset(f"{name}/labels", data=labels, chunks=labels.shape, fletcher32=True)


def _read_images(images: h5py.Dataset, part: tuple[int, int], empty: Empty) -> Array:
    N, C, H, W = images.shape
    array = empty((N, H, W, C), np.dtype(np.uint8))
    mine = part_of(N, *part)
    chunk = images.chunks[0] if images.chunks else 1
    for block in blocks(mine.start, mine.stop, max(1, BLOCK // chunk) * chunk):
        array[block] = images[block].transpose(0, 2, 3, 1)
    return nchw(array)


def _read_labels(name: str, labels: h5py.Dataset, part: tuple[int, int], empty: Empty, classes: int) -> Array:
    array = empty(labels.shape, np.dtype(np.int64))
    mine = part_of(len(array), *part)
    values = labels[mine]
    check_labels(name, values, classes)
    array[mine] = values
    return array


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """Open for reading; whatever HDF5 raises, then or later, becomes a DataError."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{path}: truncated, damaged or not readable HDF5: {_reason(error)}") from error


def _open(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    """Open a dataset by way of hard links only, with all its bytes in this very file."""
    node: Any = file
    for component in name.split("/"):
        if not isinstance(node, h5py.Group) or not node.id.links.exists(component.encode()):
            raise DataError(f"{path}: {name} is missing")
        if node.id.links.get_info(component.encode()).type != h5py.h5l.TYPE_HARD:
            raise DataError(f"{path}: refused: {name} is reached by a soft or external link")
        node = node[component]
    if not isinstance(node, h5py.Dataset):
        raise DataError(f"{path}: {name} is not a dataset")
    if node.is_virtual:
        raise DataError(f"{path}: refused: {name} is a virtual dataset, kept in other files")
    if node.external:
        raise DataError(f"{path}: refused: {name} has external storage, in other files")
    if node.shape is None:
        raise DataError(f"{path}: {name} is empty")
    _check_size(f"{path}: refused: {name}", node, path.stat().st_size)
    return node


def _check_size(name: str, node: h5py.Dataset, file_size: int) -> None:
    """Raise DataError if more is declared than is stored, or than anyone would want to allocate."""
    properties = node.id.get_create_plist()
    filters = {properties.get_filter(i)[0] for i in range(properties.get_nfilters())}
    ratio = LARGEST_RATIO if filters - {h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_SHUFFLE} else 1
    declared, stored = math.prod(node.shape) * node.dtype.itemsize, node.id.get_storage_size()
    if stored > file_size:
        raise DataError(f"{name} claims {stored} stored bytes in a file of {file_size}")
    if declared > min(LARGEST, stored * ratio):
        raise DataError(f"{name} declares {declared} bytes but stores {stored}")
    if math.prod(node.chunks or ()) * node.dtype.itemsize > LARGEST_CHUNK:
        raise DataError(f"{name} has chunks of more than {LARGEST_CHUNK} bytes")


def _attributes(path: Path, file: h5py.File) -> tuple[tuple[str, ...], str, str]:
    """Return classes, source and sha256; only the first must be there."""
    if "classes" not in file.attrs:
        raise DataError(f"{path}: the attribute classes, the list of the classes' names, is missing")
    classes = np.atleast_1d(file.attrs["classes"]).tolist()
    if not all(isinstance(name, bytes | str) for name in classes) or not classes:
        raise DataError(f"{path}: the attribute classes must be a list of names")
    source, sha256 = file.attrs.get("source", printable(path)), file.attrs.get("sha256", "")
    return tuple(_text(name) for name in classes), _text(source), _text(sha256)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _reason(error: Exception) -> str:
    """Return the system's reason if there is one, else HDF5's, on one line."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return " ".join(str(error).split())


def _sync(path: Path) -> None:
    """Wait until a file's contents, or a directory's names, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(descriptor)

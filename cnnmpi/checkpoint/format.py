"""The checkpoint format: a text header with a digest in the user block of a plain HDF5 file.

A file is checked in two steps. The digest, compared before libhdf5 sees a byte, finds damage. It does not find malice,
so what HDF5 offers for reaching outside the file or for claiming more memory than it holds is refused one by one, here
and in ``cnnmpi.common.hdf5``.
"""

import hashlib
import io
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cnnmpi.checkpoint.atomic import CheckpointError, write_atomically
from cnnmpi.common import hdf5
from cnnmpi.common.arrays import Array
from cnnmpi.common.files import open_regular

Attribute = str | int | float | bool | list[str] | list[float]

FORMAT_VERSION = 2  # what is read; written is 1 where no attribute needs 2
LARGE = "attributes"  # the group of attributes that are larger than HDF5 allows: since version 2
DTYPES = ("<f4", "<f8", "<i8")
LONGEST_NAME = 1000  # of an array: deeper and longer ones are no names of layers
BLOCK = 512  # the smallest user block that HDF5 knows
TITLE = b"cnnmpi checkpoint\n"
ADVICE = "use the previous checkpoint or copy the file again"
HEADER = re.compile(TITLE + rb"sha256 of the bytes after this block: ([0-9a-f]{64})\nbytes after this block: (\d+)\n+")


def save(
    path: str | Path, arrays: Mapping[str, Array], attributes: Mapping[str, Attribute], *, keep: Path | None = None
) -> None:
    """Write arrays (named as "model/fc.weight") and attributes to ``path``; the file before it moves to ``keep``.

    Arrays are float32, float64 or int64 of any shape and memory layout. The same content gives the same bytes.
    Raises CheckpointError, with the file at ``path`` left as it was, if anything cannot be stored or written.
    """
    file = io.BytesIO()
    try:
        with h5py.File(file, "w", libver="earliest", userblock_size=BLOCK) as root:
            for name in sorted(arrays):
                check_name(name)
                root.create_dataset(name, data=stored(name, arrays[name]))
            values = {name: encoded(name, value) for name, value in sorted(attributes.items())}
            large = {name: value for name, value in values.items() if not hdf5.fits_attribute(name, value)}
            for name, value in large.items():
                check_name(name)
                root.create_dataset(f"{LARGE}/{name}", data=value)
            values["format_version"] = encoded("format_version", 2 if large else 1)
            for name in sorted(values.keys() - large.keys()):
                root.attrs[name] = values[name]
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be stored: {first_line(error)}") from error
    with file.getbuffer() as blob:
        blob[:BLOCK] = header(blob[BLOCK:])
    write_atomically(path, file.getvalue(), keep)


def load(path: str | Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the arrays and attributes of a checkpoint, arrays by their path as "model/fc.weight".

    Raises CheckpointError for a file that is missing, truncated, damaged, foreign, of a newer format, or that contains
    anything but attributes, groups and contiguous arrays of numbers.
    """
    try:
        with open_regular(Path(path)) as file:
            blob = file.read(BLOCK)
            check_title(path, blob)  # before the rest is read, which may be of any size
            blob += file.read()
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read: {reason}; check the path and its rights") from error
    check_header(path, blob)
    try:
        with h5py.File(io.BytesIO(blob), "r") as root:
            reader = hdf5.Reader(root, lambda at, count: blob[at : at + count], len(blob))
            check_version(reader.attribute("format_version"))
            attributes = {name: reader.attribute(name) for name in root.attrs}
            datasets = dict(walk(reader, root, "", {root["/"]}))
            if sum(math.prod(data.shape) * data.dtype.itemsize for data in datasets.values()) > len(blob):
                raise ValueError("its arrays claim more bytes than the file holds; it was not written by cnnmpi")
            arrays = {name: np.asarray(data[()]) for name, data in datasets.items()}
    except Exception as error:  # libhdf5 reports a malformed file by many types
        raise CheckpointError(f"{path}: refused: {first_line(error)}") from error
    if attributes["format_version"] > 1:
        for name in [name for name in arrays if name.startswith(f"{LARGE}/")]:
            attributes[name.removeprefix(f"{LARGE}/")] = hdf5.to_python(arrays.pop(name))
    return arrays, attributes


def weights_digest(arrays: Mapping[str, Array]) -> str:
    """Return the sha256, as 64 hex digits, of names, dtypes, shapes and little-endian C-order bytes in name order.

    Each array adds ``name NUL dtype NUL shape NUL bytes``, such as ``fc.weight NUL <f4 NUL 10,64 NUL ...``.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = stored(name, arrays[name])
        digest.update(f"{name}\0{array.dtype.str}\0{','.join(map(str, array.shape))}\0".encode())
        digest.update(array.data)
    return digest.hexdigest()


def check_name(name: str) -> None:
    """Raise ValueError unless an array may be called so."""
    parts = name.split("/")
    if any(part in ("", ".") for part in parts) or parts[0] == LARGE or len(name) > LONGEST_NAME:
        raise ValueError(
            f"array {name!r:.100}: a name is parts joined by single slashes, none of them '.', not {LARGE!r} first; "
            f"it has at most {LONGEST_NAME} characters"
        )


def stored(name: str, array: Array) -> Array:
    """Return ``array`` in C order and little-endian; raise CheckpointError for a dtype outside the format."""
    array = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    if array.dtype.str not in DTYPES:
        raise CheckpointError(f"array {name!r} is {array.dtype}; convert it to float32, float64 or int64")
    return array


def encoded(name: str, value: Any) -> Any:
    """Return an attribute as HDF5 stores it, as a NumPy value. Texts get a fixed length, in bytes of UTF-8."""
    match value:
        case bool() | np.bool_():
            return np.bool_(value)
        case int() | np.integer():
            return np.int64(value)
        case float() | np.floating():
            return np.float64(value)
        case [*items] if all(isinstance(item, int | float | np.integer | np.floating) for item in items):
            return np.array(items, np.float64)
    if isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)):
        try:
            return hdf5.texts(value)
        except ValueError as error:
            raise ValueError(f"attribute {name!r}: {error}") from None
    raise TypeError(f"attribute {name!r} is {value!r:.60}; it must be text, a number, or a list of either")


def header(contents: bytes | memoryview) -> bytes:
    """Return the text that fills the user block before ``contents``, the rest of the file."""
    text = f"sha256 of the bytes after this block: {hashlib.sha256(contents).hexdigest()}\n"
    return (TITLE + f"{text}bytes after this block: {len(contents)}\n".encode()).ljust(BLOCK, b"\n")


def check_title(path: str | Path, start: bytes) -> None:
    """Raise CheckpointError unless a file that starts like this may be a checkpoint."""
    if start.startswith(hdf5.SIGNATURE):
        raise CheckpointError(f"{path}: is an HDF5 file but not a cnnmpi checkpoint; name a file that cnnmpi wrote")
    if not start or not start.startswith(TITLE[: len(start)]):
        raise CheckpointError(f"{path}: is empty, or not a cnnmpi checkpoint, or damaged in its first line; {ADVICE}")


def check_header(path: str | Path, blob: bytes) -> None:
    """Raise CheckpointError unless the user block is intact and describes exactly the bytes after it."""
    match = HEADER.fullmatch(blob[:BLOCK])
    contents = memoryview(blob)[BLOCK:]
    if len(blob) < BLOCK or (match and len(contents) < int(match[2])):
        raise CheckpointError(f"{path}: is truncated after {len(blob)} bytes; {ADVICE}")
    if not match or len(contents) > int(match[2]) or blob[:BLOCK] != header(contents):
        raise CheckpointError(f"{path}: is damaged, its bytes and its sha256 disagree; {ADVICE}")


def check_version(version: Any) -> None:
    """Raise ValueError unless this program can read format ``version``."""
    if type(version) is not int or version < 1:
        raise ValueError("its attribute format_version is missing or no version; it was not written by cnnmpi")
    if version > FORMAT_VERSION:
        raise ValueError(f"its format version is {version}, this cnnmpi reads up to {FORMAT_VERSION}; update cnnmpi")


def walk(reader: hdf5.Reader, group: Any, prefix: str, seen: set[Any]) -> Iterator[tuple[str, Any]]:
    """Yield (path, dataset) for all below ``group``; raise an error for anything but plain groups and datasets."""
    for part in group:
        name = prefix + part
        if "/" in part or part == "." or len(name) > LONGEST_NAME:
            raise ValueError(f"{name!r:.100} is no name that a checkpoint has")
        try:
            item = reader.child(group, part)
        except ValueError as error:
            raise ValueError(f"{name!r} {error}; a checkpoint holds its own arrays") from None
        if item in seen:
            raise ValueError(f"{name!r} is a second link to the same object; a checkpoint has none")
        seen.add(item)
        if isinstance(item, h5py.Group):
            yield from walk(reader, item, name + "/", seen)
        else:
            check_dataset(name, item)
            yield name, item


def check_dataset(name: str, item: Any) -> None:
    """Raise an error unless ``item`` is a dataset of numbers, or a large attribute, in one piece."""
    if not isinstance(item, h5py.Dataset):
        raise TypeError(f"{name!r} is neither a group nor a dataset; it was not written by cnnmpi")
    if item.id.get_create_plist().get_layout() != h5py.h5d.CONTIGUOUS:
        raise ValueError(f"{name!r} is chunked, compressed or compact; a checkpoint is contiguous")
    large = name.startswith(f"{LARGE}/") and item.dtype.kind == "S" and len(item.shape or ()) <= 1
    if item.shape is None or not (item.dtype.str in DTYPES or large):
        raise ValueError(f"{name!r} holds {item.dtype!s:.60}; a checkpoint holds float32, float64 and int64 arrays")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text: messages are one line each."""
    return (str(error).splitlines() or [type(error).__name__])[0]

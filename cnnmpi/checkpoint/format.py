"""The checkpoint format: a text header with a digest in the user block of a plain HDF5 file.

A file is checked in two steps. The digest, compared before libhdf5 sees a byte, finds damage. It does not find malice,
so what HDF5 offers for reaching outside the file or for claiming more memory than it holds is refused one by one.
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

Array = np.ndarray[Any, np.dtype[Any]]
Attribute = str | int | float | bool | list[str] | list[float]

FORMAT_VERSION = 1
DTYPES = ("<f4", "<f8", "<i8")
BLOCK = 512  # the smallest user block that HDF5 knows
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
TITLE = b"cnnmpi checkpoint\n"
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
                if any(part in ("", ".") for part in name.split("/")):
                    raise ValueError(f"array {name!r}: a name is parts joined by single slashes, none of them '.'")
                root.create_dataset(name, data=stored(name, arrays[name]))
            for name, value in sorted({**attributes, "format_version": FORMAT_VERSION}.items()):
                root.attrs[name] = encoded(name, value)
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
        blob = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; check the path and its rights") from error
    check_header(path, blob)
    try:
        with h5py.File(io.BytesIO(blob), "r") as root:
            attributes = read_attributes(root, len(blob))
            check_version(attributes.get("format_version"))
            datasets = dict(walk(root, "", {root["/"]}))
            if sum(math.prod(data.shape) * data.dtype.itemsize for data in datasets.values()) > len(blob):
                raise ValueError("its arrays claim more bytes than the file holds; it was not written by cnnmpi")
            return {name: np.asarray(data[()]) for name, data in datasets.items()}, attributes
    except Exception as error:  # libhdf5 reports a malformed file by many types
        raise CheckpointError(f"{path}: refused: {first_line(error)}") from error


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


def stored(name: str, array: Array) -> Array:
    """Return ``array`` in C order and little-endian; raise CheckpointError for a dtype outside the format."""
    array = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    if array.dtype.str not in DTYPES:
        raise CheckpointError(f"array {name!r} is {array.dtype}; convert it to float32, float64 or int64")
    return array


def encoded(name: str, value: Any) -> Any:
    """Return an attribute as HDF5 stores it. Texts get a fixed length, in bytes of UTF-8: see read_attributes."""
    match value:
        case bool() | np.bool_():
            return np.bool_(value)
        case int() | np.integer():
            return np.int64(value)
        case float() | np.floating():
            return np.float64(value)
        case [*items] if all(isinstance(item, int | float | np.integer | np.floating) for item in items):
            return np.array(items, np.float64)
        case str() if "\0" not in value:
            text = value.encode()
            return np.array(text, h5py.string_dtype("utf-8", max(1, len(text))))
        case [*items] if all(isinstance(item, str) and "\0" not in item for item in items):
            texts = [item.encode() for item in items]
            return np.array(texts, h5py.string_dtype("utf-8", max(1, *map(len, texts))))
    raise TypeError(f"attribute {name!r} is {value!r:.60}; it must be text, a number, or a list of either")


def header(contents: bytes | memoryview) -> bytes:
    """Return the text that fills the user block before ``contents``, the rest of the file."""
    text = f"sha256 of the bytes after this block: {hashlib.sha256(contents).hexdigest()}\n"
    return (TITLE + f"{text}bytes after this block: {len(contents)}\n".encode()).ljust(BLOCK, b"\n")


def check_header(path: str | Path, blob: bytes) -> None:
    """Raise CheckpointError unless the user block is intact and describes exactly the bytes after it."""
    advice = "use the previous checkpoint or copy the file again"
    if blob.startswith(HDF5_SIGNATURE):
        raise CheckpointError(f"{path}: is an HDF5 file but not a cnnmpi checkpoint; name a file that cnnmpi wrote")
    if not blob or not blob.startswith(TITLE[: len(blob)]):
        raise CheckpointError(f"{path}: is empty, or not a cnnmpi checkpoint, or damaged in its first line; {advice}")
    match = HEADER.fullmatch(blob[:BLOCK])
    contents = memoryview(blob)[BLOCK:]
    if len(blob) < BLOCK or (match and len(contents) < int(match[2])):
        raise CheckpointError(f"{path}: is truncated after {len(blob)} bytes; {advice}")
    if not match or len(contents) > int(match[2]) or blob[:BLOCK] != header(contents):
        raise CheckpointError(f"{path}: is damaged, its bytes and its sha256 disagree; {advice}")


def check_version(version: Any) -> None:
    """Raise ValueError unless this program can read format ``version``."""
    if type(version) is not int or version < 1:
        raise ValueError("its attribute format_version is missing or no version; it was not written by cnnmpi")
    if version > FORMAT_VERSION:
        raise ValueError(f"its format version is {version}, this cnnmpi reads up to {FORMAT_VERSION}; update cnnmpi")


def read_attributes(root: Any, limit: int) -> dict[str, Any]:
    """Return the root attributes as plain Python values; raise ValueError for any of another kind.

    Texts of variable length are refused: a list of them can refer to the same bytes many times, and libhdf5 2.0 never
    returns from a malformed heap, in which it keeps them. An attribute claims at most ``limit`` bytes.
    """
    attributes: dict[str, Any] = {}
    for name in root.attrs:
        attribute = root.attrs.get_id(name)
        dtype, shape = attribute.dtype, attribute.shape
        null = attribute.get_space().get_simple_extent_type() == h5py.h5s.NULL
        if null or len(shape) > 1 or dtype.kind not in "Sfiub" or (dtype.kind == "f" and dtype.itemsize > 8):
            raise ValueError(f"attribute {name!r} is neither text, a number, nor a list of either; refused unread")
        if math.prod(shape) * dtype.itemsize > limit:
            raise ValueError(f"attribute {name!r} claims more bytes than the file holds; refused unread")
        value = np.asarray(root.attrs[name])
        attributes[name] = (np.char.decode(value, "utf-8") if dtype.kind == "S" else value).tolist()
    return attributes


def walk(group: Any, prefix: str, seen: set[Any]) -> Iterator[tuple[str, Any]]:
    """Yield (path, dataset) for all below ``group``; raise an error for anything but plain groups and datasets."""
    for part in group:
        name = prefix + part
        if "/" in part or part == "." or not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise ValueError(f"{name!r} is a soft or external link or misnamed; a checkpoint has none")
        item = group[part]
        if item in seen:
            raise ValueError(f"{name!r} is a second link to the same object; a checkpoint has none")
        seen.add(item)
        if isinstance(item, h5py.Group):
            yield from walk(item, name + "/", seen)
        else:
            check_dataset(name, item)
            yield name, item


def check_dataset(name: str, item: Any) -> None:
    """Raise an error unless ``item`` is a dataset of numbers with its bytes in one piece inside this file."""
    if not isinstance(item, h5py.Dataset):
        raise TypeError(f"{name!r} is neither a group nor a dataset; it was not written by cnnmpi")
    layout = item.id.get_create_plist()
    if layout.get_layout() == h5py.h5d.VIRTUAL or layout.get_external_count():
        raise ValueError(f"{name!r} is virtual or keeps its data in another file; a checkpoint holds its own")
    if layout.get_layout() != h5py.h5d.CONTIGUOUS:
        raise ValueError(f"{name!r} is chunked, compressed or compact; a checkpoint is contiguous")
    if item.dtype.str not in DTYPES or item.shape is None:
        raise ValueError(f"{name!r} holds {item.dtype}; a checkpoint holds float32, float64 and int64 arrays")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text: messages are one line each."""
    return (str(error).splitlines() or [type(error).__name__])[0]

"""Reading HDF5 that may come from anyone, with distrust; and texts as both of our file formats store them.

libhdf5 survives most malformed structures, but not all. What it keeps in the file's global heap, texts of variable
length and the sources of virtual datasets, makes it loop for ever where one entry is malformed, and thousands of texts
may refer to one huge entry. So each object's header is looked at here, before libhdf5 opens it, and texts of variable
length are read here, with bounds, from the bytes of the file. The layout of these bytes is described in the "HDF5 File
Format Specification Version 3.0", chapters III.E (global heap) and IV (object headers).

All functions raise ValueError that says what is wrong with the content of the file.
"""

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import h5py
import numpy as np

from cnnmpi.common.arrays import Array

Read = Callable[[int, int], bytes]  # (offset in the file, number of bytes) -> as many of them as there are

SIGNATURE = b"\x89HDF\r\n\x1a\n"
LARGEST_ATTRIBUTE = 60_000  # bytes; libhdf5 ends at 64 KiB with the attribute's name and type
LARGEST_TEXTS = 1 << 27  # bytes of a list of texts
EXTERNAL, LAYOUT, ATTRIBUTE, CONTINUATION = 0x07, 0x08, 0x0C, 0x10  # kinds of messages
VIRTUAL = 3  # a class of layouts


def find_signature(read: Read, size: int) -> int | None:
    """Return where HDF5 begins in a file of ``size`` bytes: at 0, or after a user block of 512, 1024, ... bytes."""
    at = 0
    while at + len(SIGNATURE) <= size:
        if read(at, len(SIGNATURE)) == SIGNATURE:
            return at
        at = max(512, 2 * at)
    return None


class Reader:
    """An open file, with the bytes that it was opened from."""

    def __init__(self, root: h5py.File, read: Read, size: int) -> None:
        self.root, self.size = root, size
        self._base = root.userblock_size  # addresses count from there
        self._read = read
        self._budget = 4 * size  # bytes of headers to look at: objects do not share them, the root's is needed again
        if root.id.get_create_plist().get_sizes() != (8, 8):
            raise ValueError("its addresses or sizes do not have 8 bytes; no common program writes that")

    def child(self, group: h5py.Group, name: str) -> Any:
        """Open what is called ``name`` in ``group``, a group or a dataset with all its bytes in this very file."""
        link = group.id.links.get_info(name.encode())
        if link.type != h5py.h5l.TYPE_HARD:
            raise ValueError("is reached by a soft or external link")
        for kind, body in self._messages(link.u):
            if kind == EXTERNAL:
                raise ValueError("has external storage: it keeps its data in another file")
            if kind == LAYOUT and body[1 if body[0] >= 3 else 2] == VIRTUAL:
                raise ValueError("is a virtual dataset: it keeps its data in other files")
        return group[name]

    def attribute(self, name: str, *, heap: bool = False) -> Any:
        """Return an attribute of the root as str, int, float, bool, or a list of them; None where it is missing.

        Texts of variable length are refused unless ``heap``.
        """
        if name not in self.root.attrs:
            return None
        attribute = self.root.attrs.get_id(name)
        if heap and h5py.check_string_dtype(attribute.dtype) and attribute.dtype.kind == "O":
            return self._texts(name, attribute.shape)
        null = attribute.get_space().get_simple_extent_type() == h5py.h5s.NULL
        if null or len(attribute.shape) > 1 or not plain(attribute.dtype):
            raise ValueError(f"attribute {name!r} is neither text, a number, nor a list of either; refused unread")
        if math.prod(attribute.shape) * attribute.dtype.itemsize > self.size:
            raise ValueError(f"attribute {name!r} claims more bytes than the file holds; refused unread")
        return to_python(np.asarray(self.root.attrs[name]))

    def _texts(self, name: str, shape: tuple[int, ...]) -> str | list[str]:
        """Read an attribute of texts of variable length, of which the file's header holds references to the heap."""
        body = self._attribute_data(name)
        count = math.prod(shape)
        if len(shape) > 1 or len(body) < 16 * count:
            raise ValueError(f"attribute {name!r} is neither a text nor a list of texts")
        heap: dict[int, dict[int, bytes]] = {}  # collections, by their address
        budget = 2 * self.size  # every byte once in a collection, and once in a text
        texts = []
        for size, address, index in struct.iter_unpack("<IQI", body[: 16 * count]):
            if size == 0:
                texts.append("")
                continue
            if address not in heap:
                heap[address], walked = self._collection(address)
                budget -= walked
            budget -= size
            entry = heap[address].get(index, b"")
            if budget < 0 or size > len(entry):
                raise ValueError(f"attribute {name!r} is damaged, or claims more bytes than the file holds")
            texts.append(entry[:size].split(b"\0")[0].decode("utf-8", "replace"))
        return texts if shape else texts[0]

    def _attribute_data(self, name: str) -> bytes:
        """Return what the root's header holds as the value of an attribute."""
        for kind, body in self._messages(h5py.h5o.get_info(self.root.id).addr):
            if kind != ATTRIBUTE:
                continue
            version, _, *sizes = struct.unpack_from("<BBHHH", body)
            at = 9 if version == 3 else 8
            name_size, *others = [-(-size // 8) * 8 for size in sizes] if version == 1 else sizes
            if body[at : at + name_size].split(b"\0")[0] == name.encode():
                return body[at + name_size + sum(others) :]
        raise ValueError(
            f"attribute {name!r} is of variable length and kept in dense storage, which is not read; store it with a "
            f'fixed length: file.attrs["{name}"] = numpy.array(..., dtype="S")'
        )

    def _messages(self, address: int) -> Iterator[tuple[int, bytes]]:
        """Yield (kind, body) of all messages in the header of the object at ``address``."""
        start = self._bytes(address, 16)
        old = start[:4] != b"OHDR"
        if old and start[0] != 1:
            raise ValueError(f"no object's header is at {address}")
        if old:
            blocks, ordered = [(address + 16, int.from_bytes(start[8:12], "little"))], 0
        else:
            flags = start[5]
            at, width = 6 + 16 * (flags >> 5 & 1) + 4 * (flags >> 4 & 1), 1 << (flags & 3)
            size = int.from_bytes(self._bytes(address + at, width), "little")
            blocks, ordered = [(address + at + width, size)], 2 * (flags >> 2 & 1)
        for begin, size in blocks:  # which grows
            self._budget -= size + 8
            if self._budget < 0:
                raise ValueError(f"the object's header at {address} claims more bytes than the file holds")
            block, at = self._bytes(begin, size), 0
            while at + (8 if old else 4 + ordered) <= len(block):
                kind, length = struct.unpack_from("<HH" if old else "<BH", block, at)
                at += 8 if old else 4 + ordered
                body = block[at : at + length]
                at += length
                if len(body) < length:
                    raise ValueError(f"the object's header at {address} is damaged")
                if kind == CONTINUATION and length >= 16:
                    begin, size = struct.unpack_from("<QQ", body)
                    blocks.append((begin, size) if old else (begin + 4, max(size - 8, 0)))  # without OCHK and checksum
                elif length >= 8:
                    yield kind, body

    def _collection(self, address: int) -> tuple[dict[int, bytes], int]:
        """Return the entries of a collection of the global heap by their index, and its size."""
        head = self._bytes(address, 16)
        size = int.from_bytes(head[8:], "little")
        if head[:5] != b"GCOL\1" or not 16 <= size <= self.size:
            raise ValueError(f"no heap of texts is at {address}")
        content, at, entries = self._bytes(address, size), 16, {}
        while at + 16 <= size:
            index, _, length = struct.unpack_from("<HH4xQ", content, at)
            if index == 0:  # free space, up to the end
                break
            at += 16
            if length > size - at:
                raise ValueError(f"the heap of texts at {address} is damaged")
            entries[index] = content[at : at + length]
            at += -(-length // 8) * 8
        return entries, size

    def _bytes(self, address: int, count: int) -> bytes:
        """Return bytes of the file; addresses beyond its end are damage."""
        if self._base + address + count > self.size:
            raise ValueError(f"address {address} lies outside of the file")
        content = self._read(self._base + address, count)
        if len(content) < count:
            raise ValueError("the file became shorter while it was read")
        return content


def plain(dtype: np.dtype[Any]) -> bool:
    """Return whether ``dtype`` is a text of fixed length, a number of up to 8 bytes, or a truth value."""
    return dtype.kind == "S" or (dtype.kind in "fiub" and dtype.itemsize <= 8)


def to_python(value: Array) -> Any:
    """Return texts and numbers as plain Python values."""
    if value.dtype.kind == "S":
        value = np.char.decode(value, "utf-8", "replace")
    return value.tolist()


def texts(value: str | Sequence[str]) -> Array:
    """Return a text, or a list of texts, of fixed length in bytes of UTF-8: padded by NUL to the longest.

    Raises ValueError for what cannot be stored so.
    """
    single = isinstance(value, str)
    items = [value] if isinstance(value, str) else value
    if any("\0" in item for item in items):
        raise ValueError("a text with the character NUL cannot be stored")
    encoded = [item.encode() for item in items]
    longest = max([1, *map(len, encoded)])
    if longest * len(items) > LARGEST_TEXTS:
        raise ValueError(
            f"{len(items)} texts of up to {longest} bytes, each stored as long as the longest, take more than "
            f"{LARGEST_TEXTS} bytes: shorten the longest"
        )
    array = np.array(encoded, h5py.string_dtype("utf-8", longest))
    return array.reshape(()) if single else array


def fits_attribute(name: str, value: Any) -> bool:
    """Return whether HDF5 can hold ``value`` as the attribute ``name``; else it has to be a dataset."""
    return len(name.encode()) + np.asarray(value).nbytes <= LARGEST_ATTRIBUTE

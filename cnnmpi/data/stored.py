"""What a dataset in a stranger's HDF5 file really stores: looked at before anything is allocated."""

import math
import zlib
from typing import Any

import h5py

from cnnmpi.data.dataset import DataError

LARGEST_CHUNK = 1 << 30
LARGEST_RATIO = 2000  # of declared to stored bytes, where a filter compresses; deflate reaches 1032
DEFLATE, SHUFFLE, FLETCHER32, LZF = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, 32000
FILTERS = ((SHUFFLE, DEFLATE, FLETCHER32), (SHUFFLE, LZF, FLETCHER32))  # in one of these orders, each at most once


def check_stored(name: str, node: h5py.Dataset, file_size: int, largest: float) -> None:
    """Raise DataError if more is declared than is stored, or than anyone would want to allocate."""
    properties = node.id.get_create_plist()
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    if not any(filters == [code for code in order if code in filters] for order in FILTERS):
        raise DataError(f"{name} passes through filters that are not read here; h5repack -f GZIP=4 replaces them")
    compressed = DEFLATE in filters or LZF in filters
    declared, stored = math.prod(node.shape) * node.dtype.itemsize, node.id.get_storage_size()
    if stored > file_size:
        raise DataError(f"{name} claims {stored} stored bytes in a file of {file_size}")
    if declared > min(largest, stored * (LARGEST_RATIO if compressed else 1)):
        raise DataError(f"{name} declares {declared} bytes but stores {stored}")
    if node.chunks:
        _check_chunks(name, node, filters)


def _check_chunks(name: str, node: h5py.Dataset, filters: list[int]) -> None:
    """Raise DataError unless every chunk is there, and unpacks to the bytes of a chunk: no less, and no more.

    libhdf5 2.0 can crash on a chunk of no bytes, and inflates one as far as it goes.
    """
    size = math.prod(node.chunks) * node.dtype.itemsize
    if size > LARGEST_CHUNK:
        raise DataError(f"{name} has chunks of more than {LARGEST_CHUNK} bytes")
    chunks: list[Any] = []
    node.id.chunk_iter(chunks.append)
    axes = list(zip(node.shape, node.chunks, strict=True))
    wanted = math.prod(-(-length // step) for length, step in axes)
    places = {
        chunk.chunk_offset
        for chunk in chunks
        if all(at % step == 0 and at < length for at, (length, step) in zip(chunk.chunk_offset, axes, strict=True))
    }
    if len(chunks) != wanted or len(places) != wanted:
        raise DataError(f"{name} holds {len(places)} of {wanted} chunks")
    for chunk in chunks:
        used = [code for i, code in enumerate(filters) if not chunk.filter_mask >> i & 1]
        packed = chunk.size - 4 * (FLETCHER32 in used)
        if DEFLATE in used:
            whole = inflates_to(node.id.read_direct_chunk(chunk.chunk_offset)[1], size)
        elif LZF in used:
            whole = 0 < packed <= size
        else:
            whole = packed == size
        if not whole:
            raise DataError(f"{name} has a chunk at {chunk.chunk_offset} that does not hold its {size} bytes")


def inflates_to(packed: bytes, size: int) -> bool:
    """Return whether ``packed`` begins with a zlib stream of exactly ``size`` bytes; needs little memory."""
    stream, piece = zlib.decompressobj(), 1 << 14  # deflate reaches 1032 times as much
    try:
        for at in range(0, len(packed), piece):
            size -= len(stream.decompress(packed[at : at + piece]))
            if size < 0 or stream.eof:
                break
    except zlib.error:
        return False
    return size == 0 and stream.eof

"""Images that are not one array in memory: rows of a file, read where they are asked for, or some rows of others.

Each stands in the place of an array of images (N, C, H, W): it has a shape, a dtype and a length, and
``images[index]``, for a slice or an array of whole numbers, is an array (n, C, H, W), channels-last in memory.
"""

import itertools
import math
import os
import queue
import threading
import weakref
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from cnnmpi.common.arrays import Array, nchw, nhwc
from cnnmpi.data.dataset import DataError


class InMemory:
    """An array of images (N, C, H, W), of any dtype. Channels-last in memory, it is not copied."""

    def __init__(self, images: Array) -> None:
        self._rows = nhwc(images)
        self.shape: tuple[int, ...] = images.shape
        self.dtype: Any = images.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Array:
        return nchw(self._rows[index])


class InFile:
    """Images uint8 (N, C, H, W) that stay in their file, which may be larger than memory.

    Nothing is kept but what the system caches for all processes of the host. An image whose checksum was recorded is
    compared with it when it is read for the first time. Any number of threads may read.

    Args:
        path: the file.
        shape: (N, C, H, W).
        starts: where in the file each group of ``together`` images begins, int64.
        together: how many images lie one after another.
        crc32: the checksum of each image's bytes, uint32 (N,), or None.

    """

    dtype: Any = np.dtype(np.uint8)

    def __init__(
        self, path: Path, shape: tuple[int, ...], starts: Array, together: int, crc32: Array | None = None
    ) -> None:
        self.path, self.shape, self._starts, self._together, self._crc32 = path, shape, starts, together, crc32
        self._size = math.prod(shape[1:])  # bytes of an image
        self._unread = np.full(shape[0], crc32 is not None)  # whose checksum is still to be compared
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        weakref.finalize(self, os.close, self._file)
        if hasattr(os, "posix_fadvise"):  # the order is random: to read more than is asked for would be in vain
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)

    def __reduce__(self) -> tuple[Any, ...]:
        return InFile, (self.path, self.shape, self._starts, self._together, self._crc32)  # a copy opens it again

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Array:
        rows = np.arange(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index)
        if rows.size and (rows.dtype.kind not in "iu" or not 0 <= rows.min() <= rows.max() < len(self)):
            raise IndexError(f"{self.path}: rows are whole numbers in 0..{len(self) - 1}, got {rows!r:.60}")
        _, C, H, W = self.shape
        planes = np.empty((len(rows), self._size), np.uint8)
        at = self._starts[rows // self._together] + rows % self._together * self._size
        gaps = 1 + np.flatnonzero(np.diff(at) != self._size)
        for first, end in itertools.pairwise([0, *gaps.tolist(), len(rows)]):  # what follows one another, at once
            self._read(planes[first:end], int(at[first]) if end else 0)
        self._compare(rows, planes)
        pixels = np.empty((len(rows), H * W, C), np.uint8)
        for c, plane in enumerate(planes.reshape(len(rows), C, H * W).transpose(1, 0, 2)):
            pixels[:, :, c] = plane  # a quarter of the time that a transposed copy takes
        return nchw(pixels.reshape(len(rows), H, W, C))

    def _read(self, planes: Array, at: int) -> None:
        """Fill ``planes``, which is contiguous, from the file. Raises DataError where it ends, or fails."""
        rest = memoryview(planes.reshape(-1))  # type: ignore[arg-type]
        try:
            while rest:
                count = os.preadv(self._file, [rest], at)
                if count == 0:
                    raise DataError(f"{self.path}: has become shorter while it was in use")
                rest, at = rest[count:], at + count
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read any more: {error.strerror}") from error

    def _compare(self, rows: Array, planes: Array) -> None:
        """Raise DataError for an image that is not what was written. Each is compared once."""
        for index in np.flatnonzero(self._unread[rows]).tolist():
            row = int(rows[index])
            if zlib.crc32(planes[index]) != self._crc32[row]:  # type: ignore[index]
                raise DataError(
                    f"{self.path}: image {row} is not what was written (crc32): python -m cnnmpi.data verify names all"
                )
            self._unread[row] = False


class Selected:
    """Those of ``images`` whose numbers are ``rows``, in this order."""

    def __init__(self, images: Any, rows: Array) -> None:
        self.images, self._rows = as_rows(images), rows
        self.shape: tuple[int, ...] = (len(rows), *images.shape[1:])
        self.dtype: Any = images.dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Array:
        return self.images[self._rows[index]]


Rows = InMemory | InFile | Selected


def as_rows(images: Any) -> Rows:
    """Return ``images`` as something of which rows can be taken."""
    return images if isinstance(images, Rows) else InMemory(images)


class Readers:
    """Threads that call what they are given: daemons, since a disk that never answers must not hold up the end."""

    def __init__(self, count: int) -> None:
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for number in range(count):
            name = f"cnnmpi-read-{number}"
            threading.Thread(target=_call, args=(self._tasks,), name=name, daemon=True).start()
            weakref.finalize(self, self._tasks.put, None)  # ends one of them

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Return what will have the result of ``function(*arguments)``."""
        future: Future[Any] = Future()
        self._tasks.put((future, function, arguments))
        return future


def _call(tasks: "queue.SimpleQueue[Any]") -> None:
    while task := tasks.get():
        future, function, arguments = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # for whoever asks for the result
                future.set_exception(error)
        del task, future, function, arguments  # nothing is held while the thread waits


def reads(images: Rows) -> bool:
    """Return whether taking rows means to wait for a file."""
    return isinstance(images, InFile) or (isinstance(images, Selected) and reads(images.images))


def held_out(labels: Array, fraction: float, random: np.random.Generator) -> tuple[Array, Array]:
    """Return the numbers of the images that stay, and of those that are held out: both ascending.

    Of each class, for ``labels`` (N,), this ``fraction`` is held out, rounded; of all images, for targets (N, K).
    """
    groups: Sequence[Array] = (
        [np.flatnonzero(labels == label) for label in np.unique(labels)]
        if labels.ndim == 1
        else [np.arange(len(labels))]
    )
    out = [random.permutation(group)[: round(fraction * len(group))] for group in groups]
    away = np.zeros(len(labels), bool)
    away[np.concatenate(out)] = True
    return np.flatnonzero(~away), np.flatnonzero(away)

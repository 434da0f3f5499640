"""Blocks of images: convolutions, BatchNorm, ReLU and pools work in pieces that profit from the caches, on threads.

The pieces depend on shapes only, never on the number of threads, and what they return is combined in the order of
the pieces. So the bits of a result do not depend on the number that ``set_threads`` was given.
"""

import contextlib
import ctypes
import functools
import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np

from cnnmpi.common.arrays import Array as Array
from cnnmpi.common.arrays import nchw as nchw
from cnnmpi.common.arrays import nhwc as nhwc
from cnnmpi.machine import one_blas_thread

Item = TypeVar("Item")
Result = TypeVar("Result")

# Of columns, tiles or rows: 2 to 4 MiB were the fastest of 0.75 to 6 MiB on a core with 1 MiB of L2. Smaller ones make
# threads wait for each other: between two operations they need the interpreter's lock, where it has one.
BLOCK_BYTES = 4 << 20
WIDE = 1 << 13  # numbers in a row: NumPy combines one row with many up to 1.5 times as fast as with shorter ones
RUNS = 8  # sums over blocks run on up to this many threads
_pool: ThreadPoolExecutor | None = None
_threads = 1


def set_threads(count: int, callers: int = 1) -> None:
    """Let all ops of this process share ``count`` threads; without this call they use the one that calls them.

    ``callers`` of these threads call ops at the same time; only the rest helps them. BLAS has one thread inside ops,
    and as many as before outside of them (``machine.one_blas_thread``). Raises ValueError for fewer threads than 1.
    """
    global _pool, _threads
    if count < 1:
        raise ValueError(f"set_threads: at least 1 thread is needed, got {count}")
    if _pool is not None:
        _pool.shutdown()
    _threads = math.ceil(count / callers)  # at most, in one op
    _pool = ThreadPoolExecutor(count - callers, thread_name_prefix="cnnmpi-op") if count > callers else None


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep what NumPy frees for the next array, instead of giving it back and faulting it in again.

    Every step makes arrays of the same sizes: this took SimpleCNN's step from 19.6 to 13.9 ms (16 images). It happens
    once, when the first op runs; up to 1 GiB is kept. glibc only, and not where the environment has one of its own
    variables for this.
    """
    if os.environ.keys() & {"MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_"}:
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # mallopt(3)
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(mmap_threshold, 1 << 25)
        mallopt(trim_threshold, 1 << 30)
        mallopt(top_pad, 1 << 26)


def for_each_block(body: Callable[[slice], Result], count: int, bytes_each: float) -> list[Result]:
    """Call ``body`` with slices that cut ``range(count)`` into pieces of about BLOCK_BYTES; results in their order."""
    return _for_each(body, _cut(count, bytes_each))


def sum_over_blocks(body: Callable[[slice], Array], count: int, bytes_each: float) -> Array:
    """Add up what ``body`` returns for slices that cut ``range(count)`` into pieces of about BLOCK_BYTES.

    Runs of neighbouring blocks add up in place, each run on one thread; then the sums of the runs, first to last. So
    ``body`` must return an array that is nobody else's.
    """
    blocks = _cut(count, bytes_each)
    runs = [blocks[len(blocks) * run // RUNS : len(blocks) * (run + 1) // RUNS] for run in range(RUNS)]

    def sum_run(run: list[slice]) -> Array:
        total = body(run[0])
        for block in run[1:]:
            total += body(block)
        return total

    first, *others = _for_each(sum_run, [run for run in runs if run])

    def add_others(rows: slice) -> None:
        for part in others:
            first[rows] += part[rows]

    if others:
        _for_each(add_others, _cut(len(first), (len(others) + 1) * first[:1].nbytes))
    return first


def _cut(count: int, bytes_each: float) -> list[slice]:
    """Cut ``range(count)`` into pieces of at most BLOCK_BYTES, nearly equal ones: a power of 2 of them, or one each."""
    keep_freed_memory()
    most = max(1, int(BLOCK_BYTES // max(bytes_each, 1)))
    pieces = min(1 << (math.ceil(count / most) - 1).bit_length(), count) if count > most else 1
    edges = [count * piece // pieces for piece in range(pieces + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(edges)]


def _for_each(body: Callable[[Item], Result], items: list[Item]) -> list[Result]:
    """Call ``body`` with each item, on all threads; results in the order of the items."""
    return share_out(items, [body] * min(_threads, len(items)), _pool)


def share_out(
    items: Sequence[Item], bodies: Sequence[Callable[[Item], Result]], pool: ThreadPoolExecutor | None
) -> list[Result]:
    """Call a body with each item: the first body on this thread, each other one on a thread of ``pool``.

    Every thread takes the next item when it is done with one. Returns the results in the order of the items, or raises
    what a body raised, once all threads have ended the item that they had.
    """
    if pool is None or len(items) <= 1:
        return [bodies[0](item) for item in items]
    results: list[Any] = [None] * len(items)
    queue = deque(enumerate(items))

    def work(body: Callable[[Item], Result]) -> None:
        try:
            for index, item in _taken_from(queue):
                results[index] = body(item)
        except BaseException:
            queue.clear()  # nobody takes another item
            raise

    helpers = [pool.submit(one_blas_thread()(work), body) for body in bodies[1:]]
    try:
        work(bodies[0])
    finally:
        begun = [helper for helper in helpers if not helper.cancel()]  # for one that has not, nothing is left to do
        wait(begun)
    for helper in begun:
        helper.result()
    return results


def _taken_from(queue: deque[Item]) -> Iterator[Item]:
    """Yield what is taken from the front of ``queue``, on any number of threads, until it is empty."""
    while True:
        try:
            item = queue.popleft()  # an iterator that threads share may give an item twice where there is no GIL
        except IndexError:
            return
        yield item


def pad(x: Array, padding: tuple[int, int], value: float = 0.0) -> Array:
    """Return channels-last ``x`` (n, H, W, C) with a border of ``value``; ``x`` itself where there is none."""
    pH, pW = padding
    if not (pH or pW):
        return x
    n, H, W, C = x.shape
    padded = np.empty((n, H + 2 * pH, W + 2 * pW, C), x.dtype)
    padded[:, :pH], padded[:, pH + H :] = value, value
    padded[:, :, :pW], padded[:, :, pW + W :] = value, value
    padded[:, pH : pH + H, pW : pW + W] = x
    return padded


def wide_rows(x: Array, channels: int) -> Array:
    """View contiguous channels-last ``x`` as rows of equally many positions: as many as can be up to WIDE numbers."""
    positions = x.size // channels
    together = _largest_divisor(positions, math.ceil(WIDE / channels))
    return x.reshape(positions // together, together * channels)


def image_rows(x: Array) -> Array:
    """View (N, C, H, W) or (N, C) as wide_rows of each image: (N, rows, positions * C)."""
    N, C = x.shape[:2]
    positions = math.prod(x.shape[2:])
    together = _largest_divisor(positions, math.ceil(WIDE / C))
    contiguous = nhwc(x) if x.ndim == 4 else np.ascontiguousarray(x)
    return contiguous.reshape(N, positions // together, together * C)


@functools.lru_cache(1024)
def _largest_divisor(number: int, limit: int) -> int:
    return next(n for n in range(limit, 0, -1) if number % n == 0)


def add_bias(y: Array, b: Array) -> None:
    """Add ``b`` (C,) in place to all positions of contiguous ``y`` (n, H, W, C)."""
    rows = wide_rows(y, y.shape[-1])
    rows += np.tile(b, rows.shape[1] // y.shape[-1])


def column_sums(rows: Array) -> Array:
    """Sum (M, C) over its rows, as a matrix product: several times as fast as ``rows.sum(axis=0)`` for small C."""
    total: Array = np.ones(len(rows), rows.dtype) @ rows
    return total

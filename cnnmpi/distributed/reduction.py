"""The sum of the gradients over all shards of all ranks, in floating point or exactly."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from cnnmpi.common.arrays import Array
from cnnmpi.distributed.errors import NotFiniteError
from cnnmpi.distributed.ranks import Ranks


class Reducer:
    """Sums arrays over shards and ranks as float32: fast, but the last bits depend on the number of ranks.

    A rank calls ``add`` for each of its shards, if it has any, then ``reduce`` with all others. Values that are not
    finite, or too large for the sum, raise NotFiniteError on every rank alike.

    Args:
        ranks: who takes part.
        shards: how many shards there are on all ranks together.
        sizes: of the 1-D arrays of a shard.
        names: (name, size) of the consecutive pieces of the first array, to say where a value is bad.

    """

    on_device = False  # whether the first array may be a tensor on a device
    dtype: Any = np.float32
    limit = float(np.finfo(np.float32).max) / 2

    def __init__(self, ranks: Ranks, shards: int, sizes: Sequence[int], names: Sequence[tuple[str, int]] = ()) -> None:
        self.ranks, self.shards, self.sizes, self.names = ranks, shards, list(sizes), list(names)
        # one message: the arrays one after another, then a flag for each shard, 0 where all is well
        self._message = np.zeros(sum(sizes) + shards, self.dtype)
        self._sums = np.empty(sum(sizes))
        self._lock = threading.Lock()
        self._total, self._flags = self._message[: sum(sizes)], self._message[sum(sizes) :]

    def add(self, shard: int, *arrays: Array | None) -> None:
        """Add the arrays of one shard; they are left alone. None adds nothing. Any thread may call."""
        start = 0
        for index, (array, size) in enumerate(zip(arrays, self.sizes, strict=True)):
            total = self._total[start : start + size]
            if array is not None and not self._accumulate(array, total):  # the last array tells where it began
                self._flags[shard] = self._blame(array) if index == 0 else len(self.names) + 1
            start += size

    def reduce(self, step: int = 0) -> list[Array]:
        """Return the sums over all shards of all ranks as float64 arrays, and start anew at zero.

        The arrays are the caller's until the next ``reduce``, which writes into the same memory.
        Raises NotFiniteError naming the step, the shard and the first bad piece of the first array, if others are in
        order, where a value was not finite or beyond ``limit``; the next sum starts at zero all the same.
        """
        self.ranks.sum(self._message)
        self._decode()
        flags = self._flags.copy()
        self._message[...] = 0
        for shard in np.flatnonzero(flags):
            blamed = int(flags[shard]) - 1
            known = blamed < len(self.names)
            where = f"the gradient of {self.names[blamed][0]}" if known else "the loss, a metric or a running statistic"
            message = f"step {step}, shard {shard}: {where} is not finite or beyond {self.limit:.3g}"
            raise NotFiniteError(message, backward=known)
        return np.split(self._sums, np.cumsum(self.sizes)[:-1])

    def _blame(self, gradient: Array) -> int:
        """Return 1 + the index of the named piece that holds the first bad value."""
        return self._piece(int(np.argmin(np.abs(gradient) <= self.limit)))

    def _piece(self, place: int) -> int:
        """Return 1 + the index of the named piece of the first array that holds the number at ``place``."""
        ends = np.cumsum([size for _, size in self.names])
        return 1 + int(np.searchsorted(ends, place, side="right"))

    def _accumulate(self, array: Array, total: Array) -> bool:
        """Add ``array`` to ``total``; return whether all its values were in range."""
        with self._lock:
            total += array
        return bool(np.all(np.abs(array) <= self.limit))

    def _decode(self) -> None:
        """Write the totals of all ranks into the sums."""
        self._sums[...] = self._total


class ExactReducer(Reducer):
    """Sums in 64-bit fixed point with 40 fractional bits: the same bits for any number of ranks and any order.

    Integer sums do not depend on their order, floating-point sums do. Each value is rounded once to a multiple of
    2**-40 (9e-13; a float32 gradient above 7.7e-6 loses nothing), then all arithmetic is exact. Values may reach
    2**22 / shards, about 500,000 with 8 shards.
    """

    dtype = np.int64
    ONE = 2.0**40
    CHUNK = 1 << 16  # values converted at a time: few enough to stay in the caches, many enough not to hurry threads

    def __init__(self, ranks: Ranks, shards: int, sizes: Sequence[int], names: Sequence[tuple[str, int]] = ()) -> None:
        super().__init__(ranks, shards, sizes, names)
        self.limit = 2.0**62 / self.ONE / shards

    def _accumulate(self, array: Array, total: Array) -> bool:
        array = array.astype(np.result_type(array, np.float32), copy=False)  # counts may be integers
        scaled_chunk, whole_chunk = np.empty(self.CHUNK, array.dtype), np.empty(self.CHUNK, np.int64)
        for start in range(0, array.size, self.CHUNK):
            part = array[start : start + self.CHUNK]
            if not max(part.max(), -part.min()) <= self.limit:  # also where one is NaN
                return False
            scaled, whole = scaled_chunk[: part.size], whole_chunk[: part.size]
            np.multiply(part, part.dtype.type(self.ONE), out=scaled)  # by a power of two, so nothing is rounded
            np.rint(scaled, out=scaled)
            np.copyto(whole, scaled, casting="unsafe")
            with self._lock:
                total[start : start + self.CHUNK] += whole
        return True

    def _decode(self) -> None:
        np.multiply(self._total, 1 / self.ONE, out=self._sums)  # a power of two rounds nothing


class DeviceReducer(ExactReducer):
    """An ExactReducer whose first array is a torch tensor on a GPU: rounded and added up there, to the same integers.

    A shard's gradients never leave the device, and nobody waits for it; ``reduce`` copies the sum to the host once.
    """

    on_device = True
    _sum: Any = None  # of the first arrays, int64, on their device
    _bad: Any = None  # for each shard 1 + the place of its first bad value, or 0; there, too

    def add(self, shard: int, *arrays: Any) -> None:
        """Add the arrays of one shard; the first is a tensor. See ``Reducer.add``."""
        first, *others = arrays
        super().add(shard, None, *others)
        if first is None:
            return
        whole, bad = (first * self.ONE).round().long(), ~(first.abs() <= self.limit)
        place = (1 + bad.byte().argmax()) * bad.any()
        with self._lock:
            if self._sum is None:
                self._sum, self._bad = 0 * whole, whole.new_zeros(self.shards)
            self._sum += whole
            self._bad[shard] = place

    def reduce(self, step: int = 0) -> list[Array]:
        """Return the sums, on the host. See ``Reducer.reduce``."""
        if self._sum is not None:
            self._total[: self.sizes[0]] = self._sum.cpu().numpy()
            for shard, place in enumerate(self._bad.tolist()):
                if place and not self._flags[shard]:
                    self._flags[shard] = self._piece(place - 1)
            self._sum[...], self._bad[...] = 0, 0
        return super().reduce(step)

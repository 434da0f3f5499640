"""Batches of a data set, cut into shards: every batch is a pure function of (data, seed, step, shard)."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Literal

import numpy as np

from cnnmpi.common.arrays import Array
from cnnmpi.data.augment import normalize, to_unit
from cnnmpi.data.dataset import part_of
from cnnmpi.data.rows import Readers, as_rows, reads
from cnnmpi.data.transforms import Augment, Draw, Tables, check_sizes, entries
from cnnmpi.sizes import whole

Part = tuple[int, Array, Array]  # an epoch, places in it, and the samples there
READERS = 4  # threads that wait for a disk or a network, each for another part of a batch


class DataLoader:
    """Batches of images ``x`` and labels ``y``, in a new order each epoch.

    ``x`` is uint8 or float32 (N, C, H, W), an array or rows of a file (rows.py); ``y`` whole numbers (N,) or, where an
    image has no single class, floats (N, K). Labels are of ``classes`` classes, or of as many more as the largest one
    says.

    Every sample is in exactly one batch of an epoch; the last batch may be smaller. With ``sample`` "balanced", the N
    places of an epoch are shared out to the classes equally instead, see ``balanced_order``. Iterating yields the
    batches of one epoch, iterating again those of the next. ``batch(step, shard)`` gives any part of any batch
    directly, so a run can begin at any step and needs no state.

    ``augment`` lists what happens to the images: a text such as "flip,crop=4,cutout=8,mixup=0.2", a function of your
    own, or a list of both; transforms.py says what there is and in which order. A function of your own gets the images
    (n, C, H, W), the labels int64 (n,) or float32 (n, K), and ``draw``, of which ``draw("a word")`` is a generator for
    this (seed, step, shard). It returns images of that shape, or these and labels: of the shape they had, or
    probabilities, floats (n, classes). Of pixels (uint8, or float32 in 0..1) it returns uint8 or float32 in 0..1, of
    normalised images float32; for anything else DataError is raised.

    ``mean`` and ``std``, one number for each channel, normalise; without them uint8 images are scaled to [0, 1].
    Raises ValueError for arguments that make no sense.
    """

    def __init__(
        self,
        x: Any,
        y: Array,
        batch_size: int,
        shuffle: bool = True,
        *,
        seed: int = 0,
        shards: int = 1,
        augment: Any = None,
        sample: Literal["all", "balanced"] = "all",
        classes: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if len(x.shape) != 4 or 0 in x.shape or x.dtype not in (np.uint8, np.float32):
            raise ValueError(f"DataLoader: expected uint8 or float32 images (N, C, H, W), got {x.dtype} {x.shape}")
        if y.ndim != {"i": 1, "u": 1, "f": 2}.get(y.dtype.kind) or len(y) != len(x):
            raise ValueError(
                f"DataLoader: expected {len(x)} integer labels, or floats ({len(x)}, K), got {y.dtype} {y.shape}"
            )
        batch_size, shards = whole("DataLoader: batch_size", batch_size), whole("DataLoader: shards", shards)
        if batch_size < 1 or shards < 1:
            raise ValueError(f"DataLoader: batch_size {batch_size} and shards {shards} must be at least 1")
        if sample not in ("all", "balanced") or (sample == "balanced" and not (shuffle and y.ndim == 1)):
            raise ValueError(f"DataLoader: sample {sample!r} must be 'all' or, of shuffled labels (N,), 'balanced'")
        if (mean is None) != (std is None):
            raise ValueError("DataLoader: give both mean and std, or neither")
        try:
            listed = entries(augment, _not_by_name)
            check_sizes(listed, *x.shape[2:])
        except ValueError as error:
            raise ValueError(f"DataLoader: augment: {error}") from None
        self.batch_size, self.shuffle, self.seed, self.shards = batch_size, shuffle, seed, shards
        self.sample, self.mean, self.std = sample, mean, std
        cut = next((at for at, entry in enumerate(listed) if entry.normalised), len(listed))
        self.before, self.after = listed[:cut], listed[cut:]  # normalisation
        self.classes = y.shape[1] if y.ndim == 2 else max(int(y.max()) + 1, classes or 0)
        self.labels = y
        self._x = as_rows(x)  # of a channels-last x, a view: memory shared by processes stays shared
        self._ahead: dict[tuple[int, int | None], tuple[Part, Future[Array]]] = {}  # what prepare() has begun to read
        self._readers = Readers(READERS) if reads(self._x) else None
        self._next_epoch = 0
        self._tables = Tables(seed)
        self._finish(x[:1])  # raises here rather than in the first batch

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return -(-len(self._x) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        first = self._next_epoch * len(self)
        self._next_epoch += 1
        return (self.batch(first + index) for index in range(len(self)))

    def batch(self, step: int, shard: int | None = None) -> tuple[Array, Array]:
        """Return images float32 (n, C, H, W), channels-last in memory, and labels int64 (n,) or float32 (n, K).

        ``step`` counts from the beginning of the run. ``shard`` chooses one of the parts into which np.array_split
        would cut the batch, possibly an empty one; None means the whole batch.
        """
        begun = self._ahead.pop((step, shard), None)
        epoch, places, samples = begun[0] if begun else self._part(step, shard)
        x = begun[1].result() if begun else self._x[samples]
        y = self.labels[samples].astype(np.int64 if self.labels.ndim == 1 else np.float32)
        drawn_for = samples if self.sample == "all" else places  # a sample that comes again is augmented anew
        part = 0 if shard is None else shard + 1
        draw = Draw(self._tables, epoch, step, part, drawn_for, len(self._x), self.classes)
        for transform in self.before:
            x, y = transform(x, y, draw)
        x = self._finish(x)
        for transform in self.after:
            x, y = transform(x, y, draw)
        return x, y

    def prepare(self, step: int, shards: Sequence[int | None]) -> None:
        """Begin to read the images of these parts of a batch, on threads, where they lie in a file: ``batch`` follows.

        What was begun for steps before the one that comes first, and not fetched, is dropped.
        """
        for key in [key for key in self._ahead if not step - 1 <= key[0] <= step]:
            self._ahead.pop(key)[1].cancel()
        if self._readers is not None:
            for shard in shards:
                if (step, shard) not in self._ahead:
                    part = self._part(step, shard)
                    self._ahead[step, shard] = part, self._readers.submit(self._x.__getitem__, part[2])

    def _part(self, step: int, shard: int | None) -> Part:
        """Return the epoch of a step, and of a part of its batch the places in the epoch, and the samples there."""
        if step < 0 or not (shard is None or 0 <= shard < self.shards):
            raise ValueError(f"DataLoader: no batch at step {step}, shard {shard} of {self.shards}")
        epoch, index = divmod(step, len(self))
        places = np.arange(index * self.batch_size, min((index + 1) * self.batch_size, len(self._x)))
        if shard is not None:
            places = places[part_of(len(places), shard, self.shards)]
        return epoch, places, self._tables.of("order", epoch, self._order)[places]

    def _finish(self, x: Array) -> Array:
        if self.mean is None or self.std is None:
            return to_unit(x)
        return normalize(x, self.mean, self.std)

    def _order(self, rng: np.random.Generator) -> Array:
        """Return the samples of an epoch, (N,)."""
        if self.sample == "balanced":
            return balanced_order(self.labels, rng)
        N = len(self._x)
        return rng.permutation(N) if self.shuffle else np.arange(N)


def balanced_order(labels: Array, rng: np.random.Generator) -> Array:
    """Return N samples (N,), int64, of which each class of ``labels`` (N,) has as many, or one more, in random order.

    The samples of a class come equally often, or once more: which ones, and which classes, is drawn.
    """
    N, (present, counts) = len(labels), np.unique(labels, return_counts=True)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])  # of each class
    places = np.full(len(present), N // len(present))
    places[rng.permutation(len(present))[: N % len(present)]] += 1
    chosen = []
    for samples, count in zip(members, places.tolist(), strict=True):
        times, more = divmod(count, len(samples))
        chosen += [np.repeat(samples, times), rng.permutation(samples)[:more]]
    return rng.permutation(np.concatenate(chosen))


def _not_by_name(name: str) -> Augment:
    raise ValueError(f"{name}: give the function itself")

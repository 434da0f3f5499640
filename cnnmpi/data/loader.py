"""Batches of a data set, cut into shards: every batch is a pure function of (data, seed, step, shard)."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cnnmpi.common.arrays import Array, nchw, nhwc
from cnnmpi.data.augment import cutout, normalize, random_crop, random_horizontal_flip, to_unit
from cnnmpi.data.dataset import DataError, part_of
from cnnmpi.rng import generator
from cnnmpi.sizes import whole

Augment = Callable[[Array, np.random.Generator], Array]


class DataLoader:
    """Batches of images ``x`` and labels ``y``, in a new order each epoch.

    ``x`` is uint8 or float32 (N, C, H, W); ``y`` whole numbers (N,) or, where an image has no single class, floats
    (N, K).

    Every sample is in exactly one batch of an epoch; the last batch may be smaller. Iterating yields the batches of one
    epoch, iterating again those of the next. ``batch(step, shard)`` gives any part of any batch directly, so a run can
    begin at any step and needs no state. What happens to a sample (flip, crop, cutout) depends on (seed, epoch, sample)
    only.

    ``augment`` is a function of your own: it gets the images (n, C, H, W), flipped and cropped, of the dtype of ``x``,
    and a generator for this (seed, step, shard); it returns images of that shape, uint8 or float32, or DataError is
    raised.

    ``mean`` and ``std``, one number for each channel, normalise; without them uint8 images are scaled to [0, 1].
    Raises ValueError for arguments that make no sense.
    """

    def __init__(
        self,
        x: Array,
        y: Array,
        batch_size: int,
        shuffle: bool = True,
        *,
        seed: int = 0,
        shards: int = 1,
        flip: bool = False,
        crop_padding: int = 0,
        cutout_size: int = 0,
        augment: Augment | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if x.ndim != 4 or 0 in x.shape or x.dtype not in (np.uint8, np.float32):
            raise ValueError(f"DataLoader: expected uint8 or float32 images (N, C, H, W), got {x.dtype} {x.shape}")
        if y.ndim != {"i": 1, "u": 1, "f": 2}.get(y.dtype.kind) or len(y) != len(x):
            raise ValueError(
                f"DataLoader: expected {len(x)} integer labels, or floats ({len(x)}, K), got {y.dtype} {y.shape}"
            )
        batch_size, shards = whole("DataLoader: batch_size", batch_size), whole("DataLoader: shards", shards)
        crop_padding = whole("DataLoader: crop_padding", crop_padding)
        cutout_size = whole("DataLoader: cutout_size", cutout_size)
        if batch_size < 1 or shards < 1 or crop_padding < 0:
            raise ValueError(
                f"DataLoader: batch_size {batch_size} and shards {shards} must be at least 1, "
                f"crop_padding {crop_padding} at least 0"
            )
        if not 0 <= cutout_size <= min(x.shape[2:]):
            raise ValueError(f"DataLoader: cutout_size {cutout_size} does not fit into images of {x.shape[2:]} pixels")
        if (mean is None) != (std is None):
            raise ValueError("DataLoader: give both mean and std, or neither")
        self.batch_size, self.shuffle, self.seed, self.shards = batch_size, shuffle, seed, shards
        self.flip, self.crop_padding, self.cutout_size, self.mean, self.std = flip, crop_padding, cutout_size, mean, std
        self.augment = augment
        self._x = nhwc(x)  # a view if x is channels-last, so memory shared by processes stays shared
        self._y = y
        self._next_epoch = 0
        self._tables = (0, *self._draw(0))
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
        if step < 0 or not (shard is None or 0 <= shard < self.shards):
            raise ValueError(f"DataLoader: no batch at step {step}, shard {shard} of {self.shards}")
        epoch, index = divmod(step, len(self))
        order, flip, crop, square = self._epoch(epoch)
        samples = order[index * self.batch_size : (index + 1) * self.batch_size]
        if shard is not None:
            samples = samples[part_of(len(samples), shard, self.shards)]
        x = nchw(self._x[samples])
        if flip is not None:
            x = random_horizontal_flip(x, flip[samples])
        if crop is not None:
            top, left = crop[:, samples]
            x = random_crop(x, top, left, self.crop_padding)
        if self.augment is not None and len(samples):
            x = self._augmented(self.augment, x, step, 0 if shard is None else shard + 1)
        x = self._finish(x)
        if square is not None:
            top, left = square[:, samples]
            x = cutout(x, top, left, self.cutout_size)  # after normalisation, so that 0 is the mean colour
        y = self._y[samples]
        return x, y.astype(np.int64 if y.ndim == 1 else np.float32)

    def _augmented(self, augment: Augment, x: Array, step: int, part: int) -> Array:
        result = augment(x, generator(self.seed, "augment", step, part))
        shape, dtype = getattr(result, "shape", ()), getattr(result, "dtype", type(result).__name__)
        if shape != x.shape or dtype not in (np.uint8, np.float32):
            name = getattr(augment, "__qualname__", type(augment).__name__)
            raise DataError(
                f"the augmentation {name} returned {dtype} {shape} for images {x.dtype} {x.shape}; expected uint8, or "
                "float32 in 0..1, of the same shape"
            )
        return result

    def _finish(self, x: Array) -> Array:
        if self.mean is None or self.std is None:
            return to_unit(x)
        return normalize(x, self.mean, self.std)

    def _epoch(self, epoch: int) -> tuple[Array, Array | None, Array | None, Array | None]:
        """Return the order and the draws of an epoch, kept until another epoch is asked for."""
        tables = self._tables  # read once and replaced as a whole, so that threads may share a loader
        if tables[0] != epoch:
            tables = self._tables = (epoch, *self._draw(epoch))
        return tables[1:]

    def _draw(self, epoch: int) -> tuple[Array, Array | None, Array | None, Array | None]:
        (N, H, W, _), p = self._x.shape, self.crop_padding
        order = generator(self.seed, "order", epoch).permutation(N) if self.shuffle else np.arange(N)
        flip = None
        if self.flip:  # at random at first, then by turns: two epochs show both sides of each image (Jordan, 2024)
            flip = (generator(self.seed, "flip").random(N) < 0.5) ^ (epoch % 2 == 1)
        crop = generator(self.seed, "crop", epoch).integers(0, 2 * p + 1, (2, N)) if p else None  # top, left
        square = None
        if self.cutout_size:
            highest = np.array([[H - self.cutout_size], [W - self.cutout_size]])
            square = generator(self.seed, "cutout", epoch).integers(0, highest, (2, N), endpoint=True)  # top, left
        return order, flip, crop, square

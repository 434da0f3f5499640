"""Batches of a data set, cut into shards: every batch is a pure function of (data, seed, step, shard)."""

from collections.abc import Iterator, Sequence

import numpy as np

from cnnmpi.data.augment import cutout, normalize, random_crop, random_horizontal_flip, to_unit
from cnnmpi.data.dataset import Array, nchw, nhwc, part_of
from cnnmpi.rng import generator
from cnnmpi.sizes import whole


class DataLoader:
    """Batches of images ``x`` (N, C, H, W), uint8 or float32, and labels ``y`` (N,), in a new order each epoch.

    Every sample is in exactly one batch of an epoch; the last batch may be smaller. Iterating yields the batches of one
    epoch, iterating again those of the next. ``batch(step, shard)`` gives any part of any batch directly, so a run can
    begin at any step and needs no state. What happens to a sample (flip, crop, cutout) depends on (seed, epoch, sample)
    only.

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
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if x.ndim != 4 or 0 in x.shape or x.dtype not in (np.uint8, np.float32):
            raise ValueError(f"DataLoader: expected uint8 or float32 images (N, C, H, W), got {x.dtype} {x.shape}")
        if y.shape != (len(x),) or y.dtype.kind not in "iu":
            raise ValueError(f"DataLoader: expected {len(x)} integer labels, got {y.dtype} {y.shape}")
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
        """Return images float32 (n, C, H, W), channels-last in memory, and labels int64 (n,).

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
        x = self._finish(x)
        if square is not None:
            top, left = square[:, samples]
            x = cutout(x, top, left, self.cutout_size)  # after normalisation, so that 0 is the mean colour
        return x, self._y[samples].astype(np.int64)

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

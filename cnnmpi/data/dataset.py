"""A data set: images and labels for training and testing, what they are called and where they come from."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnmpi.common.arrays import Array, nchw, nhwc

BLOCK = 3 << 20  # bytes of images handled at a time, so that temporaries stay small
SMALLEST_STD = 1e-3  # a quarter of a grey level; a constant channel is divided by this rather than by 0


class DataError(ValueError):
    """Data that cannot be used; the message is one line that names the file and says what is wrong."""


@dataclass(frozen=True)
class Recorded:
    """What a data file says of its content: its digest, and mean and standard deviation of the training pixels."""

    data_sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images uint8 (N, C, H, W), channels-last in memory, and labels int64 (N,), for training and for testing.

    Where an image has no single class, its "labels" are targets float32 (N, K): a number for each of the K classes.
    Images may lie in a file (``rows.InFile``): then ``images[index]`` reads them.
    """

    train_images: Any
    train_labels: Array
    test_images: Any
    test_labels: Array
    classes: tuple[str, ...]
    source: str  # for people: where the images come from
    sha256: str = ""  # of the archive they were read from, if any
    fit: str = ""  # how pictures of other sizes were fitted, if they were: crop, pad or stretch
    recorded: Recorded | None = None  # by the file that images are read from where they lie

    @classmethod
    def of(cls, arrays: Any, source: str = "arrays") -> "Dataset":
        """Return the data set of ``arrays``: x_train, y_train, x_test, y_test.

        Images are uint8, or floats in 0..1, of which the nearest of 256 levels is taken; y is whole numbers from 0
        (N,), or floats (N, K). Classes are called "0", "1", .... Raises DataError for other arrays.
        """
        try:
            x_train, y_train, x_test, y_test = map(np.asarray, arrays)
        except (TypeError, ValueError):
            given = f"{len(arrays)} of them" if isinstance(arrays, tuple | list) else f"a {type(arrays).__name__}"
            raise DataError(f"{source}: expected four arrays, x_train, y_train, x_test, y_test, got {given}") from None
        images = [to_levels(source, x) for x in (x_train, x_test)]
        images = [nchw(nhwc(x)) if x.ndim == 4 else x for x in images]
        if wrong := [y.dtype for y in (y_train, y_test) if y.dtype.kind not in "biuf"]:
            raise DataError(f"{source}: labels must be whole numbers (N,), or targets floats (N, K), got {wrong[0]}")
        targets = [y.astype(np.float32 if y.dtype.kind == "f" else np.int64) for y in (y_train, y_test)]
        floats = targets[0].ndim == 2
        count = targets[0].shape[1] if floats else 1 + int(max((y.max() for y in targets if y.size), default=0))
        if not floats:
            check_count(source, count, len(y_train) + len(y_test))
        dataset = cls(images[0], targets[0], images[1], targets[1], tuple(map(str, range(max(count, 1)))), source)
        dataset.check(source)
        return dataset

    def check(self, name: str = "data set") -> None:
        """Raise DataError, beginning with ``name``, unless dtypes, shapes, lengths and labels are as they should be."""
        texts = (*self.classes, self.source, self.sha256, self.fit)
        if not self.classes or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{name}: classes must be names, at least one; source, sha256 and fit texts")
        for part, images, labels in self._parts():
            check_declared(f"{name}: {part}", images, labels, len(self.classes))
            if labels.dtype not in (np.int64, np.float32):
                raise DataError(f"{name}: {part} labels must be int64, or float32 (N, K), got {labels.dtype}")
            check_labels(f"{name}: {part}", labels, len(self.classes))
        check_alike(name, self._parts())

    def digest(self) -> str:
        """Return the sha256 of classes, shapes, pixels (N, H, W, C) and labels (little-endian)."""
        return content_digest(self.classes, [(images, labels) for _, images, labels in self._parts()])

    def _parts(self) -> list[tuple[str, Array, Array]]:
        return [("train", self.train_images, self.train_labels), ("test", self.test_images, self.test_labels)]


def to_levels(name: str, images: Array) -> Array:
    """Return ``images`` as uint8: as they are, or of floats in 0..1 the nearest of 256 levels.

    Raises DataError, beginning with ``name``, for others.
    """
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind != "f":
        raise DataError(f"{name}: images must be uint8, or floats in 0..1, got {images.dtype}")
    if not (images.size and images.min() >= 0 and images.max() <= 1):
        raise DataError(f"{name}: images of {images.dtype} must lie in 0..1")
    levels: Array = np.rint(images * 255).astype(np.uint8)
    return levels


def content_digest(classes: Sequence[str], parts: Sequence[tuple[Any, Array]]) -> str:
    """Return the sha256 of a data set's content: what ``Dataset.digest`` says.

    ``parts`` are images (N, C, H, W) and labels for training and for testing; images are an array, or a dataset of an
    open HDF5 file, of which a few are read at a time.
    """
    sha = hashlib.sha256(json.dumps(classes).encode())
    for images, labels in parts:
        sha.update(json.dumps(images.shape).encode())
        for block in blocks(0, len(images), images_per_block(images.shape)):
            sha.update(nhwc(images[block]).data)
        sha.update(little_endian(labels).data)
    return sha.hexdigest()


def index_digest(described: Mapping[str, Any], parts: Sequence[tuple[tuple[int, ...], Array, Array]]) -> str:
    """Return the sha256 that vouches for all that a data file says besides its pixels.

    ``described`` are its attributes: classes, source, sha256, fit ("" if there is none), data_sha256, mean and std.
    ``parts`` are, for training and for testing, the shape of the images (N, C, H, W), the labels, and the CRC-32 of
    each image's bytes as uint32 (N,): who has checked this digest can check any image by itself.
    """
    facts = [described[name] for name in ("classes", "source", "sha256", "fit", "data_sha256", "mean", "std")]
    sha = hashlib.sha256(json.dumps([*facts, *(shape for shape, _, _ in parts)]).encode())
    for _, labels, crc32 in parts:
        sha.update(little_endian(labels).data)
        sha.update(np.ascontiguousarray(crc32, "<u4").data)
    return sha.hexdigest()


def little_endian(labels: Array) -> Array:
    """Return labels as digests take them: whole numbers as int64, floats as float32, lowest byte first."""
    return np.ascontiguousarray(labels, "<f4" if labels.dtype.kind == "f" else "<i8")


def statistics(images: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 ``images`` (N, C, H, W), scaled to [0, 1].

    The sums are sums of integers, so the result is exact up to one rounding: it depends neither on the order of
    the images nor on the machine. A channel that hardly varies gets SMALLEST_STD.
    """
    if images.dtype != np.uint8 or 0 in images.shape:
        raise ValueError(f"statistics: expected at least one uint8 image, got {images.dtype} {images.shape}")
    return mean_and_std(level_counts(images))


def level_counts(images: Array) -> Array:
    """Return how often each channel of uint8 ``images`` (N, C, H, W) has each of its 256 levels: int64 (C, 256)."""
    N, C = images.shape[:2]
    counts = np.zeros((C, 256), np.int64)
    for block in blocks(0, N, images_per_block(images.shape)):
        pixels = nhwc(images[block]).reshape(-1, C)
        for c in range(C):
            counts[c] += np.bincount(pixels[:, c], minlength=256)
    return counts


def mean_and_std(counts: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return what ``statistics`` does, of the ``counts`` (C, 256) of all levels."""
    n = int(counts[0].sum())  # pixels
    levels = np.arange(256)
    sums = [int(levels @ count) for count in counts]
    squares = [int(levels**2 @ count) for count in counts]
    mean = tuple(s / (255 * n) for s in sums)
    std = tuple(math.sqrt((n * q - s * s) / (255 * n) ** 2) for s, q in zip(sums, squares, strict=True))
    return mean, tuple(max(value, SMALLEST_STD) for value in std)


def check_declared(name: str, images: Any, labels: Any, classes: int) -> None:
    """Raise DataError unless dtypes and shapes, of arrays or of what a file declares, fit uint8 images and labels."""
    if images.dtype != np.uint8:
        raise DataError(f"{name} images must be uint8, got {images.dtype}")
    if len(images.shape) != 4:
        raise DataError(f"{name} needs images (N, C, H, W), got {images.shape}")
    if len(labels.shape) != {"i": 1, "u": 1, "f": 2}.get(labels.dtype.kind):
        raise DataError(
            f"{name} labels must be integers (N,), or floats (N, K), got {labels.dtype} of shape {labels.shape}"
        )
    if len(labels.shape) == 2 and labels.shape[1] != classes:
        raise DataError(f"{name} targets must be {classes} for each image, one for each class, got {labels.shape[1]}")
    if 0 in images.shape or 0 in labels.shape:
        raise DataError(f"{name} is empty: images {images.shape}, labels {labels.shape}")
    if images.shape[0] != labels.shape[0]:
        raise DataError(f"{name} has {images.shape[0]} images but {labels.shape[0]} labels")
    _, C, H, W = images.shape
    if W in (1, 3, 4) and C > W and H != W:  # one would train on it, and learn little
        raise DataError(
            f"{name} images must be (N, C, H, W), but {images.shape} looks like (N, H, W, C): transpose them by "
            "images.transpose(0, 3, 1, 2)"
        )


def check_count(name: str, classes: int, images: int) -> None:
    """Raise DataError for many more ``classes`` than images, which labels that are no numbers of classes suggest."""
    if classes > max(1000, images):
        raise DataError(f"{name}: a label of {classes - 1}, with fewer images: number the classes from 0")


def check_labels(name: str, labels: Array, classes: int) -> None:
    """Raise DataError unless all ``labels`` lie in 0..classes - 1, or are finite numbers for each of the classes."""
    if labels.ndim == 2:
        if not np.isfinite(labels).all():
            raise DataError(f"{name} targets must be finite")
    elif len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(f"{name} labels must lie in 0..{classes - 1}, got {labels.min()}..{labels.max()}")


def check_alike(name: str, parts: Sequence[tuple[str, Any, Any]]) -> None:
    """Raise DataError if the images for training and testing differ in channels or size, or the labels in kind."""
    (_, *train), (_, *test) = parts
    sizes = [tuple(images.shape[1:]) for images, _ in (train, test)]
    if sizes[0] != sizes[1]:
        raise DataError(f"{name}: train images are {sizes[0]} but test images {sizes[1]}")
    if len(train[1].shape) != len(test[1].shape):
        raise DataError(f"{name}: train and test must both have labels (N,), or both targets (N, K)")


def part_of(count: int, index: int, parts: int) -> slice:
    """Return where the ``index``-th of ``parts`` contiguous parts of ``count`` things lies, as np.array_split cuts."""
    size, larger = divmod(count, parts)
    start = index * size + min(index, larger)
    return slice(start, start + size + (index < larger))


def images_per_block(shape: tuple[int, ...]) -> int:
    """Return how many images of an array (N, C, H, W) of bytes are handled at a time: at least one."""
    return max(1, BLOCK // math.prod(shape[1:]))


def blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    """Cut start..stop into slices of ``size``."""
    return (slice(at, min(at + size, stop)) for at in range(start, stop, size))

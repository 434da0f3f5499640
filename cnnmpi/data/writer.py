"""Writing a data file piece by piece: whole or not at all, and never with more than some megabytes in memory.

What a file is made of is a ``Source``; ``write`` takes its pieces as they come, without knowing how many will follow.
The layout, and what is recorded for readers that trust nobody, is described in docs/checkpoint-format.md.
"""

import array
import io
import math
import zlib
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cnnmpi.common import hdf5
from cnnmpi.common.arrays import Array
from cnnmpi.common.files import replacing
from cnnmpi.data.dataset import (
    DataError,
    Dataset,
    blocks,
    check_alike,
    check_declared,
    check_labels,
    content_digest,
    index_digest,
    level_counts,
    mean_and_std,
)
from cnnmpi.data.hdf5 import reason

PARTS = ("train", "test")
MOST_PIECES = 1000
CHUNK = 1 << 20  # bytes of the images that HDF5 reads, and checks, together

Piece = tuple[str, Array, Array]
"""A part, "train" or "test"; images uint8 (n, C, H, W); labels, integers (n,) or floats (n, K)."""


@dataclass(frozen=True)
class Source:
    """A data set that comes piece by piece. ``pieces`` raises DataError where the data cannot be used."""

    classes: tuple[str, ...]
    title: str  # for people: where the images come from
    pieces: Iterable[Piece]
    sha256: str = ""  # of the archive that they were read from, if any
    fit: str = ""  # how pictures of other sizes were fitted, if they were: crop, pad or stretch


@dataclass(frozen=True)
class Written:
    """What a data file holds: images for training and for testing, and the digest of its content."""

    train: int
    test: int
    data_sha256: str


def write_hdf5(path: str | Path, dataset: Dataset) -> None:
    """Write ``dataset`` to ``path``, whole or not at all: beside it first, synced to disk, then renamed.

    Raises DataError for a data set that fails its check, and where the file cannot be written.
    """
    dataset.check(str(path))
    write(path, source_of(dataset))


def source_of(dataset: Dataset) -> Source:
    """Return a data set in memory as a source of two pieces."""
    pieces = [
        ("train", dataset.train_images, dataset.train_labels),
        ("test", dataset.test_images, dataset.test_labels),
    ]
    return Source(dataset.classes, dataset.source, pieces, dataset.sha256, dataset.fit)


def write(path: str | Path, source: Source) -> Written:
    """Write what ``source`` yields to ``path``, whole or not at all: beside it first, synced to disk, then renamed.

    Raises DataError, and leaves what was at ``path`` before, where the source does, where its pieces do not fit
    together, and where the file cannot be written.
    """
    path, pieces = Path(path), iter(source.pieces)
    try:
        described = {name: hdf5.texts(text) for name, text in _descriptions(source).items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, _Disk(temporary, "xb+") as disk:
            try:
                with h5py.File(disk, "w") as file:
                    for name, value in described.items():
                        if hdf5.fits_attribute(name, value):
                            file.attrs[name] = value
                        else:
                            file[name] = value  # the names of many classes
                    writer = Writer(path, file, source)
                    for piece in pieces:
                        writer.add(*piece)
                        disk.check()
                    return writer.finish()
            finally:
                disk.check()
    except DataError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{path}: cannot be written: {reason(error)}") from error
    finally:
        if isinstance(pieces, Generator):
            pieces.close()  # ends its threads and closes its files


def _descriptions(source: Source) -> dict[str, Any]:
    """Return the texts that stand in a file before its images do."""
    texts = {"classes": source.classes, "source": source.title, "sha256": source.sha256}
    return texts | ({"fit": source.fit} if source.fit else {})


class _Disk(io.FileIO):
    """The file that libhdf5 writes to. A failure is kept, for ``check`` to raise, and libhdf5 told that all is well.

    It cannot close a file that it cannot write to, and crashes when the process ends.
    """

    _failure: OSError | None = None

    def check(self) -> None:
        """Raise what failed first, if anything did."""
        if self._failure is not None:
            raise self._failure

    def write(self, content: Any, /) -> int:
        """Write all of ``content``, unless a write has failed before. Returns its size, whatever became of it."""
        rest = memoryview(content)
        size = rest.nbytes
        try:
            while len(rest) and self._failure is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self._failure = error
        return size

    def truncate(self, size: int | None = None, /) -> int:
        """Make the file as long as ``size``, unless a write has failed before."""
        try:
            if self._failure is None:
                super().truncate(size)
        except OSError as error:
            self._failure = error
        return size or 0


class Writer:
    """Puts pieces into an open HDF5 ``file``, which errors call ``path``; ``finish`` adds what is known at the end."""

    def __init__(self, path: Path, file: h5py.File, source: Source) -> None:
        self._path, self._file, self._source, self._classes = path, file, source, source.classes
        self._parts = {name: _Part(file, name) for name in PARTS}

    def add(self, part: str, images: Array, labels: Array) -> None:
        """Append images uint8 (n, C, H, W) and their labels to "train" or "test".

        Raises DataError for other arrays, and OSError or RuntimeError where they cannot be written.
        """
        name = f"{self._path}: {part}"
        check_declared(name, images, labels, len(self._classes))
        check_labels(name, labels, len(self._classes))
        held = self._parts[part].size
        if held not in (None, images.shape[1:]):
            raise DataError(f"{name} images of {images.shape[1:]} follow others of {held}: all must have one size")
        self._parts[part].add(images, labels)

    def finish(self) -> Written:
        """Write the labels, and what is recorded of the content. Raises DataError where a part is missing or differs.

        The digest of the content begins with the number of images, which is known only now: they are read once more.
        """
        for name, part in self._parts.items():
            if part.size is None:
                raise DataError(f"{self._path}: there are no {name} images")
            part.finish()
        parts = [(name, part.images, part.labels) for name, part in self._parts.items()]
        check_alike(str(self._path), parts)
        data_sha256 = content_digest(self._classes, [(images, labels) for _, images, labels in parts])
        indexed = [(part.images.shape, part.labels, part.crc32) for part in self._parts.values()]
        mean, std = mean_and_std(self._parts["train"].counts)
        texts = {"fit": "", **_descriptions(self._source), "data_sha256": data_sha256}
        as_read = {name: hdf5.to_python(hdf5.texts(text)) for name, text in texts.items()}
        described = {**as_read, "classes": list(self._classes), "mean": mean, "std": std}
        attributes = self._file.attrs
        attributes["data_sha256"] = hdf5.texts(data_sha256)
        attributes["index_sha256"] = hdf5.texts(index_digest(described, indexed))
        attributes["mean"], attributes["std"] = np.array(mean), np.array(std)
        train, test = (len(part.labels) for part in self._parts.values())
        return Written(train, test, data_sha256)


class _Part:
    """The images for training, or those for testing: written in whole chunks; their labels wait in memory."""

    def __init__(self, file: h5py.File, name: str) -> None:
        self._file, self._name = file, name
        self._waiting: list[Array] = []  # images that do not fill a chunk yet
        self._count = 0  # how many these are
        self.images: Any = None  # the dataset, from the first chunk on
        self.size: tuple[int, ...] | None = None  # (C, H, W)
        self.counts = np.zeros((0, 256), np.int64)  # of levels, for each channel
        self._labels: list[Array] = []
        self._crc32 = array.array("I")
        self.labels, self.crc32 = np.zeros(0, np.int64), np.zeros(0, np.uint32)  # of all images, when it is finished

    def add(self, images: Array, labels: Array) -> None:
        if self.size is None:
            self.size = images.shape[1:]
            self.counts = np.zeros((self.size[0], 256), np.int64)
        self._labels.append(np.array(labels, np.float32 if labels.dtype.kind == "f" else np.int64))
        if len(self._labels) > MOST_PIECES:  # an array takes more than the few labels of a piece
            self._labels = [np.concatenate(self._labels)]
        chunk = max(1, CHUNK // math.prod(self.size))
        for block in blocks(0, len(images), chunk):
            pixels = np.array(images[block], order="C")  # a copy: whoever gave them may use the memory again
            self.counts += level_counts(pixels)
            self._crc32.extend(zlib.crc32(image) for image in pixels)
            self._waiting.append(pixels)
            self._count += len(pixels)
            if self._count >= chunk:
                together = np.concatenate(self._waiting)
                self._write(together[:chunk])
                self._waiting = [together[chunk:]]
                self._count -= chunk

    def finish(self) -> None:
        """Write what waits, and the rest that belongs to the part."""
        if self._count:
            self._write(np.concatenate(self._waiting))
            self._waiting, self._count = [], 0
        self.labels, self.crc32 = np.concatenate(self._labels), np.array(self._crc32, np.uint32)
        for name, values in (("labels", self.labels), ("crc32", self.crc32)):
            rows = max(1, CHUNK // values[:1].nbytes)
            chunks = (min(len(values), rows), *values.shape[1:])
            self._file.create_dataset(f"{self._name}/{name}", data=values, chunks=chunks, fletcher32=True)

    def _write(self, images: Array) -> None:
        """Append ``images``: a whole chunk of them or, at the end, fewer."""
        if self.images is None:  # a small part is one chunk, no larger than need be
            self.images = self._file.create_dataset(
                f"{self._name}/images", (0, *images.shape[1:]), np.uint8,
                maxshape=(None, *images.shape[1:]), chunks=images.shape, fletcher32=True,
            )  # fmt: skip
        before = len(self.images)
        self.images.resize(before + len(images), axis=0)
        self.images[before:] = images

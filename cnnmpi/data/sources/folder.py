"""A folder of image files -> images and labels: a folder for each class, or a table that says what each file shows.

Classes, and the files of each, come in the order of their names, so that a folder gives the same data on every file
system. Links to files, and to folders of classes, are followed; links to folders below those are not, for they may lead
in circles. What cannot be read is left out and named, and files that systems put everywhere are not even looked at.
"""

import collections
import csv
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

import numpy as np

from cnnmpi.common.arrays import Array
from cnnmpi.common.text import printable
from cnnmpi.data.dataset import DataError
from cnnmpi.data.images import Fit, read_fitted
from cnnmpi.data.sources.split import drawn_for_test
from cnnmpi.data.writer import CHUNK, Piece, Source
from cnnmpi.machine import usable_cores

TEST_NAMES = ("test", "val")  # the first of them that is there
TEST_SHARE = 0.1  # where the folder has neither
CLUTTER = {"thumbs.db", "desktop.ini", "__macosx"}  # and whatever begins with a dot
LARGEST_TABLE = 1 << 28  # bytes
MOST_TOGETHER = 16  # files that a thread decodes before it hands them over: more would not save time
AHEAD = 2  # such batches in work or waiting, for each thread

Item = TypeVar("Item")
Result = TypeVar("Result")


class Picture(NamedTuple):
    """An image file, and which of the classes it shows."""

    path: Path
    label: int


@dataclass
class Pictures:
    """The image files of a folder, not read yet; ``left_out`` says in a line each what is not used, and why."""

    folder: Path
    classes: tuple[str, ...]
    train: list[Picture]
    test: list[Picture]
    left_out: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.train) + len(self.test)

    def source(
        self,
        height: int,
        width: int,
        how: Fit = "crop",
        channels: int = 3,
        *,
        strict: bool = False,
        advance: Callable[[int], None] = lambda count: None,
    ) -> Source:
        """Return the source of uint8 images (n, ``channels``, ``height``, ``width``), scaled as ``how`` says.

        ``advance`` is told how many files have been read since it was told last. The pieces raise DataError where a
        class has no image that can be read and, if ``strict``, where anything at all is left out.
        """
        title = f"images of {printable(self.folder)}, {height}x{width} by {how}"
        return Source(self.classes, title, self._pieces((height, width), how, channels, strict, advance), fit=how)

    def _pieces(
        self, size: tuple[int, int], how: Fit, channels: int, strict: bool, advance: Callable[[int], None]
    ) -> Iterator[Piece]:
        together = min(MOST_TOGETHER, max(1, CHUNK // (channels * size[0] * size[1])))

        def read(batch: list[Picture]) -> list[tuple[int, Array | DataError]]:
            return [(picture.label, _read(picture.path, channels, size, how)) for picture in batch]

        for part, pictures in (("train", self.train), ("test", self.test)):
            found = np.zeros(len(self.classes), np.int64)
            batches = [pictures[at : at + together] for at in range(0, len(pictures), together)]
            for results in in_order(read, batches):
                images = [pixels for _, pixels in results if not isinstance(pixels, DataError)]
                labels = [label for label, pixels in results if not isinstance(pixels, DataError)]
                self.left_out += [str(error) for _, error in results if isinstance(error, DataError)]
                np.add.at(found, labels, 1)
                if images:
                    yield part, np.stack(images).transpose(0, 3, 1, 2), np.array(labels)
                advance(len(results))
            if part == "train" and 0 in found:
                name = printable(self.classes[int(np.argmin(found))])
                raise DataError(f"{self.folder}: no training image of the class {name} can be read")
        if strict and self.left_out:
            raise DataError(f"{self.folder}: {len(self.left_out)} files cannot be used, and --strict allows for none")


def _read(path: Path, channels: int, size: tuple[int, int], how: Fit) -> Array | DataError:
    try:
        return read_fitted(path, channels, *size, how)
    except DataError as error:
        return error


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int = 0, ahead: int = 0
) -> Iterator[Result]:
    """Yield ``work(item)`` of each item, in their order, computed by ``threads`` threads, ``ahead`` items ahead.

    Unless given, that is a thread for each core, and a few items for each of them.

    Threads, because Pillow lets others run while it decodes and scales: large photographs keep all cores busy. Of
    images as small as CIFAR's nearly all time is Python's own, some 5000 of them a second, with processes as well.
    """
    threads = threads or usable_cores()
    ahead = ahead or AHEAD * threads
    pool = ThreadPoolExecutor(threads)
    waiting: collections.deque[Future[Result]] = collections.deque()
    # each read silences warnings for itself and then restores what was: among threads that holds only if all are silent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


# -- which files -------------------------------------------------------------------------------------------------------


def find_pictures(folder: Path, labels: Path | None = None, test: float | None = None, seed: int = 0) -> Pictures:
    """Return the image files in ``folder`` and their classes.

    Each class has a folder of its name, in ``folder`` itself or, where there are both, in its train/ and in its test/
    or val/. Or the table ``labels``, CSV with a header of path and label, says the class of each file. Where the data
    do not say which images are for testing, the share ``test`` of each class is drawn by ``seed``: 0.1 unless given.

    Raises DataError, in one line, for whatever does not make a data set.
    """
    share = TEST_SHARE if test is None else test
    if not 0 < share < 1:
        raise DataError(f"--test {test}: expected a share of the images, above 0 and below 1")
    found = Pictures(folder, (), [], [])
    if labels is not None:
        files = _from_table(folder, labels)
    else:
        entries = _entries(folder)
        second = next((name for name in TEST_NAMES if entries.get(name)), None)
        if entries.get("train") and second:
            return _from_two_folders(found, entries, second, test)
        files = _from_classes(folder, entries, found.left_out)
    found.classes = _class_names(labels or folder, files)
    for label, name in enumerate(found.classes):
        members = sorted(files[name])
        drawn = drawn_for_test([f"{name}/{member}" for member in members], share, seed)
        for member, tests in zip(members, drawn, strict=True):
            (found.test if tests else found.train).append(Picture(files[name][member], label))
    return found


Files = dict[str, dict[str, Path]]
"""{class: {name of a file, by which it is drawn and sorted: its path}}"""


def _from_two_folders(found: Pictures, entries: dict[str, bool], second: str, test: float | None) -> Pictures:
    """Fill ``found`` from folders for training and for testing, each with a folder for each class."""
    folder = found.folder
    if test is not None:
        raise DataError(f"{folder}: has a folder {second} already: leave --test away")
    found.left_out += [
        f"{folder / name}: not used: neither train nor {second}" for name in entries if name not in ("train", second)
    ]
    parts = [_from_classes(folder / name, _entries(folder / name), found.left_out) for name in ("train", second)]
    found.classes = _class_names(folder / "train", parts[0])
    for name in sorted(parts[0].keys() ^ parts[1].keys()):
        has, lacks = ("train", second) if name in parts[0] else (second, "train")
        raise DataError(f"{folder}: {lacks} has no folder {printable(name)}, as {has} has: both need the same classes")
    for files, pictures in zip(parts, (found.train, found.test), strict=True):
        for label, name in enumerate(found.classes):
            pictures += [Picture(files[name][member], label) for member in sorted(files[name])]
    return found


def _from_classes(folder: Path, entries: dict[str, bool], left_out: list[str]) -> Files:
    """Return the files of a folder whose folders are classes."""
    files: Files = {}
    for name, is_folder in entries.items():
        if not is_folder:
            left_out.append(f"{folder / name}: in no folder of a class")
            continue
        files[name] = files_below(folder / name, left_out)
        if not files[name]:
            raise DataError(f"{folder / name}: the folder of a class holds no files: put images into it, or remove it")
    return files


def files_below(top: Path, left_out: list[str]) -> dict[str, Path]:
    """Return all files below ``top``, by their path from there; a line in ``left_out`` for each folder not entered."""

    def failed(error: OSError) -> None:
        left_out.append(f"{error.filename}: cannot be read: {error.strerror}")

    files = {}
    for where, folders, names in os.walk(top, onerror=failed):
        folders[:] = sorted(name for name in folders if not _is_clutter(name))
        left_out += [
            f"{Path(where, name)}: a link to a folder, which may lead in circles"
            for name in folders
            if Path(where, name).is_symlink()
        ]
        for name in names:
            if not _is_clutter(name):
                path = Path(where, name)
                files[path.relative_to(top).as_posix()] = path
    return files


def _entries(folder: Path) -> dict[str, bool]:
    """Return the names in ``folder`` in their order, and whether each is a folder; by links, too."""
    try:
        entries = {path.name: path.is_dir() for path in folder.iterdir() if not _is_clutter(path.name)}
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return dict(sorted(entries.items()))


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name.lower() in CLUTTER


def _class_names(where: Path, files: Files) -> tuple[str, ...]:
    """Return the classes in the order of their names. Raises DataError for names that make no data set."""
    names = sorted(files)
    for name in names:
        if not _is_text(name):
            raise DataError(f"{where}: the class {printable(name)} has a name that is not valid UTF-8: rename it")
    if len(names) < 2:
        given = f"only {printable(names[0])}" if names else "none"
        raise DataError(f"{where}: expected at least two classes, each a folder with its images inside; found {given}")
    return tuple(names)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_table(folder: Path, table: Path) -> Files:
    """Return the files that a CSV names, whose paths count from ``folder``."""
    files: Files = {}
    seen: set[str] = set()
    for line, path, label in _rows(table):
        if not path or not label:
            raise DataError(f"{table}: line {line}: a path and a label are needed, got {path!r:.60} and {label!r:.60}")
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise DataError(f"{table}: line {line}: {printable(path)} leads outside of {folder}")
        name = PurePosixPath(path).as_posix()
        if name in seen:
            raise DataError(f"{table}: line {line}: {printable(path)} is named a second time")
        seen.add(name)
        files.setdefault(label, {})[name] = folder / name
    return files


def _rows(table: Path) -> Iterator[tuple[int, str, str]]:
    """Yield (line, path, label) of each row of a CSV."""
    try:
        status = table.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_TABLE:
            raise DataError(f"{table}: not a file of at most {LARGEST_TABLE} bytes")
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            if not {"path", "label"} <= set(rows.fieldnames or ()):
                raise DataError(f"{table}: the first line must name the columns path and label")
            for row in rows:
                yield rows.line_num, (row["path"] or "").strip(), (row["label"] or "").strip()
    except DataError:
        raise
    except UnicodeError:
        raise DataError(f"{table}: is not text in UTF-8") from None
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read: {getattr(error, 'strerror', None) or error}") from None

"""Read CIFAR-10 and CIFAR-100 as published: python or binary version, as a tar archive or as the extracted folder.

An archive may come from anywhere, so nothing is extracted and nothing in it is executed: members are read by name, and
the pickles of the python version by a reader of its own (``pickled``). How much an archive may expand to is
bounded. The format is described at https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import gzip
import hashlib
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cnnmpi.common.arrays import Array, nchw, nhwc
from cnnmpi.common.files import open_regular
from cnnmpi.common.text import printable
from cnnmpi.data.dataset import DataError, Dataset
from cnnmpi.data.sources.pickled import read_pickle
from cnnmpi.data.sources.streams import names_in

SHAPE = (3, 32, 32)  # each record: the red, the green and the blue plane, row by row
PIXELS = 3072
LARGEST = 1 << 29  # bytes, unpacked; three times the official ones
LARGEST_HEADER = 1 << 20  # bytes that a name or an extended header may have
MOST_MEMBERS = 10_000
OTHERS = "python -m cnnmpi.data makes data files of folders of images, .npz files and MNIST's"
GZIP = b"\x1f\x8b"
Members = dict[str, bytes]


@dataclass(frozen=True)
class Layout:
    """The files of one published version, and where the label stands in them."""

    title: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str  # the file with the names of the classes
    label: str = "labels"  # python: the key of the labels; the names are under its singular + "_names"
    label_bytes: int = 0  # binary: bytes before the pixels, the last of which is the label; 0 for the python version

    @property
    def files(self) -> tuple[str, ...]:
        """All files that are read, in this order."""
        return (*self.train, *self.test, self.names)


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_BINARY_BATCHES = tuple(f"{batch}.bin" for batch in _BATCHES)
LAYOUTS = (
    Layout("CIFAR-10 python version", "cifar-10-batches-py", _BATCHES, ("test_batch",), "batches.meta"),
    Layout(
        "CIFAR-10 binary version",
        "cifar-10-batches-bin",
        _BINARY_BATCHES,
        ("test_batch.bin",),
        "batches.meta.txt",
        label_bytes=1,
    ),
    Layout("CIFAR-100 python version", "cifar-100-python", ("train",), ("test",), "meta", label="fine_labels"),
    Layout(
        "CIFAR-100 binary version",
        "cifar-100-binary",
        ("train.bin",),
        ("test.bin",),
        "fine_label_names.txt",
        label_bytes=2,  # coarse, fine
    ),
)


def read_archive(path: str | Path) -> Dataset:
    """Read an official archive (.tar.gz, .tar) or its extracted folder; CIFAR-100 with its fine labels.

    Raises DataError, naming the file, for anything damaged, incomplete or suspicious.
    """
    path = Path(path)
    layout, members = _read_members(path)
    read = _read_binary if layout.label_bytes else _read_python
    train, test = (
        [read(f"{path}: {file}", members[file], layout) for file in files] for files in (layout.train, layout.test)
    )
    classes = _class_names(path, members[layout.names], layout)
    dataset = Dataset(*_join(train), *_join(test), classes, layout.title, _sha256(path, members))
    dataset.check(str(path))
    return dataset


def holds_archive(folder: Path) -> bool:
    """Return whether a folder is one that an archive was extracted to, or holds it, be it complete or not."""
    names = {name for layout in LAYOUTS for name in (*layout.files, layout.folder)}
    return any(name in names for name in names_in(folder))


def archive_sha256(path: str | Path) -> str:
    """Return the sha256 of an archive or, for a folder, of the files that would be read, without decoding them."""
    path = Path(path)
    return _sha256(path, _read_members(path)[1] if _is_folder(path) else {})


def _sha256(path: Path, members: Members) -> str:
    sha = hashlib.sha256()
    if _is_folder(path):
        for content in members.values():
            sha.update(content)
        return sha.hexdigest()
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _read_members(path: Path) -> tuple[Layout, Members]:
    """Return the layout that ``path`` has, and the contents of that layout's files in their order."""
    found = _from_folder(path) if _is_folder(path) else _from_tar(path)
    layout = next((layout for layout in LAYOUTS if layout.train[0] in found), None)
    if layout is None:
        raise DataError(f"{path}: holds no CIFAR-10 or CIFAR-100, python or binary version; {OTHERS}")
    missing = [file for file in layout.files if file not in found]
    if missing:
        raise DataError(f"{path}: incomplete {layout.title}: {', '.join(missing)} missing")
    return layout, {file: found[file] for file in layout.files}


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _from_folder(path: Path) -> Members:
    for layout in LAYOUTS:
        for folder in (path, path / layout.folder):
            if (folder / layout.train[0]).is_file():
                files = [file for file in layout.files if (folder / file).is_file()]
                try:
                    for file in files:
                        if (size := (folder / file).stat().st_size) > LARGEST:
                            raise DataError(f"{folder / file}: refused: {size} bytes are more than any official file")
                    return {file: (folder / file).read_bytes() for file in files}
                except OSError as error:
                    raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return {}


class _Bounded:
    """A file of which no more than LARGEST bytes are read or skipped, in small pieces: whatever its headers claim."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, count: int) -> bytes:
        if count > LARGEST_HEADER:
            raise DataError(f"claims a header of {count} bytes")
        self._check(self._file.tell() + count)
        content: bytes = self._file.read(count)
        return content

    def seek(self, position: int) -> int:
        self._check(position)
        at: int = self._file.seek(position)
        return at

    def tell(self) -> int:
        at: int = self._file.tell()
        return at

    def _check(self, position: int) -> None:
        if position > LARGEST + LARGEST_HEADER:
            raise DataError(f"unpacks to more than {LARGEST} bytes, of which the official archives have a third")


def _from_tar(path: Path) -> Members:
    try:
        with open_regular(path) as file:
            packed = file.read(len(GZIP)) == GZIP
            file.seek(0)
            bounded: Any = _Bounded(gzip.GzipFile(fileobj=file) if packed else file)
            with tarfile.open(fileobj=bounded, mode="r:") as tar:
                return _wanted_members(tar)
    except DataError as error:
        raise DataError(f"{path}: refused: {error}") from None
    except Exception as error:  # tarfile, gzip and the others raise nearly anything for damaged files
        if isinstance(error, OSError) and error.errno:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        raise DataError(
            f"{path}: truncated, damaged, or no .tar.gz, .tar or HDF5 at all ({type(error).__name__}); {OTHERS}"
        ) from error


def _wanted_members(tar: tarfile.TarFile) -> Members:
    wanted = {file for layout in LAYOUTS for file in layout.files}
    found: Members = {}
    for count, member in enumerate(tar):
        name, shown = PurePosixPath(member.name), printable(member.name[:100])
        if count >= MOST_MEMBERS:
            raise DataError(f"holds more than {MOST_MEMBERS} members")
        if not (member.isreg() or member.isdir()) or member.issparse():
            raise DataError(f"{shown} is a link or a device, not a file")
        if name.is_absolute() or ".." in name.parts:
            raise DataError(f"{shown} points outside the archive")
        if member.isdir() or name.name not in wanted:
            continue
        if name.name in found:
            raise DataError(f"holds {name.name} twice")
        if member.size > LARGEST:
            raise DataError(f"{shown} claims {member.size} bytes")
        file, pieces = tar.extractfile(member), []
        while piece := file.read(LARGEST_HEADER // 2) if file else b"":
            pieces.append(piece)
        found[name.name] = b"".join(pieces)
    return found


def _read_binary(name: str, content: bytes, layout: Layout) -> tuple[Array, Array]:
    """Return images (n, 3, 32, 32) and labels (n,) of records of label bytes and pixels."""
    record = layout.label_bytes + PIXELS
    if not content or len(content) % record:
        raise DataError(f"{name}: {len(content)} bytes are not a whole number of records of {record} bytes")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return records[:, layout.label_bytes :].reshape(-1, *SHAPE), records[:, layout.label_bytes - 1]


def _read_python(name: str, content: bytes, layout: Layout) -> tuple[Array, Array]:
    """Return images (n, 3, 32, 32) and labels (n,) of a pickled {"data": uint8 (n, 3072), "labels": [...]}."""
    batch = _unpickle(name, content)
    data, labels = batch.get("data"), batch.get(layout.label)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        raise DataError(f"{name}: expected 'data' as a uint8 array of rows of {PIXELS}")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise DataError(f"{name}: expected '{layout.label}' as a list of small integers")
    if len(labels) != len(data):
        raise DataError(f"{name}: {len(data)} images but {len(labels)} labels")
    return data.reshape(-1, *SHAPE), np.array(labels, np.int64)


def _class_names(path: Path, content: bytes, layout: Layout) -> tuple[str, ...]:
    name = f"{path}: {layout.names}"
    if layout.label_bytes:
        names: Any = content.splitlines()
    else:
        names = _unpickle(name, content).get(layout.label.removesuffix("s") + "_names")
    if not isinstance(names, list) or not all(isinstance(text, bytes | str) for text in names):
        raise DataError(f"{name}: holds no names of classes")
    texts = (text.decode("utf-8", "replace") if isinstance(text, bytes) else text for text in names)
    return tuple(text.strip() for text in texts if text.strip())


def _unpickle(name: str, content: bytes) -> dict[str, Any]:
    try:
        loaded = read_pickle(content)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    if not isinstance(loaded, dict):
        raise DataError(f"{name}: expected a pickled dictionary, got {type(loaded).__name__}")
    return {key.decode("utf-8", "replace") if isinstance(key, bytes) else key: loaded[key] for key in loaded}


def _join(batches: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Return all images, channels-last in memory, and all labels as int64."""
    images = np.concatenate([nhwc(images) for images, _ in batches])
    return nchw(images), np.concatenate([labels for _, labels in batches]).astype(np.int64)

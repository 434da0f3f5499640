"""Where the data comes from: a file that is there, an archive that is converted once, or a download."""

import os
from collections.abc import Callable
from pathlib import Path

from cnnmpi.common.arrays import Array
from cnnmpi.data.augment import to_unit
from cnnmpi.data.dataset import DataError, Dataset
from cnnmpi.data.download import DownloadError, download_cifar10
from cnnmpi.data.hdf5 import is_hdf5, read_descriptions, read_hdf5
from cnnmpi.data.sources.archive import LAYOUTS, archive_sha256, holds_archive, read_archive
from cnnmpi.data.sources.arrays import read_arrays
from cnnmpi.data.sources.idx import holds_idx, idx_sha256, read_idx
from cnnmpi.data.sources.streams import files_sha256
from cnnmpi.data.writer import Source, source_of, write

CIFAR10, CIFAR100 = "cifar10.h5", "cifar100.h5"
NPZ = ".npz"
ARCHIVES = (".tar.gz", ".tgz", ".tar")
SUFFIXES = (*ARCHIVES, NPZ)
HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5")
LOCAL = (  # what is used where cifar10.h5 is not there yet: the first of these
    *(f"cifar-10-{version}{suffix}" for version in ("python", "binary") for suffix in ARCHIVES),
    *(layout.folder for layout in LAYOUTS[:2]),
)


def find_data(spec: str, data_dir: str | Path = "data", notify: Callable[[str], None] = print) -> Path | None:
    """Return the HDF5 file that ``--data spec`` means, made if need be; None means the synthetic data.

    - ``auto``: cifar10.h5 in ``data_dir``; else converted from an archive or extracted folder there; else
      downloaded; else (no network, or a folder that cannot be written), with a notice, synthetic.
    - ``cifar10``: the same, but an error where ``auto`` would turn to synthetic data.
    - ``synthetic``: the synthetic data.
    - a path: an HDF5 file as it is; a CIFAR archive or its extracted folder, an .npz file, or a folder with the files
      of MNIST is converted to ``data_dir``/<name>.h5, and again only when its sha256 has changed.

    Raises DataError, one line, for what is missing or damaged, and if ``data_dir`` cannot be written.
    """
    folder = Path(data_dir)
    if spec == "synthetic":
        return None
    if spec not in ("auto", "cifar10"):
        return _from_path(Path(spec), folder, notify)
    target = folder / CIFAR10
    if target.exists():
        _check_cifar10(target, len(read_descriptions(target)[0]))
        return target
    try:
        _check_writable(folder)
        archive = _local_archive(folder) or download_cifar10(folder)
    except (DownloadError, FolderError) as error:
        if spec == "cifar10":
            raise
        line = "!" * 100
        notify(
            f"{line}\nNO CIFAR-10: {error}.\n"
            f"USING SYNTHETIC IMAGES INSTEAD. Accuracies say nothing about CIFAR-10.\n{line}"
        )
        return None
    return _convert(archive, target, notify)


def load_cifar10(data_dir: str | Path = "data") -> tuple[Array, Array, Array, Array]:
    """Return x_train, y_train, x_test, y_test of CIFAR-10, as ``data_dir`` has it or else downloaded to there.

    Images are float32 (N, 3, 32, 32) in [0, 1], channels-last in memory; labels are int64. Raises DataError.
    """
    folder = Path(data_dir)
    if (folder / CIFAR10).exists():
        dataset = read_hdf5(folder / CIFAR10)
        _check_cifar10(folder / CIFAR10, len(dataset.classes))
    else:
        archive = _local_archive(folder)
        if archive is None:
            _check_writable(folder)
            archive = download_cifar10(folder)
        dataset = read_archive(archive)
        _check_cifar10(archive, len(dataset.classes))
    return to_unit(dataset.train_images), dataset.train_labels, to_unit(dataset.test_images), dataset.test_labels


def _from_path(path: Path, folder: Path, notify: Callable[[str], None]) -> Path:
    try:
        present = path.exists()
    except (OSError, ValueError):  # a name that no file can have
        present = False
    if not present:
        raise DataError(
            f"{path}: no such file; expected auto, cifar10, synthetic, or an HDF5 file, archive, .npz file or folder"
        )
    if not path.is_file() and not path.is_dir():
        raise DataError(f"{path}: neither a file nor a folder")
    if path.is_file() and (is_hdf5(path) or path.suffix.lower() in HDF5_SUFFIXES):
        return path  # if it is called HDF5 without being so, its reader says what is wrong
    if path.is_dir() and not holds_idx(path) and not holds_archive(path):
        raise DataError(f"{path}: a folder of images? python -m cnnmpi.data images {path} makes a data file of it")
    target = folder / file_name(path)
    if target.exists():
        recorded = read_descriptions(target)[2]
        if not recorded:
            raise DataError(f"{target}: in the way: it was not made from {path}; move it or pass it instead")
        if recorded == _sha256(path):
            return target
    _check_writable(folder)
    return _convert(path, target, notify)


class FolderError(DataError):
    """The data folder cannot be used."""


def _local_archive(folder: Path) -> Path | None:
    present = {path.name.lower(): path for path in folder.iterdir()} if folder.is_dir() else {}
    return next((present[name] for name in LOCAL if name in present), None)


def file_name(path: Path) -> str:
    """Return what the data file is called that is made from ``path``."""
    name = path.resolve().name
    return next((name[: -len(suffix)] for suffix in SUFFIXES if name.lower().endswith(suffix)), name) + ".h5"


def archive_name(dataset: Dataset) -> str:
    """Return what a converted CIFAR archive is called."""
    return CIFAR100 if "CIFAR-100" in dataset.source else CIFAR10


def check_free(target: Path, title: str) -> None:
    """Raise DataError if a data file was made from another source than the one of this title: it would be lost.

    All archives of CIFAR are one source: their versions hold the same images.
    """
    if not target.exists():
        return
    other = read_descriptions(target)[1]
    if other != title and not all(text.startswith("CIFAR-") for text in (other, title)):
        raise DataError(f"{target}: in the way: it was made from {other}, not from {title}; move it, or name another")


def _check_cifar10(path: Path, classes: int) -> None:
    if classes != 10:
        raise DataError(
            f"{path}: has {classes} classes, CIFAR-10 has ten: give it another name, and pass that to --data"
        )


def _convert(archive: Path, target: Path, notify: Callable[[str], None]) -> Path:
    notify(f"converting {archive} to {target}")
    source = _source(archive)
    check_free(target, source.title)
    if target.name == CIFAR10:
        _check_cifar10(archive, len(source.classes))
    write(target, source)
    return target


def _source(path: Path) -> Source:
    """Return what an archive, an .npz file or a folder with the files of MNIST holds."""
    if path.suffix.lower() == NPZ:
        return read_arrays(path)
    return read_idx(path) if holds_idx(path) else source_of(read_archive(path))


def _sha256(path: Path) -> str:
    """Return the sha256 that a data file records which was made from ``path``."""
    if path.suffix.lower() == NPZ:
        return files_sha256([path])
    return idx_sha256(path) if holds_idx(path) else archive_sha256(path)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"{folder}: the data folder cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FolderError(f"{folder}: the data folder cannot be written")

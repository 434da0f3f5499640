"""Where the data comes from: a file that is there, an archive that is converted once, or a download."""

import os
from collections.abc import Callable
from pathlib import Path

from cnnmpi.data.archive import LAYOUTS, archive_sha256, read_archive
from cnnmpi.data.augment import to_unit
from cnnmpi.data.dataset import Array, DataError
from cnnmpi.data.download import DownloadError, download_cifar10
from cnnmpi.data.hdf5 import read_hdf5, recorded_sha256, write_hdf5

CIFAR10 = "cifar10.h5"
SUFFIXES = (".tar.gz", ".tgz", ".tar")
LOCAL = (  # what is used where cifar10.h5 is not there yet: the first of these
    *(f"cifar-10-{version}{suffix}" for version in ("python", "binary") for suffix in SUFFIXES),
    *(layout.folder for layout in LAYOUTS[:2]),
)


def find_data(spec: str, data_dir: str | Path = "data", notify: Callable[[str], None] = print) -> Path | None:
    """Return the HDF5 file that ``--data spec`` means, made if need be; None means the synthetic data.

    - ``auto``: cifar10.h5 in ``data_dir``; else converted from an archive or extracted folder there; else
      downloaded; else (no network, or a folder that cannot be written), with a notice, synthetic.
    - ``cifar10``: the same, but an error where ``auto`` would turn to synthetic data.
    - ``synthetic``: the synthetic data.
    - a path: an HDF5 file as it is; an archive or extracted folder is converted to ``data_dir``/<name>.h5, and again
      only when its sha256 has changed.

    Raises DataError, one line, for what is missing or damaged, and if ``data_dir`` cannot be written.
    """
    folder = Path(data_dir)
    if spec == "synthetic":
        return None
    if spec not in ("auto", "cifar10"):
        return _from_path(Path(spec), folder, notify)
    target = folder / CIFAR10
    if target.exists():
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
    else:
        archive = _local_archive(folder)
        if archive is None:
            _check_writable(folder)
            archive = download_cifar10(folder)
        dataset = read_archive(archive)
    return to_unit(dataset.train_images), dataset.train_labels, to_unit(dataset.test_images), dataset.test_labels


def _from_path(path: Path, folder: Path, notify: Callable[[str], None]) -> Path:
    if not path.exists():
        raise DataError(f"{path}: no such file; expected auto, cifar10, synthetic, or an HDF5 file, archive or folder")
    if path.suffix in (".h5", ".hdf5") and path.is_file():
        return path
    name = path.resolve().name
    stem = next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)
    target = folder / f"{stem}.h5"
    if target.exists():
        recorded = recorded_sha256(target)
        if not recorded:
            raise DataError(f"{target}: in the way: it was not made from {path}; move it or pass it instead")
        if recorded == archive_sha256(path):
            return target
    _check_writable(folder)
    return _convert(path, target, notify)


class FolderError(DataError):
    """The data folder cannot be used."""


def _local_archive(folder: Path) -> Path | None:
    return next((folder / name for name in LOCAL if (folder / name).exists()), None)


def _convert(archive: Path, target: Path, notify: Callable[[str], None]) -> Path:
    notify(f"converting {archive} to {target}")
    write_hdf5(target, read_archive(archive))
    return target


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"{folder}: the data folder cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FolderError(f"{folder}: the data folder cannot be written")

"""Convert a CIFAR archive to HDF5: ``python -m cnnmpi.data --archive cifar-10-binary.tar.gz --out data/cifar10.h5``."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from cnnmpi.console import command, complain, printable
from cnnmpi.data.dataset import DataError
from cnnmpi.data.find import file_name
from cnnmpi.data.sources.archive import read_archive
from cnnmpi.data.writer import write_hdf5


@dataclass(frozen=True)
class Convert:
    """Convert an official CIFAR-10 or CIFAR-100 archive, python or binary version, to HDF5."""

    archive: Path
    """The archive (.tar.gz or .tar), or the folder that it was extracted to."""
    out: Path | None = None
    """The HDF5 file to write; data/cifar10.h5 or data/cifar100.h5 if not given, as the archive is."""


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns its exit code: 0, or 2 for data that cannot be used."""
    wanted = tyro.cli(Convert, args=argv, prog="cnnmpi.data")
    try:
        dataset = read_archive(wanted.archive)
        out = wanted.out or Path("data") / file_name(dataset)
        write_hdf5(out, dataset)
    except DataError as error:
        complain("cnnmpi.data", error)
        return 2
    print(
        f"{printable(out)}: {printable(dataset.source)}, {len(dataset.train_labels)} train and "
        f"{len(dataset.test_labels)} test images, {len(dataset.classes)} classes, sha256 {dataset.sha256}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Make data files, and look into them.

python -m cnnmpi.data images photos --size 64              a folder of image files for each class
python -m cnnmpi.data images photos --labels labels.csv    or a table that says the class of each
python -m cnnmpi.data arrays mine.npz                      x_train, y_train, x_test, y_test, or x and y
python -m cnnmpi.data idx mnist                            the four files of MNIST and its relatives
python -m cnnmpi.data archive cifar-10-binary.tar.gz       CIFAR-10 and CIFAR-100
python -m cnnmpi.data show data/photos.h5 --sheet sheet.png
python -m cnnmpi.data verify data/*.h5
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cnnmpi.console import command, complain, printable, progress
from cnnmpi.data.dataset import DataError
from cnnmpi.data.find import archive_name, check_free, file_name
from cnnmpi.data.images import Fit
from cnnmpi.data.inspect import describe, make_sheet, verify
from cnnmpi.data.sources.archive import read_archive
from cnnmpi.data.sources.arrays import read_arrays
from cnnmpi.data.sources.folder import Pictures, find_pictures
from cnnmpi.data.sources.idx import read_idx
from cnnmpi.data.writer import Source, source_of, write

PROGRAM = "cnnmpi.data"
LARGEST_SIDE = 4096  # pixels
MOST_LISTED = 50  # files that were left out


@dataclass(frozen=True)
class Archive:
    """Convert an official CIFAR-10 or CIFAR-100 archive, python or binary version."""

    archive: tyro.conf.Positional[Path]
    """The archive (.tar.gz or .tar), or the folder that it was extracted to."""
    out: Path | None = None
    """The HDF5 file to write; data/cifar10.h5 or data/cifar100.h5 if not given, as the archive is."""


@dataclass(frozen=True)
class OldArchive:
    """The call of version 0.1: --archive ARCHIVE."""

    archive: Path
    out: Path | None = None


@dataclass(frozen=True)
class Images:
    """Convert image files of any kind and size: a folder for each class, maybe in train/ and in test/ or val/.

    Files that cannot be read are left out, and listed. Links are followed, but not those to folders below a class's.
    """

    folder: tyro.conf.Positional[Path]
    size: str = "64"
    """Pixels that all images are scaled to: 64, or height and width, such as 48x64."""
    fit: Fit = "crop"
    """What becomes of other proportions: cut to the middle, padded with black, or stretched. predict does the same."""
    channels: Literal[1, 3] = 3
    """3 for colour, 1 for gray."""
    labels: Path | None = None
    """A CSV file with the columns path (counted from FOLDER) and label, instead of a folder for each class."""
    test: float | None = None
    """The share of each class that is drawn for testing, where there is no folder for it; 0.1 if not given."""
    seed: int = 0
    """Chooses another draw. It depends on this and the names of the files alone."""
    strict: bool = False
    """Write nothing if any file has to be left out."""
    out: Path | None = None
    """The HDF5 file to write; data/FOLDER.h5 if not given."""


@dataclass(frozen=True)
class Arrays:
    """Convert an .npz file of NumPy's with x_train, y_train, x_test, y_test, or with x and y.

    Images are uint8, or floats in 0..1, (N, C, H, W), or (N, H, W) if gray; y is whole numbers from 0 (N,), or
    floats (N, K).
    """

    file: tyro.conf.Positional[Path]
    test: float | None = None
    """Of x and y: the share of each class that is drawn for testing; 0.1 if not given."""
    seed: int = 0
    """Chooses another draw."""
    out: Path | None = None
    """The HDF5 file to write; data/FILE.h5 if not given."""


@dataclass(frozen=True)
class Idx:
    """Convert MNIST or a relative: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-..., packed as .gz or not."""

    folder: tyro.conf.Positional[Path]
    out: Path | None = None
    """The HDF5 file to write; data/FOLDER.h5 if not given."""


@dataclass(frozen=True)
class Show:
    """Print what a data file holds: classes and how many images each has, size, statistics, digests."""

    file: tyro.conf.Positional[Path]
    sheet: Path | None = None
    """A picture to draw, such as sheet.png: ten images of each class, beside its name."""


@dataclass(frozen=True)
class Verify:
    """Read every byte of each data file, and compare with what was recorded; the exit code is 1 if any is bad."""

    files: tyro.conf.Positional[tuple[Path, ...]]


Conversion = Archive | Images | Arrays | Idx
Command = (
    Annotated[Archive, tyro.conf.subcommand("archive")]
    | Annotated[Images, tyro.conf.subcommand("images")]
    | Annotated[Arrays, tyro.conf.subcommand("arrays")]
    | Annotated[Idx, tyro.conf.subcommand("idx")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)


@command
def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0, 1 for files that ``verify`` finds bad, or 2 for unusable data."""
    args = sys.argv[1:] if argv is None else argv
    program = f"python -m {PROGRAM}"
    wanted: Conversion | Show | Verify
    if args and args[0].partition("=")[0] in ("--archive", "--out"):
        old = tyro.cli(OldArchive, args=args, prog=program)
        wanted = Archive(old.archive, old.out)
    else:
        wanted = tyro.cli(Command, args=args, prog=program, description="Make data files, and look into them.")
    try:
        if isinstance(wanted, Verify):
            return verify_all(wanted.files)
        check_output(wanted)
        if isinstance(wanted, Show):
            show(wanted)
        else:
            print(convert(wanted))
    except DataError as error:
        complain(PROGRAM, error)
        return 2
    return 0


def check_output(wanted: Conversion | Show) -> None:
    """Raise DataError where what is to be written would replace a file that is named to be read."""
    paths = {name: os.path.realpath(value) for name, value in vars(wanted).items() if isinstance(value, Path)}
    for name in paths.keys() & {"out", "sheet"}:
        if list(paths.values()).count(paths[name]) > 1:
            raise DataError(f"--{name} {getattr(wanted, name)}: is to be read: name another file")


def convert(wanted: Conversion) -> str:
    """Write the data file that is ``wanted``; return a line that says what it holds."""
    if isinstance(wanted, Images):
        height, width = parse_size(wanted.size)
        pictures = find_pictures(wanted.folder, wanted.labels, wanted.test, wanted.seed)
        with listing(pictures), progress(len(pictures), PROGRAM) as advance:
            source = pictures.source(height, width, wanted.fit, wanted.channels, strict=wanted.strict, advance=advance)
            return save(wanted.out, file_name(wanted.folder), source)
    if isinstance(wanted, Arrays):
        return save(wanted.out, file_name(wanted.file), read_arrays(wanted.file, wanted.test, wanted.seed))
    if isinstance(wanted, Idx):
        return save(wanted.out, file_name(wanted.folder), read_idx(wanted.folder))
    dataset = read_archive(wanted.archive)
    return save(wanted.out, archive_name(dataset), source_of(dataset))


def save(out: Path | None, name: str, source: Source) -> str:
    """Write ``source`` to ``out`` or, if none is named, to data/``name``; return a line that says what it holds.

    Raises DataError where data/``name`` was made from something else.
    """
    if out is None:
        out = Path("data") / name
        check_free(out, source.title)
    written = write(out, source)
    digest = f"sha256 {source.sha256}" if source.sha256 else f"data_sha256 {written.data_sha256}"
    return (
        f"{printable(out)}: {printable(source.title)}, {written.train} train and {written.test} test images, "
        f"{len(source.classes)} classes, {digest}"
    )


def parse_size(text: str) -> tuple[int, int]:
    """Return (height, width) of "64" or "48x64". Raises DataError for anything else."""
    match = re.fullmatch(r"(\d{1,4})(?:x(\d{1,4}))?", text)
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not (1 <= height <= LARGEST_SIDE and 1 <= width <= LARGEST_SIDE):
        raise DataError(f"--size {text}: expected 64, or height x width such as 48x64, from 1 to {LARGEST_SIDE}")
    return height, width


@contextlib.contextmanager
def listing(pictures: Pictures) -> Iterator[None]:
    """At the end, whatever it is, say on standard error which files were left out, and why."""
    try:
        yield
    finally:
        for line in pictures.left_out[:MOST_LISTED]:
            print(f"left out: {printable(line)}", file=sys.stderr)
        if count := len(pictures.left_out):
            more = f", of which {count - MOST_LISTED} are not listed" if count > MOST_LISTED else ""
            print(f"left out: {count} in all{more}", file=sys.stderr)


def show(wanted: Show) -> None:
    """Print what a data file holds, and draw its sheet."""
    print(describe(wanted.file))
    if wanted.sheet is not None:
        make_sheet(wanted.file, wanted.sheet)


def verify_all(files: tuple[Path, ...]) -> int:
    """Print a line for each file; return 1 if any is bad, else 0."""
    if not files:
        raise DataError("no file is named; name at least one data file")
    bad = 0
    for path in files:
        try:
            digest, recorded = verify(path)
        except DataError as error:
            complain(PROGRAM, error)
            bad = 1
        else:
            print(f"ok {printable(path)} data_sha256={digest}" + ("" if recorded else ", with no digest to compare"))
    return bad


if __name__ == "__main__":
    sys.exit(main())

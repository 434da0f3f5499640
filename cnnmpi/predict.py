"""Say what image files show, by a trained checkpoint.

python -m cnnmpi.predict runs/simplecnn-0/best.h5 cat.jpg dog.png
python -m cnnmpi.predict runs/simplecnn-0/best.h5 photos --csv photos.csv --gallery photos.html
python -m cnnmpi.predict runs/simplecnn-0/best.h5 'photos/**/*.jpg' --json -
find photos -name '*.png' -print0 | python -m cnnmpi.predict runs/simplecnn-0/best.h5 -
"""

import codecs
import contextlib
import functools
import glob
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from cnnmpi.answers import Answer, Csv, Json, Lines, Meaning, Output, Writer
from cnnmpi.checkpoint import CheckpointError
from cnnmpi.common.arrays import Array, nchw
from cnnmpi.common.files import identity
from cnnmpi.console import command, complain, printable, progress
from cnnmpi.data import DataError, Views
from cnnmpi.data.images import FITS, is_image, read_fitted
from cnnmpi.data.sources.folder import MOST_TOGETHER, files_below, in_order
from cnnmpi.distributed import Ranks, UserError
from cnnmpi.functional import sigmoid, softmax
from cnnmpi.gallery import Gallery
from cnnmpi.machine import usable_cores
from cnnmpi.models import Model
from cnnmpi.sizes import pair
from cnnmpi.train.code import named_files
from cnnmpi.train.config import Backend, Config, Precision
from cnnmpi.train.evaluation import batch_size, mean_logits
from cnnmpi.train.judging import config_of
from cnnmpi.train.setup import load_trained, make_team, share_parameters, to_engine

PROGRAM = "cnnmpi.predict"

Read = Callable[[str], Array]
File = Annotated[str | None, tyro.conf.arg(metavar="FILE")]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Predict as ``argv`` says (the command line's if None). Returns the exit code, see ``run``; 2 for errors."""
    try:
        return tyro.cli(run, args=argv, prog=PROGRAM)
    except (CheckpointError, UserError) as error:
        complain(PROGRAM, error)
        return 2


def run(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE|FOLDER|PATTERN|- ...")],
    /,
    csv: File = None,
    json: File = None,
    gallery: File = None,
    top: int | None = None,
    strict: bool = False,
    threads: int = 0,
    model: str | None = None,
    backend: Backend = "numpy",
    device: str = "cpu",
    precision: Precision = "float32",
    tta: Views = "none",
) -> int:
    """Print the most probable classes of each image, or those with the largest numbers; or write them to files.

    Files that cannot be read are listed on standard error and, in the files that are written, with the reason. The
    exit code is 0 if any image could be read (--strict: if all could), else 2. What a model says is probabilities,
    those of several labels an image, or numbers, by the loss that it was trained with. Of a loss of your own, outputs
    are taken for the logits of classes if the run counted its accuracy, and else for numbers.

    Args:
        checkpoint: a checkpoint of cnnmpi.train.
        images: image files of any kind and size, scaled as the training images were, else cut to the middle first;
            folders, for all files below; quoted patterns such as 'photos/**/*.jpg'; - for a list on standard input, of
            a path a line or, as find -print0 writes them, each with a NUL character after it. A name that begins with
            - is written ./-name.png. Links to folders are followed where they are named, but not below a folder or **.
        csv: a table to write, with a header path,class,probability,...,error; - for standard output.
        json: a list of {path, classes: [{class, probability}, ...]} or {path, error} to write; - for standard output.
        gallery: a page to write, such as out.html: how many images of each class, and those that are least sure.
        top: how many classes to name of each image; 3 unless given, and in files all labels of a model of several.
        strict: end with exit code 2 if any file cannot be read; the others are predicted all the same.
        threads: threads to read and compute with; 0 uses all cores. The numbers do not depend on it.
        model: the network of a checkpoint of your own: FILE.py:CLASS or MODULE:CLASS.
        backend: engine under the layers, whatever the run had.
        device: where torch computes: cpu, cuda, cuda:N.
        precision: of torch's convolutions and matrix products.
        tta: views of each image over which outputs are averaged: none but itself, flip (2), or flip+shift (6).

    """
    if not images:
        raise UserError("name at least one image")
    # exact: where what a thread computes does not depend on how many there are
    config = Config(backend=backend, device=device, precision=precision, threads=threads, reduction="exact")
    trained = load_trained(checkpoint, model)
    to_engine(trained, config)
    classes = trained.info.classes
    if top is not None and not 1 <= top <= len(classes):
        raise UserError(f"--top {top}: the model knows {len(classes)} classes; name a number from 1 to {len(classes)}")
    read_image = reader(trained, checkpoint)
    named = {"--csv": csv, "--json": json, "--gallery": gallery}
    outputs = [Output(option, path) for option, path in named.items() if path is not None]
    check_outputs(outputs, checkpoint, named_files(model, type(trained)))
    unmatched: set[str] = set()
    paths = list(find_files(images, outputs, unmatched))
    loss = loss_of(checkpoint, trained)
    meaning, count = Meaning(classes, loss, top), Count(tta)

    def read(path: str) -> Array:
        if path in unmatched:
            raise DataError(f"{path}: no file of this name, and none matches it as a pattern")
        return read_image(path)

    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        writers: list[Writer] = [] if outputs else [Lines(meaning)]
        for output in outputs:
            stack.enter_context(output)
            if output.option == "--csv":
                writers.append(Csv(output, meaning))
            elif output.option == "--json":
                writers.append(Json(output, meaning))
            else:
                writers.append(Gallery(output, meaning, f"Predictions of {checkpoint}", count.facts))
        with progress(len(paths), PROGRAM, "images") if outputs else contextlib.nullcontext(lambda _: None) as advance:
            for answer in answers(trained, config, paths, read, tta, loss):
                if answer.values is None:
                    count.unreadable += 1
                    complain(PROGRAM, f"{answer.path}: {answer.error}")
                else:
                    count.images += 1
                for writer in writers:
                    writer.add(answer)
                advance(1)
        count.seconds = time.monotonic() - began
        for writer in writers:  # each is whole before the next can fail: the gallery, which takes longest, is the last
            writer.end()
    if outputs:
        print(f"{PROGRAM}: {count}", file=sys.stderr)
    elif count.unreadable and len(paths) > 1:
        print(f"{PROGRAM}: {count.unreadable:,} of {len(paths):,} files could not be read", file=sys.stderr)
    return 2 if count.unreadable > (0 if strict else len(paths) - 1) else 0


@dataclass
class Count:
    """How many files were read as images and how many could not be, in how many seconds, and by which views."""

    views: Views
    images: int = 0
    unreadable: int = 0
    seconds: float = math.nan

    def facts(self) -> list[tuple[str, str]]:
        """Return pairs (name, value) for people."""
        speed = f"{self.images / self.seconds:,.0f}"
        numbers = [("images", f"{self.images:,}"), ("images/s", speed), ("unreadable", f"{self.unreadable:,}")]
        return [*numbers, ("--tta", self.views)]

    def __str__(self) -> str:
        *numbers, (option, views) = self.facts()
        return ", ".join([*(f"{value} {name}" for name, value in numbers), f"{option} {views}"])


def reader(model: Model, checkpoint: Path) -> Read:
    """Return the function that reads a file as uint8 (H, W, C), as the images were that the model was trained on."""
    channels, (height, width) = model.info.options["in_channels"], pair(model.info.options["image_size"])
    if channels not in (1, 3):
        raise UserError(f"{checkpoint} takes images of {channels} channels: an image file has 1 or 3")
    recorded = model.info.attributes.get("data_fit")  # how the training images were made of larger ones, if known
    how = next((name for name in FITS if name == recorded), FITS[0])

    def read(path: str) -> Array:
        return read_fitted(path, channels, height, width, how)

    return read


# -- which files -------------------------------------------------------------------------------------------------------


def find_files(arguments: Sequence[str], outputs: Collection[Output], unmatched: set[str]) -> Iterator[str]:
    """Yield the files that ``arguments`` mean, as ``run`` takes them, in their order; those of one argument are sorted.

    What is named is not looked at: it may be no image, or not there. A pattern that nothing matches is yielded itself,
    and added to ``unmatched``. What ``outputs`` replace in a folder is left out, such as the table of an earlier run,
    unless it is an image. Raises UserError where they would replace any other file, and for what gives nothing.
    """
    replaced = {output.replaced for output in outputs if output.replaced}

    def is_replaced(path: str) -> bool:
        return bool(replaced) and identity(path) in replaced

    if list(arguments).count("-") > 1:
        raise UserError("- stands for the list on standard input, which is read once: name it once")
    for argument in arguments:
        if argument == "-":
            files = listed_files()
        elif os.path.isdir(argument):  # noqa: PTH112 - a Path raises an error for names that are too long
            files = [path for path in files_of(Path(argument)) if not is_replaced(path) or is_image(path)]
        elif os.path.lexists(argument) or not glob.has_magic(argument):
            files = [argument]
        elif not (files := matching(argument)):
            files = [argument]
            unmatched.add(argument)
        if not files:
            what = {"-": "standard input names"}.get(argument, f"{argument} gives")
            raise UserError(f"{what} no files")
        for path in files:
            if is_replaced(path):
                raise UserError(f"{path} is to be read: let what is written have another name")
            yield path


def files_of(folder: Path) -> list[str]:
    """Return the paths of all files below ``folder`` in their order; links to folders are not followed, but told."""
    left_out: list[str] = []
    files = files_below(folder, left_out)
    tell(left_out)
    return [str(files[name]) for name in sorted(files)]


def tell(left_out: Iterable[str]) -> None:
    """Print a line on standard error for each thing that is ``left_out``."""
    for line in left_out:
        print(f"{PROGRAM}: left out: {printable(line)}", file=sys.stderr)


def matching(pattern: str) -> list[str]:
    """Return the paths of the files that match, sorted; one of those that lead to the same by links to folders.

    ``**`` stands for a folder and all below it, but for those that links lead to, which are told.
    """
    links: dict[str, None] = {}
    real = functools.cache(os.path.realpath)
    longest_first = sorted(expanded(pattern, links), key=len, reverse=True)
    once = {(real(Path(path).parent), Path(path).name): path for path in longest_first}
    tell(f"{link}: a link to a folder, which may lead in circles" for link in links)
    return sorted(path for path in once.values() if not Path(path).is_dir())


def expanded(pattern: str, links: dict[str, None]) -> Iterator[str]:
    """Yield what matches ``pattern``, some of it twice; those links to folders that ``**`` leaves out are ``links``."""
    stars = re.search(r"(?<![^/])\*\*(?![^/])", pattern)
    if stars is None:
        yield from glob.iglob(pattern)  # noqa: PTH207 - a Path takes no absolute pattern
        return
    above, below = pattern[: stars.start()], pattern[stars.end() :].lstrip("/") or "*"
    for top in glob.iglob(above) if above else [""]:  # noqa: PTH207
        for where, folders, _ in os.walk(top or "."):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            here = where if top else where[2:]  # after "./"
            inside = [os.path.join(here, name) for name in folders]  # noqa: PTH118 - a Path would end in no "/"
            links |= dict.fromkeys(path for path in inside if Path(path).is_symlink())
            yield from expanded(os.path.join(glob.escape(here), below), links)  # noqa: PTH118


def listed_files() -> list[str]:
    """Return the paths on standard input: one a line or, if there are NUL characters, those between them.

    Raises UserError for UTF-16, which some programs write on Windows.
    """
    if sys.stdin is None:
        return []
    text = sys.stdin.buffer.read().removeprefix(codecs.BOM_UTF8)
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError("standard input is a list in UTF-16: write it in UTF-8")
    paths = text.split(b"\0") if b"\0" in text else text.splitlines()
    return [os.fsdecode(path) for path in paths if path]


def check_outputs(outputs: Collection[Output], checkpoint: Path, sources: Collection[Path]) -> None:
    """Raise UserError where two would be written to one place, or one over the checkpoint or a network's sources."""
    places = [output.path for output in outputs]
    for output in outputs:
        if places.count(output.path) > 1:
            raise UserError(f"{output.option} {output.name}: named twice: each needs a place of its own")
        output.spare(checkpoint, "the checkpoint")
        for source in sources:
            output.spare(source, "the network's source")


# -- what the model says -----------------------------------------------------------------------------------------------


def answers(model: Model, config: Config, paths: Sequence[str], read: Read, tta: Views, loss: str) -> Iterator[Answer]:
    """Yield what ``model`` says of each of ``paths``, in their order; all threads read files and compute batches.

    Batches are cut from ``paths`` alone, whatever can be read and however many threads there are, so that the numbers
    depend on neither. One round of batches, one for each thread, is computed while the next is read.
    """
    shape = (model.info.options["in_channels"], *pair(model.info.options["image_size"]))
    size = batch_size(model, shape)
    starts = range(0, len(paths), size)
    team = make_team(config, model, Ranks(), len(starts))
    if len(team.models) > 1:
        share_parameters(team.models)
    threads, round_size = config.threads or usable_cores(), size * len(team.models)
    # few large photographs are to keep all threads busy, too
    together = min(MOST_TOGETHER, math.ceil(len(paths) / threads))
    parts = [paths[at : at + together] for at in range(0, len(paths), together)]
    ahead = max(2 * threads, round_size // together)

    def read_part(part: Sequence[str]) -> list[Array | DataError]:
        return [read_or_error(read, path) for path in part]

    def compute(model: Model, images: Sequence[Array | DataError]) -> Array:
        # a file that cannot be read is black: it changes the batch's shape, and by that other numbers, in no way
        black = np.zeros((*shape[1:], shape[0]), np.uint8)
        return predictions(model, [black if isinstance(image, DataError) else image for image in images], tta, loss)

    pictures = itertools.chain.from_iterable(in_order(read_part, parts, threads, ahead))
    with team.evaluating():
        for start in range(0, len(paths), round_size):
            images = list(itertools.islice(pictures, round_size))
            batches = [images[at : at + size] for at in range(0, len(images), size)]
            rows = itertools.chain.from_iterable(team.map(compute, batches))
            for path, image, row in zip(paths[start : start + round_size], images, rows, strict=True):
                if isinstance(image, DataError):
                    yield Answer(path, None, str(image).removeprefix(f"{path}: "))
                else:
                    yield Answer(path, row)


def read_or_error(read: Read, path: str) -> Array | DataError:
    """Return an image, or why there is none."""
    try:
        return read(path)
    except DataError as error:
        return error


def predictions(model: Model, images: Sequence[Array], tta: Views = "none", loss: str = "cross_entropy") -> Array:
    """Return what the model says of uint8 ``images`` (H, W, C): a number for each class, (N, classes).

    By the ``loss`` that ``loss_of`` names, it is the probability that this is the class or, where an image may have
    several, that it has this one; a model that was trained by squared errors predicts numbers.
    """
    pixels = nchw(np.stack(images))
    logits: Array = model.F.to_numpy(mean_logits(model, pixels, model.info.mean, model.info.std, tta))
    if loss == "mse":
        return logits
    return sigmoid(logits)[0] if loss == "binary_cross_entropy" else softmax(logits)


def loss_of(checkpoint: Path, model: Model) -> str:
    """Return the name of the loss by which outputs are understood: that which the model was trained with.

    Of a loss of a person's own nobody knows what outputs mean. A run counts the accuracy where its targets are classes:
    then it is the cross-entropy, and else squared errors, whose outputs are numbers. Raises UserError as ``config_of``.
    """
    attributes = model.info.attributes
    loss = config_of(checkpoint, attributes).loss or "cross_entropy"
    if ":" not in loss:
        return loss
    return "cross_entropy" if {"best_test_acc", "best_val_acc"} & attributes.keys() else "mse"


if __name__ == "__main__":
    sys.exit(main())

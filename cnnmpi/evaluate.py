"""Evaluate a checkpoint: accuracy, loss, a table of classes and the confusion matrix.

python -m cnnmpi.evaluate runs/simplecnn-0/best.h5 --data data/cifar10.h5
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cnnmpi.checkpoint import CheckpointError
from cnnmpi.common.text import read_json
from cnnmpi.console import command, complain, printable, table
from cnnmpi.data import Views
from cnnmpi.distributed import Ranks, UserError
from cnnmpi.sizes import pair
from cnnmpi.train import Config, Evaluation, evaluate
from cnnmpi.train.code import Code
from cnnmpi.train.config import Backend, Precision, check_ranges, from_plain
from cnnmpi.train.inputs import open_data, parts_of
from cnnmpi.train.measures import find_losses, make_measures, with_loss
from cnnmpi.train.setup import load_trained, to_engine

PROGRAM = "cnnmpi.evaluate"
LARGEST_MATRIX = 20  # classes up to which the confusion matrix is shown


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as ``argv`` says (the command line's if None). Returns the exit code."""
    try:
        tyro.cli(run, args=argv, prog=PROGRAM)
    except (CheckpointError, UserError) as error:
        complain(PROGRAM, error)
        return 2
    return 0


def run(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    data: str = "auto",
    split: Literal["test", "val", "train"] = "test",
    threads: int = 0,
    model: str | None = None,
    loss: str | None = None,
    backend: Backend = "numpy",
    device: str = "cpu",
    precision: Precision = "float32",
    tta: Views = "none",
) -> None:
    """Evaluate a checkpoint on the test (or training) images.

    Args:
        checkpoint: a checkpoint of cnnmpi.train.
        data: auto, cifar10, synthetic, an HDF5 file, a CIFAR archive, an .npz file, or MNIST's folder.
        split: which images; val are those that the run held out (--validation), and train then are the rest.
        threads: threads to compute with; 0 uses all cores.
        model: the network of a checkpoint of your own: FILE.py:CLASS or MODULE:CLASS.
        loss: the loss to report, FILE.py:FUNCTION for one of your own; that of the run, unless it was your own.
        backend: engine under the layers, whatever the run had.
        device: where torch computes: cpu, cuda, cuda:N.
        precision: of torch's convolutions and matrix products.
        tta: views of each image over which logits are averaged: none but itself, flip (2), or flip+shift (6).

    """
    trained, ranks = load_trained(checkpoint, model), Ranks()
    to_engine(trained, Config(backend=backend, device=device, precision=precision))
    trained.F.set_threads(threads or ranks.default_threads())
    found = open_data(data, ranks, lambda text: print(printable(text), file=sys.stderr))
    dataset, info = found.dataset, trained.info
    known = in_words(info.options["in_channels"], pair(info.options["image_size"]), info.classes)
    _, channels, *size = dataset.test_images.shape
    given = in_words(channels, size, dataset.classes)
    if known != given:
        raise UserError(f"{checkpoint} was trained on {known}; --data {data} has {given}")
    for number, (theirs, ours) in enumerate(zip(info.classes, dataset.classes, strict=True)):
        if theirs != ours:
            raise UserError(f"class {number} of {checkpoint} is {theirs}, that of --data {data} is {ours}")
    of_run = config_of(checkpoint, info.attributes)
    parts = parts_of(dataset, of_run.validation or 0.0, of_run.seed or 0)
    if split not in parts:
        raise UserError(f"--split val: the run of {checkpoint} held no images out (--validation)")
    if split != "test" and "val" in parts and found.sha256 != info.attributes.get("data_sha256"):
        raise UserError(f"--split {split}: {checkpoint} held images out of other data than --data {data}: name its own")
    part, its_loss = parts[split], of_run.loss or ""
    config = with_loss(Config(loss=loss or (None if ":" in its_loss else its_loss or None)), dataset)
    _, measured = find_losses(config, Code(), trained.F)
    metrics = make_measures(config, dataset, type(trained).recipe.get("metrics")).metrics
    try:
        scaling = {"mean": info.mean, "std": info.std}
        result = evaluate(
            trained,
            part.images,
            part.labels,
            classes=len(dataset.classes),
            loss=measured,
            metrics=metrics,
            tta=tta,
            **scaling,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    seen = "" if tta == "none" else f", logits averaged over the views {tta}"
    print(printable(f"{checkpoint} on the {len(part.labels)} {split} images of {dataset.source}{seen}"))
    values = {("accuracy" if name == "acc" else name): value for name, value in result.metrics.items()}
    print("  ".join(f"{name} {value:.4f}" for name, value in {**values, "loss": result.loss}.items()))
    if len(result.labels):
        show(result, dataset.classes)


def config_of(checkpoint: Path, attributes: dict[str, Any]) -> Config:
    """Return the settings that a checkpoint says it was trained with. Raises UserError for what cannot be one."""
    try:
        config = Config(**from_plain(read_json(attributes.get("config", "{}")), f"{checkpoint}: its configuration"))
        check_ranges(config)
    except ValueError as error:
        raise UserError(f"{checkpoint}: its configuration cannot be used: {error}") from None
    return config


def in_words(channels: int, size: Sequence[int], classes: Sequence[str]) -> str:
    """Return what images and classes a model or a data set has, in a few words however many there are."""
    first = ", ".join(classes[:10]) + (f", ... ({len(classes)} in all)" if len(classes) > 10 else "")
    return f"{size[0]}x{size[1]} pixels of {channels} channels and the classes {first}"


def show(result: Evaluation, classes: Sequence[str]) -> None:
    """Print the table of classes and, up to 20 classes, the confusion matrix."""
    names = [f"{number:{len(str(len(classes) - 1))}} {name}" for number, name in enumerate(classes)]
    counts = zip(names, result.images, result.guessed, result.hits, strict=True)
    rows = [(name, images, _share(hits, images), _share(hits, guessed)) for name, images, guessed, hits in counts]
    print("\n" + table(("class", "images", "recall", "precision"), rows))
    if len(classes) <= LARGEST_MATRIX:
        print(
            "\nconfusion matrix: a row holds the images of a class, a column those taken for the class of this number"
        )
        matrix = [(name, *row) for name, row in zip(names, result.confusion, strict=True)]
        print(table(("class", *map(str, range(len(classes)))), matrix))


def _share(part: Any, whole: Any) -> str:
    return f"{part / whole:.3f}" if whole else "-"


if __name__ == "__main__":
    sys.exit(main())

"""Evaluate a checkpoint: accuracy, loss, a table of classes and the confusion matrix.

python -m cnnmpi.evaluate runs/simplecnn-0/best.h5 --data data/cifar10.h5
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cnnmpi.checkpoint import CheckpointError
from cnnmpi.console import command, complain, printable, table
from cnnmpi.data import Views
from cnnmpi.distributed import UserError
from cnnmpi.train import Config, Evaluation
from cnnmpi.train.config import Backend, Precision
from cnnmpi.train.judging import judge

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
    judgement = judge(
        checkpoint,
        lambda text: print(printable(text), file=sys.stderr),
        data=data,
        split=split,
        threads=threads,
        model=model,
        loss=loss,
        engine=Config(backend=backend, device=device, precision=precision),
        tta=tta,
    )
    result, part, dataset = judgement.evaluation, judgement.part, judgement.dataset
    seen = "" if tta == "none" else f", logits averaged over the views {tta}"
    print(printable(f"{checkpoint} on the {len(part.labels)} {split} images of {dataset.source}{seen}"))
    values = {("accuracy" if name == "acc" else name): value for name, value in result.metrics.items()}
    print("  ".join(f"{name} {value:.4f}" for name, value in {**values, "loss": result.loss}.items()))
    if len(result.labels):
        show(result, dataset.classes)


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

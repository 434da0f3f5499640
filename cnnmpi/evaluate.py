"""Evaluate a checkpoint: accuracy, loss, a table of classes and the confusion matrix.

python -m cnnmpi.evaluate runs/simplecnn-0/best.h5 --data data/cifar10.h5
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from cnnmpi.checkpoint import CheckpointError
from cnnmpi.distributed import Ranks, UserError
from cnnmpi.train import Evaluation, evaluate, load_checkpoint
from cnnmpi.train.setup import open_data


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as ``argv`` says (the command line's if None). Returns the exit code."""
    try:
        tyro.cli(run, args=argv, prog="cnnmpi.evaluate")
    except (CheckpointError, UserError) as error:
        print(f"cnnmpi.evaluate: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    data: str = "auto",
    split: Literal["test", "train"] = "test",
    threads: int = 0,
) -> None:
    """Evaluate a checkpoint on the test (or training) images.

    Args:
        checkpoint: a checkpoint of cnnmpi.train.
        data: auto, cifar10, synthetic, an HDF5 file, or a CIFAR archive.
        split: which images.
        threads: threads to compute with; 0 uses all cores.

    """
    model = load_checkpoint(checkpoint)
    ranks = Ranks()
    model.F.set_threads(threads or ranks.default_threads())
    dataset = open_data(data, ranks, lambda text: print(text, file=sys.stderr)).dataset
    images, labels = (
        (dataset.test_images, dataset.test_labels) if split == "test" else (dataset.train_images, dataset.train_labels)
    )
    channels = model.info.options["in_channels"]
    if images.shape[1] != channels or list(dataset.classes) != model.info.classes:
        raise UserError(
            f"{checkpoint} knows {channels} channels and the classes {', '.join(model.info.classes)}; "
            f"--data {data} has {images.shape[1]} channels and {', '.join(dataset.classes)}"
        )
    try:
        known = {"classes": len(dataset.classes), "mean": model.info.mean, "std": model.info.std}
        result = evaluate(model, images, labels, **known)
    except ValueError as error:  # images of another size than the model was made for
        raise UserError(str(error)) from None
    print(f"{checkpoint} on the {len(images)} {split} images of {dataset.source}")
    print(f"accuracy {result.accuracy:.4f}  loss {result.loss:.4f}")
    show(result, dataset.classes)


def show(result: Evaluation, classes: Sequence[str]) -> None:
    """Print the table of classes and, up to 20 classes, the confusion matrix."""
    console = Console()
    confusion = result.confusion
    table = Table("class", "images", "recall", "precision", title="classes")
    for k, name in enumerate(classes):
        images, guessed, hits = confusion[k].sum(), confusion[:, k].sum(), confusion[k, k]
        table.add_row(name, str(images), _share(hits, images), _share(hits, guessed))
    console.print(table)
    if len(classes) <= 20:
        matrix = Table("true \\ taken for", *(name[:6] for name in classes), title="confusion matrix")
        for k, name in enumerate(classes):
            matrix.add_row(name, *(str(count) for count in confusion[k]))
        console.print(matrix)


def _share(part: Any, whole: Any) -> str:
    return f"{part / whole:.3f}" if whole else "-"


if __name__ == "__main__":
    sys.exit(main())

"""What a run shows and writes down, on rank 0: terminal or log file, records, TensorBoard."""

import datetime
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cnnmpi.common.arrays import Array
from cnnmpi.data import DataLoader, Dataset
from cnnmpi.distributed import Ranks
from cnnmpi.machine import blas_kernels, processor
from cnnmpi.report import confusion_pixels, grid
from cnnmpi.train.board import FOLDER, Board
from cnnmpi.train.config import Config
from cnnmpi.train.evaluation import Evaluation
from cnnmpi.train.records import Records
from cnnmpi.train.state import version_of
from cnnmpi.train.terminal import Terminal

SAMPLES, SAMPLED_PIXELS = 64, 1 << 21  # training images that TensorBoard is shown, and all their pixels at most
LARGEST_MATRIX = 200  # classes up to which TensorBoard is shown the confusion matrix


class Reporter:
    """Speaks and writes for the whole job. On other ranks (``silent``) all of its methods do nothing."""

    def __init__(self, folder: Path, config: Config = Config(), silent: bool = False) -> None:  # noqa: B008 - frozen
        self.silent = silent
        self.terminal = Terminal(silent, config.quiet)
        self.board = Board(folder / FOLDER, self.line) if config.tensorboard and not silent else None
        self.records = Records(folder, config.log_every, self.line, self.board)

    def line(self, text: str, important: bool = False) -> None:
        """Print one line; with --quiet only warnings, and what is ``important``."""
        self.terminal.line(text, important)

    def block(self, text: str) -> None:
        """Print lines of our own."""
        for line in text.splitlines():
            self.terminal.line(line)

    def begin(self, step: int, steps: int, ranks: Ranks, threads: int, loader: DataLoader, shard: int) -> None:
        """Say that the run begins, or goes on, at ``step`` of all ``steps``; ``shard`` is one of this rank's."""
        if self.silent:
            return
        self.records.start(circumstances(step, ranks, threads))
        if self.board and step == 0:
            self.board.image("train/images", grid(sample_images(loader, shard)), step)
        self.terminal.begin(step, steps)

    def step(self, line: Mapping[str, Any], steps: int, epochs: int, images: int) -> None:
        """Show, and write down, a step of so many ``images``: step, epoch, loss, lr, grad_norm."""
        if self.silent:
            return
        self.records.step(dict(line), images)
        self.terminal.step(f"{line['epoch']}/{epochs}", line["step"], steps, line["loss"], images)

    def epoch(self, metrics: dict[str, Any], evaluation: Evaluation, part: str) -> None:
        """Show an epoch's line, and write it down; ``evaluation`` is of this ``part`` of the data."""
        if self.silent:
            return
        self.records.epoch(metrics)
        if self.board and len(evaluation.labels) and evaluation.classes <= LARGEST_MATRIX:
            self.board.image(f"{part}/confusion", confusion_pixels(evaluation.confusion), metrics["step"])
        named = [(name.partition("_"), value) for name, value in metrics.items()]
        parts = [
            " ".join([part, *(f"{name} {value:.4f}" for (start, _, name), value in named if start == part)])
            for part in ("train", "val", "test")
            if any(start == part for (start, _, _), _ in named)
        ]
        speed = "{images_per_s:.0f} images/s  {seconds:.0f} s".format(**metrics)
        self.line("  ".join([f"epoch {metrics['epoch']}  step {metrics['step']}", *parts, speed]))
        self.terminal.evaluated(parts[-1])

    def rewind(self, step: int, steps_per_epoch: int, ended: bool) -> None:
        """Keep of the records what was complete at ``step``; see ``Records.rewind``."""
        if not self.silent:
            self.records.rewind(step, steps_per_epoch, ended)

    def close(self) -> None:
        """Take the progress down."""
        self.terminal.close()


def sample_images(loader: DataLoader, shard: int) -> Array:
    """Return the first images of a shard (N, C, H, W) as the network gets them, augmented, float32 in 0..1."""
    images, _ = loader.batch(0, shard)
    images = images[: max(1, min(SAMPLES, SAMPLED_PIXELS // images[0, 0].size))]
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (loader.mean, loader.std))
    pixels: Array = np.clip(images * std + mean, 0, 1)
    return pixels


def circumstances(step: int, ranks: Ranks, threads: int) -> dict[str, Any]:
    """Return what shapes the speed of a run that begins at ``step``, and never its result."""
    return {
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "ranks": ranks.size,
        "threads": threads,
        "cores": ranks.cores_on_node,
        "processor": processor(),
        "blas": blas_kernels(),
        "system": platform.platform(terse=True),
        "versions": {
            "python": platform.python_version(),
            **{name: version_of(name) for name in ("cnnmpi", "numpy", "h5py", "mpi4py", "torch")},
        },
    }


def greeting(
    config: Config, dataset: Dataset, parts: Mapping[str, Any], ranks: Ranks, threads: int, gpus: int = 0
) -> list[str]:
    """Return lines that say what is about to be trained, on what, and what would make it faster.

    ``gpus`` is how many this host has, where it computes on them.
    """
    shards, cores = config.shards, ranks.cores_on_node
    loss = f", loss {config.loss}" if dataset.train_labels.ndim > 1 else ""
    precision = "" if config.precision == "float32" else f" in {config.precision}"
    lines = [
        f"{config.model} on {dataset.source}: {len(parts['train'].labels)} training"
        f"{', {} validation'.format(len(parts['val'].labels)) if 'val' in parts else ''} and "
        f"{len(parts['test'].labels)} test images; {ranks.size} rank{'s' * (ranks.size > 1)} with {threads} "
        f"thread{'s' * (threads > 1)}, {config.backend}{precision}{loss}"
    ]
    if not isinstance(dataset.train_images, np.ndarray):
        lines.append("note: images are read from their file as they are needed (--data-in)")
    if 0 < gpus < ranks.local_size:
        lines.append(
            f"note: {ranks.local_size} ranks share {gpus} GPU{'s' * (gpus > 1)} of this host: the result is the same, "
            "but as many ranks as GPUs would be faster"
        )
    if ranks.oversubscribed:
        lines.append(
            f"note: {ranks.local_size} ranks share {cores} cores of this host: the result is the "
            "same, but as many ranks as cores would be faster"
        )
    elif cores > (shards or 1):
        lines.append(
            f"note: {cores} cores, {shards} shards: up to {shards} ranks "
            "share the work, and threads the other cores; for more ranks raise --shards, and --batch-size with it"
        )
    return lines

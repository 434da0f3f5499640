"""What a run shows and writes: a progress bar on a terminal, plain lines elsewhere, metrics.jsonl. Rank 0 only."""

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cnnmpi.checkpoint import CheckpointError, write_atomically
from cnnmpi.console import is_terminal, printable
from cnnmpi.data import Dataset
from cnnmpi.distributed import Ranks
from cnnmpi.train.config import Config

METRICS = "metrics.jsonl"
Tell = Callable[[str], None]


class Report:
    """Speaks for the whole job. On other ranks (``silent``) all of its methods do nothing."""

    def __init__(self, folder: Path, silent: bool = False) -> None:
        self.folder, self.silent = folder, silent
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        if not silent and is_terminal(sys.stdout):
            columns = (TextColumn("epoch {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            console = Console(highlight=False, markup=False, emoji=False)  # names and paths are no markup
            self.progress = Progress(*columns, TextColumn("{task.fields[loss]}"), console=console)
            self.progress.start()

    def line(self, text: str) -> None:
        """Print one line, above the progress bar if there is one."""
        if self.silent:
            return
        text = printable(text)
        if self.progress:
            self.progress.console.print(text, soft_wrap=True)
        else:
            print(text, flush=True)

    def step(self, epoch: int, index: int, steps: int, loss: float) -> None:
        """Show that ``index`` of the ``steps`` of ``epoch`` are done."""
        if self.progress:
            if self.task is None:
                self.task = self.progress.add_task("", total=steps, loss="")
            self.progress.update(
                self.task, description=str(epoch), completed=index, total=steps, loss=f"loss {loss:.3f}"
            )

    def epoch(self, metrics: dict[str, Any]) -> None:
        """Print an epoch's line and append it to metrics.jsonl, synced to disk. What is not finite is null there."""
        if self.silent:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        try:
            with (self.folder / METRICS).open("a") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self.line(f"warning: {self.folder / METRICS} cannot be written: {error.strerror}")
        named = [(name.partition("_"), value) for name, value in metrics.items()]
        parts = [
            " ".join([part, *(f"{name} {value:.4f}" for (start, _, name), value in named if start == part)])
            for part in ("train", "val", "test")
            if any(start == part for (start, _, _), _ in named)
        ]
        speed = "{images_per_s:.0f} images/s  {seconds:.0f} s".format(**metrics)
        self.line("  ".join([f"epoch {metrics['epoch']}  step {metrics['step']}", *parts, speed]))

    def rewind(self, step: int, steps_per_epoch: int) -> None:
        """Keep in metrics.jsonl the epochs that were complete at ``step``: the others will be done again."""
        path = self.folder / METRICS
        if self.silent or not path.exists():
            return
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        kept = []
        for line in lines:
            at = _step(line)
            if at is None:
                self.line(f"warning: {path}: dropped a damaged line")
            elif at <= step and at % steps_per_epoch == 0:
                kept.append(line)
        if kept != lines:
            write_atomically(path, "".join(line + "\n" for line in kept).encode())

    def close(self) -> None:
        """Take the progress bar down."""
        if self.progress:
            self.progress.stop()


def _step(line: str) -> int | None:
    """Return the step that a line of metrics.jsonl is about; None of a damaged one."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


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

"""What a run shows and writes: a progress bar on a terminal, plain lines elsewhere, metrics.jsonl. Rank 0 only."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

METRICS = "metrics.jsonl"


class Report:
    """Speaks for the whole job. On other ranks (``silent``) all of its methods do nothing."""

    def __init__(self, folder: Path, silent: bool = False) -> None:
        self.folder, self.silent = folder, silent
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        if not silent and sys.stdout.isatty():
            columns = (TextColumn("epoch {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, TextColumn("{task.fields[loss]}"), console=Console(highlight=False))
            self.progress.start()

    def line(self, text: str) -> None:
        """Print one line, above the progress bar if there is one."""
        if self.silent:
            return
        if self.progress:
            self.progress.console.print(text, markup=False, soft_wrap=True)
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
        """Print an epoch's line and append it to metrics.jsonl."""
        if self.silent:
            return
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        self.line(
            "epoch {epoch}  step {step}  train loss {train_loss:.4f} acc {train_acc:.4f}  test loss {test_loss:.4f} "
            "acc {test_acc:.4f}  {images_per_s:.0f} images/s  {seconds:.0f} s".format(**metrics)
        )

    def rewind(self, step: int, steps_per_epoch: int) -> None:
        """Keep in metrics.jsonl the epochs that were complete at ``step``: the others will be done again."""
        path = self.folder / METRICS
        if not self.silent and path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
            steps = [json.loads(line)["step"] for line in lines]
            kept = [line for line, at in zip(lines, steps, strict=True) if at <= step and at % steps_per_epoch == 0]
            path.write_text("".join(line + "\n" for line in kept))

    def close(self) -> None:
        """Take the progress bar down."""
        if self.progress:
            self.progress.stop()

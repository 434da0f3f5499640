"""What a run shows while it goes: a line at the bottom of a terminal, elsewhere lines of text, on rank 0."""

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from cnnmpi.console import is_terminal, printable

EVERY = 60.0  # seconds after which a log file hears how far the run has come
SETTLES = 0.5  # seconds over which a speed is averaged before it is shown
ROOMY, NARROW = 100, 60  # columns of a terminal for everything, and for more than how far, how long, and the loss


class Terminal:
    """Speaks for the whole job; does nothing where ``silent``, and says only what is important where ``quiet``."""

    def __init__(self, silent: bool = False, quiet: bool = False) -> None:
        self.silent, self.quiet = silent, quiet
        self.progress: Progress | None = None
        self.task = TaskID(0)
        self.begun = (time.monotonic(), 0)  # when, and at which step
        self.told = time.monotonic()  # when a log file last heard something
        self.measured, self.images, self.speed = time.monotonic(), 0, 0.0
        self.latest = ""  # the newest evaluation

    def begin(self, step: int, steps: int) -> None:
        """Say that ``step`` of all ``steps`` of the run are done, and that it goes on from there."""
        self.begun, self.told, self.measured = (time.monotonic(), step), time.monotonic(), time.monotonic()
        console = Console(highlight=False, markup=False, emoji=False)  # names and paths are no markup
        if self.silent or self.quiet or not is_terminal(sys.stdout) or console.is_dumb_terminal:
            return
        columns: list[ProgressColumn] = [TaskProgressColumn(), TimeRemainingColumn(compact=True)]
        columns.append(TextColumn("{task.fields[loss]}"))
        if console.width >= NARROW:
            columns = [TextColumn("epoch {task.description}"), BarColumn(20), *columns]
            columns.append(TextColumn("{task.fields[speed]}"))
        if console.width >= ROOMY:
            columns.append(TextColumn("{task.fields[latest]}"))
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task("", total=steps, completed=step, loss="", speed="", latest="")
        self.progress.start()

    def line(self, text: str, important: bool = False) -> None:
        """Print one line, above the progress if that is shown; warnings are important."""
        if self.silent or (self.quiet and not important and not text.startswith("warning:")):
            return
        text, self.told = printable(text), time.monotonic()
        if self.progress:
            self.progress.console.print(text, soft_wrap=True)
        else:
            print(text, flush=True)

    def step(self, epoch: str, step: int, steps: int, loss: float, images: int) -> None:
        """Show that ``step`` of all ``steps`` are done, the last one of so many ``images`` with this mean ``loss``."""
        now = time.monotonic()
        self.images += images
        if now - self.measured > SETTLES:
            self.speed, self.measured, self.images = self.images / (now - self.measured), now, 0
        if self.progress:
            fields: dict[str, Any] = {"loss": f"loss {loss:.3f}", "latest": self.latest}
            fields["speed"] = f"{self.speed:,.0f} images/s" if self.speed else ""
            self.progress.update(self.task, description=epoch, completed=step, **fields)
        elif now - self.told > EVERY:
            started, first = self.begun
            left = (now - started) / max(1, step - first) * (steps - step)
            self.line(
                f"step {step} of {steps} ({step / steps:.0%})  epoch {epoch}  loss {loss:.3f}  "
                f"{self.speed:.0f} images/s  {in_words(left)} left"
            )

    def evaluated(self, text: str) -> None:
        """Show ``text``, the newest evaluation, from now on; what it took is not the steps' time."""
        self.latest, self.measured, self.images = text, time.monotonic(), 0

    def close(self) -> None:
        """Take the progress down."""
        if self.progress:
            self.progress.stop()
            self.progress = None


def in_words(seconds: float) -> str:
    """Return a time as "42 s", "3 min", "2 h 05 min" or "3 d 04 h"."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 100 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02} h"

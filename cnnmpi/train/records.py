"""What a run writes down of its course: metrics.jsonl (each epoch), steps.jsonl (steps), starts.jsonl (its starts)."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cnnmpi.checkpoint import CheckpointError, write_atomically
from cnnmpi.common.files import append
from cnnmpi.common.lines import Line, each_line, to_line
from cnnmpi.report import METRICS, STARTS, STEPS
from cnnmpi.train.board import Board

MOST_UNWRITTEN = 1 << 20  # bytes of lines that wait for a disk with room


class Records:
    """The lines of a run in its ``folder``, and its ``board`` for TensorBoard, which shows the same numbers.

    Every ``log_every``-th step gets a line, none if that is 0. A line goes to the system in one piece, so that a killed
    process leaves whole lines; those of epochs wait for the disk. A file that cannot be written is told once; the run
    goes on, and what is missing there follows as soon as it can be written again.
    """

    def __init__(self, folder: Path, log_every: int, tell: Callable[[str], None], board: Board | None = None) -> None:
        self.folder, self.log_every, self.tell, self.board = folder, log_every, tell, board
        self._unwritten: dict[str, bytes] = {}  # of files that failed
        self._since: tuple[float, int] | None = None  # when the last line of a step was written, and images since

    def wants(self, step: int) -> bool:
        """Return whether ``step``, counted from 1, gets a line."""
        return self.log_every > 0 and step % self.log_every == 0

    def start(self, values: Line) -> None:
        """Write down under what circumstances this process begins, or goes on."""
        self._append(STARTS, values, wait=True)

    def step(self, values: Line, images: int) -> None:
        """Count a step of so many ``images``, and write its line if it is to have one."""
        now = time.perf_counter()
        started, seen = self._since or (now, -images)  # the first one after a pause only starts the clock
        seen += images
        if self.wants(values["step"]):
            values = values | {"images_per_s": round(seen / (now - started), 1) if seen else None}
            self._append(STEPS, values)
            if self.board:
                self.board.step(values)
            started, seen = now, 0
        self._since = started, seen

    def epoch(self, values: Line) -> None:
        """Write an epoch's line, which has reached the disk afterwards."""
        self._append(METRICS, values, wait=True)
        if self.board:
            self.board.epoch(values)
        self._since = None  # evaluation and saving are no part of a step

    def rewind(self, step: int, steps_per_epoch: int, ended: bool) -> None:
        """Keep what was complete at ``step``: all that came later will be done again. Raises CheckpointError.

        A checkpoint after the last step of an epoch may be from before its evaluation, or from after: ``ended``.
        """
        last = step if ended else step - 1
        self._keep(METRICS, lambda at: at <= last and at % steps_per_epoch == 0)
        self._keep(STEPS, lambda at: at <= step)
        if self.board:
            self.board.rewrite(*((line for _, line in self._lines(name) if line) for name in (STEPS, METRICS)))

    def _append(self, name: str, values: Line, wait: bool = False) -> None:
        path, failed = self.folder / name, name in self._unwritten
        blob = self._unwritten.pop(name, b"") + to_line(values)
        try:
            append(path, blob if _ends_whole(path) else b"\n" + blob, wait)
        except OSError as error:
            self._unwritten[name] = blob[-MOST_UNWRITTEN:]
            if not failed:
                self.tell(f"warning: {path} cannot be written: {error.strerror}")

    def _lines(self, name: str) -> Iterator[tuple[bytes, Line | None]]:
        path = self.folder / name
        try:
            if path.exists():
                yield from each_line(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}; move it away") from None

    def _keep(self, name: str, good: Callable[[int], bool]) -> None:
        """Keep the lines of a file whose step is ``good``."""
        path = self.folder / name
        kept: list[bytes] = []
        count = damaged = 0
        for blob, line in self._lines(name):
            count += 1
            if line is None or type(line.get("step")) is not int:
                damaged += 1
            elif good(line["step"]):
                kept.append(blob)
        if damaged:
            self.tell(f"warning: {path}: dropped {damaged} damaged line{'s' * (damaged > 1)}")
        if len(kept) != count:
            write_atomically(path, b"".join(kept))


def _ends_whole(path: Path) -> bool:
    """Return whether what is added to a file begins a line of its own: the one before may be torn."""
    try:
        with path.open("rb") as file:
            return file.seek(0, 2) == 0 or (file.seek(-1, 2), file.read(1))[1] == b"\n"
    except FileNotFoundError:
        return True

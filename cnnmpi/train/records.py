"""What a run writes down of its course: metrics.jsonl (each epoch), steps.jsonl (steps), starts.jsonl (its starts)."""

import time
from collections.abc import Callable
from io import BufferedWriter
from pathlib import Path
from typing import Any

from cnnmpi.checkpoint import CheckpointError, write_atomically
from cnnmpi.common.files import sync_open
from cnnmpi.common.lines import read_lines, to_line
from cnnmpi.report import METRICS, STARTS, STEPS
from cnnmpi.train.board import Board

Line = dict[str, Any]


class Records:
    """The lines of a run in its ``folder``, and its ``board`` for TensorBoard, which shows the same numbers.

    Every ``log_every``-th step gets a line, none if that is 0. A line goes to the system in one piece, so that a killed
    process leaves whole lines; those of epochs wait for the disk. What cannot be written is told once, and the run
    goes on without it.
    """

    def __init__(self, folder: Path, log_every: int, tell: Callable[[str], None], board: Board | None = None) -> None:
        self.folder, self.log_every, self.tell, self.board = folder, log_every, tell, board
        self._files: dict[str, BufferedWriter | None] = {}  # None: it failed
        self._since: tuple[float, int] | None = None  # when the last line of a step was written, and images since

    def wants(self, step: int) -> bool:
        """Return whether ``step``, counted from 1, gets a line."""
        return self.log_every > 0 and step % self.log_every == 0

    def start(self, values: Line) -> None:
        """Write down under what circumstances this process begins, or goes on."""
        self._append(STARTS, values, sync=True)

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
        """Write an epoch's line; what came before is on the disk then, too."""
        if STEPS in self._files:
            self._sync(STEPS)
        self._append(METRICS, values, sync=True)
        if self.board:
            self.board.epoch(values)
        self._since = None  # evaluation and saving are no part of a step

    def rewind(self, step: int, steps_per_epoch: int) -> None:
        """Keep what was complete at ``step``: all that came later will be done again. Raises CheckpointError."""
        self._keep(METRICS, lambda at: at <= step and at % steps_per_epoch == 0)
        self._keep(STEPS, lambda at: at <= step)
        if self.board:
            lines = [self._read(name)[0] if (self.folder / name).exists() else [] for name in (STEPS, METRICS)]
            self.board.go_on(step, steps=lines[0], epochs=lines[1])

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            if file:
                file.close()
        self._files.clear()
        if self.board:
            self.board.close()

    def _append(self, name: str, values: Line, sync: bool = False) -> None:
        try:
            if name not in self._files:
                self._files[name] = (self.folder / name).open("ab", buffering=0)  # type: ignore[assignment]
            if file := self._files[name]:
                file.write(to_line(values).encode())
                if sync:
                    self._sync(name)
        except OSError as error:
            if file := self._files.get(name):
                file.close()
            self._files[name] = None
            self.tell(f"warning: {self.folder / name} cannot be written: {error.strerror}")

    def _sync(self, name: str) -> None:
        if file := self._files[name]:
            sync_open(file.fileno())

    def _read(self, name: str) -> tuple[list[Line], int]:
        try:
            return read_lines(self.folder / name)
        except OSError as error:
            raise CheckpointError(f"{self.folder / name}: cannot be read: {error.strerror}") from None

    def _keep(self, name: str, good: Callable[[int], bool]) -> None:
        """Keep the lines of a file whose step is ``good``."""
        path = self.folder / name
        if not path.exists():
            return
        lines, damaged = self._read(name)
        placed = [line for line in lines if type(line.get("step")) is int]
        kept = [line for line in placed if good(line["step"])]
        if lost := damaged + len(lines) - len(placed):
            self.tell(f"warning: {path}: dropped {lost} damaged line{'s' * (lost > 1)}")
        if len(kept) != len(lines) + damaged:
            write_atomically(path, "".join(map(to_line, kept)).encode())

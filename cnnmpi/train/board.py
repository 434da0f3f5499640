"""What TensorBoard shows of a run (--tensorboard): the numbers of its records, and pictures.

The events are written here and now, not by a thread of their own: nothing that was said is lost with the process.
"""

import importlib.util
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cnnmpi.common.arrays import Array
from cnnmpi.distributed import UserError

FOLDER = "tensorboard"


class Board:
    """Event files in the folder ``path``. Raises UserError where the package that writes them is missing.

    What cannot be written is told once, and the run goes on without it.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        if importlib.util.find_spec("tensorboardX") is None:
            raise UserError("--tensorboard needs the package tensorboardX: pip install 'cnnmpi[tensorboard]'")
        self.path, self.tell, self.failed = path, tell, False
        self._writer: Any = None  # as soon as there is something to write

    def step(self, line: dict[str, Any]) -> None:
        """Add a line of steps.jsonl."""
        self._add(line, {f"step/{name}": value for name, value in line.items() if name not in ("step", "epoch")})

    def epoch(self, line: dict[str, Any]) -> None:
        """Add a line of metrics.jsonl: train_loss as train/loss, seconds as epoch/seconds."""
        tags = {
            name: name.replace("_", "/", 1) for name in line if name.startswith(("train_", "val_", "test_", "time_"))
        }
        others = {name: f"epoch/{name}" for name in line.keys() - tags.keys() - {"step"}}
        self._add(line, {tag: line[name] for name, tag in (tags | others).items()})

    def image(self, tag: str, pixels: Array, step: int) -> None:
        """Add a picture (H, W, 3) of uint8."""
        if not self.failed:
            from tensorboardX import summary

            self._write([(step, summary.image(tag, pixels, dataformats="HWC"))])

    def go_on(self, step: int, steps: Iterable[dict[str, Any]], epochs: Iterable[dict[str, Any]]) -> None:
        """Have the curves go on after ``step``: readers forget what was written beyond it.

        The lines are those that the run's records kept. Where there is no event file yet, all of them are written.
        """
        epochs = list(epochs)
        fresh = not any(self.path.glob("*tfevents*"))
        complete = any(line["step"] == step for line in epochs)
        if not fresh:  # a step in the middle of an epoch is forgotten, too: with it an evaluation that has no line now
            self._write([(step + complete, None)])
        for line in steps:
            if fresh or (line["step"] == step and not complete):
                self.step(line)
        for line in epochs:
            if fresh:
                self.epoch(line)

    def close(self) -> None:
        """Let go of the file."""
        if self._writer:
            self._writer.close()

    def _add(self, line: dict[str, Any], values: dict[str, Any]) -> None:
        if not self.failed:
            from tensorboardX import summary

            numbers = {tag: value for tag, value in values.items() if type(value) in (int, float)}  # None: not finite
            self._write([(line["step"], summary.scalar(tag, float(value))) for tag, value in numbers.items()])

    def _write(self, summaries: Iterable[tuple[int, Any]]) -> None:
        """Write events; without a summary, one that marks a new beginning at its step."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        try:
            for step, summary in summaries:
                if self._writer is None:
                    self.path.mkdir(exist_ok=True)
                    # two starts in one second and on one host would otherwise take the same name
                    self._writer = EventsWriter(str(self.path / "events"), f".{step:012}")
                event = Event(wall_time=time.time(), step=step)
                if summary is None:
                    event.session_log.status = SessionLog.START
                else:
                    event.summary.CopyFrom(summary)
                self._writer.write_event(event)
            if self._writer:
                self._writer.flush()
        except OSError as error:
            self.failed = True
            self.tell(f"warning: {self.path} cannot be written: {error.strerror}")

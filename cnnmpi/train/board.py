"""What TensorBoard shows of a run (--tensorboard): the numbers of its records, and pictures.

The events are written here and now, not by a thread of their own: nothing that was said is lost with the process.
"""

import math
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cnnmpi.common.arrays import Array
from cnnmpi.common.files import append, remove_temporaries, replacing
from cnnmpi.common.lines import Line
from cnnmpi.distributed import UserError

FOLDER = "tensorboard"
BATCH = 1000  # lines that are written at a time, where all are written again


class Board:
    """An event file in the folder ``path``. Raises UserError where what writes it is missing, or does not work.

    What cannot be written is told once, and the run goes on without it.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        try:
            from tensorboardX import summary
            from tensorboardX.proto.event_pb2 import Event
            from tensorboardX.record_writer import masked_crc32c
        except Exception as error:  # of versions that do not fit, by whatever they run into
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"--tensorboard needs tensorboardX ({why}): pip install 'cnnmpi[tensorboard]'") from None
        self.path, self.tell = path, tell
        self._summary, self._Event, self._crc = summary, Event, masked_crc32c
        self._file: Path | None = None  # as soon as there is something to write
        self._failed = False

    def step(self, line: Line) -> None:
        """Add a line of steps.jsonl."""
        self._write(self._of_step(line))

    def epoch(self, line: Line) -> None:
        """Add a line of metrics.jsonl: train_loss as train/loss, seconds as epoch/seconds."""
        self._write(self._of_epoch(line))

    def image(self, tag: str, pixels: Array, step: int) -> None:
        """Add a picture (H, W, 3) of uint8."""
        self._write([self._event(step, self._summary.image(tag, pixels, dataformats="HWC"))])

    def rewrite(self, steps: Iterable[Line], epochs: Iterable[Line]) -> None:
        """Have the curves go on from these lines, those that a resumed run keeps, and forget what was beyond them.

        A new file takes the place of those that are there. It has their pictures, too, of epochs that are kept.
        """
        earlier = sorted(self.path.glob("*tfevents*"))
        kept = {0}

        def events() -> Iterator[Any]:
            for line in steps:
                yield from self._of_step(line)
            for line in epochs:
                kept.add(line["step"])
                yield from self._of_epoch(line)
            shown = set()  # a rewriting that was cut short left two files with the same pictures
            for path in earlier:
                for event in _pictures(path, self._Event):
                    tag = event.summary.value[0].tag
                    if event.step in kept and (tag, event.step) not in shown:
                        shown.add((tag, event.step))
                        yield event

        try:
            file = self._new_file()
            with replacing(file) as temporary:
                batch = self._beginning()
                for number, event in enumerate(events()):
                    batch += self._record(event)
                    if number % BATCH == 0:
                        append(temporary, batch)
                        batch = b""
                append(temporary, batch)
            for path in earlier:
                path.unlink()
            self._file = file
        except OSError as error:
            self._fail(error)

    # -- events ------------------------------------------------------------------------------------------------------

    def _of_step(self, line: Line) -> Iterator[Any]:
        return self._numbers(line["step"], {f"step/{k}": v for k, v in line.items() if k not in ("step", "epoch")})

    def _of_epoch(self, line: Line) -> Iterator[Any]:
        own = ("train_", "val_", "test_", "time_")
        tags = {name: name.replace("_", "/", 1) if name.startswith(own) else f"epoch/{name}" for name in line}
        return self._numbers(line["step"], {tags[name]: value for name, value in line.items() if name != "step"})

    def _numbers(self, step: int, values: dict[str, Any]) -> Iterator[Any]:
        for tag, value in values.items():
            if isinstance(value, int | float | np.number) and math.isfinite(value):
                yield self._event(step, self._summary.scalar(tag, float(value)))

    def _event(self, step: int, summary: Any) -> Any:
        event = self._Event(wall_time=time.time(), step=step)
        event.summary.CopyFrom(summary)
        return event

    # -- the file: records of TensorFlow, each its length, a checksum of that, an event, a checksum of that -----------

    def _record(self, event: Any) -> bytes:
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        return b"".join((length, struct.pack("<I", self._crc(length)), data, struct.pack("<I", self._crc(data))))

    def _beginning(self) -> bytes:
        return self._record(self._Event(wall_time=time.time(), file_version="brain.Event:2"))

    def _new_file(self) -> Path:
        """Return a name that readers sort behind those of earlier files."""
        self.path.mkdir(exist_ok=True)
        file = self.path / f"events.out.tfevents.{time.time_ns():020}.cnnmpi"
        remove_temporaries(file)
        return file

    def _write(self, events: Iterable[Any]) -> None:
        if self._failed:
            return
        try:
            beginning = b""
            if self._file is None:
                self._file, beginning = self._new_file(), self._beginning()
            append(self._file, beginning + b"".join(map(self._record, events)))
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self._failed = True
        self.tell(f"warning: {self.path} cannot be written: {error.strerror}; the run goes on without it")


def _pictures(path: Path, Event: Any) -> Iterator[Any]:
    """Yield the events of a file that hold pictures, up to where it is cut off."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            length = struct.unpack("<Q", head[:8])[0]
            if length + 4 > size - file.tell():
                return
            data = file.read(length)
            file.read(4)
            try:
                event = Event.FromString(data)
            except Exception:  # protobuf's, of damaged data
                return
            if any(value.HasField("image") for value in event.summary.value):
                yield event

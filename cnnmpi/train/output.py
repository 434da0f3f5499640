"""Output that may fail without ending a run: a closed pipe, a full disk, a terminal that went away."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class SteadyStream:
    """Writes to ``stream`` as long as that works; after the first failure, nowhere."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text``. Returns its length, whatever became of it."""
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            self._give_up()
        return len(text)

    def flush(self) -> None:
        """Pass on what was written."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def isatty(self) -> bool:
        """Return whether a terminal shows what is written."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return bool(self._stream.isatty())
        return False

    def _give_up(self) -> None:
        """Lead what is still buffered, and all that follows, to where nothing fails: Python flushes at its end."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Let no failing output end the program within the ``with``; a missing one (None) is nobody who listens."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a device, not a file
        sys.stdout, sys.stderr = (SteadyStream(nowhere if stream is None else stream) for stream in before)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before

"""Signals that ask a run to save and stop. A handler only sets a flag: the ranks decide together, at a step's end."""

import math
import signal
import time
from types import TracebackType
from typing import Any

AGAIN_S = 1.0  # a terminal and mpirun may both deliver one Ctrl-C: a second one comes later than this
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """While entered, SIGINT, SIGTERM and SIGUSR1 set ``asked``; a second SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked, self._asked_at = False, math.inf
        self._previous: dict[int, Any] = {}

    def receive(self, number: int, frame: Any = None) -> None:
        """Note the signal ``number``."""
        now = time.monotonic()
        if number == signal.SIGINT and now - self._asked_at > AGAIN_S:
            raise KeyboardInterrupt  # asked twice: at once
        self.asked, self._asked_at = True, min(now, self._asked_at)

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self.receive) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

"""Signals that ask a run to save and stop. A handler only sets a flag: the ranks decide together, at a step's end."""

import math
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from cnnmpi.train.progress import Progress

AGAIN_S = 1.0  # a terminal and mpirun may both deliver one Ctrl-C: a second one comes later than this
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
PATIENCE_S, PATIENCE_SLOW_S = 10.0, 60.0  # the least that a rank gets after a signal for what it is doing
TIMES = 3  # and as many times as long as anything has taken so far
LOOK_S = 0.2


def stop_signals() -> list[signal.Signals]:
    """Return the signals that ask for an end; not SIGHUP, where nohup started this process, which ignores it.

    Shells let what they start in the background ignore SIGINT: who sends it to a run all the same means it.
    """
    nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (nohup and number == signal.SIGHUP)]


class StopSignals:
    """From ``heed()`` to the end of the ``with``, SIGINT, SIGTERM, SIGUSR1 and SIGHUP set ``asked``.

    A second SIGINT raises KeyboardInterrupt.

    Python calls a handler between two of its instructions: never, where a library call does not return. So a thread
    hears of each signal, too, and watches the ``progress`` of this rank from then on. If there is none for longer than
    anything has taken so far (and than PATIENCE_S), it calls ``end`` with the signal's number and what the rank was
    doing.
    """

    def __init__(self, progress: Progress | None = None, end: Callable[[int, str], None] | None = None) -> None:
        self.asked, self._asked_at = False, math.inf
        self._progress, self._end = progress or Progress(), end
        self._previous: dict[int, Any] = {}
        self._closing = threading.Event()

    def receive(self, number: int, frame: Any = None) -> None:
        """Note the signal ``number``."""
        now = time.monotonic()
        if number == signal.SIGINT and now - self._asked_at > AGAIN_S:
            raise KeyboardInterrupt  # asked twice: at once
        self.asked, self._asked_at = True, min(now, self._asked_at)

    def __enter__(self) -> "StopSignals":
        return self

    def heed(self) -> None:
        """Begin to catch the signals."""
        self._previous = {number: signal.signal(number, self.receive) for number in stop_signals()}
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="cnnmpi-signals", daemon=True).start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        if not self._previous:
            return
        signal.set_wakeup_fd(self._previous_fd)
        self._told.close()  # the thread then reads the end
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    # -- on the thread -----------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        with self._heard:
            while number := self._heard.recv(1):
                if number[0] in self._previous and self._end is not None:
                    self._wait_for_the_end(number[0])

    def _wait_for_the_end(self, number: int) -> None:
        """Return when the run has ended; end it where it does not get on."""
        begun = self._progress.now
        since = time.monotonic()
        while not self._closing.wait(LOOK_S):
            now = self._progress.now
            if now.count != begun.count:
                begun, since = now, time.monotonic()
            least = PATIENCE_SLOW_S if now.slow else PATIENCE_S
            if time.monotonic() - since > max(least, TIMES * self._progress.longest):
                assert self._end is not None
                self._end(number, now.doing)

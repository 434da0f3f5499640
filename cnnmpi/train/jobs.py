"""Jobs that a command starts: the signals that ask it to stop reach them as well."""

import math
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from cnnmpi.train.signals import AGAIN_S, LOOK_S, stop_signals

ENDING_S = 10.0  # how long a job may take to end after a second Ctrl-C


class Jobs:
    """Within the ``with``, SIGINT, SIGTERM, SIGUSR1 and SIGHUP are passed on to each job that ``run`` has started.

    ``asked`` lists those that came. A job has a session of its own, so that Ctrl-C reaches it once, by this way. Those
    that do not end within ENDING_S after a second SIGINT are killed.
    """

    def __init__(self) -> None:
        self.asked: list[int] = []
        self._again_from, self._deadline = math.inf, math.inf
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Jobs":
        self._previous = {number: signal.signal(number, self._note) for number in stop_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, words: Sequence[str], **streams: Any) -> int:
        """Start a command, on any thread, and return its exit code when it has ended. Raises OSError.

        A signal that came before is passed on at once.
        """
        job = subprocess.Popen(words, start_new_session=True, **streams)
        passed = 0
        while True:
            try:
                return job.wait(LOOK_S)
            except subprocess.TimeoutExpired:
                news = self.asked[passed:]
            for number in news:
                job.send_signal(passed_on(number))
            passed += len(news)
            if time.monotonic() > self._deadline and job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now > self._again_from:
            self._deadline = min(self._deadline, now + ENDING_S)
        self._again_from = min(self._again_from, now + AGAIN_S)
        self.asked.append(number)


def passed_on(number: int) -> int:
    """Return the signal that a job gets for this one: MPICH's mpirun dies of SIGHUP, and kills its ranks."""
    return signal.SIGTERM if number == signal.SIGHUP else number

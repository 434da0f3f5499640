"""What a job says as it ends: it ends all the same where nobody hears, and is heard where somebody can."""

import contextlib
import fcntl
import os
import stat
import sys
import termios
import threading
import time
from collections.abc import Callable

SPEAK_S = 5.0  # how long the last words of a job may take
LOOK_S = 2e-4  # between two looks at what a reader has left


def say(text: str) -> None:
    """Print a line to standard error at once, or not at all: where nobody hears, the job does not end for that."""
    with contextlib.suppress(Exception):
        print(text, file=sys.stderr, flush=True)


def flush() -> None:
    """Pass on what was printed, if anybody takes it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # full, closed, a broken pipe, None, or something without flush()
            stream.flush()


def in_time(speak: Callable[[], None]) -> bool:
    """Call ``speak``, but do not wait long for it: a pipe that nobody reads lets nobody write.

    Returns whether it was heard. If not, the interpreter would wait at its end as well: only os._exit() does not.
    """
    thread = threading.Thread(target=speak, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter ends and makes no more threads
        return True
    thread.join(SPEAK_S)
    return not thread.is_alive()


def wait_for_readers(seconds: float) -> None:
    """Wait until nothing is left in the pipes that output goes to, for ``seconds`` at most.

    A launcher that hears of an abort throws away what it has not read yet, on a busy machine the whole explanation.
    """
    deadline = time.monotonic() + seconds
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # it is closed
            while stat.S_ISFIFO(os.fstat(descriptor).st_mode) and time.monotonic() < deadline:
                if not int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder):
                    break
                time.sleep(LOOK_S)

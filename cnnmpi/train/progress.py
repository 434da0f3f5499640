"""What a rank is doing: noted by the training loop, read by the threads that watch over it."""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """The ``count``-th thing that a rank began to do; ``slow`` if it may well take minutes."""

    doing: str = "start"
    slow: bool = False
    count: int = 0


class Progress:
    """The newest note, and the longest time in seconds that anything took so far."""

    def __init__(self) -> None:
        self.now, self.longest = Note(), 0.0
        self._since = time.monotonic()

    def note(self, doing: str, slow: bool = False) -> None:
        """Say what this rank begins to do; ``slow`` if that may well take minutes."""
        now = time.monotonic()
        self.longest, self._since = max(self.longest, now - self._since), now
        self.now = Note(doing, slow, self.now.count + 1)

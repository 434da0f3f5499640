"""Watching the ranks: one that no longer comes is named, and a job that hangs is ended instead of waiting for ever.

A thread of every rank says once a second what its rank is doing, to rank 0 and, in case that is the one, to rank 1.
A stopped or dead process says nothing; one that is alive but late says where it is. So the training loop sends nothing
and asks nothing: it only notes what it begins, by ``note()``.
"""

import itertools
import math
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from types import FrameType
from typing import Any

from cnnmpi.distributed import Ranks, say
from cnnmpi.layers import Layer
from cnnmpi.train.progress import Progress

INTERVAL_S = 1.0
REPORTERS = 2  # ranks 0 and 1 are told
SLOW = 10  # a save, or finding the data, may take this many times as long
SILENT = "gives no sign of life"
STACK_CHARS = 4000  # of a message: short enough that MPI sends it without waiting for the receiver

_tags = itertools.count()


@dataclass(frozen=True)
class Heartbeat:
    """What a rank says of itself."""

    rank: int
    host: str
    doing: str
    layer: str
    waiting: bool  # for other ranks
    slow: bool
    notes: int  # how many things it has begun
    stacks: str


@dataclass
class RankStatus:
    """The newest heartbeat of a rank, when it came, and since when the rank has begun nothing new."""

    beat: Heartbeat
    heard: float
    moved: float


class Watchdog:
    """Names the rank that keeps the others waiting after ``warning_s``; ends the job after ``limit_s``. 0: never.

    It works while it is entered; with one rank, or an MPI library that admits one thread only, it does nothing.
    """

    def __init__(
        self, ranks: Ranks, warning_s: float = 0, limit_s: float = 0, progress: Progress | None = None
    ) -> None:
        self.ranks, self.warning_s, self.limit_s = ranks, warning_s or math.inf, limit_s or math.inf
        self.interval = min(INTERVAL_S, self.warning_s / 4, self.limit_s / 4) if warning_s or limit_s else math.inf
        self.progress = progress or Progress()
        self._named: dict[int, str] = {}  # what was said of a rank
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        ranks = self.ranks
        if ranks.comm is None or self.interval == math.inf or ranks.mpi.Query_thread() < ranks.mpi.THREAD_MULTIPLE:
            return self
        self._tag = next(_tags)  # so that it does not hear of an earlier run in the same processes
        self._sends: list[Any] = [None] * REPORTERS
        hosts = ranks.gather(socket.gethostname())
        now = self._ticked = time.monotonic()
        self._statuses = [
            RankStatus(Heartbeat(r, host, "start", "", False, False, 0, ""), now, now) for r, host in enumerate(hosts)
        ]
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="cnnmpi-watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread and kind is None:
            self.note("the end")
            self.ranks.all_arrive(math.inf)  # watched to the last: MPI_Finalize waits for all
        self._closing.set()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join()

    def note(self, doing: str, slow: bool = False) -> None:
        """Say what this rank begins to do; ``slow`` if that may well take minutes."""
        self.progress.note(doing, slow)

    # -- on the thread -----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closing.wait(self.interval):
            beat = self._observe()
            for reporter in range(min(REPORTERS, self.ranks.size)):
                if reporter == self.ranks.rank:
                    self._hear(beat)
                elif self._sends[reporter] is None or self._sends[reporter].test()[0]:
                    self._sends[reporter] = self.ranks.aside.isend(beat, reporter, self._tag)
            if self.ranks.rank < REPORTERS:
                while self.ranks.aside.iprobe(tag=self._tag):
                    self._hear(self.ranks.aside.recv(tag=self._tag))
                self._judge()

    def _observe(self) -> Heartbeat:
        """Return what this rank is doing, from the stacks of its threads."""
        frames = sys._current_frames()
        frames.pop(threading.get_ident(), None)
        main = frames[self._main] if self._main in frames else next(iter(frames.values()))
        layers = [layer for frame in (main, *frames.values()) if (layer := _innermost_layer(frame))]
        stacks = [f"thread {number}:\n{''.join(traceback.format_stack(frame))}" for number, frame in frames.items()]
        note = self.progress.now
        waiting = main.f_code.co_qualname.startswith("Ranks.")  # the innermost call of ours is a collective
        text = "".join(stacks)[-STACK_CHARS:]
        layer = layers[0] if layers else ""
        host = socket.gethostname()
        return Heartbeat(self.ranks.rank, host, note.doing, layer, waiting, note.slow, note.count, text)

    def _hear(self, beat: Heartbeat) -> None:
        status, now = self._statuses[beat.rank], time.monotonic()
        if beat.notes != status.beat.notes:
            status.moved = now
        status.beat, status.heard = beat, now

    def _judge(self) -> None:
        """Name the ranks that are silent or late, once, and end the job where the limit has passed."""
        now, last = time.monotonic(), self._ticked
        self._ticked = now
        asleep = now - last - 4 * self.interval
        if asleep > 0:  # this process itself was stopped: that time proves nobody else's silence
            for status in self._statuses:
                status.heard, status.moved = min(status.heard + asleep, now), min(status.moved + asleep, now)
        if self.ranks.rank > 0 and now - self._statuses[0].heard < self.warning_s:
            return  # rank 0 is there, and speaks
        overdue = {status.beat.rank: since for status in self._statuses if (since := self._overdue(status, now))}
        for rank, (seconds, why) in overdue.items():
            news = rank not in self._named or why == SILENT != self._named[rank]  # one that was late may fall silent
            if news and seconds > self.warning_s:
                beat = self._statuses[rank].beat
                at = f"{beat.doing}, {beat.layer}" if beat.layer else beat.doing
                self._say(f"warning: {self._name(rank)} {why} for {seconds:.0f} s; last seen in {at}")
                self._named[rank] = why
        for rank in self._named.keys() - overdue:
            self._say(f"{self._name(rank)} goes on")
            del self._named[rank]
        if any(seconds > self.limit_s for seconds, _ in overdue.values()):
            self._say(f"error: nothing goes on for {self.limit_s:g} s: the job is ended. Where the ranks were:")
            for status in self._statuses:
                say(f"--- {self._name(status.beat.rank)}, {status.beat.doing}:\n{status.beat.stacks}")
            self.ranks.abort(1)

    def _overdue(self, status: RankStatus, now: float) -> tuple[float, str] | None:
        """Return for how many seconds a rank is missing, and how; None where all is well."""
        shortest = min(self.warning_s, self.limit_s)
        silent = now - status.heard
        if silent > shortest:
            return silent, SILENT
        waits = [now - other.moved for other in self._statuses if other.beat.waiting]
        all_wait = len(waits) == len(self._statuses)  # since the last of them began to
        others_wait = (min if all_wait else max)(waits, default=0.0)
        same = min(now - status.moved, others_wait) / (SLOW if status.beat.slow else 1)
        if same > shortest and (not status.beat.waiting or all_wait):
            return same, "is not where the others wait for it" if not all_wait else "waits for others that wait as well"
        return None

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {self.ranks.size} on {self._statuses[rank].beat.host}"

    def _say(self, text: str) -> None:
        say(f"cnnmpi: {text}")


def _innermost_layer(frame: FrameType | None) -> str:
    """Return the layer, made of no others, whose forward or backward a thread is in; "" where it is in none.

    Always "" where Python runs without GIL: to read the variables of a thread that goes on is then not safe.
    """
    while frame is not None and getattr(sys, "_is_gil_enabled", lambda: True)():  # known since Python 3.13
        owner = frame.f_locals.get("self") if frame.f_code.co_name in ("forward", "backward") else None
        if isinstance(owner, Layer) and not any(owner.children()):
            return f"{owner.name} {owner!r} {frame.f_code.co_name}".strip()
        frame = frame.f_back
    return ""

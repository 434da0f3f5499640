"""Where the time of a run goes: seconds of this rank, by what it was doing."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence

LOAD, COMPUTE, REDUCE, UPDATE, EVALUATE, SAVE = "loading", "computing", "reducing", "updating", "evaluating", "saving"
SHARED = (LOAD, COMPUTE, EVALUATE)  # work that the ranks share out; the rest each of them does, or waits for


class Phases:
    """Adds up seconds under names."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((LOAD, COMPUTE, REDUCE, UPDATE, EVALUATE, SAVE), 0.0)
        self.started = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what is done within the ``with``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started

    def move(self, seconds: float, source: str, name: str) -> None:
        """Count ``seconds`` that were counted as ``source`` as another phase."""
        self.seconds[source] -= seconds
        self.seconds[name] += seconds

    @property
    def whole(self) -> float:
        """Seconds since these were made."""
        return time.perf_counter() - self.started


def shares(phases: Sequence[Mapping[str, float]], whole: float) -> dict[str, float]:
    """Return what part of ``whole`` seconds the ranks spent on what: means of the ``phases``, {name: seconds}, of all.

    What no phase has counted is "other".
    """
    means = {name: sum(each[name] for each in phases) / len(phases) / whole for name in phases[0]}
    return means | {"other": max(0.0, 1 - sum(means.values()))}


def slowest(phases: Sequence[Mapping[str, float]]) -> tuple[int, float]:
    """Return the rank that computed longest, and by what part longer than the mean of all."""
    times = [each[LOAD] + each[COMPUTE] for each in phases]
    rank = max(range(len(times)), key=times.__getitem__)
    return rank, times[rank] * len(times) / sum(times) - 1 if sum(times) else 0.0

"""Randomness as a function, not a state: every draw of the program is keyed by what it is for.

A generator is made from (seed, purpose, where), used for that and thrown away. Nothing random needs to be saved, and
neither the number of ranks nor a resume can change a draw.
"""

import contextlib
import contextvars
import hashlib
from collections.abc import Iterator

import numpy as np

_first_draws: contextvars.ContextVar[np.random.Generator | None] = contextvars.ContextVar("first draws", default=None)


def generator(seed: int, purpose: str, *where: int) -> np.random.Generator:
    """Return the generator for one use, such as ``generator(seed, "order", epoch)``.

    ``seed`` and ``purpose`` choose the key of Philox4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
    2011) and ``where``, at most three non-negative integers, the upper words of its counter. Two different uses
    never share a stream: each has 2**64 blocks of the counter to itself.
    """
    if len(where) > 3 or any(index < 0 for index in where):
        raise ValueError(f"generator: at most three non-negative indices say where a draw belongs, got {where}")
    key = np.frombuffer(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:16], dtype="<u8")
    counter = np.array([0, *where] + [0] * (3 - len(where)), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@contextlib.contextmanager
def first_draws(seed: int) -> Iterator[None]:
    """Within the ``with``, layers that are made without a generator draw their weights from that for ``seed``.

    So a network needs no argument for it to start from the same weights again.
    """
    token = _first_draws.set(generator(seed, "init"))
    try:
        yield
    finally:
        _first_draws.reset(token)


def for_first_draws() -> np.random.Generator:
    """Return the generator of the innermost ``first_draws``; outside of all, a fresh one that nobody can repeat."""
    return _first_draws.get() or np.random.default_rng()

"""Randomness as a function, not a state: every draw of the program is keyed by what it is for.

A generator is made from (seed, purpose, where), used for that and thrown away. Nothing random needs to be saved, and
neither the number of ranks nor a resume can change a draw.
"""

import hashlib

import numpy as np


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

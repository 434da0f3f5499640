"""Which images are kept for testing, where the data do not say so."""

import hashlib
from collections.abc import Sequence


def drawn_for_test(names: Sequence[str], share: float, seed: int) -> list[bool]:
    """Return for each image of a class whether it is drawn for testing: a ``share`` of them, and of two at least one.

    The draw is a function of ``seed`` and the set of names alone: neither their order nor other classes change it, and
    an image that is added moves at most one other.
    """
    count = max(1, round(share * len(names))) if len(names) > 1 else 0

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{seed}/{names[index]}".encode("utf-8", "surrogateescape")).digest()

    chosen = set(sorted(range(len(names)), key=rank)[:count])
    return [index in chosen for index in range(len(names))]

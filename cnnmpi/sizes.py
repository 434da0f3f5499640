"""Sizes, counts and numbers as people give them, of Python's or of NumPy's kinds."""

import math
import operator
from typing import Any

Size = int | tuple[int, int]


def whole(name: str, value: Any) -> int:
    """Return ``value`` as an int, which never overflows as NumPy's do. Raises ValueError for no whole number."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None


def number(name: str, value: Any) -> float:
    """Return ``value`` as a float. Raises ValueError for what is no finite number."""
    try:
        if not isinstance(value, bool | str) and math.isfinite(value):
            return float(value)
    except TypeError:
        pass
    raise ValueError(f"{name} must be a finite number, got {value!r}")


def pair(size: Any) -> tuple[int, int]:
    """Return (height, width) of a size given as one whole number or two, of Python's or of NumPy's kinds.

    Raises ValueError for anything else, such as 3.0, True or three numbers.
    """
    if type(size) is int:  # at once: every operation asks several times
        return size, size
    try:
        one = not hasattr(size, "__len__") or getattr(size, "ndim", None) == 0  # an array of no dimensions is one
        height, width = (size, size) if one else size
        if isinstance(height, bool) or isinstance(width, bool):
            raise TypeError
        return operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        raise ValueError(f"a size must be one whole number, or two for height and width, got {size!r}") from None

"""Files of JSON objects, a line each, that grow while a program runs and may be cut off by its end."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cnnmpi.common.files import open_regular

LONGEST = 1 << 20  # bytes of a line; a longer one is damage, and nobody's memory is given to it
MOST_DAMAGED = 1000  # lines; a file with more is none of ours, and the rest of it is not read

Line = dict[str, Any]


def to_line(values: Line) -> bytes:
    """Return ``values`` as a line of strict JSON; numbers that are not finite become null."""
    return (json.dumps(_plain(values), allow_nan=False) + "\n").encode()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def each_line(path: Path) -> Iterator[tuple[bytes, Line | None]]:
    """Yield each line of ``path`` as it stands there, and the object in it; None for one that is damaged.

    A crash may have cut off the last one. Raises OSError where it cannot be read.
    """
    damaged = 0
    with open_regular(path) as file:
        while damaged < MOST_DAMAGED and (line := file.readline(LONGEST)):
            found = _object_in(line)
            damaged += found is None
            yield line, found


def read_lines(path: Path, most: int | None = None) -> tuple[list[Line], int]:
    """Return the objects in ``path``, and how many of its lines hold none.

    Of more than ``most`` objects every second, fourth, ... is returned. Raises OSError where it cannot be read.
    """
    found: list[Line] = []
    damaged, count, stride = 0, 0, 1
    for _, line in each_line(path):
        if line is None:
            damaged += 1
            continue
        if count % stride == 0:
            found.append(line)
        count += 1
        if most is not None and len(found) > most:
            found, stride = found[::2], 2 * stride
    return found, damaged


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _object_in(line: bytes) -> Line | None:
    try:
        value = json.loads(line, parse_constant=_refuse) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):  # also of UTF-8
        return None
    return value if isinstance(value, dict) else None

"""Files of JSON objects, a line each, that grow while a program runs and may be cut off by its end."""

import json
import math
from pathlib import Path
from typing import Any

from cnnmpi.common.files import open_regular
from cnnmpi.common.text import read_json

LONGEST = 1 << 20  # bytes of a line; a longer one is damage, and nobody's memory is given to it


def to_line(values: dict[str, Any]) -> str:
    """Return ``values`` as a line of strict JSON; numbers that are not finite become null."""
    return json.dumps(_finite(values), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects in ``path``, and how many of its lines are none, as the last one after a crash.

    Raises OSError where it cannot be read.
    """
    found, damaged = [], 0
    with open_regular(path) as file:
        while line := file.readline(LONGEST):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("it has no end")
                found.append(read_json(line.decode()))
            except ValueError:  # of UTF-8, too
                damaged += 1
    return found, damaged

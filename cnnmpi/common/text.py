"""Texts that may come from anyone."""

import json
import math
from typing import Any


def printable(text: str) -> str:
    """Return ``text``, escaped where it would break a line, or where a terminal could take it for commands."""
    return text if text.isprintable() else ascii(text)


def read_json(text: Any) -> dict[str, Any]:
    """Return the JSON object in ``text``. Raises ValueError for anything else, and for NaN and infinite numbers."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name:.40} is no number in JSON")

    def number(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits)

    if not isinstance(text, str):
        raise ValueError("it is no text")
    try:
        value = json.loads(text, parse_constant=refuse, parse_float=number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value

"""Texts that may come from anyone."""

import json
import math
import unicodedata
from typing import Any


def printable(text: object) -> str:
    """Return ``text`` in one line, with escapes for control characters, which a terminal may obey, and surrogates."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode() for c in text
    )


def read_json(text: Any) -> dict[str, Any]:
    """Return the JSON object in ``text``. Raises ValueError for anything else, and for numbers that no float can be."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name:.40} is no number in JSON")

    def number(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits)

    def whole(digits: str) -> int:
        number(digits)  # that no float can hold: it would be an error wherever one is made of it
        return int(digits)

    if not isinstance(text, str):
        raise ValueError("it is no text")
    try:
        value = json.loads(text, parse_constant=refuse, parse_float=number, parse_int=whole)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value

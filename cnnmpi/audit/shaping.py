"""What shapes a run: how that of two differs, or changed within one, as a person reads it."""

from collections.abc import Iterator, Mapping
from typing import Any

from cnnmpi.audit.record import NO_SHAPING, Record


def differences(a: Mapping[str, Any], b: Mapping[str, Any], of: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (name, value in ``a``, value in ``b``) of all that is not alike; settings are named one by one."""
    for name in sorted(a.keys() | b.keys()):
        if (name in NO_SHAPING or name == "fingerprint") and not of:
            continue
        first, second = a.get(name), b.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            yield from differences(first, second, of if name == "config" else name)
        elif first != second:
            yield (f"{of} {name}".strip(), shown(first), shown(second))


def changes(record: Record) -> Iterator[tuple[int, str, str, str]]:
    """Yield (step, name, before, afterwards) of what changed in a run after its beginning."""
    known = record.at(-1)
    for step, news in record.changes:
        for difference in differences(known, known | news):
            yield (step, *difference)
        known |= news


def shown(value: Any) -> str:
    """Return what shapes a run as a person reads it: of a digest the first 16 digits."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(each)}" for name, each in value.items()) or "none"
    text = "none" if value is None or value == "" else str(value)
    return text[:16] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text

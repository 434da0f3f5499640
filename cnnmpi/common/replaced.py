"""Watching the functions of an object from outside, so that its code need not know."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Have ``function`` in the place of ``owner.name``, of this instance or module alone, within the ``with``."""
    before, own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)

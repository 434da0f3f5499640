"""Read the pickles of CIFAR's python version as data: nothing that a pickle names is looked up, let alone called.

A pickle is a program for a small stack machine (the standard library's ``pickletools`` describes it). Of its
instructions these batches need some forty, which are interpreted here: dictionaries, lists, tuples, texts, numbers,
and uint8 arrays of NumPy.
"""

import pickletools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cnnmpi.common.text import printable
from cnnmpi.data.dataset import DataError

MOST_STEPS = 1_000_000  # instructions; several times as many as the largest official file has
CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
TEXTS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
OLD_BYTES = {"STRING", "SHORT_BINSTRING", "BINSTRING"}  # str of Python 2, which pickletools decodes as latin1
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
IGNORED = {"PROTO", "FRAME", "STOP"}
ADMITTED = {
    "numpy.core.multiarray _reconstruct": "array",
    "numpy._core.multiarray _reconstruct": "array",
    "numpy ndarray": "class",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
}


@dataclass(frozen=True)
class Name:
    """What a pickle asks for by its name: one of the values of ADMITTED."""

    of: str


@dataclass
class Built:
    """An array or a dtype in the making."""

    kind: str
    arguments: tuple[Any, ...]
    state: Any = field(default=())


def read_pickle(content: bytes) -> Any:
    """Return what a pickle of plain values and uint8 arrays holds; str of Python 2 as bytes.

    Raises DataError for whatever is damaged, or asks for anything else.
    """
    try:
        return _finished(_Machine().run(content))
    except DataError:
        raise
    except Exception as error:  # damaged pickles raise nearly anything
        raise DataError(f"truncated or damaged pickle ({type(error).__name__})") from error


class _Machine:
    """The stack machine that a pickle is a program for."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if step == MOST_STEPS:
                raise DataError(f"refused: the pickle has more than {MOST_STEPS} instructions")
            self.step(opcode.name, argument)
        return self.stack.pop()

    def step(self, name: str, argument: Any) -> None:
        stack, memo = self.stack, self.memo
        if name in VALUES or name in TEXTS or name in BYTES:
            stack.append(argument)
        elif name in OLD_BYTES:
            stack.append(argument.encode("latin1"))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name in TUPLES:
            stack.append(tuple(self.taken(TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(self.since_mark()))
        elif name == "LIST":
            stack.append(self.since_mark())
        elif name == "DICT":
            stack.append(self.set_items({}, self.since_mark()))
        elif name == "APPEND":
            self.append(self.taken(1))
        elif name == "APPENDS":
            self.append(self.since_mark())
        elif name == "SETITEM":
            self.set_items(stack[-3], self.taken(2))
        elif name == "SETITEMS":
            items = self.since_mark()
            self.set_items(stack[-1], items)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name == "GLOBAL":
            stack.append(admitted(argument))
        elif name == "STACK_GLOBAL":
            module, attribute = self.taken(2)
            stack.append(admitted(f"{module} {attribute}"))
        elif name == "REDUCE":
            callee, arguments = self.taken(2)
            stack.append(call(callee, arguments))
        elif name == "BUILD":
            built, state = self.taken(2)
            if not isinstance(built, Built):
                raise DataError("refused: the pickle sets the state of something that is no array")
            built.state = state
            stack.append(built)
        elif name not in IGNORED:
            raise DataError(f"refused: the pickle has the instruction {name}")

    def taken(self, count: int) -> list[Any]:
        start = len(self.stack) - count
        if start < 0:
            raise IndexError(count)
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def since_mark(self) -> list[Any]:
        return self.taken(len(self.stack) - self.marks.pop())

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise TypeError(type(target))
        target.extend(items)

    def set_items(self, target: Any, items: list[Any]) -> Any:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(target, dict) or not isinstance(key, str | bytes):  # tuples in tuples take ages to hash
                raise TypeError(type(key))
            target[key] = value
        return target


def admitted(name: str) -> Name:
    """Return what stands for ``name``, module and attribute."""
    if name not in ADMITTED:
        raise DataError(f"refused: the pickle asks for {printable(name.replace(' ', '.', 1)[:100])}")
    return Name(ADMITTED[name])


def call(callee: Any, arguments: Any) -> Any:
    """Return what ``callee`` would return in NumPy, as far as an array of bytes needs it."""
    if not isinstance(callee, Name) or not isinstance(arguments, tuple):
        raise TypeError(type(callee))
    if callee.of == "encode":
        text, encoding = arguments
        if encoding not in ("latin1", b"latin1"):
            raise LookupError(type(encoding))
        return text.encode("latin1")
    if callee.of not in ("array", "dtype"):
        raise TypeError(callee.of)
    return Built(callee.of, arguments)


def _finished(value: Any) -> Any:
    """Return ``value`` with the arrays in a dictionary made."""
    if not isinstance(value, dict):
        return value
    return {key: _array(item) if isinstance(item, Built) else item for key, item in value.items()}


def _array(built: Built) -> Any:
    _, shape, dtype, fortran, content = built.state
    if built.kind != "array" or not isinstance(dtype, Built) or dtype.arguments[0] not in ("u1", b"u1", "|u1", b"|u1"):
        raise DataError("refused: the pickle holds an array of another type than uint8")
    return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")

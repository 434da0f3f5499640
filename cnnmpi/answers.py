"""What a model says of image files, and the forms in which it is written: lines, CSV, JSON.

CSV and JSON take texts as they are, quoted as the format asks: a path that begins with "=" stays that path, and who
opens a table of strangers' files in a spreadsheet imports its columns as text.
"""

import contextlib
import csv
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

import numpy as np

from cnnmpi.common.arrays import Array
from cnnmpi.common.files import identity, remove_temporaries, replacing
from cnnmpi.common.text import printable
from cnnmpi.distributed import UserError

TOP = 3  # classes named of each image


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model says of the file ``path``: ``values`` (classes,), or None and the ``error``, why it has no image."""

    path: str
    values: Array | None
    error: str = ""


@dataclass(frozen=True)
class Meaning:
    """What a model's outputs stand for, by the ``loss`` that it was trained with; ``top`` is how many are asked for."""

    classes: Sequence[str]
    loss: str = "cross_entropy"
    top: int | None = None

    @property
    def names(self) -> tuple[str, str, str]:
        """What an output is called, several of them, and their values."""
        if self.loss == "mse":
            return "output", "outputs", "value"
        return ("label", "labels", "probability") if self.several else ("class", "classes", "probability")

    @property
    def several(self) -> bool:
        """Whether an image may have several of the classes at once, or none."""
        return self.loss == "binary_cross_entropy"

    def best(self, values: Array) -> list[int]:
        """Return the classes to print, those with the largest ``values`` (classes,) first: ``top``, 3 unless given."""
        order: list[int] = np.argsort(-values, kind="stable")[: self.top or TOP].tolist()
        return order

    def listed(self, values: Array) -> list[int]:
        """Return the classes to write to a file: as printed, but all where each is an answer of its own.

        So it is unless ``top`` is given: of several labels, the most probable first; of numbers, in the model's order.
        """
        if self.top is None and self.loss == "mse":
            return list(range(len(self.classes)))
        order: list[int] = np.argsort(-values, kind="stable").tolist()
        return order[: self.top or (len(order) if self.several else TOP)]

    def shown(self, k: int, value: float) -> str:
        """Return class ``k`` and its value as people read them."""
        return f"{printable(self.classes[k])} " + (f"{value:.3g}" if self.loss == "mse" else f"{value:.1%}")


class Writer(Protocol):
    """Writes answers in some form, one after the other."""

    def add(self, answer: Answer) -> None:
        """Write the next answer."""

    def end(self) -> None:
        """Write what belongs after the last one, and let the file take its place."""


class Lines:
    """A line on standard output for each image that could be read."""

    def __init__(self, meaning: Meaning) -> None:
        self.meaning = meaning

    def add(self, answer: Answer) -> None:
        """Print a line."""
        if (values := answer.values) is not None:
            said = "  ".join(self.meaning.shown(k, values[k]) for k in self.meaning.best(values))
            print(f"{printable(answer.path)}: {said}")

    def end(self) -> None:
        """Nothing."""


class Csv:
    """A table as RFC 4180 has it: path, the classes and their values in pairs of columns, error.

    With three classes, the header is path,class,probability,class_2,probability_2,class_3,probability_3,error.
    """

    def __init__(self, file: "Output", meaning: Meaning) -> None:
        self.file, self.rows, self.meaning = file, csv.writer(file), meaning
        name, _, value = meaning.names
        count = len(meaning.listed(np.zeros(len(meaning.classes))))
        numbers = ("", *(f"_{k}" for k in range(2, count + 1)))
        self.head = ["path", *(column + number for number in numbers for column in (name, value)), "error"]
        self.rows.writerow(self.head)

    def add(self, answer: Answer) -> None:
        """Write a row."""
        if (values := answer.values) is None:
            cells: list[Any] = [""] * (len(self.head) - 2)
        else:
            cells = [cell for k in self.meaning.listed(values) for cell in (self.meaning.classes[k], short(values[k]))]
        self.rows.writerow([answer.path, *cells, answer.error])

    def end(self) -> None:
        """Let the file take its place."""
        self.file.close()


class Json:
    """A list of objects: {path, classes: [{class, probability}, ...]}, or {path, error}; an object a line.

    A value that is not finite is null. Bytes of a path that are not valid UTF-8 are escapes that Python's json and
    ``os.fsencode`` make the same bytes of.
    """

    def __init__(self, file: "Output", meaning: Meaning) -> None:
        self.file, self.meaning, self.before = file, meaning, "[\n"

    def add(self, answer: Answer) -> None:
        """Write an object."""
        name, names, value = self.meaning.names
        said: dict[str, Any] = {"path": answer.path}
        if (values := answer.values) is None:
            said["error"] = answer.error
        else:
            said[names] = [
                {name: self.meaning.classes[k], value: short(values[k]) if math.isfinite(values[k]) else None}
                for k in self.meaning.listed(values)
            ]
        self.file.write(self.before + json.dumps(said, allow_nan=False))
        self.before = ",\n"

    def end(self) -> None:
        """Close the list, and let the file take its place."""
        self.file.write("\n]\n" if self.before == ",\n" else "[]\n")
        self.file.close()


def short(value: Any) -> float:
    """Return a float32 as the shortest number that is rounded to it: 0.1, not 0.10000000149011612."""
    return float(str(value))


class Output:
    """Standard output for the path "-", else a new file that takes the place of ``path`` when it is closed.

    Until then nothing is seen there, and nothing stays if the ``with`` ends by an error before. The file beside it is
    made at the beginning: a place that cannot be written is known before anything is computed. ``replaced`` is the
    ``identity`` of the file that is there already, if one is. ``option`` names it in errors. Raises UserError.
    """

    def __init__(self, option: str, path: str) -> None:
        self.option, self.name = option, path
        self.path = None if path == "-" else Path(os.path.realpath(path))  # what a link leads to is replaced, not it
        self.replaced = None if self.path is None else identity(self.path)
        self._stack, self._file = contextlib.ExitStack(), sys.stdout

    def spare(self, path: str | Path, what: str) -> None:
        """Raise UserError where ``path``, which is ``what``, would be replaced, by whatever name."""
        if self.replaced is not None and self.replaced == identity(path):
            raise UserError(f"{self.option} {self.name}: is {what}: name another file")

    def __enter__(self) -> "Output":
        if self.path is None:
            return self
        with self._explained():
            if self.path.exists() and not self.path.is_file():  # a folder; or a device, which a file would replace
                raise OSError("it is not a file (standard output is called -)")
            remove_temporaries(self.path)
            with contextlib.ExitStack() as stack:
                temporary = stack.enter_context(replacing(self.path))
                file: TextIO = temporary.open("x", encoding="utf-8", errors="backslashreplace", newline="")
                self._file = stack.enter_context(file)
                self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._explained():
            self._stack.__exit__(kind, error, at)

    def close(self) -> None:
        """Let the file take its place."""
        with self._explained():
            self._stack.close()

    def write(self, text: str) -> int:
        """Write ``text``; return its length."""
        if self.path is None:
            return self._file.write(text)
        with self._explained():
            return self._file.write(text)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"{self.option} {self.name}: cannot be written: {reason}") from error

"""What all commands print through: text that any terminal, pipe, file or encoding can take, and tables of it."""

import contextlib
import functools
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from cnnmpi.common.text import printable as printable

Main = TypeVar("Main", bound=Callable[..., int])

PIPE_CLOSED = 141  # what a shell reports of a program that SIGPIPE ended
INTERRUPTED = 130  # and of one that Ctrl-C ended
EVERY_S = 10.0  # between two lines of progress, where no terminal shows a bar


def prepare() -> None:
    """Let this process's output show by an escape what its encoding cannot write, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # a notebook's or a test's stream; a closed one
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def command(main: Main) -> Main:
    """Return the ``main`` of a command, made to end quietly where its output does, as in ``| head -1``, and by Ctrl-C.

    It then returns 141, or 130. Output that cannot be written for another reason, such as a full disk, is told in one
    line, and the code is 2.
    """

    @functools.wraps(main)
    def guarded(*args: Any, **kwargs: Any) -> int:
        prepare()
        try:
            try:
                return main(*args, **kwargs)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # here: what fails as the interpreter ends nobody can catch
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            _lead_nowhere(sys.stdout)
            return PIPE_CLOSED
        except OSError as error:
            if error.filename is not None:  # not of a stream
                raise
            _lead_nowhere(sys.stdout)
            complain("cnnmpi", f"the output cannot be written: {error.strerror or error}")
            return 2

    return guarded  # type: ignore[return-value]


def _lead_nowhere(stream: Any) -> None:
    """Let what is left in the stream's buffer, and what follows, go nowhere: Python flushes again at its end."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # a stream without a file
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)


class SteadyStream:
    """Writes to ``stream`` as long as that works; after the first failure, nowhere."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text``. Returns its length, whatever became of it."""
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            _lead_nowhere(self._stream)
        return len(text)

    def flush(self) -> None:
        """Pass on what was written."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            _lead_nowhere(self._stream)

    def isatty(self) -> bool:
        """Return whether a terminal shows what is written."""
        return is_terminal(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Let no failing output end the program within the ``with``: a closed pipe, a full disk, a terminal that went away.

    A missing stream (None) is nobody who listens.
    """
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - a device, not a file
        sys.stdout, sys.stderr = (SteadyStream(nowhere if stream is None else stream) for stream in before)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def parted(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a command's own arguments, and those after ``--``, which are for the program that it starts."""
    at = list(args).index("--") if "--" in args else len(args)
    return list(args[:at]), list(args[at + 1 :])


def is_script(arguments: Sequence[str]) -> bool:
    """Return whether what is to be trained is a script of a person's own, and its arguments."""
    return bool(arguments) and arguments[0].endswith(".py")


def complain(program: str, text: object) -> None:
    """Print one line of error, as far as that is possible."""
    with contextlib.suppress(OSError):
        print(f"{program}: error: {printable(text)}", file=sys.stderr)


@contextlib.contextmanager
def told_warnings() -> Iterator[None]:
    """Print the warnings that are raised within the ``with`` on standard error at its end: a line each, each once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text in dict.fromkeys(printable(warning.message) for warning in caught):
        print(f"warning: {text}", file=sys.stderr)


def is_terminal(stream: Any) -> bool:
    """Say whether a person reads ``stream`` as it is written; also of streams that cannot tell."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # None, a notebook's, or a closed one
        return False


@contextlib.contextmanager
def progress(total: int, program: str, what: str = "files") -> Iterator[Callable[[int], None]]:
    """Show on standard error how many of ``total`` are done: by a bar on a terminal, else by a line every 10 s.

    Yields what is to be told how many more are done.
    """
    if is_terminal(sys.stderr):
        columns = (what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # lines above the bar are not broken, and standard output stays what it is: the results may go there
        console = Console(file=sys.stderr, soft_wrap=True)
        with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
            task = bar.add_task("", total=total)
            yield lambda count: bar.advance(task, count)
        return
    done, began = 0, time.monotonic()
    told = began

    def advance(count: int) -> None:
        nonlocal done, told
        done, now = done + count, time.monotonic()
        if now - told >= EVERY_S:
            told, speed = now, done / (now - began)
            rate = f"{speed:.0f}/s" if speed >= 1 else f"{60 * speed:.1f} a minute"
            print(f"{program}: {done} of {total} {what}, {rate}", file=sys.stderr, flush=True)

    yield advance


def table(head: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None) -> str:
    """Return lines of aligned cells: the first column begins at the left, the others end at the right.

    Nothing is cut. Columns that ``width`` has no room for stand below, in blocks of their own that begin with the
    first column again. Without ``width``, standard output's if it is a terminal, else there is room for all.
    """
    if width is None and is_terminal(sys.stdout):
        width = shutil.get_terminal_size().columns
    cells = [[printable(cell) for cell in row] for row in (head, *rows)]
    first, *others = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    blocks: list[list[int]] = [[]]
    for index, size in enumerate(others, 1):
        used = first + sum(2 + others[i - 1] for i in blocks[-1])
        if blocks[-1] and width is not None and used + 2 + size > width:
            blocks.append([])
        blocks[-1].append(index)

    def line(row: Sequence[str], block: Sequence[int]) -> str:
        text = row[0] + " " * (first - cell_len(row[0]))
        return text + "".join(" " * (2 + others[i - 1] - cell_len(row[i])) + row[i] for i in block)

    return "\n\n".join("\n".join(line(row, block).rstrip() for row in cells) for block in blocks)

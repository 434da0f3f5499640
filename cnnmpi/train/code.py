"""A person's own code: networks, losses and augmentations, named as FILE.py:NAME or MODULE:NAME, or handed over.

Nothing is imported because a file says so: only what the command line, a settings file that it names, or a script asks
for. What goes wrong in such code is told in one line, with its file and line.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from cnnmpi import functional
from cnnmpi.distributed import UserError
from cnnmpi.models import MODELS

LOSSES = {
    "cross_entropy": functional.cross_entropy_loss,
    "binary_cross_entropy": functional.binary_cross_entropy_loss,
    "mse": functional.mse_loss,
}
OURS: dict[str, Mapping[str, Any]] = {"model": MODELS, "loss": LOSSES, "augment": {}}  # what the settings can name
PACKAGE = Path(__file__).parents[1]
PYTHON, INSTALLED = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
_importing: list[str] = []  # what is being imported: a script that trains while it is imported is told so


class Code:
    """Finds code by its name: what was handed over under that name, or what a file or a module holds.

    ``used`` maps (setting, name) of what was asked for, and is a person's code, to what it is.
    """

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        self.given = dict(given or {})
        self.used: dict[tuple[str, str], Any] = {}

    def name(self, setting: str, thing: Any) -> str:
        """Return the name of a class or function, under which it can be found from now on; a name stays as it is.

        What is one of OURS has its name there. Several of one name, such as partials of one function, are numbered.
        """
        if isinstance(thing, str):
            return thing
        for name, known in itertools.chain(OURS[setting].items(), self.given.items()):
            if known == thing:
                return name
        inner, file = _unwrapped(thing), source_file(thing)
        module = inner.__module__
        loose = module == "__main__" or getattr(sys.modules.get(module), "__cnnmpi_spec__", None)
        plain = name = f"{_shown(file) if file and loose else module}:{inner.__qualname__}"
        numbers = itertools.count(2)
        while name in self.given:
            name = f"{plain}#{next(numbers)}"
        self.given[name] = thing
        return name

    def find(self, setting: str, name: str) -> Any:
        """Return what ``name`` means: handed over, one of OURS, or imported. Raises UserError naming the setting."""
        ours, kind = OURS[setting], "CLASS" if setting == "model" else "FUNCTION"
        if name in self.given:
            found = self.given[name]
        elif name in ours:
            return ours[name]
        elif ":" in name:
            found = _imported(f"--{setting}", name)
        else:
            known = f"one of {', '.join(ours)}, or " if ours else ""
            raise UserError(f"--{setting} must be {known}FILE.py:{kind} or MODULE:{kind}, got {name!r}")
        if not callable(found):
            raise UserError(f"--{setting} {name}: expected a {kind.lower()}, got a {type(found).__name__}")
        self.used[setting, name] = found
        return found

    def sources(self) -> dict[str, str]:
        """Return {setting: sha256 of the source} of all code of a person's that was asked for.

        Of a setting that names several functions these are their sha256, one after the other.
        """
        sources: dict[str, str] = {}
        for setting, name in sorted(self.used):
            sources[setting] = sources.get(setting, "") + source_sha256(self.used[setting, name])
        return sources


def source_file(thing: Any) -> Path | None:
    """Return the file that a class or function was written in, or one behind functools.partial; None in a notebook."""
    thing = _unwrapped(thing)
    file = getattr(sys.modules.get(getattr(thing, "__module__", "")), "__file__", None)
    return Path(file) if file else None


def named_files(name: str | None, thing: Any) -> list[Path]:
    """Return the files of ``thing``, code that was found by ``name``: the one named, and that it was written in."""
    named, written = (name or "").rpartition(":")[0], source_file(thing)
    return [*([Path(named)] if named else []), *([written] if written else [])]


def source_sha256(thing: Any) -> str:
    """Return the sha256 of the file that ``thing`` was written in, or of its own lines in a notebook; "" if unknown."""
    file = source_file(thing)
    with contextlib.suppress(OSError, TypeError):
        text = file.read_bytes() if file else inspect.getsource(_unwrapped(thing)).encode()
        return hashlib.sha256(text).hexdigest()
    return ""


@contextlib.contextmanager
def explained(what: str, remedy: str = "") -> Iterator[None]:
    """Turn whatever a person's code raises within the ``with`` into one line that says ``what``, why and where."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{what}: {reason(error)}" + (f"; {remedy}" if remedy else "")) from error


def reason(error: BaseException) -> str:
    """Return an error in one line: its type and text, and the line of a person's code that it comes from."""
    text = " ".join(str(error).split())
    where = ""
    if isinstance(error, SyntaxError):
        text, where = error.msg, f" ({error.filename}, line {error.lineno})"
    else:
        trace = traceback.extract_tb(error.__traceback__)
        frames = [frame for frame in trace if not _lies_in(frame.filename, PACKAGE, PYTHON)]
        theirs = [frame for frame in frames if not _lies_in(frame.filename, INSTALLED)]
        for frame in (theirs or frames)[-1:]:
            where = f" ({_shown(Path(frame.filename))}, line {frame.lineno})"
    if isinstance(error, SystemExit):
        text = f"it ends the program: put what it runs below if __name__ == '__main__' {text}".rstrip()
    return f"{type(error).__name__}: {text:.1000}{where}" if text else f"{type(error).__name__}{where}"


def importing() -> str:
    """Return the name of what is being imported for a run; "" outside of that."""
    return _importing[-1] if _importing else ""


def _imported(setting: str, name: str) -> Any:
    where, _, attribute = name.rpartition(":")
    _importing.append(name)
    try:
        with explained(f"{setting} {name}: cannot be imported"):
            module = _load_file(Path(where)) if where.endswith(".py") else _load_module(where)
    finally:
        _importing.pop()
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise UserError(f"{setting} {name}: {where} has no {attribute}; it has {', '.join(own) or 'nothing'}")
    return found


def _load_file(path: Path) -> ModuleType:
    """Import the file at ``path``, once; files beside it can be imported by it, as if it were a script."""
    path = path.resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    for module in list(sys.modules.values()):
        if getattr(module, "__cnnmpi_spec__", None) == str(path):
            return module
    main = sys.modules["__main__"]
    if getattr(main, "__file__", None) and Path(str(main.__file__)).resolve() == path:
        return main  # the script itself: its classes are there
    name = path.stem if path.stem not in sys.modules else f"{path.stem} in {path.parent}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # as the name ends in .py
    module = importlib.util.module_from_spec(spec)
    module.__cnnmpi_spec__ = str(path)  # type: ignore[attr-defined]
    sys.modules[name] = module  # pickle, dataclasses and inspect look there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:  # of a console script
        sys.path.append(str(Path.cwd()))
    return importlib.import_module(name)


def _unwrapped(thing: Any) -> Any:
    while hasattr(thing, "func"):
        thing = thing.func
    return thing if hasattr(thing, "__module__") and hasattr(thing, "__qualname__") else type(thing)


def _lies_in(filename: str, *folders: Path) -> bool:
    return filename.startswith("<frozen") or any(folder in Path(filename).parents for folder in folders)


def _shown(path: Path) -> str:
    """Return a path as a person would type it here."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here)) if here in path.parents else str(path)

"""The folder of a run: locked while the run lasts, written by rank 0 alone."""

import fcntl
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnnmpi import checkpoint
from cnnmpi.checkpoint import CheckpointError
from cnnmpi.distributed import Ranks, UserError
from cnnmpi.train.report import METRICS
from cnnmpi.train.setup import Say, as_user_errors
from cnnmpi.train.state import Arrays, read_progress

LAST, PREVIOUS, BEST = "last.h5", "previous.h5", "best.h5"

Saved = tuple[Path, Arrays, dict[str, Any]]  # a checkpoint: where it is, its arrays, its attributes


class RunFolder:
    """Where a run keeps what it produces. All ranks call the methods; rank 0 acts, the others hear of failures."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self.path, self.ranks = path.resolve(), ranks
        self._lock: Any = None

    def open(self, fresh: bool, config: str, say: Say) -> None:
        """Make and lock the folder and write ``config``. What another run left there is moved aside, if ``fresh``."""

        def make() -> None:
            try:
                if self.path.exists():
                    self._take_lock()
                if fresh and any((self.path / name).exists() for name in (LAST, PREVIOUS, BEST, METRICS)):
                    self._move_aside(say)
                self.path.mkdir(parents=True, exist_ok=True)
                self._take_lock()
                (self.path / "config.toml").write_text(config)
            except OSError as error:
                raise UserError(f"--out {self.path} cannot be used: {error.strerror}") from None

        self.ranks.on_rank0(make)

    def save(self, name: str, content: Callable[[], tuple[Arrays, dict[str, Any]]]) -> None:
        """Write the checkpoint ``name`` of the arrays and attributes that ``content`` returns, on rank 0."""

        def write() -> None:
            with as_user_errors():
                keep = self.path / PREVIOUS if name == LAST else None
                checkpoint.save(self.path / name, *content(), keep=keep)

        self.ranks.on_rank0(write)

    def close(self) -> None:
        """Let other jobs have the folder."""
        if self._lock:
            self._lock.close()

    def _take_lock(self) -> None:
        self.close()
        self._lock = (self.path / "lock").open("w")
        weakref.finalize(self, self._lock.close)  # of a run that never begins
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {self.path}: another job is training there: wait for it, or name another") from None
        except OSError:
            pass  # a file system without locks

    def _move_aside(self, say: Say) -> None:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(aside)
        say(f"the earlier run in {self.path} was moved to {aside}")


def find_checkpoint(resume: str, folder: Path, say: Say) -> Saved | None:
    """Return the checkpoint that ``--resume`` means: a named file, or for "auto" the newest good one in ``folder``.

    None for "auto" where there is none yet. A damaged one is named and the one before it is used. Raises UserError
    where none is good, or where one does not come from training.
    """
    with as_user_errors():
        if resume != "auto":
            found: Saved | None = (Path(resume), *checkpoint.load(resume))
        else:
            found = _newest(folder, say)
    if found is None:
        say(f"--resume: no checkpoint in {folder} yet: starting from the beginning")
        return None
    with as_user_errors():
        read_progress(found[0], found[2])
    return found


def _newest(folder: Path, say: Say) -> Saved | None:
    present = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
    for path in present:
        try:
            return path, *checkpoint.load(path)
        except CheckpointError as error:
            say(f"warning: {error}")
    if present:
        raise CheckpointError(f"{folder}: no checkpoint in it is good; start anew without --resume")
    return None

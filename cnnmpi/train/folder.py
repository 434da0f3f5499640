"""The folder of a run: locked while the run lasts, written by rank 0 alone."""

import fcntl
import itertools
import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnmpi import checkpoint
from cnnmpi.checkpoint import CheckpointError
from cnnmpi.checkpoint.atomic import sync_directory
from cnnmpi.distributed import Ranks, UserError
from cnnmpi.report import CONFIG, METRICS, STARTS, STEPS
from cnnmpi.train.board import FOLDER as BOARD
from cnnmpi.train.closing import PAGE
from cnnmpi.train.errors import as_user_errors
from cnnmpi.train.fingerprint import FINGERPRINT
from cnnmpi.train.ledger import LEDGER
from cnnmpi.train.state import Arrays, SavedRun, read_saved_run

LAST, PREVIOUS, BEST = "last.h5", "previous.h5", "best.h5"
KEPT = "kept"  # the folder of numbered checkpoints
# What a run writes, in the order in which it is moved aside. A move that is cut short leaves --resume the earlier run,
# as it was, or nothing: never an older checkpoint of it. Where config.toml has come, the move was completed.
WRITTEN = (PREVIOUS, LAST, BEST, KEPT, METRICS, STEPS, STARTS, LEDGER, FINGERPRINT, PAGE, BOARD, CONFIG)


@dataclass(frozen=True)
class Saved:
    """A checkpoint of training: where it is, its arrays, and what it says of the run."""

    path: Path
    arrays: Arrays
    run: SavedRun


class RunFolder:
    """Where a run keeps what it produces. All ranks call the methods; rank 0 acts, the others hear of failures."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self.path, self.ranks = Path(os.path.realpath(path)), ranks  # a loop of links is an error of open()
        self._lock: Any = None

    def open(self, fresh: bool, config: str, tell: Callable[[str], None]) -> None:
        """Make and lock the folder and write ``config``.

        If ``fresh``, what another run wrote there is moved into a folder of its own inside, and all else left alone.
        """
        content = config.encode(errors="surrogateescape")  # paths need not be Unicode

        def make() -> None:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._take_lock()
                if fresh:
                    self._move_aside(content, tell)
                else:
                    self._check_room()
                with as_user_errors():
                    checkpoint.write_atomically(self.path / CONFIG, content)
            except OSError as error:
                where = f" ({error.filename})" if error.filename not in (None, str(self.path)) else ""
                raise UserError(f"--out {self.path} cannot be used: {error.strerror}{where}") from None

        self.ranks.on_rank0(make)

    def save(self, name: str, content: Callable[[], tuple[Arrays, dict[str, Any]]]) -> None:
        """Write the checkpoint ``name`` of the arrays and attributes that ``content`` returns, on rank 0."""

        def write() -> None:
            with as_user_errors():
                keep = self.path / PREVIOUS if name == LAST else None
                checkpoint.save(self.path / name, *content(), keep=keep)

        self.ranks.on_rank0(write)

    def keep(self, name: str, content: Callable[[], tuple[Arrays, dict[str, Any]]], most: int) -> None:
        """Write the numbered checkpoint ``name``, then remove all but the ``most`` newest ones, unless that is 0.

        At no moment there are fewer than were promised.
        """

        def prepare() -> None:
            with as_user_errors():
                (self.path / KEPT).mkdir(exist_ok=True)

        def thin_out() -> None:
            numbered = sorted((self.path / KEPT).glob("epoch-*.h5"), key=lambda path: (len(path.name), path.name))
            for path in numbered[:-most] if most else ():
                path.unlink(missing_ok=True)

        self.ranks.on_rank0(prepare)
        self.save(name, content)
        self.ranks.on_rank0(thin_out)

    def close(self) -> None:
        """Let other jobs have the folder."""
        if self._lock:
            self._lock.close()

    def _take_lock(self) -> None:
        self._lock = (self.path / "lock").open("a")  # of which nothing is lost if it should be somebody's
        weakref.finalize(self, self._lock.close)  # of a run that never begins
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {self.path}: another job is training there: wait for it, or name another") from None
        except OSError:
            pass  # a file system without locks

    def _check_room(self) -> None:
        """Raise UserError unless another checkpoint has room: better now than after an epoch."""
        sizes = [(self.path / name).stat().st_size for name in (LAST, PREVIOUS) if (self.path / name).exists()]
        needed, free = max(sizes, default=0), shutil.disk_usage(self.path).free
        if free < needed:
            raise UserError(f"--out {self.path}: {free >> 10} KiB free, a checkpoint takes {needed >> 10}: make room")

    def _move_aside(self, config: bytes, tell: Callable[[str], None]) -> None:
        """Move what another run wrote into the folder old-1, or the next number; a ``config`` like ours may stay."""
        paths = map(self.path.joinpath, WRITTEN)
        there = [path for path in paths if (path.is_dir() if path.name in (BOARD, KEPT) else path.is_file())]
        if not there or (there == [self.path / CONFIG] and there[0].read_bytes() == config):
            return
        names = {path.name for path in there}
        for number in itertools.count(1):
            aside = self.path / f"old-{number}"
            try:
                aside.mkdir()
            except FileExistsError:  # somebody's, or another run's, unless it is the beginning of this very move
                if aside.is_symlink() or not aside.is_dir():
                    continue
                if not {path.name for path in aside.iterdir()} <= {*WRITTEN} - names - {CONFIG}:
                    continue
            break
        for path in there:
            path.rename(aside / path.name)
            sync_directory(aside)
            sync_directory(self.path)
        tell(f"the earlier run in {self.path} was moved to {aside}")


def kept_name(epoch: int) -> str:
    """Return the name, in the folder of a run, of the checkpoint that is kept of an epoch."""
    return f"{KEPT}/epoch-{epoch:04}.h5"


def find_checkpoint(resume: str, folder: Path, tell: Callable[[str], None]) -> Saved | None:
    """Return the checkpoint that ``--resume`` means: a named file, or for "auto" the newest good one in ``folder``.

    None for "auto" where there is none yet. A damaged one is named and the one before it is used. Raises UserError
    where none is good, or where one does not come from training.
    """
    with as_user_errors():
        if resume != "auto":
            return _load(Path(resume))
        found = _newest(folder, tell)
    if found is None:
        tell(f"--resume: no checkpoint in {folder} yet: starting from the beginning")
    return found


def _load(path: Path) -> Saved:
    arrays, attributes = checkpoint.load(path)
    return Saved(path, arrays, read_saved_run(path, attributes))


def _newest(folder: Path, tell: Callable[[str], None]) -> Saved | None:
    present = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
    for path in present:
        try:
            return _load(path)
        except CheckpointError as error:
            tell(f"warning: {error}")
    if present:
        raise CheckpointError(f"{folder}: no checkpoint in it is good; start anew without --resume")
    return None

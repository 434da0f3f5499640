"""Replacing a file so that its path never shows anything but the complete old or the complete new content."""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """Yield a path beside ``path`` for the body to fill; afterwards it replaces ``path``, if the body did not fail.

    The order is: the body writes, fsync, rename, fsync the directory. ``keep``, in the same directory, then holds what
    was at ``path`` before. Who may read and write is as it was. Whatever fails, ``path`` (after a crash between the two
    renames: ``keep``) holds a complete file, and no temporary stays behind, unless the process is killed. Raises
    OSError.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with contextlib.suppress(OSError):  # there was none, or this file system knows no modes
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        sync(temporary)
        if keep and not path.exists():
            keep = None
        if keep:
            path.replace(keep)
        try:
            temporary.replace(path)
        except BaseException:
            if keep:
                keep.replace(path)
            raise
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def identity(path: str | Path) -> tuple[int, int] | None:
    """Return what a file has in common with itself by all its names and links, and with no other; None if not there."""
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def remove_temporaries(path: Path) -> None:
    """Remove what killed processes left beside ``path``. Only for files that no other process is writing."""
    for stale in path.parent.glob(".*.tmp"):
        if stale.name.startswith(f".{path.name}."):
            stale.unlink(missing_ok=True)


def write(path: Path, blob: bytes) -> None:
    """Create ``path`` with the bytes ``blob``."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write_all(descriptor, blob)
    finally:
        os.close(descriptor)


def append(path: Path, blob: bytes, wait: bool = False) -> None:
    """Add the bytes ``blob`` to the end of ``path``, which is made if need be: all of them or none.

    With ``wait`` they have reached the disk afterwards. Raises OSError.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        before = os.fstat(descriptor).st_size
        try:
            _write_all(descriptor, blob)
            if wait:
                sync_open(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, blob: bytes) -> None:
    rest = memoryview(blob)
    while rest:
        written = os.write(descriptor, rest)  # may take less than it was given
        if written == 0:
            raise OSError(errno.EIO, "a write made no progress")
        rest = rest[written:]


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's names, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_open(descriptor)
    finally:
        os.close(descriptor)


def sync_open(descriptor: int) -> None:
    """Wait until what an open file holds has reached the disk."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading. Raises OSError, also for what is none: a pipe would let us wait for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a file", str(path))
    return path.open("rb")

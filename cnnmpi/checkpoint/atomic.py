"""Writing a file so that its path never shows anything but the complete old or the complete new content."""

import contextlib
import errno
import os
import uuid
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or trusted: one line with the file, what is wrong and what to do."""


def write_atomically(path: str | Path, blob: bytes, keep: Path | None = None) -> None:
    """Replace the file at ``path`` by ``blob``; ``keep``, in the same directory, then holds what was there before.

    The order is write, fsync, rename, fsync the directory. Whatever fails, ``path`` (after a crash between the two
    renames: ``keep``) holds a complete file, and no temporary stays behind. Those of a killed process are removed by
    the next write. Raises CheckpointError with the system's reason.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        for stale in path.parent.glob(".*.tmp"):
            if stale.name.startswith(f".{path.name}."):
                stale.unlink(missing_ok=True)
        write_and_sync(temporary, blob)
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
        sync_directory(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{path}: cannot be written: {reason}; check the directory, rights and space") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_and_sync(path: Path, blob: bytes) -> None:
    """Create ``path`` with the bytes ``blob`` and wait until they have reached the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rest = memoryview(blob)
        while rest:
            written = os.write(descriptor, rest)  # may take less than it was given
            if written == 0:
                raise OSError(errno.EIO, "a write made no progress")
            rest = rest[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(descriptor)

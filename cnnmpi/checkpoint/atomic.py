"""Writing the files of a run, whole or not at all."""

from pathlib import Path

from cnnmpi.common.files import remove_temporaries, replacing, sync, write


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or trusted: one line with the file, what is wrong and what to do."""


def write_atomically(path: str | Path, blob: bytes, keep: Path | None = None) -> None:
    """Replace the file at ``path`` by ``blob``; ``keep``, in the same directory, then holds what was there before.

    Whatever fails, ``path`` holds a complete file: see ``cnnmpi.common.files.replacing``. Temporaries of a killed
    process are removed by the next write. Raises CheckpointError with the system's reason.
    """
    path = Path(path)
    try:
        remove_temporaries(path)
        with replacing(path, keep) as temporary:
            write(temporary, blob)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{path}: cannot be written: {reason}; check the directory, rights and space") from error


def write_and_sync(path: Path, blob: bytes) -> None:
    """Create ``path`` with the bytes ``blob`` and wait until they have reached the disk."""
    write(path, blob)
    sync(path)


sync_directory = sync

"""The launcher of several ranks, as options name it: its words, and where it is."""

import shlex
import shutil
import sys
from pathlib import Path

from cnnmpi.distributed.errors import UserError


def find_launcher(mpirun: str) -> list[str]:
    """Return the words of ``--mpirun``: the path of the launcher, and any arguments of its own.

    It is looked for in PATH, then beside this interpreter, where that of a virtual environment is, also if it was not
    activated. A path with spaces needs no quotes. Raises UserError where there is no launcher.
    """
    name, *arguments = [mpirun] if shutil.which(mpirun) else split_words("--mpirun", mpirun) or [""]
    path = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        raise UserError(f"--mpirun {mpirun}: no such command; pip install 'cnnmpi[mpich]' brings mpirun")
    return [path, *arguments]


def split_words(option: str, text: str) -> list[str]:
    """Return the words of an option's ``text``, parted as a shell does. Raises UserError for an open quotation."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{option} {text}: {str(error).lower()}") from None

"""How a job of several ranks begins and ends: all of them together."""

import contextlib
import functools
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from cnnmpi.distributed.errors import RemoteError, UserError, exit_code
from cnnmpi.distributed.last_words import in_time, say
from cnnmpi.distributed.ranks import Ranks
from cnnmpi.machine import SHARED_MEMORY, free_mib

# What launchers tell each process they start: how many there are. mpirun under SLURM starts its own helpers by srun,
# one a host, so SLURM's number counts only where no mpirun has given one.
MPIRUN_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
SLURM_SIZE = "SLURM_STEP_NUM_TASKS"  # of srun; SLURM_NTASKS is set as well where nothing but a shell was started
MPIRUN_LOCAL_SIZES = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
MPIRUN_LOCAL_RANKS = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
# Of /dev/shm, for MPICH's own buffers: measured with 2 to 12 ranks of MPICH 5; with less it may crash in MPI_Init.
MPI_MIB, MPI_MIB_A_RANK = 16, 6
ARRIVE_S = 2.0  # how long a rank with an error waits for the others to come with the same one
PASS_ON_S = 1.0  # how long the launcher gets to pass on a warning, before the ranks may crash


def start() -> Ranks:
    """Return the ranks that the launcher started; a single one where there was no launcher or no mpi4py.

    Raises UserError where a launcher started several processes that do not find each other.
    """
    told = launched()
    expected = max(told.values(), default=1)
    _warn_of_little_shared_memory()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        if expected > 1:
            raise UserError(
                f"the launcher started {expected} processes, but mpi4py cannot be used ({error}): "
                "pip install 'cnnmpi[mpich]', or start one process without mpirun"
            ) from None
        return Ranks()
    if MPI.COMM_WORLD.Get_size() == 1:
        if expected > 1:
            names = ", ".join(f"{name}={value}" for name, value in told.items())
            raise UserError(
                f"the launcher started {expected} processes ({names}), but each is alone in its MPI world, "
                f"of {' '.join(MPI.Get_library_version().split()[:3])}: use the mpirun of the MPI that mpi4py uses"
            )
        return Ranks()
    ranks = _world(MPI)
    _install_hooks(ranks)
    return ranks


@functools.cache
def _world(mpi: Any) -> Ranks:
    """Return all ranks; once, as MPI has a limited number of communicators."""
    return Ranks(mpi.COMM_WORLD, mpi)


def launched() -> dict[str, int]:
    """Return what the launcher, if there was one, says of the number of processes: {variable: number}."""
    told = {name: int(os.environ[name]) for name in MPIRUN_SIZES if os.environ.get(name, "").isdigit()}
    slurm = os.environ.get(SLURM_SIZE, "")
    return told or ({SLURM_SIZE: int(slurm)} if slurm.isdigit() and int(slurm) > 1 else {})


def little_shared_memory(ranks: int) -> str:
    """Return what is to be done where ``ranks`` of MPI may crash for lack of shared memory; "" where all is well.

    They do so without a word when their own buffers find no room.
    """
    needed = MPI_MIB + MPI_MIB_A_RANK * ranks
    with contextlib.suppress(OSError):
        if (free := free_mib(SHARED_MEMORY)) < needed:
            return (
                f"{SHARED_MEMORY} has {free} MiB free, but MPI may need {needed} for {ranks} ranks: if they crash at "
                "the start (bus error, segmentation fault), enlarge it: docker run --shm-size=1g"
            )
    return ""


def _warn_of_little_shared_memory() -> None:
    """Say it once on each host where several ranks start."""
    ranks = next((int(value) for name in MPIRUN_LOCAL_SIZES if (value := os.environ.get(name, "")).isdigit()), 1)
    first = next((os.environ[name] for name in MPIRUN_LOCAL_RANKS if name in os.environ), "0") == "0"
    if ranks > 1 and first and (problem := little_shared_memory(ranks)):
        say(f"cnnmpi: warning: {problem}")
        time.sleep(PASS_ON_S)  # a launcher whose ranks crash throws away what it has not passed on yet


def _install_hooks(ranks: Ranks) -> None:
    """Let an exception that nobody catches, on any thread, end all ranks: else the others wait for ever."""

    def on_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        _explain(ranks, error)
        ranks.abort(exit_code(error))

    sys.excepthook = on_exception
    threading.excepthook = lambda args: on_exception(args.exc_type, args.exc_value or SystemExit(1), None)


def _explain(ranks: Ranks, error: BaseException) -> bool:
    """Say how this rank ends, and return whether anybody takes what it says."""
    who = f"rank {ranks.rank} of {ranks.size} on {socket.gethostname()}" if ranks.size > 1 else "cnnmpi"

    def speak() -> None:
        if isinstance(error, UserError):
            say(f"cnnmpi: error: {error}")
        elif isinstance(error, SystemExit | RemoteError | KeyboardInterrupt):
            say(f"{who}: ended by {error!r}")
        else:
            say(f"{who}:\n{''.join(traceback.format_exception(error)).rstrip()}")

    return in_time(speak)


@contextlib.contextmanager
def failing_together(ranks: Ranks, crash: int = 1) -> Iterator[None]:
    """Run the body of a program so that its failure on one rank ends all ranks within seconds, explained once.

    An error of the user's that all ranks meet, and a sys.exit of all, end in an orderly way. Any other exception, and
    what the other ranks do not share, abort the job. ``crash`` is the exit code where nobody foresaw the error.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None and ranks.size == 1:
            raise  # of the output, such as a closed pipe: see console.command
        shared = isinstance(error, UserError | RemoteError | SystemExit) and ranks.all_arrive(ARRIVE_S)
        heard = True
        if not shared or (ranks.rank == 0 and isinstance(error, UserError)):
            heard = _explain(ranks, error)
        code = exit_code(error)
        if code == 1 and not isinstance(error, SystemExit):
            code = crash
        if heard and (shared or ranks.size == 1):
            sys.exit(code)
        ranks.abort(code or crash)

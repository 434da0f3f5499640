"""Ranks: who works together, what they agree on, and the sum of their gradients. The only file that imports mpi4py.

ranks = start()                       # the ranks that mpirun started; a single one without mpirun
reducer = ExactReducer(ranks, shards, sizes)
reducer.add(shard, grads, statistics, counts)      # for each shard of this rank; 1-D arrays of these sizes
grads, statistics, counts = reducer.reduce()       # the sums over all shards: equal bits on every rank
"""

import contextlib
import fcntl
import functools
import hashlib
import math
import os
import socket
import stat
import sys
import termios
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from cnnmpi.machine import (
    SHARED_MEMORY,
    allowance,
    cores_of,
    create_shared,
    free_mib,
    open_shared,
    shared_folders,
)

Array = np.ndarray[Any, np.dtype[Any]]
Result = TypeVar("Result")

# What launchers tell each process they start: how many there are. mpirun under SLURM starts its own helpers by srun,
# one a host, so SLURM's number counts only where no mpirun has given one.
MPIRUN_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
SLURM_SIZE = "SLURM_STEP_NUM_TASKS"  # of srun; SLURM_NTASKS is set as well where nothing but a shell was started
MPIRUN_LOCAL_SIZES = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
MPIRUN_LOCAL_RANKS = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
# Of /dev/shm, for MPICH's own buffers: measured with 2 to 12 ranks of MPICH 5; with less it may crash in MPI_Init.
MPI_MIB, MPI_MIB_A_RANK = 16, 6
SPEAK_S = 5.0  # how long the last words of a job may take
ARRIVE_S = 2.0  # how long a rank with an error waits for the others to come with the same one
PASS_ON_S = 1.0  # how long the launcher gets to pass on a warning, before the ranks may crash
READ_S = 2.0  # how long a rank waits before it aborts until the launcher has read what it said
IDLE_S = 2e-4  # between two looks at a reduction under way, where ranks share cores


class UserError(Exception):
    """Something that the user can mend: shown as one line, without a traceback."""

    code = 2  # the exit code that it stands for


class NotFiniteError(UserError):
    """A sum over the ranks had a part that was not finite or too large; all ranks meet it at the same step."""


class DisagreementError(UserError):
    """Ranks that must hold the same no longer do: not the user's doing, and gone after a restart."""

    code = 1


class RemoteError(Exception):
    """Another rank failed and has said why; this one ends as well."""

    def __init__(self, code: int) -> None:
        super().__init__(f"rank 0 ended with code {code}")
        self.code = code


class Ranks:
    """The processes that train together. With ``comm`` None it is this process alone, and nothing is sent.

    ``rank`` of ``size`` in all; ``local_rank`` of ``local_size`` on this host.
    """

    def __init__(self, comm: Any = None, mpi: Any = None) -> None:
        self.comm, self.mpi = comm, mpi
        self.rank: int = comm.Get_rank() if comm else 0
        self.size: int = comm.Get_size() if comm else 1
        self.node = comm.Split_type(mpi.COMM_TYPE_SHARED) if comm else None
        self.local_rank: int = self.node.Get_rank() if self.node else 0
        self.local_size: int = self.node.Get_size() if self.node else 1
        self.cores_on_node = cores_of(self.gather_node(allowance()))
        self.oversubscribed = self.local_size > self.cores_on_node
        self.aside: Any = comm.Dup() if comm else None  # for messages that must not meet those of the training

    # -- objects: small things, by pickle ----------------------------------------------------------------------------

    def gather_node(self, value: Result) -> list[Result]:
        """Return the ``value`` of every rank on this host, on each of them."""
        return list(self.node.allgather(value)) if self.node else [value]

    def gather(self, value: Result) -> list[Result]:
        """Return the ``value`` of every rank, on each rank."""
        return list(self.comm.allgather(value)) if self.comm else [value]

    def on_node(self, function: Callable[[], Result]) -> Result:
        """Call ``function`` on one rank of each host and return its result on all ranks of that host."""
        result = self.gather_node(function() if self.local_rank == 0 else None)[0]
        return result  # type: ignore[return-value]

    def on_rank0(self, function: Callable[[], Result]) -> Result:
        """Call ``function`` on rank 0 and return its result on every rank.

        Where it raises, rank 0 raises that, and the others RemoteError: all end, one explains.
        """
        if self.comm is None:
            return function()
        if self.rank == 0:
            try:
                result = function()
            except BaseException as error:
                self.comm.bcast(("error", exit_code(error)))
                raise
            self.comm.bcast(("result", result))
            return result
        kind, value = self.comm.bcast(None)
        if kind == "error":
            raise RemoteError(value)
        return value  # type: ignore[no-any-return]

    def agree(self, what: str, value: object) -> None:
        """Raise UserError on every rank unless all have an equal ``value`` (compared by its repr)."""
        mine = hashlib.sha256(repr(value).encode()).hexdigest()
        theirs = self.gather((mine, socket.gethostname()))
        different = [f"rank {r} ({host})" for r, (digest, host) in enumerate(theirs) if digest != theirs[0][0]]
        if different:
            raise UserError(f"the ranks differ in {what}: {', '.join(different)} from rank 0; start all alike")

    def agree_on_arrays(self, when: str, arrays: Mapping[str, Array]) -> None:
        """Raise DisagreementError on every rank unless all hold the same bits in ``arrays``, {name: array}.

        It names the ranks whose arrays differ from those of most, and the first array that does.
        """
        if self.comm is None:
            return
        digests = {name: hashlib.sha256(array.ravel(order="K").data).hexdigest() for name, array in arrays.items()}
        everything = hashlib.sha256(repr(digests).encode()).hexdigest()
        if len(set(self.gather(everything))) == 1:
            return
        theirs = self.gather((everything, digests, socket.gethostname()))
        usual, _ = Counter(everything for everything, _, _ in theirs).most_common(1)[0]
        reference = next(digests for everything, digests, _ in theirs if everything == usual)
        different = []
        for rank, (everything, digests, host) in enumerate(theirs):
            if everything != usual:
                first = next((name for name in reference if digests.get(name) != reference[name]), "more arrays")
                different.append(f"rank {rank} ({host}) in {first}")
        raise DisagreementError(
            f"{when}: the ranks no longer hold the same numbers: {', '.join(different)} from the others; memory or "
            "software failed there. The checkpoints before are good: go on with --resume, better without that host"
        )

    # -- arrays: large things, as buffers ----------------------------------------------------------------------------

    def broadcast(self, array: Array) -> None:
        """Overwrite the contiguous ``array`` with rank 0's, in place."""
        if self.comm is not None:
            self.comm.Bcast(array, root=0)

    def sum(self, array: Array) -> None:
        """Overwrite the contiguous ``array`` with the sum over all ranks, in place."""
        if self.comm is None:
            return
        if not self.oversubscribed:
            self.comm.Allreduce(self.mpi.IN_PLACE, array)
            return
        request = self.comm.Iallreduce(self.mpi.IN_PLACE, array)
        while not request.Test():  # a waiting rank that spins would take the core from one that computes
            time.sleep(IDLE_S)

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on any rank."""
        count = np.array([flag], np.int64)
        self.sum(count)
        return bool(count[0])

    def shared_array(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return one zeroed array that all ranks of this host share. Call on all ranks, in the same order.

        Each rank lets go of it as of any other array; with the last one the memory is free again. Raises UserError on
        every rank where a host has no room for it.
        """
        if self.node is None:
            return np.zeros(shape, dtype)
        nbytes = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
        path, problem = self.on_node(lambda: _create_shared(nbytes))
        memory = None
        if path is not None:
            try:
                memory = open_shared(path, nbytes)
            except OSError as error:
                problem = f"{path} of the first rank of this host cannot be opened ({error.strerror}): let all see it"
        problems = [problem for problem in self.gather(problem and f"{socket.gethostname()}: {problem}") if problem]
        if path is not None and self.local_rank == 0:
            path.unlink()  # all that wanted to have opened it
        if problems or memory is None:
            raise UserError(problems[0])
        return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)

    def node_barrier(self) -> None:
        """Wait until all ranks of this host are here, and see what they wrote into shared arrays."""
        if self.node is not None:
            self.node.Barrier()

    def all_arrive(self, seconds: float) -> bool:
        """Return whether all ranks come to this call within ``seconds``. For the end of the program only."""
        if self.aside is None:
            return True
        request, deadline = self.aside.Ibarrier(), time.monotonic() + seconds
        while not request.Test():
            if time.monotonic() > deadline:
                return False
            time.sleep(IDLE_S)
        return True

    def default_threads(self) -> int:
        """Return how many threads each rank of this host may use so that together they fill its cores."""
        return max(1, self.cores_on_node // self.local_size)

    def abort(self, code: int) -> NoReturn:
        """End all ranks at once, whatever becomes of their output."""
        _in_time(_flush)
        if self.comm is not None and self.size > 1:
            with contextlib.suppress(Exception):
                _wait_for_readers(READ_S)
                self.comm.Abort(code)
        os._exit(code)


def _create_shared(nbytes: int) -> tuple[Path | None, str]:
    """Return the file to share, or why there is none."""
    try:
        return create_shared(nbytes), ""
    except OSError as error:
        rooms = ", ".join(f"{folder} ({free_mib(folder)} MiB free)" for folder in shared_folders())
        return None, (
            f"no room for {math.ceil(nbytes / (1 << 20))} MiB of data that the ranks share ({error.strerror}) in "
            f"{rooms}: enlarge /dev/shm (docker run --shm-size=1g), or name a folder with more room in TMPDIR"
        )


def _wait_for_readers(seconds: float) -> None:
    """Wait until nothing is left in the pipes that output goes to, for ``seconds`` at most.

    A launcher that hears of an abort throws away what it has not read yet, on a busy machine the whole explanation.
    """
    deadline = time.monotonic() + seconds
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # it is closed
            while stat.S_ISFIFO(os.fstat(descriptor).st_mode) and time.monotonic() < deadline:
                if not int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)), sys.byteorder):
                    break
                time.sleep(IDLE_S)


# -- start and end -----------------------------------------------------------------------------------------------------


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


def say(text: str) -> None:
    """Print a line to standard error at once, or not at all: where nobody hears, the job does not end for that."""
    with contextlib.suppress(Exception):
        print(text, file=sys.stderr, flush=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # full, closed, a broken pipe, None, or something without flush()
            stream.flush()


def _in_time(speak: Callable[[], None]) -> None:
    """Call ``speak``, but do not wait long for it: a pipe that nobody reads lets nobody write."""
    thread = threading.Thread(target=speak, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter ends and makes no more threads
        return
    thread.join(SPEAK_S)


def _install_hooks(ranks: Ranks) -> None:
    """Let an exception that nobody catches, on any thread, end all ranks: else the others wait for ever."""

    def on_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        _explain(ranks, error)
        ranks.abort(exit_code(error))

    sys.excepthook = on_exception
    threading.excepthook = lambda args: on_exception(args.exc_type, args.exc_value or SystemExit(1), None)


def exit_code(error: BaseException) -> int:
    """Return the exit code that an exception stands for: mostly 2 for the user's errors, 130 for Ctrl-C, else 1."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, UserError | RemoteError):
        return error.code
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _explain(ranks: Ranks, error: BaseException) -> None:
    who = f"rank {ranks.rank} of {ranks.size} on {socket.gethostname()}" if ranks.size > 1 else "cnnmpi"

    def speak() -> None:
        if isinstance(error, UserError):
            say(f"cnnmpi: error: {error}")
        elif isinstance(error, SystemExit | RemoteError | KeyboardInterrupt):
            say(f"{who}: ended by {error!r}")
        else:
            say(f"{who}:\n{''.join(traceback.format_exception(error)).rstrip()}")

    _in_time(speak)


@contextlib.contextmanager
def failing_together(ranks: Ranks) -> Iterator[None]:
    """Run the body of a program so that its failure on one rank ends all ranks within seconds, explained once.

    An error of the user's that all ranks meet, and a sys.exit of all, end in an orderly way. Any other exception, and
    what the other ranks do not share, abort the job.
    """
    try:
        yield
    except BaseException as error:
        shared = isinstance(error, UserError | RemoteError | SystemExit) and ranks.all_arrive(ARRIVE_S)
        if not shared or (ranks.rank == 0 and isinstance(error, UserError)):
            _explain(ranks, error)
        if shared or ranks.size == 1:
            sys.exit(exit_code(error))
        ranks.abort(exit_code(error) or 1)


# -- the gradient reduction --------------------------------------------------------------------------------------------


class Reducer:
    """Sums arrays over shards and ranks as float32: fast, but the last bits depend on the number of ranks.

    A rank calls ``add`` for each of its shards, if it has any, then ``reduce`` with all others. Values that are not
    finite, or too large for the sum, raise NotFiniteError on every rank alike.

    Args:
        ranks: who takes part.
        shards: how many shards there are on all ranks together.
        sizes: of the 1-D arrays of a shard.
        names: (name, size) of the consecutive pieces of the first array, to say where a value is bad.

    """

    dtype: Any = np.float32
    limit = float(np.finfo(np.float32).max) / 2

    def __init__(self, ranks: Ranks, shards: int, sizes: Sequence[int], names: Sequence[tuple[str, int]] = ()) -> None:
        self.ranks, self.shards, self.sizes, self.names = ranks, shards, list(sizes), list(names)
        # one message: the arrays one after another, then a flag for each shard, 0 where all is well
        self._message = np.zeros(sum(sizes) + shards, self.dtype)
        self._lock = threading.Lock()
        self._total, self._flags = self._message[: sum(sizes)], self._message[sum(sizes) :]

    def add(self, shard: int, *arrays: Array | None) -> None:
        """Add the arrays of one shard; they are left alone. None adds nothing. Any thread may call."""
        start = 0
        for index, (array, size) in enumerate(zip(arrays, self.sizes, strict=True)):
            total = self._total[start : start + size]
            if array is not None and not self._accumulate(array, total) and not self._flags[shard]:
                self._flags[shard] = self._blame(array) if index == 0 else len(self.names) + 1
            start += size

    def reduce(self, step: int = 0) -> list[Array]:
        """Return the sums over all shards of all ranks as float64 arrays, and start anew at zero.

        Raises NotFiniteError naming the step, the shard and the first bad piece where a value was not finite or beyond
        ``limit``; the next sum starts at zero all the same.
        """
        self.ranks.sum(self._message)
        total, flags = self._decode(self._total), self._flags.copy()
        self._message[...] = 0
        for shard in np.flatnonzero(flags):
            blamed = int(flags[shard]) - 1
            known = blamed < len(self.names)
            where = f"the gradient of {self.names[blamed][0]}" if known else "the loss or a running statistic"
            raise NotFiniteError(f"step {step}, shard {shard}: {where} is not finite or beyond {self.limit:.3g}")
        return np.split(total, np.cumsum(self.sizes)[:-1])

    def _blame(self, gradient: Array) -> int:
        """Return 1 + the index of the named piece that holds the first bad value."""
        start = 0
        for index, (_, size) in enumerate(self.names):
            if not np.all(np.abs(gradient[start : start + size]) <= self.limit):
                return index + 1
            start += size
        return len(self.names) + 1

    def _accumulate(self, array: Array, total: Array) -> bool:
        """Add ``array`` to ``total``; return whether all its values were in range."""
        with self._lock:
            total += array
        return bool(np.all(np.abs(array) <= self.limit))

    def _decode(self, total: Array) -> Array:
        return total.astype(np.float64)


class ExactReducer(Reducer):
    """Sums in 64-bit fixed point with 40 fractional bits: the same bits for any number of ranks and any order.

    Integer sums do not depend on their order, floating-point sums do. Each value is rounded once to a multiple of
    2**-40 (9e-13; a float32 gradient above 7.7e-6 loses nothing), then all arithmetic is exact. Values may reach
    2**22 / shards, about 500,000 with 8 shards.
    """

    dtype = np.int64
    ONE = 2.0**40
    CHUNK = 1 << 16  # values converted at a time: few enough to stay in the caches, many enough not to hurry threads

    def __init__(self, ranks: Ranks, shards: int, sizes: Sequence[int], names: Sequence[tuple[str, int]] = ()) -> None:
        super().__init__(ranks, shards, sizes, names)
        self.limit = 2.0**62 / self.ONE / shards

    def _accumulate(self, array: Array, total: Array) -> bool:
        array = array.astype(np.result_type(array, np.float32), copy=False)  # counts may be integers
        scaled_chunk, whole_chunk = np.empty(self.CHUNK, array.dtype), np.empty(self.CHUNK, np.int64)
        for start in range(0, array.size, self.CHUNK):
            part = array[start : start + self.CHUNK]
            if not max(part.max(), -part.min()) <= self.limit:  # also where one is NaN
                return False
            scaled, whole = scaled_chunk[: part.size], whole_chunk[: part.size]
            np.multiply(part, part.dtype.type(self.ONE), out=scaled)  # by a power of two, so nothing is rounded
            np.rint(scaled, out=scaled)
            np.copyto(whole, scaled, casting="unsafe")
            with self._lock:
                total[start : start + self.CHUNK] += whole
        return True

    def _decode(self, total: Array) -> Array:
        values: Array = np.multiply(total, 1 / self.ONE)  # float64; a power of two rounds nothing
        return values

"""The processes that train together: what they exchange, agree on and share."""

import contextlib
import hashlib
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from cnnmpi.common.arrays import Array
from cnnmpi.distributed.errors import DisagreementError, RemoteError, UserError, exit_code
from cnnmpi.distributed.last_words import flush, in_time, wait_for_readers
from cnnmpi.machine import allowance, cores_of, create_shared, free_mib, open_shared, shared_folders

Result = TypeVar("Result")

READ_S = 2.0  # how long a rank waits before it aborts until the launcher has read what it said
IDLE_S = 2e-4  # between two looks at a reduction under way, where ranks share cores


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
        in_time(flush)
        if self.comm is not None and self.size > 1:
            with contextlib.suppress(Exception):
                wait_for_readers(READ_S)
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

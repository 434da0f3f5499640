"""Ranks: who works together, what they agree on, and the sum of their gradients. The only room that imports mpi4py.

ranks = start()                       # the ranks that mpirun started; a single one without mpirun
reducer = ExactReducer(ranks, shards, sizes)
reducer.add(shard, grads, statistics, counts)      # for each shard of this rank; 1-D arrays of these sizes
grads, statistics, counts = reducer.reduce()       # the sums over all shards: equal bits on every rank
"""

from cnnmpi.distributed.errors import DisagreementError, NotFiniteError, RemoteError, UserError
from cnnmpi.distributed.job import ARRIVE_S, failing_together, launched, little_shared_memory, start
from cnnmpi.distributed.last_words import say
from cnnmpi.distributed.launcher import find_launcher, split_words
from cnnmpi.distributed.ranks import Ranks
from cnnmpi.distributed.reduction import DeviceReducer, ExactReducer, Reducer

__all__ = [
    "ARRIVE_S",
    "DeviceReducer",
    "DisagreementError",
    "ExactReducer",
    "NotFiniteError",
    "Ranks",
    "Reducer",
    "RemoteError",
    "UserError",
    "failing_together",
    "find_launcher",
    "launched",
    "little_shared_memory",
    "say",
    "split_words",
    "start",
]

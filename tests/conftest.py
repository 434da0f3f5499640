"""The same tests in one process and under mpirun; a rank that fails takes the others with it."""

import os
import sys
from pathlib import Path

import pytest

from cnnmpi import functional
from cnnmpi.distributed import Ranks, start

os.environ.setdefault("OMPI_MCA_rmaps_base_oversubscribe", "1")
os.environ.setdefault("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")
functional.set_threads(1)  # equal bits need a single-threaded BLAS

excepthook = sys.excepthook
RANKS = start()
sys.excepthook = excepthook  # pytest reports exceptions itself
if RANKS.rank > 0:
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - one report is enough; failures go to stderr


@pytest.fixture
def ranks() -> Ranks:
    """All ranks that run this test: one without mpirun."""
    return RANKS


@pytest.fixture
def shared_tmp(ranks: Ranks, tmp_path: Path) -> Path:
    """A folder that is the same for all ranks."""
    return ranks.on_rank0(lambda: tmp_path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.failed and RANKS.size > 1 and item.get_closest_marker("mpi"):
        print(f"rank {RANKS.rank}: {item.nodeid} failed\n{report.longreprtext}", file=sys.stderr, flush=True)
        RANKS.abort(1)
    return report

"""The same tests in one process and under mpirun; a rank that fails takes the others with it."""

import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from cnnmpi.data import synthetic, write_hdf5
from cnnmpi.distributed import Ranks, start
from tests.jobs import command, digest, run

if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup
    signal.signal(signal.SIGHUP, lambda *_: None)  # the same here, but the jobs that tests start hear of it
os.environ.setdefault("OMPI_MCA_rmaps_base_oversubscribe", "1")
os.environ.setdefault("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe")

excepthook = sys.excepthook
RANKS = start()
sys.excepthook = excepthook  # pytest reports exceptions itself
if RANKS.size > 1:  # ranks tidy their old temporary folders at the same time: each its own
    root = Path(tempfile.gettempdir()) / f"pytest-rank-{RANKS.rank}"
    root.mkdir(exist_ok=True)
    os.environ["PYTEST_DEBUG_TEMPROOT"] = str(root)
if RANKS.rank > 0:
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - one report is enough; failures go to stderr


@pytest.fixture(autouse=True)
def no_reports(request, monkeypatch) -> None:
    """Runs inside the tests write no report.html, which takes as long as they do; test_report.py says otherwise."""
    if request.module.__name__ != "tests.test_report":
        monkeypatch.setattr("cnnmpi.train.trainer.write_report", lambda *_: None)


@pytest.fixture
def ranks() -> Ranks:
    """All ranks that run this test: one without mpirun."""
    return RANKS


@pytest.fixture
def shared_tmp(ranks: Ranks, tmp_path: Path) -> Path:
    """A folder that is the same for all ranks."""
    return ranks.on_rank0(lambda: tmp_path)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A small data file for jobs that train with ``tests.jobs.command``."""
    path = tmp_path_factory.mktemp("data") / "synthetic.h5"
    write_hdf5(path, synthetic(train=400, test=100))
    return path


@pytest.fixture(scope="session")
def undisturbed(data, tmp_path_factory) -> str:
    """The digest in which such a job must end, whatever happens to it."""
    result = run(*command(1, data, tmp_path_factory.mktemp("one") / "run"))
    assert result.returncode == 0, result.stderr
    return digest(result.stdout)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.failed and RANKS.size > 1 and item.get_closest_marker("mpi"):
        print(f"rank {RANKS.rank}: {item.nodeid} failed\n{report.longreprtext}", file=sys.stderr, flush=True)
        RANKS.abort(1)
    return report

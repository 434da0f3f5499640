"""A few of the cases of ``python -m tests.fuzz``, which runs 10,000 of each kind; FUZZ_CASES says how many here."""

import os
import subprocess
import sys

import pytest

from tests.fuzz import KINDS

pytestmark = pytest.mark.mpi_skip  # the same on each rank

CASES = os.environ.get("FUZZ_CASES", "40")


@pytest.mark.fault
@pytest.mark.mpi_skip  # the cases are forked, which does not go together with MPI
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused(kind: str) -> None:
    """Neither hangs, nor crashes, nor takes memory, nor raises anything but the error of its kind."""
    command = [sys.executable, "-m", "tests.fuzz", kind, "--cases", CASES]
    result = subprocess.run(command, capture_output=True, text=True)  # each case has its own limit of time
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{kind}: {CASES} cases: " in result.stdout

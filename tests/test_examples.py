"""The scripts in examples/ do what they say, on little data; a copy elsewhere, as a person has it."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from cnnmpi import SmallResNet, checkpoint
from cnnmpi.data import synthetic, write_hdf5
from tests.jobs import MPIRUN, digest, needs_mpirun, run

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = ["--batch-size", "40", "--epochs", "1", "--threads", "1"]
pytestmark = pytest.mark.mpi_skip  # mpirun does not start inside mpirun


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    for script in EXAMPLES.glob("*.py"):
        shutil.copy(script, folder)
    write_hdf5(folder / "data.h5", synthetic(train=80, test=40))
    return folder


@needs_mpirun
@pytest.mark.parametrize("script", ["own_network.py", "own_layer.py"])
def test_an_example_trains_to_one_digest_on_any_number_of_ranks(script, folder, tmp_path):
    one = run(sys.executable, folder / script, "--data", folder / "data.h5", "--out", tmp_path / "one", *QUICK)
    assert one.returncode == 0, one.stderr
    words = [sys.executable, folder / script, "--data", folder / "data.h5", "--out", tmp_path / "two", *QUICK]
    two = run(MPIRUN, "-n", "2", *words)
    assert two.returncode == 0 and digest(one.stdout) == digest(two.stdout), two.stderr


def test_the_example_of_fine_tuning_keeps_the_body_of_a_checkpoint(folder, tmp_path):
    out = tmp_path / "base"
    words = ["--data", folder / "data.h5", "--model", "smallresnet", "--max-steps", "1"]
    assert run(sys.executable, "-m", "cnnmpi.train", *words, "--out", out, *QUICK).returncode == 0
    script = [folder / "fine_tune.py", "--init", out / "last.h5", "--data", folder / "data.h5"]
    tuned = run(sys.executable, *script, "--out", tmp_path / "tuned", *QUICK)
    assert tuned.returncode == 0, tuned.stderr
    learning = sum(
        p.size for name, (p, _) in SmallResNet().named_parameters().items() if name[:6] in ("stage3", "classi")
    )
    assert re.search(rf"epoch 1: {learning:,} weights learn", tuned.stdout)
    before, after = (checkpoint.load(path / "last.h5")[0] for path in (out, tmp_path / "tuned"))
    same = {name for name, array in before.items() if name in after and np.array_equal(array, after[name])}
    assert {name for name in before if name.startswith(("model/stage1", "model/stage2"))} <= same
    assert not any(name.startswith("model/stage3") for name in same)

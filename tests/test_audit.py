"""Audits: a sound run passes on any number of ranks, and whatever was changed in one is found."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from cnnmpi import checkpoint
from cnnmpi.audit.__main__ import main
from cnnmpi.common.lines import to_line
from cnnmpi.data import read_hdf5, write_hdf5
from cnnmpi.distributed import Ranks
from cnnmpi.train import Config, Trainer, set_up
from cnnmpi.train.setup import what_shapes
from tests.jobs import MPIRUN, command, needs_mpirun, run

pytestmark = pytest.mark.mpi_skip
OPTIONS = ("--keep-every", "1", "--ledger-every", "4")

# adds one ulp to one weight after the update of step 13, as other code or failing memory would
ONE_ULP = """
import sys, numpy as np
from cnnmpi.train.trainer import Trainer
from cnnmpi.train.entry import train
step = Trainer.train_step
def altered(run):
    loss = step(run)
    if run.step == 13:
        run.flat.params[7] = np.nextafter(run.flat.params[7], np.float32(9))
    return loss
Trainer.train_step = altered
train(sys.argv[1:])
"""


def other_kernels(monkeypatch, bits: bool) -> None:
    """Let this process compute with kernels of another name and, with ``bits``, to other last bits."""
    monkeypatch.setattr("cnnmpi.functional.kernels", lambda device: "openblas Other")
    step = Trainer.train_step

    def altered(run):
        loss = step(run)
        run.flat.params[7] = np.nextafter(run.flat.params[7], np.float32(9))
        return loss

    if bits:
        monkeypatch.setattr(Trainer, "train_step", altered)


def audit(folder: Path, *arguments: str) -> int:
    try:
        return main([str(folder), *arguments])
    except SystemExit as error:
        return error.code


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    result = run(*command(1, data, out, *OPTIONS))
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_sound_run_passes_and_is_left_alone(copy, capsys):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copy.rglob("*") if path.is_file()}
    assert audit(copy, "--segments", "-1") == 0
    out = capsys.readouterr().out
    assert "SOUND" in out and "WRONG" not in out
    rows = [line.split()[0] for line in out.splitlines()]
    assert rows[1:9] == [
        "ledger", "config.toml", "last.h5", "previous.h5", "best.h5", "kept/epoch-0001.h5", "kept/epoch-0002.h5",
        "kept/epoch-0003.h5",
    ]  # fmt: skip
    assert [line.split()[1] for line in out.splitlines() if line.startswith("steps")] == ["0-10", "10-20", "20-30"]
    assert "4 entries computed again" in out  # of steps 4, 8 and 10, and of the first weights
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copy.rglob("*") if path.is_file()} == before


@needs_mpirun
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_may_audit(ranks, trained):
    result = run(
        MPIRUN, "-n", str(ranks), sys.executable, "-m", "cnnmpi.audit", trained, "--segments", "2", "--seed", "5"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"(seed 5, {ranks} ranks, " in result.stdout and result.stdout.count("SOUND") == 1


def test_the_seed_draws_what_is_computed(trained, capsys):
    drawn = set()
    for seed in (1, 2, 5):
        assert audit(trained, "--segments", "1", "--seed", str(seed)) == 0
        drawn |= {line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("steps")}
    assert drawn == {"0-10", "10-20", "20-30"}


# -- what is found -----------------------------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize("name", ["ledger.jsonl", "last.h5", "kept/epoch-0002.h5"])
@pytest.mark.parametrize("part", [0.02, 0.37, 0.71, 0.98])
def test_a_flipped_bit_is_found(name, part, copy, capsys):
    blob = bytearray((copy / name).read_bytes())
    blob[int(part * len(blob))] ^= 1
    (copy / name).write_bytes(blob)
    assert audit(copy, "--segments", "0") == 1
    wrong = [line for line in capsys.readouterr().out.splitlines() if " WRONG " in line]
    # what is behind the last entry are the checkpoints that were saved there
    assert wrong[0].startswith(name if name != "ledger.jsonl" else "ledger" if part < 0.9 else "last.h5")


@pytest.mark.fault
@pytest.mark.parametrize("what", ["weights", "optimizer", "settings", "step", "ledger"])
def test_a_checkpoint_that_was_changed_and_signed_again_is_found(what, copy, capsys):
    path = copy / "kept" / "epoch-0001.h5"
    arrays, attributes = checkpoint.load(path)
    if what in ("weights", "optimizer"):
        name = next(name for name in arrays if name.startswith("model/" if what == "weights" else "optimizer/"))
        arrays[name].flat[3] = np.nextafter(arrays[name].flat[3], np.float32(9))
        weights = {key.removeprefix("model/"): value for key, value in arrays.items() if key.startswith("model/")}
        attributes["weights_sha256"] = checkpoint.weights_digest(weights)
    elif what == "settings":
        attributes["config"] = json.dumps(json.loads(attributes["config"]) | {"lr": 0.07})
    else:
        attributes |= {"step": 20} if what == "step" else {"ledger": "0" * 64}
    checkpoint.save(path, arrays, attributes)
    assert audit(copy, "--segments", "0") == 1
    assert "kept/epoch-0001.h5  WRONG" in capsys.readouterr().out


@pytest.mark.fault
@pytest.mark.parametrize("what", ["weights", "mean", "classes"])
@pytest.mark.parametrize("name", ["last.h5", "kept/epoch-0003.h5"])
def test_of_two_checkpoints_of_a_step_each_is_looked_at(name, what, copy, capsys):
    path = copy / name
    arrays, attributes = checkpoint.load(path)
    if what == "weights":
        weights = {key.removeprefix("model/"): value for key, value in arrays.items() if key.startswith("model/")}
        for array in weights.values():
            array[...] = 0.5
        attributes["weights_sha256"] = checkpoint.weights_digest(weights)
    else:
        attributes[what] = attributes[what][::-1]
    checkpoint.save(path, arrays, attributes)
    assert audit(copy, "--segments", "0") == 1
    assert f"other {what}" in capsys.readouterr().out


@pytest.mark.fault
def test_weights_behind_the_last_entry_are_computed_again(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(*command(1, data, out, *OPTIONS, "--max-steps", "15")).returncode == 0  # entries of 12 and 16
    assert audit(out, "--segments", "0") == 0
    assert "step 15, as computed again" in capsys.readouterr().out
    arrays, attributes = checkpoint.load(out / "last.h5")
    name = next(name for name in arrays if name.startswith("optimizer/"))
    arrays[name][...] *= -3
    checkpoint.save(out / "last.h5", arrays, attributes)
    assert audit(out, "--segments", "0") == 1
    assert "step 15: other optimizer/" in capsys.readouterr().out


@pytest.mark.fault
@pytest.mark.parametrize("change", ["an entry left out", "an entry twice", "another beginning"])
def test_a_chain_with_other_entries_than_such_a_run_writes_is_found(change, copy, capsys):
    says = [json.loads(line) for line in (copy / "ledger.jsonl").read_text().splitlines()]
    if change == "an entry left out":
        del says[4]
    elif change == "an entry twice":
        says.insert(4, says[3])
    else:
        says[0]["begins"] = 4
    before, lines = "", []
    for each in says:
        lines.append(to_line(each | {"before": before}))
        before = hashlib.sha256(lines[-1]).hexdigest()
    (copy / "ledger.jsonl").write_bytes(b"".join(lines))
    assert audit(copy, "--segments", "0") == 1
    assert "is not the entry of step" in capsys.readouterr().out


@pytest.mark.fault
def test_another_setting_is_found(copy, capsys):
    text = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(text.replace("momentum = 0.9", "momentum = 0.8"))
    assert audit(copy, "--segments", "0") == 1
    assert "other momentum than the ledger's" in capsys.readouterr().out


@pytest.mark.fault
def test_a_checkpoint_of_another_run_is_found(data, copy, tmp_path, capsys):
    other = tmp_path / "other"
    assert run(*command(1, data, other, *OPTIONS, "--seed", "1")).returncode == 0
    shutil.copy(other / "kept" / "epoch-0002.h5", copy / "kept" / "epoch-0002.h5")
    assert audit(copy, "--segments", "0") == 1
    assert "it is not of this ledger" in capsys.readouterr().out


@pytest.mark.fault
@pytest.mark.parametrize("how", ["a bit of the file", "a pixel, written anew"])
def test_other_data_are_found(how, data, copy, tmp_path, capsys):
    changed = tmp_path / "data.h5"
    if how == "a bit of the file":
        shutil.copy(data, changed)
        with h5py.File(changed, "r") as file:
            place = file["train/images"].id.get_chunk_info(0).byte_offset
        blob = bytearray(changed.read_bytes())
        blob[place + 1000] ^= 1
        changed.write_bytes(blob)
    else:
        dataset = read_hdf5(data)
        dataset.train_images[17, 0, 3, 3] ^= 1
        write_hdf5(changed, dataset)
    assert audit(copy, "--segments", "0", "--data", str(changed)) == 1
    assert "\ndata" in (out := capsys.readouterr().out) and "WRONG" in out


@pytest.mark.fault
def test_a_run_whose_middle_was_computed_otherwise_is_found(data, tmp_path, capsys):
    out = tmp_path / "run"
    result = run(sys.executable, "-c", ONE_ULP, *command(1, data, out, *OPTIONS)[3:])
    assert result.returncode == 0, result.stderr
    assert audit(out, "--segments", "-1") == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("steps")]
    assert ["WRONG" in row for row in rows] == [False, True, False]
    assert "step 16: other weights, optimizer" in rows[1]  # the first entry after it


# -- what cannot be told -----------------------------------------------------------------------------------------------


@pytest.mark.fault
def test_what_cannot_be_audited_is_one_line(copy, tmp_path, capfd):
    with (copy / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert audit(copy) == 2
    assert "the run is still going on: wait for its end" in capfd.readouterr().err
    for name, words in (("gone", "no such folder"), ("run", "only a run with a ledger can be audited")):
        shutil.rmtree(copy) if name == "gone" else copy.mkdir()
        assert audit(copy) == 2
        err = capfd.readouterr().err
        assert words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "options, words",
    [
        (["--init", "last.h5"], "the run began from other weights"),
        (["--resume", "kept/epoch-0001.h5"], "the ledger begins at step 10"),
    ],
)
def test_an_honest_run_that_cannot_be_followed_from_its_seed_is_not_called_wrong(
    options, words, data, trained, tmp_path, capsys
):
    option, name = options
    more = ("--max-steps", "20", option, str(trained / name))
    assert run(*command(1, data, tmp_path / "run", *OPTIONS, *more)).returncode == 0
    assert audit(tmp_path / "run", "--segments", "-1") == 2
    out = capsys.readouterr().out
    assert words in out and "WRONG" not in out


@needs_mpirun
@pytest.mark.parametrize("ranks, code", [(1, 0), (2, 2)])
def test_a_sum_in_float32_may_depend_on_the_ranks(ranks, code, data, tmp_path, capsys):
    assert run(*command(ranks, data, tmp_path / "run", *OPTIONS, "--reduction", "float32")).returncode == 0
    assert audit(tmp_path / "run", "--segments", "-1") == code
    out = capsys.readouterr().out
    assert "bits are promised by --reduction exact alone" in out and "WRONG" not in out


def test_a_run_that_changed_processors_is_followed_where_it_can_be(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert run(*command(1, data, out, *OPTIONS, "--max-steps", "20")).returncode == 0
    config = Config(out=out, resume="auto", data=str(data), threads=1, report=False, keep_every=1)
    with monkeypatch.context() as elsewhere:
        other_kernels(elsewhere, bits=True)
        assert set_up(config, Ranks()).run() == 0
    assert audit(out, "--segments", "-1") == 2
    rows = {
        line.split()[1]: line.split()[2] for line in capsys.readouterr().out.splitlines() if line.startswith("steps")
    }
    assert rows == {"0-10": "ok", "10-20": "ok", "20-30": "?"}


@pytest.mark.fault
def test_a_pipe_lets_no_audit_wait(copy):
    (copy / "lock").unlink()
    os.mkfifo(copy / "lock")
    assert audit(copy, "--segments", "0") == 0


def test_other_kernels_promise_no_bits(copy, monkeypatch, capsys):
    other_kernels(monkeypatch, bits=True)
    assert audit(copy, "--segments", "1", "--seed", "1") == 2
    out = capsys.readouterr().out
    assert (
        "note: not as in the run: kernels: " in out and "NOT TOLD HERE" in out and "other bits; losses differ by" in out
    )


@pytest.mark.parametrize("what", ["kernels", "sources_sha256"])
def test_the_same_bits_are_proof_by_whatever_they_are_computed(what, copy, monkeypatch, capsys):
    if what == "kernels":
        other_kernels(monkeypatch, bits=False)
    else:
        monkeypatch.setattr("cnnmpi.train.setup.sources_sha256", lambda: "0" * 64)
    assert audit(copy, "--segments", "1") == 0
    out = capsys.readouterr().out
    assert f"note: not as in the run: {what}: " in out and "entries computed again" in out and "SOUND" in out


def test_another_network_computes_nothing(copy, monkeypatch, capsys):
    shapes = what_shapes
    monkeypatch.setattr("cnnmpi.train.setup.what_shapes", lambda *args: shapes(*args) | {"network": "0" * 64})
    assert audit(copy, "--segments", "1") == 2
    assert "another network cannot compute them again" in capsys.readouterr().out


def test_a_run_from_other_weights_is_followed_from_them(data, trained, tmp_path, capfd):
    assert run(*command(1, data, tmp_path / "run", *OPTIONS, "--init", str(trained / "last.h5"))).returncode == 0
    assert audit(tmp_path / "run", "--segments", "-1", "--init", str(trained / "last.h5")) == 0
    assert "SOUND" in capfd.readouterr().out
    assert audit(tmp_path / "run", "--segments", "-1", "--init", str(trained / "kept" / "epoch-0001.h5")) == 2
    assert "is it that file?" in capfd.readouterr().err

"""Audits: a sound run passes on any number of ranks, and whatever was changed in one is found."""

import dataclasses
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
from cnnmpi.train import Config, set_up
from cnnmpi.train.setup import what_shapes
from tests.jobs import MPIRUN, command, needs_mpirun, one_ulp, run

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
    if bits:
        one_ulp(monkeypatch, range(99))


def rechain(folder: Path, change) -> None:
    """Let ``change`` alter what a ledger says, a list of its entries, and chain it anew."""
    says = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    change(says)
    before, lines = "", []
    for each in says:
        lines.append(to_line(each | {"before": before}))
        before = hashlib.sha256(lines[-1]).hexdigest()
    (folder / "ledger.jsonl").write_bytes(b"".join(lines))


def without_checkpoints(folder: Path) -> None:
    """Leave of a run what its ledger says alone."""
    for path in folder.rglob("*.h5"):
        path.unlink()


def sign(path: Path, arrays, attributes) -> None:
    """Write a checkpoint whose digests are right."""
    weights = {key.removeprefix("model/"): value for key, value in arrays.items() if key.startswith("model/")}
    checkpoint.save(path, arrays, attributes | {"weights_sha256": checkpoint.weights_digest(weights)})


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
    def changed(says: list[dict]) -> None:
        if change == "an entry left out":
            del says[4]
        elif change == "an entry twice":
            says.insert(4, says[3])
        else:
            says[0]["begins"] = 4

    rechain(copy, changed)
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
    code = audit(copy, "--segments", "0", "--data", str(changed))
    said = capsys.readouterr()
    if how == "a bit of the file":  # which says so itself
        assert code == 2 and f"{changed}: truncated, damaged or not readable HDF5" in said.err
    else:
        assert code == 1 and "WRONG" in next(line for line in said.out.splitlines() if line.startswith("data"))


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
    for name, words in (("gone", "no such folder"), ("run", "without its ledger a run cannot be checked")):
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
    assert "note: not as in the run: kernels: " in out and "NOT TOLD HERE" in out and "other bits from step " in out


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
    assert "the run did not begin from these weights" in capfd.readouterr().err


# -- honest runs that were interrupted, rewound, or shaped otherwise on the way ----------------------------------------


def trained_again(data: Path, out: Path, **settings) -> Path:
    config = Config(**{
        "data": str(data), "out": out, "batch_size": 40, "epochs": 3, "threads": 1, "keep_every": 1, "ledger_every": 4,
        "quiet": True, **settings,
    })  # fmt: skip
    assert set_up(config, Ranks()).run() == 0
    return out


@pytest.mark.parametrize("begin", ["resume", "init"])
def test_a_run_that_stops_between_two_entries_is_not_computed_from_its_seed(begin, data, trained, tmp_path, capsys):
    source = str(trained / "kept" / "epoch-0001.h5")
    out = trained_again(data, tmp_path / "run", max_steps=15, **{begin: source})
    assert audit(out, "--segments", "-1", *(["--init", source] if begin == "init" else [])) == (
        0 if begin == "init" else 2
    )
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("steps")]
    assert rows == ([["steps", "0-10"]] if begin == "init" else []) + [["steps", "10-15"]]


def test_the_same_data_in_another_file_are_the_same(data, trained, tmp_path, capsys):
    dataset = read_hdf5(data)
    write_hdf5(tmp_path / "other.h5", dataclasses.replace(dataset, sha256="0" * 64))
    assert audit(trained, "--segments", "1", "--data", str(tmp_path / "other.h5")) == 0
    assert "SOUND" in capsys.readouterr().out


def test_checkpoints_that_the_ledger_does_not_reach_are_not_called_wrong(data, trained, tmp_path, capsys):
    out = trained_again(data, tmp_path / "begins", ledger_every=0, max_steps=10)
    trained_again(data, out, resume="auto")
    assert audit(out, "--segments", "-1") == 2
    text = capsys.readouterr().out
    assert "step 10, before the ledger begins" not in text and "the ledger begins at step 10" in text
    assert "WRONG" not in text
    rewound = Path(shutil.copytree(trained, tmp_path / "rewound"))
    shutil.copy(rewound / "kept" / "epoch-0001.h5", rewound / "last.h5")
    trained_again(data, rewound, resume="auto", max_steps=13)
    assert audit(rewound, "--segments", "-1") == 2
    text = capsys.readouterr().out
    assert "WRONG" not in text and "step 20, and the ledger does not reach there" in text


def test_settings_that_the_ledger_says_have_changed_are_not_called_wrong(data, tmp_path, capsys):
    out = trained_again(data, tmp_path / "run", max_steps=10)
    arrays, attributes = checkpoint.load(out / "last.h5")
    attributes["config"] = json.dumps(json.loads(attributes["config"]) | {"lr": 0.2})
    checkpoint.save(out / "last.h5", arrays, attributes)
    trained_again(data, out, resume="auto")
    shutil.copy(out / "kept" / "epoch-0002.h5", out / "previous.h5")
    assert audit(out, "--segments", "-1") == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("steps")]
    assert rows == [["steps", "0-10"], ["steps", "10-20"], ["steps", "20-30"]]


@pytest.mark.fault
def test_a_ledger_that_was_cut_off_is_not_called_wrong(copy, capsys):
    lines = (copy / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "ledger.jsonl").write_bytes(b"".join(lines[:-2]) + lines[-2][:40])
    assert audit(copy, "--segments", "0") == 2
    assert "the last line was cut off" in (out := capsys.readouterr().out) and "WRONG" not in out


@pytest.mark.fault
@pytest.mark.parametrize(
    "keep, words",
    [(1, "it has no entry of a step yet"), (0, "is not the entry"), (None, "a ledger of version 7, not 1")],
)
def test_a_ledger_that_is_of_no_use_is_one_line(keep, words, copy, capfd):
    if keep is None:
        rechain(copy, lambda says: says[0].update(ledger=7))
    else:
        lines = (copy / "ledger.jsonl").read_bytes().splitlines(keepends=True)
        (copy / "ledger.jsonl").write_bytes(b"".join(lines[:keep]))
    assert audit(copy, "--segments", "0") == (2 if keep != 0 else 1)
    said = capfd.readouterr()
    assert words in said.err or keep == 0


def test_an_unforeseen_error_is_no_verdict(copy, monkeypatch, capfd):
    def fail(*_):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("cnnmpi.audit.__main__.check_state", fail)
    assert audit(copy) == 2 and "unforeseen" in capfd.readouterr().err


# -- changes that were made with care ----------------------------------------------------------------------------------


@pytest.mark.fault
def test_a_run_from_other_weights_that_was_altered_later_is_wrong(data, trained, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as there:
        one_ulp(there, range(5, 6))
        trained_again(data, tmp_path / "run", init=str(trained / "last.h5"))
    assert audit(tmp_path / "run", "--segments", "-1", "--init", str(trained / "last.h5")) == 1
    assert "step 8: other weights, optimizer" in capsys.readouterr().out


@pytest.mark.fault
@pytest.mark.parametrize("at, wrong", [(14, "step 14"), (19, "no change between"), (-5, "no change between")])
def test_a_change_that_comes_after_a_fault_does_not_excuse_it(at, wrong, data, tmp_path, capsys):
    out = tmp_path / "run"
    result = run(sys.executable, "-c", ONE_ULP, *command(1, data, out, *OPTIONS, "--ledger-every", "2")[3:])
    assert result.returncode == 0, result.stderr
    for path in out.rglob("*.h5"):
        if path.name != "epoch-0001.h5":
            path.unlink()

    def excuse(says: list[dict]) -> None:
        place = next(index for index, entry in enumerate(says) if entry.get("step") == 16)
        says.insert(place, {"changed": at, "kernels": "others"})

    rechain(out, excuse)
    assert audit(out, "--segments", "-1") == 1
    assert wrong in capsys.readouterr().out


@pytest.mark.fault
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_settings_by_which_nothing_can_be_computed_are_wrong(copy, capsys):
    without_checkpoints(copy)
    rechain(copy, lambda says: says[0]["config"].update(lr=1e30))
    text = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(text.replace("lr = 0.06", "lr = 1e30"))
    assert audit(copy, "--segments", "-1") == 1
    assert "WRONG" in (out := capsys.readouterr().out) and "not finite" in out


@pytest.mark.fault
@pytest.mark.parametrize("what", ["model", "epoch", "optimizer/z/w", "model/features.0.weight"])
def test_what_else_a_checkpoint_says_is_compared(what, copy, capsys):
    path = copy / "last.h5"
    arrays, attributes = checkpoint.load(path)
    if what == "optimizer/z/w":
        arrays[what] = np.zeros(3, np.float32)
    elif what in arrays:
        arrays[what] = arrays[what].astype(np.float64)  # which its float32 is all the same
    else:
        attributes[what] = {"model": "smallresnet", "epoch": 77}[what]
    sign(path, arrays, attributes)
    assert audit(copy, "--segments", "0") == 1
    assert f"other {what} than the run has" in capsys.readouterr().out


@pytest.mark.fault
@pytest.mark.parametrize(
    "per_epoch, words",
    [(10**9, "steps_per_epoch is 1000000000, with these data 10"), (10, "it goes on to step 40 of a run of 30")],
)
def test_more_steps_than_such_a_run_has_are_wrong(per_epoch, words, copy, capsys):
    without_checkpoints(copy)

    def more(says: list[dict]) -> None:
        says[0] |= {"every": 10**9, "steps_per_epoch": per_epoch}
        says[2:] = [says[2] | {"step": step} for step in ((10**9,) if per_epoch > 10 else (10, 20, 30, 40))]

    rechain(copy, more)
    assert audit(copy, "--segments", "-1") == 1
    assert words in capsys.readouterr().out


@pytest.mark.fault
def test_a_ledger_of_endless_changes_is_refused(copy, capsys):
    rechain(copy, lambda says: says.__setitem__(slice(2, 2), [{"changed": 0, "kernels": str(n)} for n in range(1001)]))
    assert audit(copy, "--segments", "0") == 1
    assert "is one change more than the 1000 that a run may have" in capsys.readouterr().out


@pytest.mark.fault
def test_other_frozen_weights_are_found(copy, capsys):
    without_checkpoints(copy)
    rechain(copy, lambda says: says[0].update(frozen="0" * 64))
    assert audit(copy, "--segments", "1", "--seed", "1") == 1
    assert "step 0: other frozen weights" in capsys.readouterr().out


@pytest.mark.fault
@pytest.mark.parametrize("where", ["opening", "change"])
@pytest.mark.parametrize("name", ["init", "resume", "data", "out"])
def test_a_ledger_cannot_say_how_a_run_is_begun(where, name, trained, copy, capsys):
    without_checkpoints(copy)

    def forge(says: list[dict]) -> None:
        config = says[0]["config"] | {name: str(trained / "last.h5")}
        if where == "opening":
            says[0]["config"] = config
        else:
            says.insert(2, {"changed": 0, "config": config})

    rechain(copy, forge)
    assert audit(copy, "--segments", "-1") == 1
    assert "does not say what shapes the run" in (out := capsys.readouterr().out) or "no change between" in out


@pytest.mark.parametrize("option", [["--augment", "none"], ["--loss", "mse"]])
def test_other_settings_of_the_audit_are_no_fault_of_the_run(option, copy, capfd):
    assert audit(copy, *option, "--segments", "1") == 2
    said = capfd.readouterr()
    assert "WRONG" not in said.out and "Traceback" not in said.err


@pytest.mark.fault
@pytest.mark.parametrize("change", ["a sign", "float64"])
def test_other_bits_behind_the_last_entry_are_found(change, data, tmp_path, capsys):
    out = trained_again(data, tmp_path / "run", max_steps=15)  # of which there is no entry
    arrays, attributes = checkpoint.load(out / "last.h5")
    name = next(key for key in arrays if key.startswith("optimizer/"))
    if change == "float64":
        arrays[name] = arrays[name].astype(np.float64)
    else:
        arrays[name].flat[0] *= -1
    sign(out / "last.h5", arrays, attributes)
    assert audit(out, "--segments", "0") == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.fault
@pytest.mark.parametrize("change", [{"code": None}, {"code": "model"}, {"versions": {"numpy": [[]]}}, {"config": 5}])
def test_what_shapes_a_run_must_be_that(change, copy, capsys):
    rechain(copy, lambda says: says[0].update(change))
    assert audit(copy, "--segments", "0") == 1
    assert "its first line does not say what shapes the run" in capsys.readouterr().out


@pytest.mark.fault
def test_a_loss_beyond_all_numbers_is_wrong(copy, capsys):
    without_checkpoints(copy)
    rechain(copy, lambda says: says[3].update(loss="0x1p99999"))
    assert audit(copy, "--segments", "-1") == 1
    assert "step 8: other loss" in capsys.readouterr().out


@pytest.mark.fault
def test_nothing_is_converted_to_look_at_the_data(copy, tmp_path, monkeypatch, capfd):
    (tmp_path / "images.npz").write_bytes(b"PK")
    text = (copy / "config.toml").read_text().splitlines()
    lines = [f'data = "{tmp_path / "images.npz"}"' if line.startswith("data = ") else line for line in text]
    (copy / "config.toml").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    assert audit(copy, "--segments", "0") == 2
    assert "are no HDF5 file: name that, or them, by --data" in capfd.readouterr().err
    assert not (tmp_path / "data").exists()


@needs_mpirun
@pytest.mark.fault
def test_a_failure_of_one_rank_ends_all(tmp_path):
    code = """
from cnnmpi.audit.ranks import together
from cnnmpi.distributed import UserError, failing_together, start
import sys
ranks = start()
def fail():
    if ranks.rank == int(sys.argv[1]):
        raise UserError("one alone")
    if sys.argv[2] == "waits":
        ranks.gather(0)
    return ranks.rank
with failing_together(ranks):
    try:
        together(ranks, fail)
    except UserError as error:
        print(f"told {error}\\n", end="", flush=True)  # in one piece: both ranks print
        if sys.argv[2] == "waits":
            raise
"""
    for rank, how in (("1", "goes on"), ("0", "goes on"), ("1", "waits")):
        result = run(MPIRUN, "-n", "2", sys.executable, "-c", code, rank, how)
        assert result.stdout.count("told one alone") == (2 if how == "goes on" else 1), result.stderr
        assert (result.returncode == 0) == (how == "goes on")

"""The ledger: the same bytes whatever happens to a run, and nothing in it can be changed unseen."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from cnnmpi import checkpoint
from cnnmpi.distributed import Ranks
from cnnmpi.train import Config, set_up
from cnnmpi.train.folder import RunFolder
from cnnmpi.train.ledger import BrokenChainError, Ledger, entries, plain_settings
from tests.jobs import command, needs_mpirun, rank_pids, run, signal_all, start_and_wait

pytestmark = pytest.mark.mpi_skip


def ledger(out: Path) -> bytes:
    return (out / "ledger.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    result = run(*command(1, data, out, "--ledger-every", "4"))
    assert result.returncode == 0, result.stderr
    (*_, last) = entries(out / "ledger.jsonl")
    assert result.stdout.splitlines()[-1].endswith(f" ledger={last.hash}")
    assert checkpoint.load(out / "last.h5")[1]["ledger"] == last.hash
    return out


def test_what_is_in_it(whole):
    first, *others = entries(whole / "ledger.jsonl")
    assert [entry.step for entry in others] == [0, 4, 8, 10, 12, 16, 20, 24, 28, 30]  # and the ends of epochs
    says, attributes = first.says, checkpoint.load(whole / "last.h5")[1]
    assert says["ledger"] == 1 and says["every"] == 4 and says["begins"] == 0 and says["before"] == ""
    assert says["data_sha256"] == attributes["data_sha256"] and says["config"]["batch_size"] == 40
    assert "data" not in says["config"] and str(whole) not in json.dumps(says)
    losses = [float.fromhex(entry.says["loss"]) for entry in others[1:]]
    assert all(0 < loss < 5 for loss in losses) and "loss" not in others[0].says
    for name in ("weights", "optimizer"):
        assert len({entry.says[name] for entry in others}) == len(others)
    steps = [json.loads(line) for line in (whole / "steps.jsonl").read_text().splitlines()]
    assert {line["step"]: line["loss"] for line in steps}[20] == losses[5]


@needs_mpirun
@pytest.mark.parametrize("ranks", [2, 3])
def test_it_is_the_same_on_any_number_of_ranks(ranks, data, whole, tmp_path):
    assert run(*command(ranks, data, tmp_path / "run", "--ledger-every", "4")).returncode == 0
    assert ledger(tmp_path / "run") == ledger(whole)


@pytest.mark.fault
@needs_mpirun
def test_kills_and_resumes_on_other_ranks_leave_the_same_bytes(data, whole, tmp_path):
    out = tmp_path / "run"
    more = ("--ledger-every", "4", "--checkpoint-every", "3")
    for ranks, name in ((2, "previous.h5"), (1, "best.h5"), (3, "previous.h5")):
        args = command(ranks, data, out, *more, *(["--resume"] if out.exists() else []))
        job = start_and_wait(args, out, name)
        signal_all(rank_pids(out), signal.SIGKILL)
        job.communicate(timeout=60)
        with (out / "ledger.jsonl").open("ab") as file:
            file.write(b'{"step": 28, "los')  # as if within a write
    assert run(*command(2, data, out, *more, "--resume")).returncode == 0
    assert ledger(out) == ledger(whole)


@pytest.mark.fault
def test_a_stop_between_entries_leaves_no_trace(data, whole, tmp_path):
    out = tmp_path / "run"
    for more in (["--max-steps", "7"], ["--resume", "--max-steps", "15"], ["--resume", "--ledger-every", "9"]):
        assert (
            run(*command(1, data, out, *(["--ledger-every", "4"] if more[0] != "--resume" else []), *more)).returncode
            == 0
        )
    assert ledger(out) == ledger(whole), "a resumed run keeps the ledger's own steps"


def test_settings_that_say_where_things_lie_are_left_out():
    settings = {"data": "/home/me/cifar.h5", "init": "a.h5", "model": "/home/me/net.py:Net", "augment": "flip,my.py:f"}
    assert plain_settings(settings | {"lr": 0.1}) == {"model": "Net", "augment": "flip,f", "lr": 0.1}


# -- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize("place", range(5))
def test_any_change_breaks_the_chain(place, whole, tmp_path):
    path, blob = tmp_path / "ledger.jsonl", ledger(whole)
    lines = blob.splitlines(keepends=True)
    at = len(blob) * (2 * place + 1) // 10
    changes = {
        "a bit": blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :],
        "a line less": b"".join(lines[:place] + lines[place + 1 :]),
        "two lines in each other's place": b"".join(
            [*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]]
        ),
        "a line twice": b"".join([*lines[: place + 1], *lines[place:]]),
        "a torn end": blob[:-7],
    }
    for what, changed in changes.items():
        path.write_bytes(changed)
        with pytest.raises(BrokenChainError, match=r"ledger\.jsonl: (line \d+|not a ledger)"):
            print(what, [*entries(path)])


@pytest.fixture(scope="module")
def part(data, tmp_path_factory) -> Path:
    """A run that was stopped after 12 steps."""
    out = tmp_path_factory.mktemp("part") / "run"
    assert run(*command(1, data, out, "--ledger-every", "4", "--max-steps", "12")).returncode == 0
    return out


@pytest.mark.fault
@pytest.mark.parametrize("damage", ["gone", "of another run", "changed"])
def test_a_ledger_that_does_not_lead_to_the_checkpoint_begins_anew(damage, data, part, tmp_path):
    out = Path(shutil.copytree(part, tmp_path / "run"))
    blob = ledger(out)
    if damage == "gone":
        (out / "ledger.jsonl").unlink()
    elif damage == "changed":
        (out / "ledger.jsonl").write_bytes(blob.replace(b'"step": 8', b'"step": 9'))
    else:
        other = ["--ledger-every", "4", "--max-steps", "12", "--seed", "1"]
        assert run(*command(1, data, tmp_path / "other", *other)).returncode == 0
        (out / "ledger.jsonl").write_bytes(ledger(tmp_path / "other"))
    result = run(*command(1, data, out, "--resume", "--ledger-every", "4", "--max-steps", "20"))
    assert result.returncode == 0 and "a new one begins at step 12" in result.stdout
    first, *others = entries(out / "ledger.jsonl")
    assert first.says["begins"] == 12 and [entry.step for entry in others][:3] == [12, 16, 20]


def test_what_changed_between_two_starts_is_an_entry_of_its_own(tmp_path):
    told: list[str] = []
    shaping = {"kernels": "openblas SkylakeX", "versions": {"numpy": "2.4.6"}}
    first = Ledger(tmp_path, 2, 10, told.append)
    first.begin(shaping)
    first.enter({"step": 2, "weights": "a"})
    second = Ledger(tmp_path, 2, 10, told.append)
    second.go_on(2, first.head, shaping | {"kernels": "openblas Haswell"})
    second.enter({"step": 4, "weights": "b"})
    says = [entry.says for entry in entries(tmp_path / "ledger.jsonl")]
    assert says[2]["changed"] == 2 and says[2]["kernels"] == "openblas Haswell" and "versions" not in says[2]
    assert told == ["note: kernels changed since the run began: ledger.jsonl says so from here on"]
    third = Ledger(tmp_path, 2, 10, told.append)
    third.go_on(4, second.head, shaping | {"kernels": "openblas Haswell"})
    assert len([*entries(tmp_path / "ledger.jsonl")]) == 4 and third.head == second.head
    back = Ledger(tmp_path, 0, 10, told.append)  # again from the older checkpoint, on the first processor, and without
    assert not back.go_on(2, first.head, shaping) and back.every == 2  # a wish for entries: the run has them
    assert len([*entries(tmp_path / "ledger.jsonl")]) == 2 and back.head == first.head


@pytest.mark.fault
def test_a_ledger_on_a_full_disk_has_no_gap(tmp_path):
    told: list[str] = []
    book = Ledger(tmp_path, 1, 10, told.append)
    book.begin({"kernels": "k"})
    path, kept = tmp_path / "ledger.jsonl", ledger(tmp_path)
    path.unlink()
    path.symlink_to("/dev/full")
    book.enter({"step": 1})
    path.unlink()
    path.write_bytes(kept)
    book.enter({"step": 2})
    assert len(told) == 1 and "No space left on device; a resume writes what is missing" in told[0]
    assert len([*entries(path)]) == 1


def test_a_ledger_has_reached_the_disk_before_a_checkpoint_names_its_head(data, tmp_path, monkeypatch):
    order: list[str] = []
    save, sync = RunFolder.save, "cnnmpi.train.ledger.sync"
    monkeypatch.setattr(sync, lambda path: order.append(path.name))
    monkeypatch.setattr(RunFolder, "save", lambda *args: (order.append("save"), save(*args))[1])
    config = Config(data=str(data), out=tmp_path / "run", batch_size=40, max_steps=10, threads=1, quiet=True)
    assert set_up(config, Ranks()).run() == 0
    assert order == ["ledger.jsonl", "save"] * 3  # before the first step, best.h5, last.h5

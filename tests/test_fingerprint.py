"""Fingerprints: all calls of the steps asked for, in order, the same bytes for any ranks, and no trace in the run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cnnmpi import checkpoint, functional
from cnnmpi.bisect.fingerprints import first_parting
from cnnmpi.distributed import DisagreementError, Ranks, UserError
from cnnmpi.train import Config, set_up
from cnnmpi.train.fingerprint import FINGERPRINT, digest_of
from tests.jobs import one_ulp

SMALL = {"model": "simplecnn", "batch_size": 40, "epochs": 1, "threads": 1, "quiet": True, "hang_warning": 0.0}


def trained(data: Path, out: Path, ranks: Ranks | None = None, **settings) -> Path:
    """Train a few steps in this process, and return the run's folder."""
    config = Config(**{**SMALL, "data": str(data), "out": out, "max_steps": 4, **settings})
    assert set_up(config, ranks or Ranks()).run() == 0
    return out


def calls(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / FINGERPRINT).read_text().splitlines()][1:]


@pytest.fixture(scope="module")
def printed(data, tmp_path_factory) -> Path:
    return trained(data, tmp_path_factory.mktemp("printed") / "run", fingerprint="2:3")


@pytest.mark.mpi_skip
def test_every_call_of_these_steps_is_there_in_its_order(printed):
    found = calls(printed)
    assert sorted({call["step"] for call in found}) == [2, 3]
    first = [call for call in found if call["step"] == 2]
    assert [call["shard"] for call in first if call["place"] == "batch"] == [*range(8)]
    assert [call["place"] for call in first if call["shard"] is None] == ["reduce", "update"]
    places = [call["place"] for call in first if call["shard"] == 3]
    ways = ["forward" if "forward" in place else "backward" if "backward" in place else place for place in places]
    layers = ways.count("forward")
    assert ways == ["batch", *["forward"] * layers, "loss", *["backward"] * layers, "shard"]
    assert places[1] == "features.0 Conv2d forward" and "SimpleCNN forward" in places
    leaves = [place for place in places if place.split()[0].count(".") == 1]
    assert [place.split()[0] for place in leaves] == [f"features.{index}" for index in (*range(6), *range(5, -1, -1))]


@pytest.mark.mpi_skip
def test_what_one_gives_the_next_takes(printed):
    shard = [call for call in calls(printed) if call["step"] == 2 and call["shard"] == 0]
    assert shard[0]["gives"]["images"] == shard[1]["takes"]["input"]
    assert shard[1]["gives"]["output"] == shard[2]["takes"]["input"]
    assert {"weight", "bias"} < shard[1]["takes"].keys()
    (loss,) = (call for call in shard if call["place"] == "loss")
    following = shard[shard.index(loss) + 1]
    assert loss["gives"]["dlogits"] == following["takes"]["dout"] and float.fromhex(loss["gives"]["loss"]) > 0
    assert any("gradient of weight" in call["gives"] for call in shard)
    steps = {step: [call for call in calls(printed) if call["step"] == step] for step in (2, 3)}
    assert steps[2][-1]["gives"]["weights"] != steps[3][-1]["gives"]["weights"]


@pytest.mark.mpi_skip
@pytest.mark.parametrize("threads", [2, 8])
def test_threads_do_not_show(threads, data, printed, tmp_path):
    out = trained(data, tmp_path / "run", fingerprint="2:3", threads=threads)
    assert (out / FINGERPRINT).read_bytes() == (printed / FINGERPRINT).read_bytes()


@pytest.mark.mpi(min_size=2)
def test_ranks_do_not_show(ranks, data, shared_tmp):
    source = ranks.on_rank0(lambda: data)
    together = trained(source, shared_tmp / "together", ranks, fingerprint="2:3")
    if ranks.rank == 0:
        alone = trained(source, shared_tmp / "alone", fingerprint="2:3")
        assert (alone / FINGERPRINT).read_bytes() == (together / FINGERPRINT).read_bytes()


@pytest.mark.mpi_skip
def test_a_run_is_what_it_is_without(data, printed, tmp_path):
    config = Config(**SMALL, data=str(data), out=tmp_path / "run", max_steps=4)
    run = set_up(config, Ranks())
    assert run.run() == 0 and not (tmp_path / "run" / FINGERPRINT).exists()
    digests = [checkpoint.load(out / "last.h5")[1]["weights_sha256"] for out in (printed, tmp_path / "run")]
    assert digests[0] == digests[1]
    with run.fingerprint.of_step(run):
        assert "batch" not in vars(run.loader)
    run.fingerprint.steps = (1, 99)
    with run.fingerprint.of_step(run):
        assert "batch" in vars(run.loader) and "forward" in vars(run.model.features[0])
    watched = [run.loader, run.reducer, *(layer for _, layer in run.model.walk())]
    assert not {"batch", "add", "reduce", "forward", "backward"} & {name for each in watched for name in vars(each)}


@pytest.mark.mpi_skip
def test_a_run_that_goes_on_writes_the_same(data, printed, tmp_path):
    out = trained(data, tmp_path / "run", max_steps=2, fingerprint="2:3")
    second = shutil.copy(out / "last.h5", tmp_path / "second.h5")
    trained(data, out, max_steps=3, resume="auto", fingerprint="2:3")
    shutil.copy(second, out / "last.h5")  # a step that was done, and not saved, is done again
    with (out / FINGERPRINT).open("a") as file:
        file.write('{"step": 3, "shard": 0, "pla')  # as a kill leaves it
    trained(data, out, resume="auto", fingerprint="2:3")
    assert (out / FINGERPRINT).read_bytes() == (printed / FINGERPRINT).read_bytes()


@pytest.mark.mpi_skip
def test_what_another_run_left_is_moved_aside(data, tmp_path):
    out = trained(data, tmp_path / "run", fingerprint="1:1", max_steps=1)
    trained(data, out, max_steps=1, seed=1)
    assert not (out / FINGERPRINT).exists() and (out / "old-1" / FINGERPRINT).exists()


@pytest.mark.mpi_skip
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_other_engine_has_the_same_calls(precision, data, printed, tmp_path):
    pytest.importorskip("torch")
    out = trained(data, tmp_path / "run", fingerprint="2:3", backend="torch", precision=precision)
    theirs, ours = calls(out), calls(printed)
    assert [call["place"] for call in theirs] == [call["place"] for call in ours]
    assert theirs[0]["gives"] == ours[0]["gives"]  # the images of a batch
    found, _ = first_parting(printed / FINGERPRINT, out / FINGERPRINT)
    assert found is not None and found.step == 2 and found.names == ("weight", "bias")  # after a step of another engine


@pytest.mark.mpi(min_size=2)
def test_weights_that_change_on_one_rank_are_found_there(ranks, data, shared_tmp, monkeypatch):
    source = ranks.on_rank0(lambda: data)
    whole = trained(source, shared_tmp / "whole", ranks, fingerprint="2:4")

    one_ulp(monkeypatch, range(2, 3), ranks.size - 1)
    with pytest.raises(DisagreementError):  # as soon as it is saved
        trained(source, shared_tmp / "changed", ranks, fingerprint="2:4", agree_every=0)
    if ranks.rank == 0:
        found, steps = first_parting(whole / FINGERPRINT, shared_tmp / "changed" / FINGERPRINT)
        assert (steps, found.step, found.place, found.gives) == (2, 3, "features.0 Conv2d forward", False)
        assert found.names == ("weight",) and found.shards == tuple(np.array_split(range(8), ranks.size)[-1])
        assert "after the update of step 2" in found.points_to() and "on the rank of shard" in found.points_to()


@pytest.mark.mpi_skip
@pytest.mark.fault
def test_a_disk_that_fails_is_a_warning(data, tmp_path, monkeypatch, capsys):
    def full(path: Path, blob: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cnnmpi.train.fingerprint.append", full)
    trained(data, tmp_path / "run", fingerprint="2:3")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "fingerprint.jsonl cannot be written: No space left" in warnings[0]


@pytest.mark.mpi_skip
@pytest.mark.fault
@pytest.mark.parametrize("text", ["5", "0:3", "4:2", "a:b", "1:2:3", "-1:2", "", "1:99999999999999999999"])
def test_other_ranges_are_one_line(text, data, tmp_path):
    with pytest.raises(UserError, match="--fingerprint must be FROM:TO, steps from 1 on, as 31:40, got"):
        set_up(Config(**SMALL, data=str(data), out=tmp_path / "run", fingerprint=text), Ranks())


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.astype(np.float64),
        lambda a: a.reshape(4, 6),
        lambda a: a + np.float32(2**-20),
        lambda a: a[::-1],
        lambda a: (a,),
    ],
)
def test_a_digest_tells_types_shapes_and_numbers_apart(change: Callable):
    a = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert digest_of(functional, a) != digest_of(functional, change(a))


@pytest.mark.mpi_skip
def test_a_digest_does_not_depend_on_the_layout():
    a = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert digest_of(functional, a) == digest_of(functional, np.asfortranarray(a))
    assert digest_of(functional, None) is None and digest_of(functional, 0.5) == (0.5).hex()

"""Where two runs part: the step, the array, the layer, and what that points to; and what cannot be compared."""

import dataclasses
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from cnnmpi import checkpoint
from cnnmpi.audit.record import Record
from cnnmpi.audit.shaping import changes
from cnnmpi.bisect.__main__ import main
from cnnmpi.bisect.again import compare
from cnnmpi.data import DataLoader, read_hdf5, write_hdf5
from cnnmpi.train.fingerprint import FINGERPRINT
from cnnmpi.train.ledger import LEDGER, Entry
from tests.jobs import MPIRUN, needs_mpirun, one_ulp, run
from tests.test_audit import rechain
from tests.test_fingerprint import trained

pytestmark = pytest.mark.mpi_skip
RUN = {"epochs": 3, "max_steps": None, "ledger_every": 4, "keep_every": 1}  # 30 steps, entries of 0, 4, 8, 10, 12, ...


def bisect(a: Path, b: Path, *arguments: str) -> int:
    try:
        return main([str(a), str(b), *arguments])
    except SystemExit as error:
        return error.code


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    return trained(data, tmp_path_factory.mktemp("whole") / "run", **RUN)


@pytest.fixture(scope="module")
def pixel(data, tmp_path_factory) -> Path:
    """The data, but for one pixel."""
    path = tmp_path_factory.mktemp("pixel") / "data.h5"
    dataset = read_hdf5(data)
    images = dataset.train_images.copy()
    images[17, 0, 3, 5] ^= 1
    write_hdf5(path, dataclasses.replace(dataset, train_images=images, recorded=None))
    return path


def test_equal_runs_agree_and_are_left_alone(whole, data, tmp_path, capsys):
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copy.rglob("*") if path.is_file()}
    assert bisect(whole, copy) == 0
    assert "AGREE: the ledgers say the same up to step 30" in capsys.readouterr().out
    trained(data, tmp_path / "short", **RUN | {"max_steps": 15, "ledger_every": 3})
    assert bisect(whole, tmp_path / "short") == 0  # where both have entries
    assert "up to step 12" in capsys.readouterr().out
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("every, last, first", [(4, 12, 16), (1, 13, 14)])
def test_a_single_fault_is_told_from_a_lasting_one(every, last, first, whole, data, tmp_path, monkeypatch, capsys):
    for name, steps in [("single", range(14, 15)), ("lasting", range(14, 99))][: 2 if every == 4 else 1]:
        with monkeypatch.context() as there:
            one_ulp(there, steps)
            trained(data, tmp_path / name, **RUN | {"ledger_every": every})
        assert bisect(tmp_path / name, whole if every == 4 else trained_each_step(data, tmp_path)) == 1
        out = capsys.readouterr().out
        assert "what shapes them is the same at their beginning" in out
        assert f"they agree up to step {last} and part at step {first}: other " in out
        assert "computed again from step 10: A's entry is not what it gives, B's entry is what it gives" in out
        words = "a single fault" if name == "single" else "other code or settings than its ledger names, or a host"
        assert f"which points to A: {words}" in out
        assert f"--fingerprint {last + 1}:{first} --max-steps {first}" in out


def trained_each_step(data: Path, folder: Path) -> Path:
    out = folder / "each"
    return out if out.exists() else trained(data, out, **RUN | {"ledger_every": 1})


def test_the_checkpoint_of_a_fault_names_the_array(whole, data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as there:
        one_ulp(there, range(10, 11))
        trained(data, tmp_path / "run", **RUN)
    assert bisect(whole, tmp_path / "run") == 1
    out = capsys.readouterr().out
    assert "they agree up to step 8 and part at step 10: other weights\n" in out
    place = "step 10, features.0.weight: 1 of 864 numbers by one unit in the last place, the first at"
    assert f"the first difference that B's files show: {place}" in out


def test_other_settings_from_an_epoch_on_are_named(whole, data, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for name in ("previous.h5", "best.h5", "kept/epoch-0002.h5", "kept/epoch-0003.h5"):
        (out / name).unlink()
    arrays, attributes = checkpoint.load(whole / "kept" / "epoch-0001.h5")
    attributes["config"] = json.dumps(json.loads(attributes["config"]) | {"lr": 0.2})
    checkpoint.save(out / "last.h5", arrays, attributes)
    trained(data, out, **RUN | {"resume": "auto"})
    assert bisect(whole, out) == 1
    text = capsys.readouterr().out
    assert "B: from step 10 on, lr: 0.2 instead of 0.06" in text
    assert "they agree up to step 10 and part at step 12" in text
    assert "the first difference: step 11, features.0.weight: " in text and "which points to lr\n" in text


def test_another_pixel_is_named(whole, pixel, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cnnmpi.bisect.data.CHUNK", 10)
    trained(pixel, tmp_path / "run", **RUN)
    assert bisect(whole, tmp_path / "run") == 1
    out = capsys.readouterr().out
    assert (
        "data: train images: 1 of 400 differ, the first is number 17, in 1 number: at channel 0, row 3, column 5" in out
    )
    assert "so do mean and std" in out and "the first difference: step 1, features.0.weight" in out
    assert "which points to data_sha256" in out


def test_data_that_are_gone_are_asked_for(whole, pixel, tmp_path, capsys):
    gone = Path(shutil.copy(pixel, tmp_path / "gone.h5"))
    trained(gone, tmp_path / "run", **RUN | {"max_steps": 8})
    gone.unlink()
    assert bisect(whole, tmp_path / "run") == 1
    assert "NOT COMPUTED AGAIN" in (out := capsys.readouterr().out) and "name them by --other-data" in out
    assert bisect(whole, tmp_path / "run", "--other-data", str(pixel)) == 1
    assert "the first difference: step 1" in capsys.readouterr().out


@pytest.mark.parametrize("setting", [{"seed": 1}, {"model": "smallresnet"}])
def test_runs_that_begin_otherwise_differ_in_their_first_weights(setting, whole, data, tmp_path, capsys):
    trained(data, tmp_path / "run", **RUN | {"max_steps": 1} | setting)
    assert bisect(whole, tmp_path / "run") == 1
    out = capsys.readouterr().out
    assert "they agree nowhere, and part at step 0" in out and "the first difference: step 0, features.0.weight" in out
    assert next(iter(setting)) in out.splitlines()[-1]


def test_other_kernels_are_named(whole, data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as there:
        there.setattr("cnnmpi.functional.kernels", lambda device: "openblas Other")
        one_ulp(there, range(1, 99))
        trained(data, tmp_path / "run", **RUN)
    assert bisect(whole, tmp_path / "run") == 1
    assert "which points to kernels: B was computed otherwise than here" in capsys.readouterr().out


def test_kernels_that_give_the_same_bits_are_no_cause(whole, data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as there:
        there.setattr("cnnmpi.functional.kernels", lambda device: "openblas Other")
        trained(data, tmp_path / "run", **RUN | {"lr": 0.07})
    assert bisect(whole, tmp_path / "run") == 1
    assert capsys.readouterr().out.endswith("which points to lr\n")


def test_what_changes_twice_is_told_twice():
    says = [
        {"kernels": "a", "code": {"model": "x"}},
        {"step": 0},
        {"changed": 4, "kernels": "b"},
        {"changed": 8, "kernels": "c", "code": {"model": "y"}},
    ]
    record = Record(Path(), chain=[Entry(b"", each) for each in says])
    assert [*changes(record)] == [(4, "kernels", "a", "b"), (8, "code model", "x", "y"), (8, "kernels", "b", "c")]


def test_where_neither_can_be_computed_it_says_so(whole, data, tmp_path, monkeypatch, capsys):
    trained(data, tmp_path / "run", **RUN | {"lr": 0.07})
    monkeypatch.setattr("cnnmpi.functional.kernels", lambda device: "openblas Other")
    one_ulp(monkeypatch, range(1, 99))
    assert bisect(whole, tmp_path / "run") == 1
    out = capsys.readouterr().out
    assert "as they are computed here, the first difference: step 1, features.0.weight" in out
    assert "\nwhich points to lr\n" in out and out.count("cannot be judged here: other kernels\n") == 2


@needs_mpirun
def test_on_several_ranks(whole, data, tmp_path):
    trained(data, tmp_path / "run", **RUN | {"lr": 0.07})
    result = run(MPIRUN, "-n", "2", sys.executable, "-m", "cnnmpi.bisect", whole, tmp_path / "run")
    assert result.returncode == 1, result.stderr
    assert result.stdout.count("the first difference: step 1, features.0.weight") == 1
    assert result.stdout.splitlines()[-1] == "which points to lr"


# -- fingerprints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def printed(data, tmp_path_factory) -> Path:
    return trained(data, tmp_path_factory.mktemp("printed") / "run", fingerprint="1:3")


def test_equal_fingerprints_agree(printed, data, tmp_path, capsys):
    trained(data, tmp_path / "run", fingerprint="2:4")
    assert bisect(printed, tmp_path / "run") == 0
    assert "fingerprints: the same, in 2 steps" in capsys.readouterr().out
    trained(data, tmp_path / "later", fingerprint="4:4")
    assert bisect(printed, tmp_path / "later") == 0  # by their ledgers
    for out in (printed, tmp_path / "later"):
        shutil.copytree(out, tmp_path / "alone" / out.name, ignore=shutil.ignore_patterns(LEDGER))
    capsys.readouterr()
    assert bisect(*(tmp_path / "alone").iterdir()) == 2
    assert "no step in common" in capsys.readouterr().out


def test_kernels_that_this_processor_did_not_choose_show_in_the_first_product(printed, data, tmp_path, capsys):
    """Those of another processor, in a process of their own; alone by fingerprints."""
    code = "import sys; from pathlib import Path; from tests.test_fingerprint import trained; "
    code += f"trained(Path({str(data)!r}), Path({str(tmp_path / 'run')!r}), fingerprint='1:3')"
    core = "Haswell" if os.environ.get("OPENBLAS_CORETYPE") != "Haswell" else "Sandybridge"
    environment = os.environ | {"OPENBLAS_CORETYPE": core, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = run("env", *(f"{name}={value}" for name, value in environment.items()), sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    heads = [json.loads((out / FINGERPRINT).read_text().splitlines()[0]) for out in (printed, tmp_path / "run")]
    if heads[0]["kernels"] == heads[1]["kernels"]:
        pytest.skip(f"NumPy computes by {heads[0]['kernels']} in any case")
    for out in (printed, tmp_path / "run"):
        shutil.copytree(out, tmp_path / "alone" / out.parent.name)
        (tmp_path / "alone" / out.parent.name / LEDGER).unlink()
    assert bisect(*sorted((tmp_path / "alone").iterdir())) == 1
    out = capsys.readouterr().out
    assert "kernels" in out and "Conv2d forward of all shards: takes the same, and gives other output" in out
    assert "fingerprints: step 1, features.0" in out and "points to what computes this: kernels" in out
    assert "what shapes them is not the same, kernels: look there first" in out


@pytest.mark.parametrize(
    "setting, place, points",
    [
        ({"lr": 0.07}, "step 1, update: takes other lr", "another learning rate"),
        (
            {"weight_decay": 0.001},
            "step 1, update: takes the same, and gives other weights, optimizer",
            "the optimizer",
        ),
        ({"augment": "none"}, "step 1, batch of all shards: takes the same, and gives other images", "augmentation"),
        ({"label_smoothing": 0.1}, "step 1, loss of all shards: takes the same, and gives other loss", "computes this"),
        ({"shards": 4}, "step 1 of shards 4, 5, 6, 7: other calls, from batch on", "another number of shards"),
        ({"model": "smallresnet", "augment": "flip,crop=2"}, "step 1", "another network"),
    ],
)
def test_a_fingerprint_tells_what_is_otherwise(setting, place, points, printed, data, tmp_path, capsys):
    trained(data, tmp_path / "run", fingerprint="1:1", max_steps=1, **setting)
    assert bisect(printed, tmp_path / "run") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].startswith(f"fingerprints: {place}") and points in lines[-1]
    assert next(iter(setting)) in lines[-2] and lines[-2].endswith(": look there first")


def test_an_image_whose_pixels_changed_places_shows_in_its_shard(data, tmp_path, capsys):
    dataset = read_hdf5(data)
    images = dataset.train_images.copy()
    images[17, 0] = images[17, 0, ::-1]  # as before, mean and std
    write_hdf5(tmp_path / "data.h5", dataclasses.replace(dataset, train_images=images, recorded=None))
    for name, source in (("a", data), ("b", tmp_path / "data.h5")):
        trained(source, tmp_path / name, fingerprint="1:10", max_steps=10)
    assert bisect(tmp_path / "a", tmp_path / "b") == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("fingerprints: "))
    step, shard = next(
        (step, shard) for step in range(10) for shard in range(8) if 17 in set_up_loader(data)._part(step, shard)[2]
    )
    place = f"step {step + 1}, batch of shard {shard}: takes the same, and gives other images"
    assert line == f"fingerprints: {place}"


def set_up_loader(data: Path) -> DataLoader:
    dataset = read_hdf5(data)
    return DataLoader(dataset.train_images, dataset.train_labels, 40, seed=0, shards=8)


def test_where_the_first_step_has_other_weights_already_it_says_so(data, tmp_path, monkeypatch, capsys):
    trained(data, tmp_path / "a", fingerprint="3:4")
    one_ulp(monkeypatch, range(1, 2))
    trained(data, tmp_path / "b", fingerprint="3:4")
    bisect(tmp_path / "a", tmp_path / "b")
    out = capsys.readouterr().out
    assert "fingerprints: step 3, features.0 Conv2d forward of all shards: takes other weight, bias\n" in out
    assert "which points to a step before 3: compare fingerprints of earlier ones" in out


# -- what is harder ----------------------------------------------------------------------------------------------------


def test_a_change_after_the_last_agreement_is_the_cause(whole, data, tmp_path, capsys):
    out = trained(data, tmp_path / "run", **RUN | {"max_steps": 14})
    arrays, attributes = checkpoint.load(out / "last.h5")
    attributes["config"] = json.dumps(json.loads(attributes["config"]) | {"lr": 0.09})
    checkpoint.save(out / "last.h5", arrays, attributes)
    trained(data, out, **RUN | {"resume": "auto"})
    assert bisect(whole, out) == 1
    text = capsys.readouterr().out
    assert "they agree up to step 12 and part at step 16" in text and "the first difference: step 15, " in text
    assert "which points to lr\n" in text


def test_a_change_of_kernels_after_a_fault_does_not_excuse_it(whole, data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as there:
        one_ulp(there, range(13, 14))
        trained(data, tmp_path / "run", **RUN | {"max_steps": 16})
    with monkeypatch.context() as there:
        there.setattr("cnnmpi.functional.kernels", lambda device: "openblas Other")
        trained(data, tmp_path / "run", **RUN | {"resume": "auto"})
    assert bisect(whole, tmp_path / "run") == 1
    out = capsys.readouterr().out
    assert "part at step 16" in out and "B: from step 16 on, kernels: openblas Other" in out
    assert "which points to B: a single fault" in out


def test_sums_in_float32_are_no_failing_host(data, tmp_path, monkeypatch, capsys):
    trained(data, tmp_path / "a", **RUN | {"reduction": "float32"})
    with monkeypatch.context() as there:
        one_ulp(there, range(5, 6))  # as another number of ranks
        trained(data, tmp_path / "b", **RUN | {"reduction": "float32"})
    assert bisect(tmp_path / "a", tmp_path / "b") == 1
    assert "which points to reduction: B was computed otherwise than here" in capsys.readouterr().out


def test_a_checkpoint_that_is_not_the_runs_is_passed_over(whole, data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as there:
        one_ulp(there, range(14, 15))
        trained(data, tmp_path / "b", **RUN)
    copy = Path(shutil.copytree(whole, tmp_path / "a"))
    path = copy / "kept" / "epoch-0001.h5"
    arrays, attributes = checkpoint.load(path)
    array = arrays["model/features.0.weight"]
    array.flat[0] = np.nextafter(array.flat[0], np.float32(9))
    weights = {key.removeprefix("model/"): value for key, value in arrays.items() if key.startswith("model/")}
    checkpoint.save(path, arrays, attributes | {"weights_sha256": checkpoint.weights_digest(weights)})
    assert bisect(copy, tmp_path / "b") == 1
    out = capsys.readouterr().out
    assert "computed again from step 10: A's entry is what it gives" in out and "points to B: a single fault" in out


@pytest.mark.fault
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("data = [")])
def test_settings_that_do_not_name_the_data_are_one_line(damage, whole, data, tmp_path, capsys):
    trained(data, tmp_path / "b", **RUN | {"max_steps": 4, "lr": 0.1})
    damage(tmp_path / "b" / "config.toml")
    assert bisect(tmp_path / "b", whole) == 1
    assert "NOT COMPUTED AGAIN" in (out := capsys.readouterr().out) and "does not name the data" in out


@pytest.mark.fault
def test_no_code_is_imported_because_a_ledger_names_it(whole, tmp_path, capsys):
    (tmp_path / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nNet = print\n"
    )
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))

    def evil(says: list[dict]) -> None:
        says[0]["config"]["model"] = f"{tmp_path / 'evil.py'}:Net"
        for entry in says[2:]:
            entry["weights"] = "0" * 64

    rechain(copy, evil)
    assert bisect(copy, whole) == 1
    assert "its model is a person's own" in capsys.readouterr().out and not (tmp_path / "ran").exists()


@needs_mpirun
def test_output_that_nobody_reads_ends_it_quietly(whole):
    words = f"{sys.executable} -m cnnmpi.bisect {whole} {whole}"
    result = run("bash", "-c", f"{words} | true; exit ${{PIPESTATUS[0]}}")
    assert result.returncode in (0, 141) and not result.stderr
    result = run("bash", "-c", f"{words} > /dev/full")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "cannot be written" in result.stderr


@pytest.mark.fault
def test_a_ledger_of_endless_steps_is_not_computed(whole, tmp_path, capsys):
    copies = [Path(shutil.copytree(whole, tmp_path / name)) for name in "ab"]
    for number, copy in enumerate(copies):
        shutil.rmtree(copy / "kept")

        def endless(says: list[dict], number: int = number) -> None:
            says[0] |= {"every": 10**12, "steps_per_epoch": 10**12}
            says[2:] = [says[2] | {"step": 10**12, "weights": str(number)}]

        rechain(copy, endless)
    assert bisect(*copies) == 1
    assert "steps_per_epoch is 1000000000000, with these data 10" in capsys.readouterr().out


# -- what cannot be compared -------------------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda out: shutil.rmtree(out), "no such folder"),
        (lambda out: (out / LEDGER).unlink(), "without its ledger a run cannot be checked"),
        (lambda out: (out / LEDGER).write_bytes((out / LEDGER).read_bytes()[9:]), "python -m cnnmpi.audit"),
        (lambda out: (out / LEDGER).write_text('{"ledger": 2, "before": ""}\n'), "a ledger of version 2, not 1"),
    ],
)
def test_what_is_no_whole_run_is_one_line(damage, words, whole, tmp_path, capfd):
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    damage(copy)
    assert bisect(whole, copy) == 2
    err = capfd.readouterr().err
    assert words in err and err.count("\n") == 1


@pytest.mark.fault
def test_a_run_that_goes_on_is_refused(whole, tmp_path, capfd):
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    with (copy / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert bisect(copy, whole) == 2
    assert "still going on" in capfd.readouterr().err


@pytest.mark.fault
@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda lines: [b'{"fingerprint": 2}\n', *lines[1:]], "not a fingerprint of version 1"),
        (lambda lines: [lines[0], b'{"step": 1}\n'], "line 2 is no call"),
        (lambda lines: [lines[0], *lines[len(lines) // 3 * 2 + 1 :], *lines[1:]], "goes back to step 1"),
        (lambda lines: [lines[0], b"x" * (1 << 21) + b"\n", *lines[1:]], "line 2 is no call: the file is damaged"),
        (lambda lines: [], "not a fingerprint"),
    ],
)
def test_a_damaged_fingerprint_is_one_line(damage, words, printed, tmp_path, capfd):
    copy = Path(shutil.copytree(printed, tmp_path / "copy"))
    lines = (copy / FINGERPRINT).read_bytes().splitlines(keepends=True)
    (copy / FINGERPRINT).write_bytes(b"".join(damage(lines)))
    assert bisect(printed, copy) == 2
    said = capfd.readouterr()
    assert words in said.err + said.out and "Traceback" not in said.err


@pytest.mark.fault
def test_a_torn_fingerprint_is_compared_as_far_as_it_goes(printed, tmp_path, capsys):
    copy = Path(shutil.copytree(printed, tmp_path / "copy"))
    blob = (copy / FINGERPRINT).read_bytes()
    (copy / FINGERPRINT).write_bytes(blob[: -len(blob) // 5])
    assert bisect(printed, copy) == 0
    assert "fingerprints: the same, in 2 steps" in capsys.readouterr().out


def test_how_arrays_differ_is_told_in_units_or_as_a_number():
    a = {"model/w": np.array([[1.0, -2.0, 0.0]], np.float32), "optimizer/m/w": np.zeros(2, np.float32)}

    def other(**changes):
        return compare(3, a, {key: value.copy() for key, value in a.items()} | changes)

    up = np.array([[1.0, np.nextafter(np.float32(-2), np.float32(0)), 0.0]], np.float32)
    assert (
        str(other(**{"model/w": up})) == "step 3, w: 1 of 3 numbers by one unit in the last place, the first at (0, 1)"
    )
    tiny = np.array([[1.0, -2.0, -0.0]], np.float32)
    assert "1 of 3 numbers by the sign of a zero, the first at (0, 2)" in str(other(**{"model/w": tiny}))
    far = a["model/w"] + np.float32(0.25)
    found = other(**{"model/w": far, "optimizer/m/w": np.ones(2, np.float32)})
    assert str(found) == "step 3, w: 3 of 3 numbers by up to 0.25, the first at (0, 0), and 1 other array"
    assert "float32 (1, 3) and none" in str(compare(3, a, {"optimizer/m/w": a["optimizer/m/w"]}))
    assert other() is None

"""Checkpoints: exact round trips, refusal of everything damaged or hostile, and writes that fail halfway."""

import errno
import hashlib
import io
import json
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cnnmpi.checkpoint import CheckpointError, load, save, weights_digest, write_atomically
from cnnmpi.checkpoint.__main__ import main

ARRAYS = {
    "model/features.0.weight": np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype(np.float32),
    "model/features.1.running_var": np.array([1.0, np.inf, -0.0, np.nan]),
    "model/steps": np.array(2**62 + 1),
    "model/empty": np.zeros((0, 3), np.float32),
    "optimizer/momentum/features.0.weight": np.ones((4, 3, 2, 2), np.float32),
}
ATTRIBUTES: dict[str, Any] = {
    "config": json.dumps({"lr": 0.1, "note": "größer " * 2000}),
    "epoch": 3,
    "best_test_acc": 0.75,
    "augment": True,
    "classes": ["cat", "größe", ""],
    "mean": [0.5, 0.25, 1.0],
    "nothing": [],
    "blank": "",
}


def seal(contents: bytes) -> bytes:
    """Return a file with a correct header before ``contents``, written from the document, not from the code."""
    text = f"cnnmpi checkpoint\nsha256 of the bytes after this block: {hashlib.sha256(contents).hexdigest()}\n"
    return f"{text}bytes after this block: {len(contents)}\n".ljust(512, "\n").encode() + contents


def craft(path: Path, fill: Callable[[h5py.File], object], version: Any = 1) -> Path:
    """Write a file whose header is right but whose HDF5 content is whatever ``fill`` makes of it."""
    image = io.BytesIO()
    with h5py.File(image, "w", libver="earliest", userblock_size=512) as root:
        if version is not None:
            root.attrs["format_version"] = version
        fill(root)
    path.write_bytes(seal(image.getvalue()[512:]))
    return path


def small(path: Path, value: float = 1.0) -> Path:
    """Save a small valid checkpoint at ``path`` and return it."""
    save(path, {"model/w": np.full(3, value, np.float32)}, {"epoch": 1})
    return path


def listing(directory: Path) -> list[str]:
    """Return the names in a directory, hidden ones included."""
    return sorted(path.name for path in directory.iterdir())


def error_of(path: Path) -> str:
    """Return the message with which ``path`` is refused: one line that names the file."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


# --- what is saved comes back ---


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "last.h5"
    save(path, ARRAYS, ATTRIBUTES)
    arrays, attributes = load(path)
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        assert arrays[name].shape == array.shape
        assert arrays[name].tobytes() == array.tobytes()
    assert attributes == {**ATTRIBUTES, "format_version": 1}
    assert {name: type(value) for name, value in attributes.items()} == {
        **{name: type(value) for name, value in ATTRIBUTES.items()},
        "format_version": int,
    }
    assert [type(value) for value in attributes["mean"]] == [float] * 3
    assert listing(tmp_path) == ["last.h5"]


def test_what_was_loaded_can_be_saved_and_gives_the_same_bytes(tmp_path: Path) -> None:
    save(tmp_path / "a.h5", ARRAYS, ATTRIBUTES)
    save(tmp_path / "b.h5", *load(tmp_path / "a.h5"))
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_plain_h5py_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "last.h5"
    save(path, ARRAYS, ATTRIBUTES)
    with h5py.File(path, "r") as root:
        assert sorted(root) == ["model", "optimizer"]
        weight = root["model"]["features.0.weight"]
        assert weight.dtype == np.dtype("<f4")
        np.testing.assert_array_equal(weight[()], ARRAYS["model/features.0.weight"])
        assert json.loads(root.attrs["config"]) == json.loads(ATTRIBUTES["config"])
        assert root.attrs["config"].decode() == ATTRIBUTES["config"]
        assert [text.decode() for text in root.attrs["classes"]] == ATTRIBUTES["classes"]
    assert path.read_bytes().startswith(b"cnnmpi checkpoint\nsha256 of the bytes after this block: ")


def test_any_memory_layout_and_byte_order_is_stored_in_logical_order(tmp_path: Path) -> None:
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    views = {"t": base.T, "s": base[::-1, :, ::2], "big": base.astype(">f4"), "f": np.asfortranarray(base)}
    save(tmp_path / "a.h5", views, {})
    arrays, _ = load(tmp_path / "a.h5")
    for name, view in views.items():
        np.testing.assert_array_equal(arrays[name], view)
        assert arrays[name].flags.c_contiguous
    assert weights_digest(views) == weights_digest(arrays)


def test_digest_is_what_the_document_defines() -> None:
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3).T, "a.1": np.array(2.0), "a": np.array([7])}
    text = b"a\0<i8\x001\0" + (7).to_bytes(8, "little") + b"a.1\0<f8\0\0" + bytes.fromhex("0000000000000040")
    text += b"b\0<f4\x003,2\0" + np.array([0, 3, 1, 4, 2, 5], "<f4").tobytes()
    assert weights_digest(arrays) == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.zeros((2, 3), np.float32)},
        {"w": np.zeros((3, 2), np.float32)},
        {"w": np.zeros((2, 3))},
        {"w": np.full((2, 3), -0.0, np.float32)},
        {"w": np.zeros((2, 3), np.float32), "z": np.zeros(0)},
    ],
)
def test_digest_sees_name_shape_dtype_and_every_bit(other: dict[str, Any]) -> None:
    assert weights_digest({"w": np.zeros((2, 3), np.float32)}) != weights_digest(other)


@pytest.mark.parametrize(
    ("arrays", "attributes", "said"),
    [
        ({"model/w": np.zeros(3, np.float16)}, {}, "model/w.*float16"),
        ({"model/w": np.array([None])}, {}, "model/w.*object"),
        ({"model//w": np.zeros(3)}, {}, "model//w"),
        ({"./w": np.zeros(3)}, {}, "./w"),
        ({"": np.zeros(3)}, {}, "name is parts"),
        ({"a": np.zeros(3), "a/b": np.zeros(3)}, {}, "cannot be stored"),
        ({}, {"config": {"lr": 1}}, "config"),
        ({}, {"classes": ["a", 1]}, "classes"),
        ({}, {"classes": ["a\0"]}, "classes"),
        ({}, {"model": "a\0"}, "model"),
        ({}, {"mean": [1.0, "2"]}, "mean"),
        ({}, {"step": 2**70}, "cannot be stored"),
        ({}, {"classes": ["x" * 70000, *["y"] * 2000]}, "2001 texts of up to 70000 bytes.*shorten the longest"),
        ({"attributes/w": np.zeros(3)}, {}, "attributes/w"),
        ({"/".join("a" * 501): np.zeros(3)}, {}, "at most 1000 characters"),
        ({}, {"a//b": "x" * 70000}, "a//b"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path, arrays: dict[str, Any], attributes: dict[str, Any], said: str
) -> None:
    path = small(tmp_path / "a.h5")
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=said):
        save(path, arrays, attributes)
    assert path.read_bytes() == before
    assert listing(tmp_path) == ["a.h5"]


# --- what is damaged or foreign is refused ---


@pytest.mark.fault
def test_truncation_anywhere_is_refused_and_called_so(tmp_path: Path) -> None:
    blob = small(tmp_path / "a.h5").read_bytes()
    path = tmp_path / "b.h5"
    lengths = random.Random(0).sample(range(512, len(blob)), 60)
    for length in [*range(1, 513, 7), 511, 512, 513, len(blob) - 1, *lengths]:
        path.write_bytes(blob[:length])
        assert "truncated" in error_of(path)
    path.write_bytes(b"")
    assert "empty" in error_of(path)
    path.write_bytes(blob + b"\0")
    assert "damaged" in error_of(path)


@pytest.mark.fault
def test_every_flipped_byte_is_refused(tmp_path: Path) -> None:
    blob = small(tmp_path / "a.h5").read_bytes()
    path = tmp_path / "b.h5"
    dice = random.Random(1)
    for offset in [*range(512), *dice.sample(range(512, len(blob)), 200)]:
        flipped = bytearray(blob)
        flipped[offset] ^= 1 << dice.randrange(8)
        path.write_bytes(flipped)
        message = error_of(path)
        assert "damaged" in message or "truncated" in message  # the latter where the size has become larger


@pytest.mark.fault
def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as root:
        root["model/w"] = np.zeros(3)
    assert "not a cnnmpi checkpoint" in error_of(path)
    path.write_bytes(b"PK\x03\x04 a zip archive")
    assert "not a cnnmpi checkpoint" in error_of(path)
    path.write_bytes(seal(b"no HDF5 here"))
    assert "refused" in error_of(path)
    assert "No such file" in error_of(tmp_path / "missing.h5")
    assert "not a file" in error_of(tmp_path)
    os.mkfifo(tmp_path / "pipe.h5")  # which would let a reader wait for ever
    assert "not a file" in error_of(tmp_path / "pipe.h5")
    assert "File name too long" in error_of(tmp_path / ("x" * 300))
    assert "embedded null" in error_of(tmp_path / "a\0b")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("version", "said"), [(3, "version is 3.*update"), (None, "missing"), (0, "no version"), (1.5, "no version")]
)
def test_other_versions_are_refused(tmp_path: Path, version: Any, said: str) -> None:
    path = craft(tmp_path / "a.h5", lambda root: root.create_dataset("w", data=np.zeros(3)), version)
    with pytest.raises(CheckpointError, match=said):
        load(path)


def virtual(root: h5py.File) -> None:
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource("/etc/hostname", "w", (3,))
    root.create_virtual_dataset("w", layout)


def second_hard_link(root: h5py.File) -> None:
    root["a"] = np.zeros(3)
    root["w"] = root["a"]


HOSTILE: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "soft link": (lambda root: root.__setitem__("w", h5py.SoftLink("/a")), "link"),
    "external link": (
        lambda root: root.__setitem__("model/w", h5py.ExternalLink("/etc/hostname", "/")),
        "'model/w'.*link",
    ),
    "second hard link": (second_hard_link, "second link"),
    "cycle": (lambda root: root.__setitem__("w", root["/"]), "second link"),
    "virtual dataset": (virtual, "virtual"),
    "external storage": (
        lambda root: root.create_dataset("w", (3,), "f8", external=[("/etc/hostname", 0, 24)]),
        "another file",
    ),
    "terabyte": (lambda root: root.create_dataset("w", (2**37,), "f8"), "claim more bytes"),
    "terabyte, chunked": (lambda root: root.create_dataset("w", (2**37,), "f8", chunks=(1024,)), "chunked"),
    "compressed": (lambda root: root.create_dataset("w", data=np.zeros(10**6), compression=9), "compressed"),
    "text": (lambda root: root.create_dataset("w", data="text"), "'w' holds object"),
    "references": (lambda root: root.create_dataset("w", data=root.ref, dtype=h5py.ref_dtype), "'w' holds object"),
    "compound": (lambda root: root.create_dataset("w", data=np.zeros(2, "f4,f8")), "'w' holds"),
    "complex": (lambda root: root.create_dataset("w", data=np.zeros(2, "c8")), "'w' holds"),
    "null": (lambda root: root.create_dataset("w", data=h5py.Empty("f8")), "'w' holds"),
    "datatype": (lambda root: root.__setitem__("w", np.dtype("f8")), "neither a group nor a dataset"),
    "text of variable length": (lambda root: root.attrs.__setitem__("w", "text"), "attribute 'w'"),
    "reference attribute": (lambda root: root.attrs.create("w", root.ref, dtype=h5py.ref_dtype), "attribute 'w'"),
    "null attribute": (lambda root: root.attrs.__setitem__("w", h5py.Empty("f8")), "attribute 'w'"),
    "matrix attribute": (lambda root: root.attrs.__setitem__("w", np.zeros((2, 2))), "attribute 'w'"),
}


@pytest.mark.fault
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_content_is_refused_though_its_digest_is_right(tmp_path: Path, case: str) -> None:
    fill, said = HOSTILE[case]
    path = craft(tmp_path / "a.h5", fill)
    with pytest.raises(CheckpointError, match=f"refused: .*{said}"):
        load(path)


def test_crafted_but_harmless_content_is_read(tmp_path: Path) -> None:
    """The counterpart of the test above: it is the content that is refused there, not the crafting."""
    path = craft(tmp_path / "a.h5", lambda root: root.create_dataset("model/w", data=np.ones(3)))
    arrays, attributes = load(path)
    assert arrays["model/w"].tolist() == [1.0] * 3
    assert attributes == {"format_version": 1}


@pytest.mark.fault
@pytest.mark.parametrize("free", [0, 2**64 - 8, 5000])
def test_a_malformed_heap_keeps_nobody_waiting(tmp_path: Path, free: int) -> None:
    """libhdf5 looks into the heap when it opens a virtual dataset, and never returns from free space of size 0."""
    contents = bytearray(craft(tmp_path / "a.h5", virtual).read_bytes()[512:])
    at = contents.index(b"GCOL") + 16
    contents[at : at + 2], contents[at + 8 : at + 16] = bytes(2), free.to_bytes(8, "little")
    (tmp_path / "a.h5").write_bytes(seal(bytes(contents)))
    assert "virtual" in error_of(tmp_path / "a.h5")


@pytest.mark.fault
def test_what_is_no_checkpoint_is_refused_after_its_first_bytes(tmp_path: Path) -> None:
    assert "not a file" in error_of(Path("/dev/zero"))  # of which there is no end
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    assert "not a cnnmpi checkpoint" in error_of(tmp_path / "large")


@pytest.mark.fault
def test_names_that_are_too_long_or_too_deep_are_refused(tmp_path: Path) -> None:
    for name in ("x" * 1001, "/".join("x" * 600)):
        path = craft(tmp_path / "a.h5", lambda root, name=name: root.create_dataset(name, data=np.zeros(1)))
        assert "no name that a checkpoint has" in error_of(path)


# --- attributes that are too large for HDF5 ---


@pytest.mark.parametrize("count", [1000, 100_000])
def test_attributes_of_any_size_come_back(tmp_path: Path, count: int) -> None:
    attributes = {
        "classes": [f"{i} ".ljust(66, "ö") for i in range(count)],
        "config": json.dumps({"note": "größer " * 20_000}),
        "mean": [i / 7 for i in range(10_000)],
        "a/b": "x" * 70_000,
        "step": 3,
    }
    path = tmp_path / "a.h5"
    save(path, {"model/w": np.ones(3)}, attributes)
    arrays, read = load(path)
    assert list(arrays) == ["model/w"]
    assert read == {**attributes, "format_version": 2}
    with h5py.File(path) as root:  # as any program reads them
        assert sorted(root.attrs) == ["format_version", "step"]
        assert root["attributes/classes"][count - 1].decode() == attributes["classes"][-1]
    save(tmp_path / "b.h5", arrays, read)
    assert (tmp_path / "b.h5").read_bytes() == path.read_bytes()
    assert main(["diff", str(path), str(tmp_path / "b.h5")]) == 0


def test_only_large_attributes_need_the_second_version(tmp_path: Path) -> None:
    for size in (59_000, 61_000):
        save(tmp_path / "a.h5", {}, {"note": "x" * size})
        assert load(tmp_path / "a.h5")[1] == {"note": "x" * size, "format_version": 1 + (size > 60_000)}


@pytest.mark.fault
@pytest.mark.parametrize(
    ("data", "said"),
    [
        (np.array(["a", "b"], "S"), None),
        (np.array([["a", "b"]], "S"), "holds"),
        (np.zeros(2, "f4,f8"), "holds"),
        ("text of variable length", "holds"),
    ],
)
def test_a_group_of_attributes_holds_texts_and_numbers(tmp_path: Path, data: Any, said: str | None) -> None:
    path = craft(tmp_path / "a.h5", lambda root: root.create_dataset("attributes/x", data=data), 2)
    if said:
        assert said in error_of(path)
    else:
        assert load(path) == ({}, {"format_version": 2, "x": ["a", "b"]})
    one = craft(tmp_path / "a.h5", lambda root: root.create_dataset("attributes/x", data=np.ones(2)))
    assert list(load(one)[0]) == ["attributes/x"], "in the first version it was a name like any other"


# --- a write that fails leaves the old file ---


@pytest.mark.fault
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("function", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_failed_write_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int, keep: bool
) -> None:
    path, previous = small(tmp_path / "last.h5"), tmp_path / "previous.h5"
    before = path.read_bytes()

    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(CheckpointError, match=os.strerror(code)) as caught:
            save(path, {"model/w": np.zeros(3)}, {}, keep=previous if keep else None)
    assert str(caught.value).startswith(f"{path}: cannot be written")
    assert path.read_bytes() == before
    assert listing(tmp_path) == ["last.h5"]


@pytest.mark.fault
@pytest.mark.parametrize("failing_call", [1, 2])
def test_each_rename_may_fail_when_the_previous_file_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    path, replace, calls = small(tmp_path / "last.h5"), os.replace, 0
    before = path.read_bytes()

    def fail_once(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(CheckpointError):
        save(path, {}, {}, keep=tmp_path / "previous.h5")
    assert path.read_bytes() == before
    assert listing(tmp_path) == ["last.h5"]


@pytest.mark.fault
@pytest.mark.parametrize(("code", "tolerated"), [(errno.EIO, False), (errno.EINVAL, True)])
def test_a_directory_that_cannot_be_synced_holds_the_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, tolerated: bool
) -> None:
    path, fsync, calls = small(tmp_path / "last.h5"), os.fsync, 0

    def fail_second(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_second)
    if tolerated:
        write_atomically(path, b"new")
    else:
        with pytest.raises(CheckpointError, match="Input/output error"):
            write_atomically(path, b"new")
    assert calls == 2
    assert path.read_bytes() == b"new"
    assert listing(tmp_path) == ["last.h5"]


@pytest.mark.fault
def test_file_and_folder_reach_the_disk_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    write, fsync, replace = os.write, os.fsync, os.replace

    def note(event: str, function: Callable[..., Any], *arguments: Any) -> Any:
        events.append(event)
        return function(*arguments)

    def synced(descriptor: int) -> None:
        note("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file", fsync, descriptor)

    small(tmp_path / "last.h5")
    monkeypatch.setattr(os, "write", lambda *arguments: note("write", write, *arguments))
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *arguments: note("rename", replace, *arguments))
    save(tmp_path / "last.h5", {}, {}, keep=tmp_path / "previous.h5")
    assert events == ["write", "sync file", "rename", "rename", "sync folder"]


@pytest.mark.fault
def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:100]))
    path = small(tmp_path / "last.h5", value=5.0)
    assert load(path)[0]["model/w"].tolist() == [5.0] * 3
    monkeypatch.setattr(os, "write", lambda descriptor, data: 0)
    with pytest.raises(CheckpointError, match="no progress"):
        small(path, value=6.0)
    assert load(path)[0]["model/w"].tolist() == [5.0] * 3


def test_an_interrupt_removes_the_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "last.h5", b"new")
    assert listing(tmp_path) == []


@pytest.mark.fault
def test_the_temporary_of_a_killed_process_is_removed_by_the_next_write(tmp_path: Path) -> None:
    (tmp_path / ".last.h5.0123.tmp").write_bytes(b"half")
    (tmp_path / ".best.h5.0123.tmp").write_bytes(b"another file's")
    small(tmp_path / "last.h5")
    assert listing(tmp_path) == [".best.h5.0123.tmp", "last.h5"]


def test_keep_keeps_the_previous_file(tmp_path: Path) -> None:
    path, previous = tmp_path / "last.h5", tmp_path / "previous.h5"
    for step in range(3):
        save(path, {"model/w": np.full(3, step)}, {"step": step}, keep=previous)
        assert load(path)[1]["step"] == step
        assert previous.exists() == (step > 0)
    assert load(previous)[1]["step"] == 1


@pytest.mark.fault
def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone/last\.h5: cannot be written: No such file or directory"):
        small(tmp_path / "gone" / "last.h5")


# --- the command line ---


def test_show_prints_attributes_and_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.h5"
    save(path, {"model/w": np.array([[3.0, -4.0]], np.float32), "x": np.array(1)}, {"model": "tiny", "evil": "\x1b[2J"})
    assert main(["show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "  model: tiny\n" in out
    row = next(line.split() for line in out.splitlines() if "model/w" in line)
    assert row == ["model/w", "1x2", "float32", "-4", "3", "5"]
    assert "  model: 1 arrays, 2 numbers, 8 bytes\n" in out
    assert "\x1b" not in out


def test_verify_tells_good_from_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {"w": np.ones(3, np.float32)}
    good, wrong, torn = tmp_path / "good.h5", tmp_path / "wrong.h5", small(tmp_path / "torn.h5")
    save(good, {"model/w": weights["w"], "optimizer/m/w": np.zeros(3)}, {"weights_sha256": weights_digest(weights)})
    save(wrong, {"model/w": weights["w"]}, {"weights_sha256": "0" * 64})
    torn.write_bytes(torn.read_bytes()[:-1])
    assert main(["verify", str(good)]) == 0
    assert capsys.readouterr().out == f"ok {good} weights_sha256={weights_digest(weights)}\n"
    assert main(["verify", str(wrong), str(torn), str(good)]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(f"ok {good}")
    first, second = captured.err.splitlines()
    assert first.startswith(f"cnnmpi.checkpoint: error: {wrong}: its weights")
    assert second.startswith(f"cnnmpi.checkpoint: error: {torn}: is truncated")


def test_diff_tells_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a.h5", tmp_path / "b.h5"
    arrays: dict[str, Any] = {"model/w": np.ones(3, np.float32), "optimizer/m/w": np.zeros(3), "extra/x": np.zeros(2)}
    save(a, arrays, {"epoch": 1, "same": 2, "acc": float("nan")})
    save(b, {**arrays, "extra/x": np.ones(2)}, {"epoch": 2, "same": 2, "acc": float("nan"), "new": "x"})
    assert main(["diff", str(a), str(b)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "attribute epoch: 1 | 2",
        'attribute new: - | "x"',
        "array extra/x: max abs difference 1",
        "2 of 3 arrays are equal to the bit",
    ]
    save(
        b, {"model/w": np.array([1, 1.5, 1], np.float32), "optimizer/m/w": np.zeros((1, 3)), "model/v": np.zeros(1)}, {}
    )
    assert main(["diff", str(a), str(b)]) == 1
    out = capsys.readouterr().out
    assert "array model/w: max abs difference 0.5\n" in out
    assert "array optimizer/m/w: 3 float64 | 1x3 float64\n" in out
    assert "array extra/x: only in the first file\n" in out
    assert "array model/v: only in the second file\n" in out


def test_diff_sees_bits_that_compare_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = small(tmp_path / "a.h5", 0.0), small(tmp_path / "b.h5", -0.0)
    assert main(["diff", str(a), str(b)]) == 1
    assert "max abs difference 0\n" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["show", "gone.h5"], ["diff", "gone.h5", "gone.h5"], ["show"], ["verify"]])
def test_errors_are_one_line_and_exit_code_2(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cnnmpi.checkpoint: error: ")
    assert captured.err.count("\n") == 1

"""Images that stay in their file: the same pixels as in memory, each compared with its checksum, and no more read."""

import copy
import dataclasses
import gc
import json
import os
import re
import threading
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

from cnnmpi.data import (
    DataError,
    DataLoader,
    Dataset,
    NotInPlace,
    Selected,
    held_out,
    read_hdf5,
    read_in_place,
    write_hdf5,
)
from cnnmpi.data.rows import InFile, as_rows, reads
from cnnmpi.distributed import Ranks, UserError
from cnnmpi.train import Config, set_up

pytestmark = pytest.mark.mpi_skip


def images(train: int = 400, test: int = 30, size: int = 32) -> Dataset:
    """Enough for more than one chunk of about 1 MB."""
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (train + test, 3, size, size), np.uint8)
    y = draw.integers(0, 10, train + test)
    return Dataset.of((x[:train], y[:train], x[train:], y[train:]))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_hdf5(tmp_path / "a.h5", images())
    return tmp_path / "a.h5"


def layouts(path: Path, kind: str) -> Path:
    """The same images as another program, or an earlier version, may have written them."""
    data, other = images(), path.with_name(f"{kind}.h5")
    with h5py.File(other, "w", userblock_size=512 if kind == "userblock" else 0) as file:
        for part in ("train", "test"):
            pixels = np.ascontiguousarray(getattr(data, f"{part}_images"))
            options = {
                "contiguous": {}, "userblock": {},
                "earlier": {"chunks": (min(len(pixels), 341), 3, 32, 32), "fletcher32": True},
                "resizable": {"chunks": (7, 3, 32, 32), "maxshape": (None, 3, 32, 32)},
                "compressed": {"chunks": (7, 3, 32, 32), "compression": "gzip"},
                "parts": {"chunks": (7, 1, 32, 32)}, "headers": {},
            }[kind]  # fmt: skip
            if kind == "headers":  # compact storage, for which h5py has no word
                space = h5py.h5s.create_simple((20, 3, 32, 32))
                compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                compact.set_layout(h5py.h5d.COMPACT)
                group = file.create_group(part)
                h5py.h5d.create(group.id, b"images", h5py.h5t.NATIVE_UINT8, space, compact)
                group["images"][...] = pixels[:20]
                group["labels"] = getattr(data, f"{part}_labels")[:20]
                continue
            file.create_dataset(f"{part}/images", data=pixels, **options)
            file[f"{part}/labels"] = getattr(data, f"{part}_labels")
        file.attrs["classes"] = np.array([str(k) for k in range(10)], "S")
    return other


def damage(path: Path, image: np.ndarray) -> None:
    """Change one bit of an image, wherever it stands."""
    content = bytearray(path.read_bytes())
    at = content.find(image.tobytes())
    assert at > 0
    content[at + 100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "index", [slice(0, 3), slice(339, 343), slice(5, 5), slice(None), [7, 3, 399, 3, 341, 340], []]
)
def test_rows_of_a_file_are_those_of_the_array(path, index):
    whole, rows = images().train_images, read_in_place(path).train_images
    index = index if isinstance(index, slice) else np.array(index, np.int64)
    assert isinstance(rows, InFile) and rows.shape == whole.shape and len(rows) == 400
    np.testing.assert_array_equal(rows[index], whole[index])
    assert rows[index].transpose(0, 2, 3, 1).flags.c_contiguous, "channels-last in memory"


@pytest.mark.parametrize("kind", ["contiguous", "userblock", "earlier", "resizable"])
def test_files_of_other_layouts_are_read_in_place(path, kind, tmp_path):
    ends = []
    for place in ("file", "memory"):
        out = tmp_path / place
        run = set_up(Config(data=str(layouts(path, kind)), data_in=place, out=out, epochs=1, threads=1), Ranks())
        assert run.run() == 0
        ends.append(json.loads((out / "metrics.jsonl").read_text())["train_loss"])
    assert ends[0] == ends[1]
    data, other = images(), read_in_place(layouts(path, kind))
    order = np.random.default_rng(0).permutation(400)
    np.testing.assert_array_equal(other.train_images[order], data.train_images[order])
    np.testing.assert_array_equal(other.test_images[:], data.test_images)
    assert other.recorded is None and other.digest() == data.digest()


@pytest.mark.parametrize(
    "kind, why", [("compressed", "stored compressed"), ("parts", "stored in chunks of parts of images")]
)
def test_what_cannot_be_read_in_place_is_said_and_goes_to_memory_by_itself(path, tmp_path, kind, why):
    other = layouts(path, kind)
    with pytest.raises(NotInPlace, match=f"train/images are {why}.*use --data-in memory"):
        read_in_place(other)
    with pytest.raises(UserError, match=why):
        set_up(Config(data=str(other), data_in="file", out=tmp_path / "run"), Ranks())
    assert isinstance(set_up(Config(data=str(other), out=tmp_path / "run"), Ranks()).dataset.train_images, np.ndarray)


def test_the_digest_and_the_statistics_are_known_without_reading_the_images(path, monkeypatch):
    def read(self, index):
        raise AssertionError("an image was read")

    data = read_in_place(path)
    monkeypatch.setattr(InFile, "__getitem__", read)
    recorded = data.recorded
    in_memory = read_hdf5(path)
    assert recorded.data_sha256 == in_memory.digest()
    pixels = in_memory.train_images.transpose(1, 0, 2, 3).reshape(3, -1) / 255
    np.testing.assert_allclose(recorded.mean, pixels.mean(axis=1), rtol=1e-12)  # rounding of sums of 400,000 numbers
    np.testing.assert_allclose(recorded.std, pixels.std(axis=1), rtol=1e-9)


def test_a_changed_image_is_named_when_it_is_read_and_others_are_not_touched(path, tmp_path):
    damage(path, images().train_images[123])
    rows = read_in_place(path).train_images
    rows[:123], rows[124:]
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.h5: image 123 is not what was written \(crc32\): .* verify names all"):
            rows[np.array([5, 123])]
    options = {"batch_size": 40, "epochs": 1, "threads": 1, "out": tmp_path / "run"}
    run = set_up(Config(data=str(path), data_in="file", **options), Ranks())
    with pytest.raises(DataError, match="image 123"):
        run.run()
    with pytest.raises(UserError, match=r"damaged|its content gives .* not what was written"):
        set_up(Config(data=str(path), data_in="memory", **options), Ranks())


def test_a_changed_label_is_found_at_the_start(path, tmp_path):
    with h5py.File(path, "r+") as file:
        file["train/labels"][3] = (file["train/labels"][3] + 1) % 10
    with pytest.raises(DataError, match="attributes, labels or checksums are not what was written"):
        read_in_place(path)
    for place in ("file", "memory"):
        with pytest.raises(UserError, match="not what was written"):
            set_up(Config(data=str(path), data_in=place, out=tmp_path / "run"), Ranks())


def test_a_file_that_becomes_shorter_is_one_line(path):
    rows = read_in_place(path).train_images
    os.truncate(path, 500_000)
    with pytest.raises(DataError, match=re.escape(f"{path}: has become shorter while it was in use")):
        rows[:]


def test_attributes_that_were_changed_or_are_none_are_refused(path):
    whole = path.read_bytes()
    for name, value in {
        "mean": np.array([0.1, 0.2, 0.3]), "std": np.array([np.inf, 1, 1]), "fit": "crop", "source": "elsewhere",
    }.items():  # fmt: skip
        with h5py.File(path, "r+") as file:
            file.attrs[name] = value
        with pytest.raises(DataError, match="attributes, labels or checksums are not what was written"):
            read_in_place(path)
        path.write_bytes(whole)
    with h5py.File(path, "r+") as file:
        del file["train/crc32"], file.attrs["index_sha256"]
        file["train/crc32"] = np.zeros(7, np.uint32)
    with pytest.raises(DataError, match=r"train/crc32 must be uint32 \(400,\), got uint32 \(7,\)"):
        read_in_place(path)


def test_more_than_fits_into_memory_is_read_in_place_and_refused_elsewhere(path, tmp_path, monkeypatch):
    monkeypatch.setattr("cnnmpi.data.hdf5.LARGEST", 100_000)
    np.testing.assert_array_equal(read_in_place(path).train_images[:2], images().train_images[:2])
    with pytest.raises(DataError, match="more than 100000 bytes: too many for memory"):
        read_hdf5(path)
    monkeypatch.setattr("cnnmpi.train.inputs.available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"stored compressed: .*too many for the memory of this host"):
        set_up(Config(data=str(layouts(path, "compressed")), out=tmp_path / "run"), Ranks())
    with pytest.raises(UserError, match="--data-in file needs a data file"):
        set_up(Config(data="synthetic", data_in="file", out=tmp_path / "run"), Ranks())


def test_a_compressed_file_is_unpacked_to_be_checked_only_once(path, tmp_path, monkeypatch):
    unpacked = []
    monkeypatch.setattr("cnnmpi.data.stored.inflates_to", lambda packed, size: unpacked.append(packed) or True)
    set_up(Config(data=str(layouts(path, "compressed")), out=tmp_path / "run"), Ranks())
    assert len(unpacked) == -(-400 // 7) + -(-30 // 7)


def test_a_copy_reads_after_the_original_is_gone_and_rows_are_numbers_of_rows(path):
    rows = read_in_place(path).train_images
    other = copy.deepcopy(rows)
    del rows
    np.testing.assert_array_equal(other[:2], images().train_images[:2])
    for index in (np.ones(400, bool), np.array([400]), np.array([-1])):
        with pytest.raises(IndexError, match=r"rows are whole numbers in 0\.\.399"):
            other[index]


def test_a_step_finds_its_images_read_and_each_is_read_once(path, tmp_path, monkeypatch):
    asked, waited, take = [], [], InFile.__getitem__

    def counted(self, index):
        asked.append(len(index))
        if threading.current_thread() is threading.main_thread():
            waited.append(len(index))
        return take(self, index)

    options = {"batch_size": 100, "epochs": 2, "threads": 1, "shards": 2, "out": tmp_path / "run"}
    run = set_up(Config(data=str(path), data_in="file", **options), Ranks())
    monkeypatch.setattr(InFile, "__getitem__", counted)
    for _ in range(8):
        run.train_step()
    assert sum(asked) == 800, "two epochs of 400 images"
    assert sum(waited) == 100, "the first step has nobody who could have read before"
    assert not run.loader._ahead


def test_threads_that_read_end_with_their_loader(path):
    rows = read_in_place(path)
    loader = DataLoader(rows.train_images, rows.train_labels, 40)
    loader.prepare(0, [None])
    loader.batch(0)
    mine = [thread for thread in threading.enumerate() if thread.name.startswith("cnnmpi-read")]
    assert mine and all(thread.daemon for thread in mine), "a disk that hangs does not hold up the process's end"
    count = len(mine)
    del loader
    gc.collect()
    for thread in mine[-4:]:
        thread.join(60)
    left = [thread for thread in threading.enumerate() if thread.name.startswith("cnnmpi-read")]
    assert len(left) <= count - 4


def test_a_read_that_gives_less_than_was_asked_for_is_continued(path, monkeypatch):
    rows, preadv = read_in_place(path).train_images, os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: preadv(file, [buffers[0][:1000]], at))
    np.testing.assert_array_equal(rows[:5], images().train_images[:5])


def test_a_file_that_is_replaced_goes_on_as_it_was(path):
    rows = read_in_place(path).train_images
    write_hdf5(path, images(train=50))
    np.testing.assert_array_equal(rows[:], images().train_images)


def test_reading_in_place_takes_no_memory_for_what_is_not_asked_for(path):
    tracemalloc.start()
    rows = read_in_place(path).train_images
    for start in range(0, 400, 20):
        rows[np.arange(start, start + 20)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < images().train_images.nbytes / 2


@pytest.mark.parametrize("prepared", [False, True])
def test_batches_are_the_same_from_a_file_as_from_memory(path, prepared):
    data, rows = images(), read_in_place(path)
    options = {"batch_size": 64, "shards": 3, "augment": "flip,crop=2,mixup=0.5", "seed": 4, "classes": 10}
    ours, theirs = (
        DataLoader(rows.train_images, rows.train_labels, **options),
        DataLoader(data.train_images, data.train_labels, **options),
    )
    for step in (0, 1, 6, 7, 20):  # 7 batches an epoch
        if prepared:
            ours.prepare(step, [0, 2])
        for shard in range(3):
            for mine, reference in zip(ours.batch(step, shard), theirs.batch(step, shard), strict=True):
                np.testing.assert_array_equal(mine, reference)
    ours.prepare(30, [0, 1])
    ours.prepare(32, [0])
    assert {key[0] for key in ours._ahead} == {32}, "what was begun for a step that did not come is dropped"


def test_an_error_of_a_reading_thread_reaches_the_batch(path):
    damage(path, images().train_images[7])
    rows = read_in_place(path)
    loader = DataLoader(rows.train_images, rows.train_labels, 400)
    loader.prepare(0, [None])
    with pytest.raises(DataError, match="image 7"):
        loader.batch(0)


# -- images held out ---------------------------------------------------------------------------------------------------


def test_of_each_class_the_same_share_is_held_out():
    labels = np.repeat([3, 1, 0], [100, 10, 1])
    stay, out = held_out(labels, 0.2, np.random.default_rng(0))
    assert sorted([*stay, *out]) == list(range(111)) and (np.diff(out) > 0).all() and (np.diff(stay) > 0).all()
    assert np.bincount(labels[out], minlength=4).tolist() == [0, 2, 0, 20]
    again = held_out(labels, 0.2, np.random.default_rng(0))[1]
    other = held_out(labels, 0.2, np.random.default_rng(1))[1]
    assert out.tolist() == again.tolist() != other.tolist()
    targets = np.zeros((50, 3), np.float32)
    assert len(held_out(targets, 0.2, np.random.default_rng(0))[1]) == 10


def test_selected_rows_are_rows(path):
    data, rows = images(), np.array([4, 7, 9, 300])
    for source in (data.train_images, read_in_place(path).train_images):
        chosen = Selected(source, rows)
        assert chosen.shape == (4, 3, 32, 32) and reads(chosen) == reads(as_rows(source))
        np.testing.assert_array_equal(chosen[1:3], data.train_images[rows[1:3]])
        np.testing.assert_array_equal(chosen[np.array([3, 0])], data.train_images[[300, 4]])


def test_validation_images_judge_and_evaluate_finds_them_again(path, tmp_path, capsys):
    from cnnmpi.evaluate import main as evaluate

    options = {"batch_size": 40, "epochs": 2, "threads": 1, "out": tmp_path / "run", "seed": 3}
    run = set_up(Config(data=str(path), validation=0.25, **options), Ranks())
    assert run.run() == 0
    assert "301 training, 99 validation and 30 test images" in (printed := capsys.readouterr().out)
    assert re.search(r"epoch 2 .* val loss \S+ acc \S+ ", printed) and "done: test_acc=" in printed
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    checkpoint = str(tmp_path / "run" / "last.h5")
    for split, count in (("val", 99), ("train", 301), ("test", 30)):
        assert evaluate([checkpoint, "--data", str(path), "--split", split]) == 0
        printed = capsys.readouterr().out
        assert f"on the {count} {split} images" in printed
        if split == "val":
            assert f"accuracy {last['val_acc']:.4f}" in printed
    resumed = set_up(Config(data=str(path), resume="auto", out=tmp_path / "run"), Ranks())
    assert resumed.config.validation == 0.25 and resumed.best == run.best
    plain = set_up(Config(data=str(path), **options | {"out": tmp_path / "plain", "max_steps": 1}), Ranks())
    assert plain.run() == 0
    assert evaluate([str(tmp_path / "plain" / "last.h5"), "--data", str(path), "--split", "val"]) == 2
    assert "held no images out" in capsys.readouterr().err
    write_hdf5(tmp_path / "b.h5", Dataset.of([*dataclasses.astuple(images(train=200))[:4]]))
    assert evaluate([checkpoint, "--data", str(tmp_path / "b.h5"), "--split", "val"]) == 2
    assert "held images out of other data than" in capsys.readouterr().err
    assert evaluate([checkpoint, "--data", str(tmp_path / "b.h5")]) == 0
    with pytest.raises(UserError, match="leaves none to train on, or to validate"):
        set_up(Config(data=str(path), validation=0.001, out=tmp_path / "none"), Ranks())

"""Archives, HDF5 files, synthetic images, the rule of --data, augmentation and the loader."""

import dataclasses
import gzip
import io
import os
import pickle
import stat
import sys
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from cnnmpi.data import (
    DataError,
    DataLoader,
    Dataset,
    cutout,
    find_data,
    load_cifar10,
    normalize,
    random_crop,
    random_horizontal_flip,
    read_archive,
    read_hdf5,
    statistics,
    synthetic,
    write_hdf5,
)
from cnnmpi.data import __main__ as command
from cnnmpi.data import find as find_module
from cnnmpi.data.dataset import BLOCK
from cnnmpi.data.download import DownloadError
from cnnmpi.data.sources import archive as archive_module
from cnnmpi.data.sources import pickled
from cnnmpi.data.sources.archive import LAYOUTS

NAMES = {10: [f"class {i}" for i in range(10)], 100: [f"fine {i}" for i in range(100)]}
LAYOUT_IDS = [layout.folder for layout in LAYOUTS]
CIFAR10 = Path(__file__).parents[1] / "data" / "cifar10.h5"


def channels_last(images):
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def tiny(train=23, test=7, shape=(3, 32, 32), classes=10, seed=0):
    random = np.random.default_rng(seed)
    arrays = []
    for n in (train, test):
        arrays.append(channels_last(random.integers(0, 256, (n, *shape), np.uint8)))
        arrays.append(random.integers(0, classes, n))
    return Dataset(*arrays, tuple(f"class {i}" for i in range(classes)), "tiny")


def equal(a, b):
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) and getattr(a, name).dtype == getattr(b, name).dtype
        for name in ("train_images", "train_labels", "test_images", "test_labels")
    )


def batch_of(layout, images, labels):
    """What a file of this version holds: bytes as published."""
    rows = np.ascontiguousarray(images).reshape(len(images), -1)
    if layout.label_bytes:
        coarse = np.full((len(labels), layout.label_bytes - 1), 99, np.uint8)
        return np.hstack([coarse, labels[:, None].astype(np.uint8), rows]).tobytes()
    return pickle.dumps({b"data": rows, layout.label.encode(): labels.tolist(), b"filenames": []}, protocol=2)


def members_of(layout, dataset):
    """All files of a tiny archive of this version."""
    parts = np.array_split(np.arange(len(dataset.train_labels)), len(layout.train))
    members = {
        file: batch_of(layout, dataset.train_images[part], dataset.train_labels[part])
        for file, part in zip(layout.train, parts, strict=True)
    }
    members[layout.test[0]] = batch_of(layout, dataset.test_images, dataset.test_labels)
    names = [name.encode() for name in dataset.classes]
    key = layout.label.removesuffix("s").encode() + b"_names"
    members[layout.names] = b"\n".join([*names, b""]) if layout.label_bytes else pickle.dumps({key: names}, protocol=2)
    return members


def write_tar(path, folder, members, extra=()):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for info in extra:
            tar.addfile(info)
        for name, content in members.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(params=LAYOUTS, ids=LAYOUT_IDS)
def layout(request):
    return request.param


PYTHON, BINARY = LAYOUTS[:2]


# ---- archives


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar", ""])
def test_archive_to_hdf5_and_back_is_equal_in_every_byte(tmp_path, layout, suffix):
    wanted = tiny(classes=100 if "100" in layout.folder else 10)
    members = members_of(layout, wanted)
    if suffix:
        path = write_tar(tmp_path / f"a{suffix}", layout.folder, members)
    else:
        path = tmp_path / "extracted"
        (path / layout.folder).mkdir(parents=True)
        for name, content in members.items():
            (path / layout.folder / name).write_bytes(content)
        assert equal(read_archive(path / layout.folder), wanted)
    read = read_archive(path)
    assert equal(read, wanted) and read.classes == wanted.classes
    assert read.train_images.transpose(0, 2, 3, 1).flags.c_contiguous
    assert len(read.sha256) == 64 and read.source == layout.title

    write_hdf5(tmp_path / "a.h5", read)
    again = read_hdf5(tmp_path / "a.h5")
    assert equal(again, wanted) and again.digest() == read.digest() == wanted.digest()
    assert (again.classes, again.source, again.sha256) == (read.classes, read.source, read.sha256)
    assert again.train_images.transpose(0, 2, 3, 1).flags.c_contiguous


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.fault
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path):
    target = tmp_path / "executed"
    members = members_of(PYTHON, tiny())
    members["data_batch_3"] = pickle.dumps({b"data": Payload(target), b"labels": [0]})
    path = write_tar(tmp_path / "evil.tar.gz", PYTHON.folder, members)
    with pytest.raises(DataError, match=r"data_batch_3: refused: the pickle asks for (posix|nt)\.system"):
        read_archive(path)
    assert not target.exists()
    pickle.loads(members["data_batch_3"])  # the payload does work where it is let
    assert target.exists()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("kind", "name", "match"),
    [
        (tarfile.SYMTYPE, "data_batch_1", "link or a device"),
        (tarfile.LNKTYPE, "x", "link or a device"),
        (tarfile.CHRTYPE, "x", "link or a device"),
        (tarfile.FIFOTYPE, "x", "link or a device"),
        (tarfile.REGTYPE, "../x", "outside"),
        (tarfile.REGTYPE, "/x", "outside"),
        (tarfile.REGTYPE, "other/data_batch_1.bin", "twice"),
    ],
)
def test_a_tar_that_points_elsewhere_is_refused(tmp_path, kind, name, match):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    path = write_tar(tmp_path / "evil.tar", BINARY.folder, members_of(BINARY, tiny()), [info])
    with pytest.raises(DataError, match=match) as caught:
        read_archive(path)
    assert "evil.tar" in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.fault
@pytest.mark.parametrize("suffix", [".tar.gz", ".tar"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_a_truncated_archive_is_refused(tmp_path, layout, suffix, part):
    dataset = tiny(classes=100 if "100" in layout.folder else 10)
    path = write_tar(tmp_path / f"a{suffix}", layout.folder, members_of(layout, dataset))
    content = path.read_bytes()
    if suffix == ".tar":
        content = content.rstrip(b"\0")  # or only padding would be cut
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(DataError, match=r"a\.tar"):
        read_archive(path)


@pytest.mark.fault
def test_damaged_members_are_refused_by_name(tmp_path):
    def message(layout, **changed):
        members = members_of(layout, tiny()) | {name.replace("__", "."): value for name, value in changed.items()}
        path = write_tar(tmp_path / "a.tar", layout.folder, {k: v for k, v in members.items() if v is not None})
        with pytest.raises(DataError) as caught:
            read_archive(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    good = tiny()
    assert "data_batch_2.bin: 3072 bytes" in message(BINARY, data_batch_2__bin=bytes(3072))
    assert "test_batch.bin missing" in message(BINARY, test_batch__bin=None)
    assert "labels must lie in 0..9, got 0..200" in message(
        BINARY, test_batch__bin=batch_of(BINARY, good.test_images[:2], np.array([0, 200]))
    )
    assert "data_batch_2: truncated or damaged pickle" in message(PYTHON, data_batch_2=b"\x80\x02}q")
    assert "data_batch_2: expected a pickled dict" in message(PYTHON, data_batch_2=pickle.dumps([1], protocol=2))
    assert "data_batch_2: expected 'data'" in message(
        PYTHON, data_batch_2=pickle.dumps({"data": 1, "labels": []}, protocol=2)
    )
    wrong = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, protocol=2)
    assert "data_batch_2: 2 images but 1 labels" in message(PYTHON, data_batch_2=wrong)
    assert "expected 'labels'" in message(PYTHON, data_batch_2=wrong.replace(b"labels", b"lebals"))
    (tmp_path / "text.tar.gz").write_bytes(gzip.compress(b"no tar"))
    for name in ("text.tar.gz", "absent.tar.gz"):
        with pytest.raises(DataError, match=name):
            read_archive(tmp_path / name)


def one_line(path):
    """The one line with which an archive is refused."""
    with pytest.raises(DataError) as caught:
        read_archive(path)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


def header_of(name, size, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.fault
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (header_of("unwanted", 1 << 40), "unpacks to more than"),
        (header_of("cifar/data_batch_1", 1 << 40), "claims 1099511627776 bytes"),
        (header_of("long", 1 << 28, tarfile.GNUTYPE_LONGNAME) + bytes(1 << 20), "claims a header of 268435456 bytes"),
        (header_of("pax", 1 << 28, tarfile.XHDTYPE) + bytes(1 << 20), "claims a header of 268435456 bytes"),
        (header_of("pax", 1 << 28, tarfile.XGLTYPE) + bytes(1 << 20), "claims a header of 268435456 bytes"),
        (header_of("x", 0) * 1001, "more than 1000 members"),
        (header_of("two\nlines", 0, tarfile.SYMTYPE), r"two\\nlines is a link"),
        (header_of("sparse", 0, tarfile.GNUTYPE_SPARSE) + bytes(1024), "sparse is a link or a device"),
    ],
    ids=["skipped", "wanted", "long name", "pax", "global pax", "members", "name", "sparse"],
)
def test_an_archive_that_claims_more_than_any_official_one_is_refused(tmp_path, monkeypatch, content, match, packed):
    path = tmp_path / "a.tar"
    monkeypatch.setattr(archive_module, "MOST_MEMBERS", 1000)  # instead of 10,000, which take their time to write
    content += bytes(1024)
    path.write_bytes(gzip.compress(content) if packed else content)
    tracemalloc.start()
    with pytest.raises(DataError, match=match):
        read_archive(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in one_line(path) and peak < 8 << 20, "a thousand members take 2 MB, pieces and buffers 3 MB"


@pytest.mark.fault
def test_a_gzip_bomb_is_refused_in_little_memory(tmp_path, monkeypatch):
    path = tmp_path / "a.tar.gz"
    monkeypatch.setattr(archive_module, "LARGEST", 32 << 20)  # instead of 512 MB, to be quick
    with gzip.open(path, "wb", 1) as file:  # zeros that nobody asked for
        file.write(header_of("unwanted", 40 << 20))
        for _ in range(40):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    assert "unpacks to more than" in one_line(path)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


class Pickled:
    """An object whose pickle calls ``callee``, which is looked up by its name."""

    def __init__(self, callee, arguments):
        self.callee, self.arguments = callee, arguments

    def __reduce__(self):
        return self.callee, self.arguments


def nested(depth):
    """A tuple of 2**depth leaves that takes as many steps to hash, in a pickle of some bytes a level."""
    return b"\x80\x02})" + b"2\x86" * depth + b"K\x01s."


@pytest.mark.fault
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (nested(60), "instruction DUP"),
        (b"\x80\x02})q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"h\x00K\x01s.", "damaged pickle"),
        (b"\x80\x02" + b"]" * 30_000 + b".", "more than 20000 instructions"),
        (b"\x80\x02}r\xff\xff\xff\xff.", "expected 'data'"),  # a memo of four billion entries
        (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.", "damaged pickle"),
        (b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"x.", "damaged pickle"),
        (b"\x80\x04\x95" + (1 << 40).to_bytes(8, "little") + b"}.", "damaged pickle|expected 'data'"),
        (pickle.dumps({"data": np.zeros((2, 3072)), "labels": [1, 2]}, 2), "another type than uint8"),
        (pickle.dumps({"data": Pickled(np.ndarray, ((1 << 40,),)), "labels": [1, 2]}, 2), "damaged pickle"),
        (pickle.dumps({"data": Pickled(np.zeros, ((1 << 40,),)), "labels": [1, 2]}, 2), "asks for numpy.zeros"),
        (pickle.dumps({"data": Pickled(bytes, (1 << 40,)), "labels": [1, 2]}, 2), "asks for __builtin__.bytes"),
        (b"\x80\x02cos\nsystem\n(S'true'\ntR.", "asks for os.system"),
        (b"\x80\x02cnumpy\ndtype\n(S'u1'\ntb.", "damaged pickle|sets the state"),
        (b"\x80\x02PX\n.", "instruction PERSID"),
        (b"\x80\x02", "damaged pickle"),
        (b".", "damaged pickle"),
        (b"", "damaged pickle"),
    ],
)
def test_a_pickle_that_asks_for_the_impossible_is_refused(tmp_path, monkeypatch, content, match):
    monkeypatch.setattr(pickled, "MOST_STEPS", 20_000)  # instead of a million, to be quick
    path = write_tar(tmp_path / "a.tar", PYTHON.folder, members_of(PYTHON, tiny()) | {"data_batch_4": content})
    tracemalloc.start()
    with pytest.raises(DataError, match=f"data_batch_4: .*({match})"):
        read_archive(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20, "20,000 empty lists take 2 MB, the archive less than 1 MB"
    one_line(path)


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_every_protocol_are_read(tmp_path, protocol):
    wanted = tiny()
    members = members_of(PYTHON, wanted)
    for name, content in members.items():
        members[name] = pickle.dumps(pickle.loads(content), protocol)
    path = write_tar(tmp_path / "a.tar", PYTHON.folder, members)
    if protocol == 5:  # NumPy then asks for a function of its own
        assert "asks for numpy" in one_line(path)
    else:
        assert equal(read_archive(path), wanted)


@pytest.mark.fault
def test_an_archive_cut_off_anywhere_is_refused(tmp_path):
    content = write_tar(tmp_path / "a.tar.gz", PYTHON.folder, members_of(PYTHON, tiny())).read_bytes()
    path = tmp_path / "b.tar.gz"
    for size in [0, 1, 2, 10, 18, *range(100, len(content) - 200, len(content) // 40)]:
        path.write_bytes(content[:size])
        one_line(path)


# ---- HDF5


@pytest.mark.parametrize("parts", [1, 3, 8])
def test_processes_that_share_memory_read_a_file_together(tmp_path, parts):
    dataset = tiny(train=2501, test=5, shape=(1, 6, 4), classes=3)
    write_hdf5(tmp_path / "d.h5", dataset)
    shared, calls = {}, []
    for i in range(parts):
        made = []

        def empty(shape, dtype, made=made):
            made.append((shape, dtype))
            return shared.setdefault(len(made), np.full(shape, 77, dtype))

        last = read_hdf5(tmp_path / "d.h5", part=(i, parts), empty=empty)
        calls.append(made)
        assert equal(last, dataset) == (i == parts - 1)  # complete only when the last part is there
    assert all(made == calls[0] for made in calls)
    assert calls[0][0] == ((2501, 6, 4, 1), np.uint8) and calls[0][3] == ((5,), np.int64)
    assert np.shares_memory(last.train_images, shared[1])


def test_a_file_with_compression_and_other_integers_can_be_read(tmp_path):
    dataset = tiny(shape=(2, 5, 5))
    with h5py.File(tmp_path / "d.h5", "w") as file:
        for name in ("train", "test"):
            images, labels = getattr(dataset, f"{name}_images"), getattr(dataset, f"{name}_labels")
            file.create_dataset(f"{name}/images", data=images, compression="gzip", shuffle=True)
            file[f"{name}/labels"] = labels.astype(">u2")
        file.attrs["classes"] = list(dataset.classes)
    assert equal(read_hdf5(tmp_path / "d.h5"), dataset)


def soft_link(file, folder):
    file.move("train", "elsewhere")
    file["train"] = h5py.SoftLink("/elsewhere")


def external_link(file, folder):
    write_hdf5(folder / "other.h5", tiny())
    del file["test/images"]
    file["test/images"] = h5py.ExternalLink("other.h5", "/test/images")


def virtual_dataset(file, folder):
    layout = h5py.VirtualLayout((7, 3, 32, 32), np.uint8)
    layout[:] = h5py.VirtualSource("other.h5", "test/images", (7, 3, 32, 32))
    del file["test/images"]
    file.create_virtual_dataset("test/images", layout)


def external_storage(file, folder):
    (folder / "raw").write_bytes(bytes(7 * 3072))
    del file["test/images"]
    file.create_dataset("test/images", (7, 3, 32, 32), np.uint8, external=[(str(folder / "raw"), 0, 7 * 3072)])


def replace(name, **how):
    def change(file, folder):
        del file[name]
        file.create_dataset(name, **how)

    return change


def contiguous_terabyte(file, folder):
    del file["train/images"]
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_INCR)
    space = h5py.h5s.create_simple((23, 3, 1 << 17, 1 << 17))
    h5py.h5d.create(file["train"].id, b"images", h5py.h5t.NATIVE_UINT8, space, properties)


def no_classes(file, folder):
    del file.attrs["classes"]


IMAGES = np.zeros((7, 3, 32, 32), np.uint8)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (soft_link, "refused: train/images is reached by a soft or external link"),
        (external_link, "refused: test/images is reached by a soft or external link"),
        (virtual_dataset, "refused: test/images is a virtual dataset"),
        (external_storage, "refused: test/images has external storage"),
        (contiguous_terabyte, r"refused: train/images declares \d{13} bytes"),
        (
            replace(
                "train/images", shape=(1 << 30, 3, 32, 32), dtype=np.uint8, chunks=(1, 3, 32, 32), compression="gzip"
            ),
            r"refused: train/images declares \d{13} bytes but stores 0",
        ),
        (replace("test/images", data=IMAGES.astype(np.int8)), "test images must be uint8, got int8"),
        (replace("test/images", data=IMAGES[0]), "test needs images"),
        (replace("test/images", data=IMAGES[:6]), "test has 6 images but 7 labels"),
        (replace("test/images", data=IMAGES[:, :1]), r"train images are \(3, 32, 32\) but test images \(1, 32, 32\)"),
        (
            replace("test/labels", data=np.zeros(7)),
            r"integers \(N,\), or floats \(N, K\), got float64 of shape \(7,\)",
        ),
        (replace("test/labels", data=np.zeros((7, 10))), "train and test must both have labels"),
        (replace("test/labels", data=np.zeros((7, 9))), "test targets must be 10 for each image"),
        (replace("test/labels", data=np.zeros((7, 10), int)), r"got int64 of shape \(7, 10\)"),
        (replace("test/labels", data=np.full(7, 10)), r"test labels must lie in 0\.\.9, got 10\.\.10"),
        (replace("train/labels", data=np.full(23, -1)), r"train labels must lie in 0\.\.9, got -1\.\.-1"),
        (no_classes, "attribute classes"),
        (lambda file, folder: file.pop("test/images"), "test/images is missing"),
        (lambda file, folder: file.attrs.update(classes=[1, 2]), "attribute classes"),
    ],
)
def test_a_hostile_or_wrong_hdf5_file_is_refused_before_anything_is_allocated(tmp_path, change, match):
    path = tmp_path / "d.h5"
    write_hdf5(path, tiny())
    with h5py.File(path, "r+") as file:
        change(file, tmp_path)
    allocated = []

    def empty(shape, dtype):
        allocated.append(shape)
        return np.empty(shape, dtype)

    with pytest.raises(DataError, match=match) as caught:
        read_hdf5(path, empty=empty)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not allocated or "lie in" in match


@pytest.mark.fault
def test_a_truncated_or_altered_hdf5_file_is_refused(tmp_path):
    path = tmp_path / "d.h5"
    write_hdf5(path, tiny())
    content = path.read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"d\.h5"):
            read_hdf5(path)
    at = content.index(np.ascontiguousarray(tiny().train_images[5])[0, 0].tobytes())  # a row of pixels
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(DataError, match=r"d\.h5"):  # one flipped bit
        read_hdf5(path)
    with pytest.raises(DataError, match="no such file"):
        read_hdf5(tmp_path / "absent.h5")


@pytest.mark.fault
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "d.h5"
    write_hdf5(path, tiny())
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(DataError, match=r"d\.h5: cannot be written: No space left"):
        write_hdf5(path, tiny(seed=1))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def small_file(path, classes=None, **how):
    """A data file as another program may write it: 5 and 3 images of one channel and 4x4 pixels, 3 classes."""
    dataset = tiny(5, 3, (1, 4, 4), 3)
    with h5py.File(path, "w", **how) as file:
        for name in ("train", "test"):
            file[f"{name}/images"] = getattr(dataset, f"{name}_images")
            file[f"{name}/labels"] = getattr(dataset, f"{name}_labels")
        file.attrs["classes"] = ["cat", "größe", ""] if classes is None else classes
        file.attrs["source"] = "somewhere"
    return path


def refusal(path):
    """The one line with which a data file is refused."""
    with pytest.raises(DataError) as caught:
        read_hdf5(path)
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    "how",
    [{}, {"libver": "latest"}, {"libver": "v108"}, {"userblock_size": 1024}, {"libver": "latest", "track_order": True}],
)
def test_names_of_variable_length_are_read(tmp_path, how):
    read = read_hdf5(small_file(tmp_path / "d.h5", **how))
    assert read.classes == ("cat", "größe", "") and read.source == "somewhere" and read.sha256 == ""
    assert equal(read, tiny(5, 3, (1, 4, 4), 3))
    names = [f"class {i} " + "x" * (i % 50) for i in range(3000)]  # a heap of many collections
    assert read_hdf5(small_file(tmp_path / "d.h5", names, **how)).classes == tuple(names)
    with h5py.File(tmp_path / "d.h5", "r+") as file:
        file["train/labels"][...] = file["test/labels"][...] = 0
        file.attrs["classes"] = "all"
    assert read_hdf5(tmp_path / "d.h5").classes == ("all",)


def test_dense_storage_of_names_is_refused_with_the_remedy(tmp_path):
    path = small_file(tmp_path / "d.h5", libver="latest")
    with h5py.File(path, "r+", libver="latest") as file:
        for i in range(20):
            file.attrs[f"extra {i}"] = i
    assert "fixed length" in refusal(path)
    with h5py.File(path, "r+") as file:
        file.attrs["classes"] = np.array(["a", "b", "c"], dtype="S")  # as the message says
        file.attrs["source"] = np.array("s", dtype="S")
    assert read_hdf5(path).classes == ("a", "b", "c")


@pytest.mark.fault
@pytest.mark.parametrize("virtual", [False, True])
def test_a_malformed_heap_is_refused_and_keeps_nobody_waiting(tmp_path, virtual):
    path = small_file(tmp_path / "d.h5")
    if virtual:
        with h5py.File(path, "r+") as file:
            file.attrs["classes"] = np.array(["a", "b", "c"], dtype="S")
            del file.attrs["source"], file["test/images"]
            layout = h5py.VirtualLayout((3, 1, 4, 4), np.uint8)
            layout[:] = h5py.VirtualSource("other.h5", "x", (3, 1, 4, 4))
            file.create_virtual_dataset("test/images", layout)
    content = path.read_bytes()
    for start in [at for at in range(len(content)) if content[at : at + 4] == b"GCOL"]:
        entry = start + 16
        for value in (0, 1, 2**64 - 1, 2**64 - 8, 2**63, 5000):  # libhdf5 2.0 never returns from a free space of size 0
            changed = bytearray(content)
            changed[entry : entry + 2] = bytes(2)
            changed[entry + 8 : entry + 16] = value.to_bytes(8, "little")
            path.write_bytes(changed)
            assert "classes" in refusal(path) or (virtual and "virtual dataset" in refusal(path))
            changed[entry : entry + 2] = b"\1\0"
            path.write_bytes(changed)
            try:
                read_hdf5(path)
            except DataError as error:
                assert "\n" not in str(error)


@pytest.mark.fault
def test_many_names_cannot_share_one_large_text(tmp_path):
    large = "x" * 30_000
    path = small_file(tmp_path / "d.h5", [large, *["y"] * 3000])
    content = path.read_bytes()
    at = content.index(len(large).to_bytes(4, "little"))  # its reference: length, address, index
    path.write_bytes(content[: at + 16] + content[at : at + 16] * 3000 + content[at + 16 * 3001 :])
    with h5py.File(path, "r") as file:  # 90 MB from 150 kB
        assert path.stat().st_size < 200_000 and sum(map(len, file.attrs["classes"])) == 3001 * len(large)
    assert "more bytes than the file holds" in refusal(path)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("classes", [1, 2], "classes must be a list of names"),
        ("classes", np.zeros((2, 2)), "classes.*neither text"),
        ("classes", h5py.Empty("S3"), "classes.*neither text"),
        ("classes", np.zeros(0, "S1"), "classes must be a list of names"),
        ("source", 3, "source and sha256 must be texts"),
        ("sha256", ["a", "b"], "source and sha256 must be texts"),
        ("source", np.zeros(2, "f4,f8"), "source.*neither text"),
    ],
)
def test_attributes_of_another_kind_are_refused(tmp_path, name, value, match):
    path = small_file(tmp_path / "d.h5")
    with h5py.File(path, "r+") as file:
        file.attrs[name] = value
    with pytest.raises(DataError, match=match):
        read_hdf5(path)


def direct(content, mask=0):
    """Replace the first chunk of the training images by ``content``."""

    def change(file):
        file["train/images"].id.write_direct_chunk((0, 0, 0, 0), content, mask)

    return change


def longer(file):
    """Make images of which only 5 were ever written 10."""
    file["train/images"].resize(10, axis=0)
    del file["train/labels"]
    file["train/labels"] = np.zeros(10, int)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("storage", "change", "match"),
    [
        ({"compression": "gzip"}, direct(zlib.compress(bytes(64 << 20))), "does not hold its 32 bytes"),
        ({"compression": "gzip"}, direct(zlib.compress(bytes(31))), "does not hold its 32 bytes"),
        ({"compression": "gzip"}, direct(zlib.compress(bytes(32))[:-1]), "does not hold its 32 bytes"),
        ({"compression": "gzip"}, direct(b"x"), "does not hold its 32 bytes"),
        ({"compression": "gzip"}, direct(b"x", 1), "does not hold its 32 bytes"),
        ({"compression": "lzf"}, direct(bytes(33)), "does not hold its 32 bytes"),
        ({"fletcher32": True}, direct(bytes(32)), "does not hold its 32 bytes"),
        ({"scaleoffset": 0}, None, "filters that are not read"),
        ({"maxshape": (None, 1, 4, 4)}, None, None),
        ({"compression": "gzip", "maxshape": (None, 1, 4, 4)}, longer, "holds 3 of 5 chunks"),
    ],
)
def test_chunks_that_are_not_what_they_claim_are_refused(tmp_path, storage, change, match):
    path = small_file(tmp_path / "d.h5")
    with h5py.File(path, "r+") as file:
        images = file["train/images"][()]
        del file["train/images"]
        file.create_dataset("train/images", data=images, chunks=(2, 1, 4, 4), **storage)
        if "scaleoffset" not in storage and "maxshape" not in storage:
            assert equal(read_hdf5_closed(file, path), tiny(5, 3, (1, 4, 4), 3))
    with h5py.File(path, "r+") as file:
        if change:
            change(file)
    if match is None:
        assert len(read_hdf5(path).train_images) == 5
    else:
        with pytest.raises(DataError, match=match):
            read_hdf5(path)


def read_hdf5_closed(file, path):
    """Read what ``file`` has written so far."""
    file.flush()
    copy = path.with_name("copy.h5")
    copy.write_bytes(path.read_bytes())
    return read_hdf5(copy)


@pytest.mark.parametrize(
    ("mode", "how"), [("r", {}), ("r", {"rdcc_nbytes": 0}), ("r", {"libver": "latest"}), ("r", {"driver": "core"})]
)
def test_a_file_that_is_read_elsewhere_in_the_program_can_be_read(tmp_path, mode, how):
    path = small_file(tmp_path / "d.h5")
    with h5py.File(path, mode, **how) as file:
        assert equal(read_hdf5(path), tiny(5, 3, (1, 4, 4), 3))
        assert file["train/labels"].shape == (5,)


@pytest.mark.parametrize("mode", ["r+", "a"])
def test_a_file_that_is_written_elsewhere_in_the_program_is_called_so(tmp_path, monkeypatch, mode):
    path = small_file(tmp_path / "d.h5")
    monkeypatch.chdir(tmp_path)
    with h5py.File("d.h5", mode) as file:
        file["train/labels"][0] = 2
        assert "is open for writing elsewhere in this program: close it first" in refusal(path)
    assert read_hdf5(path).train_labels[0] == 2
    with h5py.File(path.with_name("new.h5"), "w") as file:
        file["x"] = 1
        assert "close it first" in refusal(path.with_name("new.h5"))


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        ((32, 32, 3), True),
        ((4, 300, 3), True),  # 4 rows look like 4 channels
        ((28, 28, 1), True),
        ((224, 160, 4), True),
        ((5, 6, 1), True),
        ((3, 32, 32), False),
        ((1, 6, 4), False),
        ((8, 4, 4), False),
        ((4, 32, 32), False),
        ((200, 16, 16), False),
        ((3, 5, 3), False),
        ((4, 3, 3), False),
    ],
)
def test_images_with_channels_last_are_refused_with_the_remedy(tmp_path, shape, channels_last):
    dataset = tiny(5, 3, shape, 3)
    with h5py.File(tmp_path / "d.h5", "w") as file:
        for name in ("train", "test"):
            file[f"{name}/images"] = getattr(dataset, f"{name}_images")
            file[f"{name}/labels"] = getattr(dataset, f"{name}_labels")
        file.attrs["classes"] = list(dataset.classes)
    if channels_last:
        assert "transpose them by images.transpose(0, 3, 1, 2)" in refusal(tmp_path / "d.h5")
        with pytest.raises(DataError, match="transpose them"):
            write_hdf5(tmp_path / "e.h5", dataset)
    else:
        assert equal(read_hdf5(tmp_path / "d.h5"), dataset)


@pytest.mark.parametrize("count", [300, 4096, 100_000])
def test_many_classes_are_written_and_read(tmp_path, count):
    names = tuple(f"class {i} ".ljust(66, "x") for i in range(count))
    dataset = dataclasses.replace(tiny(5, 3, (1, 4, 4)), classes=names)
    dataset.train_labels[0] = count - 1
    write_hdf5(tmp_path / "d.h5", dataset)
    read = read_hdf5(tmp_path / "d.h5")
    assert read.classes == names and read.digest() == dataset.digest() and equal(read, dataset)
    with h5py.File(tmp_path / "d.h5") as file:  # as any program reads them
        assert ("classes" in file.attrs) == (count == 300)
        stored = file.attrs["classes"] if count == 300 else file["classes"][()]
        assert stored[-1].decode() == names[-1]


@pytest.mark.parametrize(
    ("classes", "match"),
    [
        (["a\0", "b"], "NUL"),
        (["x" * 2**20] + ["y"] * 200, "shorten the longest"),
        (["\udcff", "b"], "surrogates"),
        ([], "classes must be names"),
        ([1, 2], "classes must be names"),
    ],
)
def test_names_that_cannot_be_stored_are_refused(tmp_path, classes, match):
    dataset = dataclasses.replace(tiny(5, 3, (1, 4, 4), 2), classes=tuple(classes))
    with pytest.raises(DataError, match=match):
        write_hdf5(tmp_path / "d.h5", dataset)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault
def test_file_and_folder_reach_the_disk_in_this_order(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        events.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        fsync(descriptor)

    def renamed(source, target):
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_hdf5(tmp_path / "d.h5", tiny())
    assert events == ["sync file", "rename", "sync folder"]


def test_large_images_are_handled_few_at_a_time(tmp_path):
    dataset = tiny(60, 1, (3, 256, 256))  # 12 MB
    write_hdf5(tmp_path / "d.h5", dataset)
    digest = dataset.digest()
    contiguous = dataclasses.replace(dataset, train_images=np.ascontiguousarray(dataset.train_images))
    whole = dataset.train_images.nbytes
    for act in (contiguous.digest, lambda: read_hdf5(tmp_path / "d.h5").digest()):
        tracemalloc.start()
        assert act() == digest
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < (whole + dataset.test_images.nbytes) * (act != contiguous.digest) + 4 * BLOCK


# ---- the data set itself


def test_statistics_are_exact():
    images = tiny(train=1203, shape=(3, 5, 7)).train_images
    images[:, 2] = 51
    mean, std = statistics(images)
    pixels = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std[:2], pixels[:, :2].std(axis=(0, 2, 3)), rtol=1e-12)
    assert mean[2] == 0.2 and 0 < std[2] < 0.01
    assert statistics(images[::-1]) == (mean, std)


def test_the_digest_depends_on_data_only():
    dataset = tiny()
    contiguous = Dataset(
        np.ascontiguousarray(dataset.train_images),
        dataset.train_labels.astype(">i8"),
        dataset.test_images,
        dataset.test_labels,
        dataset.classes,
        "another source",
    )
    assert contiguous.digest() == dataset.digest() == tiny().digest()
    digests = {dataset.digest(), tiny(seed=1).digest(), tiny(classes=11).digest()}
    dataset.test_images[6, 2, 31, 31] ^= 1
    assert len(digests | {dataset.digest()}) == 4


def test_synthetic_images_depend_on_the_seed_only():
    a, b, c = synthetic(3, train=203, test=50), synthetic(3, train=203, test=50), synthetic(4, train=203, test=50)
    assert equal(a, b) and a.digest() != c.digest()
    assert a.train_images.shape == (203, 3, 32, 32) and len(a.classes) == 10
    assert set(np.bincount(a.train_labels)) == {20, 21}
    assert a.source == "SYNTHETIC (seed 3), not real images"
    assert not np.array_equal(a.train_images[:50], a.test_images)
    # written down once: the same bytes on every machine and with every NumPy
    assert synthetic(0, train=100, test=10).digest()[:16] == "342ae38885aca7ef"


# ---- where the data comes from


@pytest.fixture
def offline(monkeypatch):
    """Let the download fail as it does without a network; returns the folders it was asked for."""
    asked = []

    def download(folder):
        asked.append(folder)
        raise DownloadError("no network here")

    monkeypatch.setattr(find_module, "download_cifar10", download)
    return asked


@pytest.mark.fault
def test_without_data_and_network_auto_is_synthetic_with_a_loud_notice(tmp_path, offline):
    notices = []
    assert find_data("auto", tmp_path / "data", notices.append) is None
    assert offline == [tmp_path / "data"] and list((tmp_path / "data").iterdir()) == []
    assert "SYNTHETIC" in notices[0] and "no network here" in notices[0] and "!" * 80 in notices[0]
    with pytest.raises(DataError, match="no network here"):
        find_data("cifar10", tmp_path, notices.append)
    with pytest.raises(DataError, match="no network here"):
        load_cifar10(tmp_path)
    assert find_data("synthetic", tmp_path / "unused") is None and not (tmp_path / "unused").exists()


@pytest.mark.parametrize("spec", ["auto", "cifar10"])
@pytest.mark.parametrize("kind", [PYTHON, BINARY], ids=["python", "binary"])
def test_an_archive_in_the_data_folder_is_converted_once(tmp_path, offline, spec, kind):
    wanted = tiny()
    name = {PYTHON: "cifar-10-python.tar.gz", BINARY: "cifar-10-binary.tar.gz"}[kind]
    archive = write_tar(tmp_path / name, kind.folder, members_of(kind, wanted))
    x_train, y_train, x_test, y_test = load_cifar10(tmp_path)
    assert find_data(spec, tmp_path) == tmp_path / "cifar10.h5"
    assert equal(read_hdf5(tmp_path / "cifar10.h5"), wanted)
    archive.unlink()
    assert find_data(spec, tmp_path) == tmp_path / "cifar10.h5" and offline == []
    for x, images in ((x_train, wanted.train_images), (x_test, wanted.test_images)):
        assert x.dtype == np.float32 and np.array_equal(x, images.astype(np.float32) / 255)
    assert np.array_equal(y_train, wanted.train_labels) and np.array_equal(y_test, wanted.test_labels)
    for again, before in zip(load_cifar10(tmp_path), (x_train, y_train, x_test, y_test), strict=True):
        assert np.array_equal(again, before)


def test_a_damaged_archive_is_an_error_rather_than_synthetic_data(tmp_path, offline):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz"):
        find_data("auto", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]


def test_a_path_is_converted_again_only_when_the_archive_has_changed(tmp_path):
    data, notices = tmp_path / "data", []
    archive = write_tar(tmp_path / "mine.tar", BINARY.folder, members_of(BINARY, tiny()))
    target = find_data(str(archive), data, notices.append)
    assert target == data / "mine.h5" and len(notices) == 1
    assert find_data(str(archive), data, notices.append) == target and len(notices) == 1
    write_tar(archive, BINARY.folder, members_of(BINARY, tiny(seed=1)))
    assert find_data(str(archive), data, notices.append) == target and len(notices) == 2
    assert equal(read_hdf5(target), tiny(seed=1))
    assert find_data(str(target), data) == target

    write_hdf5(data / "other.h5", tiny())  # a person's own file, not made from an archive
    archive.rename(tmp_path / "other.tar")
    with pytest.raises(DataError, match="in the way"):
        find_data(str(tmp_path / "other.tar"), data)
    with pytest.raises(DataError, match=r"absent\.h5: no such file"):
        find_data("absent.h5", data)


@pytest.mark.parametrize("name", ["d.h5", "d.H5", "d.HDF5", "d.hdf", "d", "d.data", "d.tar.gz"])
@pytest.mark.parametrize("block", [0, 512, 2048])
def test_hdf5_is_told_by_its_content(tmp_path, name, block):
    path = small_file(tmp_path / name, userblock_size=block)
    assert find_data(str(path), tmp_path / "data") == path
    assert equal(read_hdf5(path), tiny(5, 3, (1, 4, 4), 3))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["a.TAR.GZ", "a.tgz", "a.Tar", "a", "a.h5.bak"])
def test_archives_are_told_by_their_content(tmp_path, name):
    path = write_tar(tmp_path / name, BINARY.folder, members_of(BINARY, tiny()))
    target = find_data(str(path), tmp_path / "data", notify=lambda text: None)
    assert target == tmp_path / "data" / ("a.h5.bak.h5" if name == "a.h5.bak" else "a.h5")
    assert equal(read_hdf5(target), tiny())
    local = write_tar(tmp_path / "CIFAR-10-Binary.TAR.GZ", BINARY.folder, members_of(BINARY, tiny()))
    assert find_data("cifar10", tmp_path, notify=lambda text: None) == tmp_path / "cifar10.h5" and local.exists()


@pytest.mark.fault
def test_what_is_neither_is_called_so(tmp_path):
    (tmp_path / "d.H5").write_bytes(b"no HDF5")
    (tmp_path / "empty.h5").write_bytes(b"")
    for name in ("d.H5", "empty.h5"):
        assert "no HDF5 file" in refusal(find_data(str(tmp_path / name), tmp_path))
    (tmp_path / "notes").write_text("text")
    with pytest.raises(DataError, match=r"notes: .*no \.tar\.gz, \.tar or HDF5"):
        find_data(str(tmp_path / "notes"), tmp_path, notify=lambda text: None)
    os.mkfifo(tmp_path / "pipe")
    for device in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DataError, match="neither a file nor a folder"):
            find_data(str(device), tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    for read in (read_hdf5, read_archive, lambda path: find_data(str(path), tmp_path)):
        with pytest.raises(DataError):
            read(tmp_path / name)


def test_cifar100_is_not_taken_for_cifar10(tmp_path, offline, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fine = tiny(classes=100)
    for layout in LAYOUTS[2:]:
        archive = write_tar(tmp_path / "cifar-100.tar", layout.folder, members_of(layout, fine))
        assert command.main(["--archive", str(archive)]) == 0
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar100.h5"]
    archive = write_tar(tmp_path / "cifar-10.tar", PYTHON.folder, members_of(PYTHON, tiny()))
    assert command.main(["--archive", str(archive)]) == 0
    assert equal(read_hdf5("data/cifar10.h5"), tiny()) and equal(read_hdf5("data/cifar100.h5"), fine)
    (tmp_path / "data/cifar100.h5").replace("data/cifar10.h5")  # as older versions converted it
    for ask in (lambda: load_cifar10("data"), lambda: find_data("cifar10"), lambda: find_data("auto")):
        with pytest.raises(DataError, match=r"data/cifar10\.h5: has 100 classes, CIFAR-10 has ten"):
            ask()
    assert find_data("data/cifar10.h5") == Path("data/cifar10.h5")
    Path("data/cifar10.h5").unlink()
    write_tar(Path("data/cifar-10-python.tar"), LAYOUTS[2].folder, members_of(LAYOUTS[2], fine))
    for ask in (lambda: load_cifar10("data"), lambda: find_data("auto", notify=lambda text: None)):
        with pytest.raises(DataError, match="has 100 classes"):
            ask()
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-10-python.tar"]


@pytest.mark.fault
def test_a_data_folder_that_cannot_be_made_is_an_error_but_for_auto(tmp_path, offline):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(DataError, match="data folder cannot"):
            find_data("cifar10", folder)
        said: list[str] = []
        assert find_data("auto", folder, notify=said.append) is None
        assert "data folder cannot" in said[0] and "SYNTHETIC" in said[0]


@pytest.mark.fault
def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    requests = pytest.importorskip("requests")
    from cnnmpi.data.download import download_cifar10

    def refuse(*args, **kwargs):
        assert max(kwargs["timeout"]) <= 30 and args[0].startswith("https://")
        raise requests.exceptions.ConnectionError("no\nroute")

    monkeypatch.setattr(requests, "get", refuse)
    with pytest.raises(DownloadError, match=r"no route.*put it in") as caught:
        download_cifar10(tmp_path)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []

    class Response:
        headers = {"content-length": "5"}  # noqa: RUF012

        def raise_for_status(self):
            pass

        def iter_content(self, chunk_size):
            return iter([b"not", b"it"])

    monkeypatch.setattr(requests, "get", lambda *args, **kwargs: Response())
    with pytest.raises(DownloadError, match="could not be downloaded"):  # the wrong checksum
        download_cifar10(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_converts_and_explains(tmp_path, capsys, monkeypatch):
    archive = write_tar(tmp_path / "mine.tar.gz", PYTHON.folder, members_of(PYTHON, tiny()))
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)  # also where the tests of other ranks print nothing
    assert command.main(["--archive", str(archive), "--out", str(tmp_path / "new" / "d.h5")]) == 0
    line = stream.getvalue()
    assert "23 train and 7 test images, 10 classes, sha256" in line and line.count("\n") == 1
    assert equal(read_hdf5(tmp_path / "new" / "d.h5"), tiny())
    assert command.main(["--archive", str(tmp_path / "absent"), "--out", str(tmp_path / "e.h5")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cnnmpi.data: error: ") and error.count("\n") == 1 and "absent" in error
    assert not (tmp_path / "e.h5").exists()


# ---- augmentation


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_flip_and_crop_against_slow_references(dtype):
    images = tiny(train=9, shape=(2, 5, 6)).train_images.astype(dtype)
    before = images.copy()
    random = np.random.default_rng(1)
    flip, (top, left) = random.random(9) < 0.5, random.integers(0, 7, (2, 9))
    padded = np.pad(images, ((0, 0), (0, 0), (3, 3), (3, 3)))
    flipped, cropped = random_horizontal_flip(images, flip), random_crop(images, top, left, 3)
    for i in range(9):
        assert np.array_equal(flipped[i], images[i][:, :, ::-1] if flip[i] else images[i])
        assert np.array_equal(cropped[i], padded[i, :, top[i] : top[i] + 5, left[i] : left[i] + 6])
    assert flipped.dtype == cropped.dtype == dtype and np.array_equal(images, before)
    assert 0 < flip.sum() < 9
    with pytest.raises(ValueError, match="draws"):
        random_crop(images, top + 4, left, 3)


def test_cutout_blanks_one_square_inside_each_image():
    images = tiny(train=9, shape=(2, 5, 6)).train_images.astype(np.float32) + 1
    before, random = images.copy(), np.random.default_rng(1)
    top, left = random.integers(0, 3, 9), random.integers(0, 4, 9)
    result = cutout(images, top, left, 3)
    for i in range(9):
        expected = before[i].copy()
        expected[:, top[i] : top[i] + 3, left[i] : left[i] + 3] = 0
        assert np.array_equal(result[i], expected)
    assert np.array_equal(images, before)
    for bad_top, bad_left in ((top + 3, left), (top, left + 4)):
        with pytest.raises(ValueError, match="draws"):
            cutout(images, bad_top, bad_left, 3)


def test_normalize_is_the_formula():
    images = tiny(train=9, shape=(3, 5, 6)).train_images
    mean, std = (0.5, 0.25, 0.1), (0.2, 0.3, 1.0)
    column = (slice(None), None, None)
    expected = (images / 255 - np.array(mean)[column]) / np.array(std)[column]
    for x in (images, (images / 255).astype(np.float32), np.ascontiguousarray(images)):
        y = normalize(x, mean, std)
        np.testing.assert_allclose(y, expected, atol=2e-6)
        assert y.dtype == np.float32 and y.shape == x.shape and y.transpose(0, 2, 3, 1).flags.c_contiguous
    for wrong in ((0.2, 0.3), (0.2, 0.3, 0.0), (0.2, 0.3, np.nan)):
        with pytest.raises(ValueError, match="normalize"):
            normalize(images, mean, wrong)


# ---- the loader


def numbered(count, dtype=np.uint8):
    """Images that carry their number, so that they can be recognised."""
    x = np.zeros((count, 3, 4, 4), dtype)
    x[:, 0, 0, 0], x[:, 1, 1, 1] = np.arange(count) % 256, np.arange(count) // 256
    return x, np.arange(count)


@pytest.mark.parametrize(
    ("count", "batch_size", "shards"), [(1003, 64, 8), (5, 64, 8), (7, 1, 3), (64, 64, 1), (65, 64, 2)]
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_sample_is_seen_once_an_epoch(count, batch_size, shards, shuffle):
    x, y = numbered(count)
    loader = DataLoader(x, y, batch_size, shuffle, shards=shards)
    orders = []
    for epoch in range(2):
        seen = []
        batches = list(loader)
        assert len(batches) == len(loader) == -(-count // batch_size)
        for index, (images, labels) in enumerate(batches):
            parts = [loader.batch(epoch * len(loader) + index, shard) for shard in range(shards)]
            assert [len(part[1]) for part in parts] == [len(part) for part in np.array_split(labels, shards)]
            assert all(part[0].shape == (len(part[1]), 3, 4, 4) and part[0].dtype == np.float32 for part in parts)
            assert np.array_equal(np.concatenate([part[0] for part in parts]), images)
            assert np.array_equal(np.concatenate([part[1] for part in parts]), labels)
            assert np.array_equal(images, x[labels].astype(np.float32) / 255) and labels.dtype == np.int64
            seen.extend(labels.tolist())
        assert sorted(seen) == list(range(count))
        orders.append(seen)
    assert (orders[0] == orders[1] == list(range(count))) == (not shuffle)


def test_a_batch_is_a_function_of_its_step():
    dataset = tiny(train=50)
    options = {"seed": 5, "augment": "flip,crop=4,cutout=2", "mean": (0.5,) * 3, "std": (0.2,) * 3}
    arguments = (dataset.train_images, dataset.train_labels, 16)
    whole, cut = DataLoader(*arguments, **options), DataLoader(*arguments, shards=3, **options)
    wanted = [whole.batch(step) for step in range(8)]  # two epochs
    for step in (6, 0, 7, 3, 4):  # resumed anywhere, in any order, in any cut
        parts = [cut.batch(step, shard) for shard in (2, 0, 1)]
        x = np.concatenate([parts[1][0], parts[2][0], parts[0][0]])
        assert np.array_equal(x, wanted[step][0])
    assert not np.array_equal(wanted[0][0], wanted[4][0])
    other = DataLoader(*arguments, **options | {"seed": 6})
    assert not np.array_equal(other.batch(0)[1], wanted[0][1])
    # a sample's draws do not depend on the batch that it falls into
    large = DataLoader(*arguments[:2], 50, **options).batch(0)[0]
    assert np.array_equal(large, np.concatenate([x for x, _ in wanted[:4]]))


def test_augmentation_in_the_loader_is_flip_then_crop_with_zeros():
    x, y = tiny(train=200, shape=(3, 8, 8), classes=200).train_images, np.arange(200)
    plain = DataLoader(x, y, 200, False)
    assert np.array_equal(plain.batch(0)[0], x.astype(np.float32) / 255)
    flipped = DataLoader(x, y, 200, False, augment="flip").batch(0)[0] * np.float32(255)
    same = np.array([np.allclose(a, b) for a, b in zip(flipped, x, strict=True)])
    mirrored = np.array([np.allclose(a, b[:, :, ::-1]) for a, b in zip(flipped, x, strict=True)])
    assert np.all(same ^ mirrored) and 60 < mirrored.sum() < 140
    cropped = DataLoader(x, y, 200, False, augment="crop=1").batch(0)[0] * np.float32(255)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    offsets = [
        [(t, l) for t in range(3) for l in range(3) if np.allclose(cropped[i], padded[i, :, t : t + 8, l : l + 8])]
        for i in range(200)
    ]
    assert all(len(found) == 1 for found in offsets) and len({found[0] for found in offsets}) == 9


def test_cutout_in_the_loader_reaches_every_place_and_blanks_with_the_mean():
    x = np.full((400, 3, 8, 8), 255, np.uint8)
    images = DataLoader(x, np.arange(400), 400, False, augment="cutout=3", mean=(0.5,) * 3, std=(0.5,) * 3).batch(0)[0]
    blank = (images == 0).all(axis=1)
    assert np.all(blank.sum(axis=(1, 2)) == 9) and np.all((images == 0) | (images == 1))
    corners = {(int(rows.min()), int(columns.min())) for rows, columns in map(np.nonzero, blank)}
    assert corners == {(t, l) for t in range(6) for l in range(6)}  # 36 places, 400 draws


def test_the_loader_does_not_copy_channels_last_images_and_leaves_them_alone():
    dataset = tiny()
    before = dataset.train_images.copy()
    loader = DataLoader(dataset.train_images, dataset.train_labels, 8, augment="flip,crop=2")
    dataset.train_images.setflags(write=False)
    for x, _ in loader:
        x += 1
    assert np.array_equal(dataset.train_images, before)
    assert np.shares_memory(loader._x[:], dataset.train_images)
    floats = DataLoader(dataset.train_images.astype(np.float32), dataset.train_labels, 8, False)
    assert np.array_equal(floats.batch(0)[0], dataset.train_images[:8])
    assert floats.batch(0)[0].transpose(0, 2, 3, 1).flags.c_contiguous


def test_nonsense_arguments_are_refused():
    x, y = numbered(8)
    for arguments, options in [
        ((x, y, 0), {}),
        ((x, y[:7], 4), {}),
        ((x.astype(np.int32), y, 4), {}),
        ((x[0], y[:3], 4), {}),
        ((x[:0], y[:0], 4), {}),
        ((x, y.astype(np.float64), 4), {}),
        ((x, y, 4), {"shards": 0}),
        ((x, y, 4), {"augment": "crop=-1"}),
        ((x, y, 4), {"augment": "cutout=99"}),
        ((x, y, 4), {"sample": "most"}),
        ((x, y, 4, False), {"sample": "balanced"}),
        ((x, np.eye(8), 4), {"sample": "balanced"}),
        ((x, y, 4), {"mean": (0.5,) * 3}),
        ((x, y, 4), {"mean": (0.5,) * 3, "std": (0.0,) * 3}),
        ((x, y, 4), {"mean": (0.5,), "std": (1.0,)}),
    ]:
        with pytest.raises(ValueError, match=r"DataLoader|normalize"):
            DataLoader(*arguments, **options)
    loader = DataLoader(x, y, 4, shards=2)
    for step, shard in ((-1, None), (0, 2), (0, -1)):
        with pytest.raises(ValueError, match="no batch"):
            loader.batch(step, shard)


@pytest.mark.skipif(not CIFAR10.exists(), reason="data/cifar10.h5 is not there: put a CIFAR-10 archive in data/")
def test_the_real_images():
    dataset = read_hdf5(CIFAR10)
    assert dataset.train_images.shape == (50000, 3, 32, 32) and dataset.test_images.shape == (10000, 3, 32, 32)
    assert set(np.bincount(dataset.train_labels)) == {5000} and set(np.bincount(dataset.test_labels)) == {1000}
    assert dataset.classes[0] == "airplane" and dataset.classes[9] == "truck"
    mean, std = statistics(dataset.train_images)
    np.testing.assert_allclose(mean, (0.4914, 0.4822, 0.4465), atol=2e-3)
    np.testing.assert_allclose(std, (0.2470, 0.2435, 0.2616), atol=2e-3)


def test_flips_and_crops_are_drawn_anew_each_epoch():
    x = np.arange(40 * 3 * 8 * 8, dtype=np.float32).reshape(40, 3, 8, 8)
    for augment in ("flip", "crop=2", "cutout=3"):
        loader = DataLoader(x, np.arange(40), 40, shuffle=False, augment=augment)
        assert not np.array_equal(loader.batch(0)[0], loader.batch(1)[0])

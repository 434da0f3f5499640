"""Damage small valid files at random and read them: python -m tests.fuzz KIND [--cases 10000]

KIND is data, checkpoint, archive, arrays (.npz) or idx (MNIST).

Each case is read in a process of its own, with a limit of time and memory. Anything but success or the reader's own
error counts as a failure, and its file is kept. A case is a function of its number.
"""

import argparse
import collections
import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cnnmpi import checkpoint
from cnnmpi.checkpoint.format import BLOCK, header
from cnnmpi.data import DataError, Dataset, find_data, read_archive, read_hdf5, write_hdf5
from cnnmpi.data.inspect import describe, verify
from cnnmpi.data.sources.arrays import read_arrays
from cnnmpi.data.sources.idx import read_idx
from cnnmpi.data.writer import Source, write
from cnnmpi.models import MODELS
from cnnmpi.train.state import load_checkpoint, model_attributes, pack, read_saved_run

SECONDS = 60  # of computing, against hangs; a case needs some milliseconds
MEMORY = 512 << 20  # bytes that a case may allocate beside what Python and its libraries have
ODD = [0, 1, 2, 3, 4, 7, 8, 16, 255, 256, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
FINE, REFUSED, TRACEBACK, NO_MEMORY = 0, 10, 11, 12  # exit codes


def data_files() -> list[bytes]:
    """Data files as this program, its earlier versions, and other programs write them."""
    dice = np.random.default_rng(0)
    kinds: list[dict[str, Any]] = [
        {},
        {"fixed": True},
        {"libver": "earliest"},
        {"libver": "latest"},
        {"libver": "v108", "compression": "gzip", "userblock_size": 512},
        {"compression": "lzf"},
        {"contiguous": True},
        {"large": True},
        {"virtual": True},
    ]
    files = []
    for kind in kinds:
        file = io.BytesIO()
        options = {key: value for key, value in kind.items() if key in ("libver", "userblock_size")}
        with h5py.File(file, "w", **options) as root:
            for name, count in (("train", 5), ("test", 3)):
                images = dice.integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)
                storage = {"chunks": (2, 1, 4, 4), "fletcher32": True, "compression": kind.get("compression")}
                root.create_dataset(f"{name}/images", data=images, **({} if "contiguous" in kind else storage))
                root.create_dataset(f"{name}/labels", data=dice.integers(0, 3, count))
            if "virtual" in kind:
                layout = h5py.VirtualLayout((3, 1, 4, 4), np.uint8)
                layout[:] = h5py.VirtualSource("other.h5", "test/images", (3, 1, 4, 4))
                del root["test/images"]
                root.create_virtual_dataset("test/images", layout)
            names = ["cat", "dog", "mouse"]
            if "large" in kind:
                root["classes"] = np.array(names, "S")
            else:
                root.attrs["classes"] = np.array(names, "S") if "fixed" in kind else names
            root.attrs["source"], root.attrs["sha256"] = "somewhere", "0" * 64
        files.append(file.getvalue())
    with tempfile.TemporaryDirectory() as folder:  # with digests and checksums
        x, y = dice.integers(0, 256, (8, 1, 4, 4), np.uint8), dice.integers(0, 3, 8)
        write_hdf5(Path(folder) / "a.h5", Dataset(x[:5], y[:5], x[5:], y[5:], ("cat", "dog", "mouse"), "somewhere"))
        files.append((Path(folder) / "a.h5").read_bytes())
    return files


def arrays_files() -> list[bytes]:
    """Files of NumPy's, packed and not, split and not, of all dtypes that are read."""
    dice, files = np.random.default_rng(0), []
    for save in (np.savez, np.savez_compressed):
        for dtype in (np.uint8, np.float32):
            x = dice.integers(0, 2, (8, 1, 4, 4)).astype(dtype)
            y = dice.integers(0, 3, 8)
            for arrays in ({"x": x, "y": y}, {"x_train": x, "y_train": y, "x_test": x, "y_test": y.astype(np.uint8)}):
                file = io.BytesIO()
                save(file, **arrays)
                files.append(file.getvalue())
    return files


def idx_files() -> list[bytes]:
    """Files of images as MNIST has them, packed and not."""
    plain = bytes([0, 0, 8, 3, 0, 0, 0, 8, 0, 0, 0, 4, 0, 0, 0, 4]) + bytes(range(128))
    return [plain, gzip.compress(plain)]


def checkpoint_files() -> list[bytes]:
    """Checkpoints as the trainer writes them, with and without attributes that are too large for HDF5."""
    options = {"in_channels": 1, "num_classes": 3, "image_size": 4}
    model = MODELS["simplecnn"](**options)
    arrays = pack(model)
    arrays["model/features.3.weight"][...] = 0
    files = []
    for note in ("", "long " * 20_000):
        attributes = model_attributes("simplecnn", options, model) | {
            "config": json.dumps({"lr": 0.1, "note": note}),
            "step": 3,
            "epoch_sums": '{"loss": [1.5, 3.0], "acc": [2.0, 3.0]}',
            "best_test_acc": 0.5,
            "classes": ["cat", "dog", "mouse"],
            "mean": [0.5],
            "std": [0.25],
            "data_sha256": "0" * 64,
            "data_source": "somewhere",
        }
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder) / "a.h5", arrays, attributes)
            files.append((Path(folder) / "a.h5").read_bytes())
    return files


def archive_files() -> list[bytes]:
    """Archives of the python and the binary version, plain and compressed."""
    dice = np.random.default_rng(0)
    files = []
    for protocol in (2, 0, 4, None):
        members: dict[str, bytes] = {}
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
            labels, rows = dice.integers(0, 10, 2), dice.integers(0, 256, (2, 3072), dtype=np.uint8)
            if protocol is None:
                members[f"{name}.bin"] = np.hstack([labels[:, None].astype(np.uint8), rows]).tobytes()
            else:
                members[name] = pickle.dumps({b"data": rows, b"labels": labels.tolist(), b"f": [b"x"]}, protocol)
        classes = [f"class {i}".encode() for i in range(10)]
        if protocol is None:
            members["batches.meta.txt"] = b"\n".join(classes)
        else:
            members["batches.meta"] = pickle.dumps({b"label_names": classes}, protocol)
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(f"cifar/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        files.append(file.getvalue())
    return files


def damaged(dice: random.Random, blob: bytes) -> bytes:
    """Return ``blob`` with some bytes flipped, set, moved, cut out or put in, or with its end cut off."""
    changed = bytearray(blob)
    for _ in range(dice.choice([1, 1, 1, 2, 3, 8])):
        size = len(changed)
        at, how = dice.randrange(size), dice.randrange(10)
        if how == 0:
            changed[at] ^= 1 << dice.randrange(8)
        elif how == 1:
            changed[at] = dice.choice([0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)])
        elif how <= 4:  # a number in place of another
            width = dice.choice([1, 2, 4, 8])
            at -= at % width if dice.random() < 0.8 else 0
            value = dice.choice([*ODD, size, size - 1, at, dice.randrange(size)])
            changed[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, "little")
        elif how <= 6:
            length, to = dice.choice([1, 4, 8, 16, 64]), dice.randrange(size)
            changed[to : to + length] = changed[at : at + length]
        elif how == 7:
            length = dice.choice([2, 8, 32])
            changed[at : at + length] = dice.choice([b"\0", b"\xff"]) * length
        elif dice.random() < 0.7:
            continue
        elif how == 8:
            length = dice.choice([1, 4, 8])
            changed[at : at + length] = dice.randbytes(dice.choice([0, 0, length * 2]))
        else:
            del changed[max(at, 8) :]
    return bytes(changed)


def read_data(path: Path) -> None:
    """Read a data file by all ways."""
    find_data(str(path), path.parent / "none", notify=lambda text: None)
    read_hdf5(path, part=(1, 2))
    read_hdf5(path).digest()
    describe(path)
    verify(path)


def read_npz(path: Path) -> None:
    """Convert a file of NumPy's."""
    convert(path.with_suffix(".out"), lambda: read_arrays(path))


def read_mnist(path: Path) -> None:
    """Convert a folder of which one file is damaged."""
    folder = path.with_suffix(".folder")
    folder.mkdir()
    try:
        content, labels = path.read_bytes(), bytes([0, 0, 8, 1, 0, 0, 0, 8]) + bytes(range(8))
        packed = ".gz" if content[:1] == b"\x1f" else ""
        (folder / f"train-images-idx3-ubyte{packed}").write_bytes(content)
        (folder / "t10k-images-idx3-ubyte").write_bytes(idx_files()[0])
        for name in ("train", "t10k"):
            (folder / f"{name}-labels-idx1-ubyte").write_bytes(labels)
        convert(path.with_suffix(".out"), lambda: read_idx(folder))
    finally:
        shutil.rmtree(folder)


def convert(out: Path, read: Callable[[], Source]) -> None:
    """Write what ``read`` gives; nothing may be left where it fails."""
    try:
        write(out, read())
    except DataError:
        assert not out.exists()
        raise
    out.unlink()


def read_checkpoint(path: Path) -> None:
    """Read a checkpoint by all ways; the first that refuses it does not hide the others."""
    errors = []
    for read in (load_checkpoint, lambda path: read_saved_run(path, checkpoint.load(path)[1])):
        try:
            read(path)
        except checkpoint.CheckpointError as error:
            errors.append(error)
    if errors:
        raise errors[0]


# how the files of a kind begin, how one is damaged, how it is read, and how it may be refused
Kind = tuple[Callable[[], list[bytes]], Callable[[random.Random, bytes], bytes], Callable[[Path], Any], type[Exception]]


def damaged_checkpoint(dice: random.Random, blob: bytes) -> bytes:
    """Damage a checkpoint and sign it anew, so that libhdf5 sees the damage."""
    contents = blob[BLOCK:]
    start = contents.index(bytes(4096))  # the weights of a convolution, which would draw most of the damage
    end = len(contents) - len(contents[start:].lstrip(b"\0"))
    parts = [contents[:start], contents[end:]]
    chosen = dice.choices([0, 1], map(len, parts))[0]
    parts[chosen] = damaged(dice, parts[chosen])
    contents = contents[start:end].join(parts)
    return header(contents) + contents


def damaged_archive(dice: random.Random, blob: bytes) -> bytes:
    """Damage an archive, before or after it is compressed; half of the time near the beginning of a member."""
    if dice.random() < 0.5:
        starts = [at for at in range(0, len(blob), 512) if blob[at : at + 6] == b"cifar/"]
        at = dice.choice(starts)
        blob = blob[:at] + damaged(dice, blob[at : at + 700]) + blob[at + 700 :]
    else:
        blob = damaged(dice, blob)
    how = dice.randrange(3)
    return blob if how == 0 else gzip.compress(blob, 1) if how == 1 else damaged(dice, gzip.compress(blob, 1))


KINDS: dict[str, Kind] = {
    "data": (data_files, damaged, read_data, DataError),
    "checkpoint": (checkpoint_files, damaged_checkpoint, read_checkpoint, checkpoint.CheckpointError),
    "archive": (archive_files, damaged_archive, read_archive, DataError),
    "arrays": (arrays_files, damaged, read_npz, DataError),
    "idx": (idx_files, damaged, read_mnist, DataError),
}


def run_case(read: Callable[[Path], Any], path: Path, refusal: type[Exception]) -> tuple[str, int]:
    """Read ``path`` in a process of its own; return how that ended, and the bytes of memory it had at most."""
    child = os.fork()
    if child == 0:
        code = TRACEBACK
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
            signal.alarm(10 * SECONDS)  # for what waits instead of computing
            has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, has + MEMORY))
            read(path)
            code = FINE
        except refusal as error:
            code = REFUSED if "\n" not in str(error) and "MemoryError" not in repr(error.__cause__) else TRACEBACK
            if code == TRACEBACK:
                print(repr(error), repr(error.__cause__), flush=True)
        except MemoryError:
            code = NO_MEMORY
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
        finally:
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    if os.WIFSIGNALED(status):
        ended = {signal.SIGXCPU: "hang", signal.SIGALRM: "hang"}.get(signal.Signals(os.WTERMSIG(status)), "crash")
    else:
        code = os.WEXITSTATUS(status)
        ended = {FINE: "read", REFUSED: "refused", TRACEBACK: "traceback", NO_MEMORY: "out of memory"}.get(
            code, "crash"
        )
    return ended, usage.ru_maxrss * 1024


def run(kind: str, cases: range, folder: Path) -> Iterator[tuple[int, str, int]]:
    """Yield (number, how it ended, bytes of memory) of each case; files of failures stay in ``folder``."""
    files, damage, read, refusal = KINDS[kind]
    blobs = files()
    for blob in blobs:
        path = folder / f"{kind}-undamaged"
        path.write_bytes(blob)
        assert run_case(read, path, refusal)[0] in ("read", "refused")
        path.unlink()
    for case in cases:
        dice = random.Random(f"{kind} {case}")
        path = folder / f"{kind}-{case}.h5"  # whatever is inside
        path.write_bytes(damage(dice, dice.choice(blobs)))
        ended, memory = run_case(read, path, refusal)
        if ended in ("read", "refused"):
            path.unlink()
        yield case, ended, memory


def main() -> int:
    """Run the cases that the command line asks for; the exit code is 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    folder, began, most = Path(tempfile.mkdtemp(prefix="fuzz-")), time.monotonic(), 0
    counts: collections.Counter[str] = collections.Counter()
    for case, ended, memory in run(options.kind, range(options.first, options.first + options.cases), folder):
        counts[ended] += 1
        most = max(most, memory)
        if ended not in ("read", "refused"):
            print(f"case {case}: {ended}: {folder / f'{options.kind}-{case}.h5'}", flush=True)
    bad = counts.total() - counts["read"] - counts["refused"]
    ways = ", ".join(f"{count} {ended}" for ended, count in sorted(counts.items()))
    minutes = (time.monotonic() - began) / 60
    print(f"{options.kind}: {counts.total()} cases: {ways}; at most {most >> 20} MiB of memory; {minutes:.1f} minutes")
    if not bad:
        folder.rmdir()
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())

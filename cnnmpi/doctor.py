"""Check what breaks jobs, before one does: each line is ok, or says what to do.

python -m cnnmpi.doctor                      # this machine, and whether mpirun works
mpirun -n 4 python -m cnnmpi.doctor          # the ranks as they will run
python -m cnnmpi.doctor --model nets.py:Net  # a network of your own as well: whether it learns, time, memory
"""

import fcntl
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
import tracemalloc
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import threadpoolctl
import tyro

from cnnmpi import console
from cnnmpi.checkpoint.atomic import sync_directory, write_and_sync
from cnnmpi.data import DataError, Dataset
from cnnmpi.distributed import (
    Ranks,
    UserError,
    failing_together,
    find_launcher,
    launched,
    little_shared_memory,
    start,
)
from cnnmpi.machine import allowance, blas_kernels, free_mib, shared_folders
from cnnmpi.models import MODELS, Model
from cnnmpi.train.code import Code, explained, source_sha256
from cnnmpi.train.config import DEFAULTS, Config, resolve
from cnnmpi.train.inputs import input_options, look_at_data
from cnnmpi.train.setup import make_model

MIB = 1 << 20
CHECKPOINTS = 4  # last, previous, best, and the one being written
SLOW_SYNC_S = 1.0
RANK_MIB = 600  # Python, NumPy and a SmallResNet step, generously
LONELY = 41  # exit code of a rank that finds no other: what two of them print may be mixed
MEET = f"import sys; from mpi4py import MPI; sys.exit(MPI.COMM_WORLD.Get_size() != 2 and {LONELY})"


@dataclass(frozen=True)
class Doctor:
    """Check MPI, cores, BLAS, PyTorch, the output folder and the data."""

    out: Path = Path("runs")
    """Folder in which runs will be kept."""
    data: str = "auto"
    """The data that will be named to cnnmpi.train; nothing is downloaded."""
    model: str | None = None
    """The network that will be named to cnnmpi.train: its class is built, and a shard of images passes through it."""
    mpirun: str = "mpirun"
    """The launcher, with any arguments of its own."""


@dataclass(frozen=True)
class Finding:
    """What a check found; ``remedy`` where something is wrong."""

    text: str
    remedy: str = ""


def check_mpirun(mpirun: str) -> Finding:
    """Start two processes, which must find each other."""
    try:
        command = find_launcher(mpirun)
    except UserError as error:
        return Finding(str(error), "name one with --mpirun; single processes work without")
    allow = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    try:
        result = _run([*command, "-n", "2", sys.executable, "-c", MEET], os.environ | allow)
    except subprocess.TimeoutExpired:
        return Finding("two ranks did not start within 60 s", "check that this host can reach itself by its own name")
    except OSError as error:
        return Finding(f"{mpirun} cannot be started: {error.strerror}", "name another one with --mpirun")
    if result.returncode == LONELY:
        return Finding("each of two processes is alone", "use the mpirun of the MPI that mpi4py was built for")
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        remedy = little_shared_memory(2) or "pip install mpi4py, and an MPI: 'cnnmpi[mpich]'"
        return Finding(f"{mpirun} -n 2 failed: {reason}", remedy)
    return Finding(f"{shlex.join(command)} and mpi4py work together")


def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command for at most a minute; what it prints may be in any encoding."""
    return subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", timeout=60)


def check_ranks(ranks: Ranks) -> Finding:
    """Compare ranks with cores, on the most crowded host."""
    crowded, cores = max(ranks.gather((ranks.local_size, ranks.cores_on_node)), key=lambda pair: pair[0] / pair[1])
    text = f"{ranks.size} ranks; at most {crowded} on {cores} cores of a host"
    if crowded > cores:
        return Finding(text, "the result is the same, but as many ranks as cores are faster")
    return Finding(text)


def check_cores(ranks: Ranks) -> Finding:
    """Count the cores that the ranks of rank 0's host may use, and say what becomes of more cores than shards."""
    mine, cores, shards = allowance(), ranks.cores_on_node, DEFAULTS["shards"]
    text = f"{cores} core{'s' * (cores > 1)}"
    if mine.quota < len(mine.cores):
        text += f": {len(mine.cores)} are seen, of whose time {mine.group} grants {mine.quota:g}"
    if cores > shards:
        text += f"; by default up to {shards} ranks (--shards {shards}), whose threads use the others"
    return Finding(text)


def check_threads(ranks: Ranks) -> Finding:
    """Ask whether a thread of ours may send messages; the watchdog needs that."""
    if ranks.comm is None:
        return Finding("one process: no rank to watch")
    if ranks.mpi.Query_thread() < ranks.mpi.THREAD_MULTIPLE:
        return Finding("this MPI admits one thread", "hangs go unnoticed: use an MPI with MPI_THREAD_MULTIPLE")
    return Finding("this MPI lets the watchdog send its messages")


def check_blas(ranks: Ranks) -> Finding:
    """Name the matrix product's kernels, on all hosts."""
    libraries = [lib for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"]
    kernels = Counter(ranks.gather(blas_kernels()))
    threads = max((lib["num_threads"] for lib in libraries), default=1)
    text = f"{'; '.join(kernels)}; {threads} threads of its own, 1 in cnnmpi"
    forced = os.environ.get("OPENBLAS_CORETYPE")
    if len(kernels) > 1:
        return Finding(
            f"hosts differ: {text}", "the last bits then depend on who computes what: set OPENBLAS_CORETYPE alike"
        )
    if forced:
        return Finding(
            f"{text}, forced by OPENBLAS_CORETYPE={forced}", "unset it for the fastest kernels, on all hosts"
        )
    return Finding(text)


def check_torch() -> Finding:
    """Tell what PyTorch could do; in a process of its own, as its import is slow and may crash."""
    code = (
        "import torch; told = lambda name: getattr(torch.cpu, name, bool)(); "
        "fast = [what for what, name in (('AMX', '_is_amx_tile_supported'), ('AVX-512', '_is_avx512_bf16_supported'))"
        " if told(name)]; "
        "print('', torch.__version__, torch.cuda.device_count(), (fast + ['none'])[0], sep='\\n')"
    )
    try:
        result = _run([sys.executable, "-c", code], dict(os.environ))
    except subprocess.TimeoutExpired:
        return Finding("PyTorch takes more than 60 s to be imported", "leave --backend torch out until it works")
    if result.returncode:
        return Finding("PyTorch is not installed: --backend torch is not available, all else is")
    version, gpus, bfloat16 = result.stdout.splitlines()[-3:]
    known = f"has bfloat16 by {bfloat16}" if bfloat16 != "none" else "is not known to have bfloat16"
    return Finding(f"PyTorch {version}, {gpus} GPU{'s' * (gpus != '1')}; the processor {known}")


def check_folder(out: Path) -> Finding:
    """Write, sync, rename and lock in ``out``."""
    probe = out / f".doctor.{uuid.uuid4().hex}"
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        begun = time.perf_counter()
        try:
            write_and_sync(probe, b"x" * MIB)
            probe = probe.replace(probe.with_suffix(".renamed"))
            sync_directory(out)
            seconds = time.perf_counter() - begun
            with probe.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    return Finding(f"{out} knows no file locks", "nothing keeps two jobs from one --out: take care")
        finally:
            probe.unlink(missing_ok=True)
            if made:
                out.rmdir()
    except OSError as error:
        return Finding(f"{out} cannot be written: {error.strerror}", "name another folder with --out")
    if seconds > SLOW_SYNC_S:
        return Finding(f"{out}: syncing 1 MiB took {seconds:.1f} s", "save less often, or on a faster disk")
    return Finding(f"{out}: writes, syncs ({1000 * seconds:.0f} ms a MiB), renames and locks")


def check_space(out: Path, size: int) -> Finding:
    """Compare free space with the checkpoints of a network of ``size`` weights; 0: of the largest reference model."""
    there = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    numbers = size or max(sum(param.size for param, _ in make().parameters()) for make in MODELS.values())
    needed, free = CHECKPOINTS * 3 * 4 * numbers, shutil.disk_usage(there).free  # weights and Adam's two slots
    text = f"{free // MIB} MiB free for checkpoints, which take up to {needed // MIB + 1} MiB"
    return Finding(text, "" if free > needed else "make room, or name another folder with --out")


def check_data(spec: str) -> Finding:
    """Read all of the data file and name its digest."""
    try:
        path, dataset = look_at_data(spec)
        if path is None:
            return Finding("synthetic images need no file")
        digest = dataset.digest()
    except DataError as error:
        return Finding(str(error), "or let cnnmpi.train download CIFAR-10, with --data cifar10")
    if dataset.recorded is not None and dataset.recorded.data_sha256 != digest:
        return Finding(f"{path}: is not what was written", "python -m cnnmpi.data verify says what differs")
    size = sum(math.prod(images.shape) for images in (dataset.train_images, dataset.test_images))
    text = f"{path}: {dataset.source}, {size // MIB} MiB, sha256 {digest}"
    rooms = {folder: free_mib(folder) for folder in shared_folders()}
    if max(rooms.values(), default=0) <= size // MIB:
        where = ", ".join(f"{folder} ({free} MiB free)" for folder, free in rooms.items())
        if isinstance(dataset.train_images, np.ndarray):  # compressed
            return Finding(text, f"ranks share the data in {where}: enlarge it, or name another folder in TMPDIR")
        text += f"; too much to be shared in {where}, so ranks read the file itself"
    return Finding(text)


def build(name: str, spec: str) -> tuple[Config, Model, Dataset]:
    """Return the network of this name as it would be trained on these data. Raises UserError or DataError."""
    code, dataset = Code(), look_at_data(spec)[1]
    config = resolve(Config(model=name), code)
    network = code.find("model", name)
    options = input_options(dataset) | {"seed": config.seed or 0}
    return config, make_model(network, config, options, 0), dataset


def check_network(name: str, spec: str) -> tuple[Finding, int]:
    """Let a shard of images pass forward and backward through the network. Returns the size of its weights, too."""
    try:
        config, model, dataset = build(name, spec)
        count = min(-(-(config.batch_size or 1) // (config.shards or 1)), len(dataset.train_images))
        x = (dataset.train_images[:count] / np.float32(255)).astype(np.float32)
        with explained(f"--model {name} fails on a shard of {count} images"):
            milliseconds, mib = measure_step(model, x)
    except (UserError, DataError) as error:
        return Finding(str(error), "training would end with this line: mend it first"), 0
    learning = sum(param.size for param, _ in model.parameters())
    text = f"{name}: {learning} weights learn; a shard of {count} images takes {milliseconds:.0f} ms and {mib} MiB"
    return Finding(text), sum(array.size for array in model.state_dict().values())


def check_sources(ranks: Ranks, name: str) -> Finding:
    """Compare the source of the network on all ranks."""
    try:
        mine = source_sha256(Code().find("model", name))
    except UserError as error:
        mine = str(error)
    if len(set(ranks.gather(mine))) > 1:
        return Finding(f"{name} is not the same on all ranks", "copy the file to all hosts, to the same place")
    return Finding(f"{name} is the same on all ranks")


def measure_step(model: Model, x: np.ndarray) -> tuple[float, int]:
    """Return milliseconds and MiB, at most, that images ``x`` take forward and backward through ``model``."""
    model.backward(np.ones_like(model.forward(x)))  # once before: caches and threads are there
    begun = time.perf_counter()
    model.backward(np.ones_like(model.forward(x)))
    milliseconds = 1000 * (time.perf_counter() - begun)
    tracemalloc.start()
    model.backward(np.ones_like(model.forward(x)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return milliseconds, peak // MIB + 1


def check_memory(ranks: Ranks) -> Finding:
    """Compare the free memory of each host with what its ranks take."""
    free, count = min(
        ranks.gather((psutil.virtual_memory().available // MIB, ranks.local_size)), key=lambda pair: pair[0] / pair[1]
    )
    text = f"{free} MiB of memory free for {count} rank{'s' * (count > 1)} of a host"
    return Finding(text, "" if free > RANK_MIB * count else f"a rank takes up to {RANK_MIB} MiB: start fewer")


def checks(config: Doctor, ranks: Ranks) -> Iterator[tuple[str, Finding]]:
    """Yield (subject, finding); all ranks take part, rank 0 does what one alone can do."""

    def alone(check: Callable[..., Finding], *arguments: object) -> Finding:
        return ranks.on_rank0(lambda: check(*arguments))

    yield "ranks", check_ranks(ranks)
    yield "cores", check_cores(ranks)
    yield "memory", check_memory(ranks)
    yield "watchdog", check_threads(ranks)
    yield "BLAS", check_blas(ranks)
    yield "folder", alone(check_folder, config.out)
    yield "data", alone(check_data, config.data)
    size = 0
    if config.model is not None:
        if ranks.size > 1:
            yield "sources", check_sources(ranks, config.model)
        finding, size = ranks.on_rank0(lambda: check_network(config.model or "", config.data))
        yield "network", finding
    yield "space", alone(check_space, config.out, size)


def show(subject: str, finding: Finding) -> int:
    """Print a line, two where there is a remedy. Returns 1 for those, else 0."""
    mark, remedy = ("FAIL", f"\n{'':<15}-> {finding.remedy}") if finding.remedy else ("ok  ", "")
    print(f"{mark} {subject:<9} {finding.text}{remedy}", flush=True)
    return int(bool(finding.remedy))


def parse(argv: Sequence[str] | None) -> Doctor:
    """Return the settings of a command line. Ends in SystemExit(2), explained, for a bad one."""
    return tyro.cli(Doctor, args=argv, prog="cnnmpi.doctor", description=__doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each check. Returns 0 if all are well, 1 if something needs a remedy, 2 for bad arguments."""
    console.prepare()
    wrong, config = 0, None
    if not launched():  # not under mpirun; no subprocess once MPI has begun
        config = parse(argv)
        wrong += show("mpirun", check_mpirun(config.mpirun)) + show("torch", check_torch())
    try:
        ranks = start()
    except UserError as error:
        return show("MPI", Finding("the processes do not find each other", str(error)))
    with failing_together(ranks):
        config = config or ranks.on_rank0(lambda: parse(argv))
        np.dot(np.ones((2, 2)), np.ones((2, 2)))  # BLAS is loaded for certain
        for subject, finding in checks(config, ranks):
            if ranks.rank == 0:
                wrong += show(subject, finding)
        return ranks.on_rank0(lambda: int(wrong > 0))
    return 1


if __name__ == "__main__":
    sys.exit(main())

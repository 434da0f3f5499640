"""What this machine gives a process: cores, memory shared with other processes, BLAS's own threads."""

import contextlib
import ctypes
import functools
import math
import mmap
import os
import platform
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import threadpoolctl

SHARED_MEMORY = Path("/dev/shm")

# -- cores -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Allowance:
    """What a process may use: these cores, and of their time the quota of a control group, in cores."""

    cores: frozenset[int]
    group: str = ""
    quota: float = math.inf


def allowance(root: Path = Path("/")) -> Allowance:
    """Return what this process may use: its affinity, and the tightest quota of its control groups (version 1 or 2).

    ``root`` is where /proc and the control groups are looked for.
    """
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    group, quota = min(_quotas(root), key=lambda pair: pair[1], default=("", math.inf))
    return Allowance(frozenset(cores), group, quota)


def cores_of(allowances: Iterable[Allowance]) -> int:
    """Return how many cores processes of one host may use together, at least 1.

    mpirun may bind each to a core of its own, so their cores are added up; those of one group share its quota.
    """
    together = list(allowances)
    cores = len(frozenset().union(*(each.cores for each in together)))
    quota = sum({each.group: each.quota for each in together}.values())
    return max(1, math.floor(min(cores, quota)))


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: of those it is bound to, what its control groups grant."""
    return cores_of([allowance(root)])


def processor() -> str:
    """Return the name of this host's processor, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _quotas(root: Path) -> Iterator[tuple[str, float]]:
    """Yield (folder, cores) for each control group, from this process's own up to the outermost, that has a quota."""
    for folder, top in _control_groups(root, "cpu"):
        for group in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                if (group / "cpu.max").exists():
                    quota, period = map(float, (group / "cpu.max").read_text().split())  # "max 100000": ValueError
                else:
                    quota, period = (float((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
                if quota > 0:  # version 1 says -1 where there is none
                    yield str(group), quota / period
            if group == top:
                break


def _control_groups(root: Path, controller: str) -> Iterator[tuple[Path, Path]]:
    """Yield (folder of this process's group, mount point) for each hierarchy that may limit what a controller does."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    paths: dict[str, Path] = {}  # of a controller such as cpu (version 1), or of "" (version 2)
    for line in lines:
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), Path(path)))
    for line in mounts:
        before, _, after = line.partition(" - ")
        mounted, point = (re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), text) for text in before.split()[3:5])
        kind, _, options = after.split(" ", 2)
        key = {"cgroup": controller, "cgroup2": ""}.get(kind)
        if key in paths and (kind == "cgroup2" or controller in options.split(",")):
            group, top = paths[key], root / point.lstrip("/")
            # a container may see the path of its group on the host, but only what is mounted of it
            inside = group.is_relative_to(mounted) and ".." not in group.parts
            yield (top / group.relative_to(mounted) if inside else top), top


# -- memory ------------------------------------------------------------------------------------------------------------


def available_memory(root: Path = Path("/")) -> int:
    """Return how many bytes processes may still take: what the host has free, or less where control groups limit it.

    ``root`` is where /proc and the control groups are looked for. What a group has cached of files counts as free.
    """
    left = [psutil.virtual_memory().available]
    for folder, top in _control_groups(root, "memory"):
        for group in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError, KeyError):
                if (group / "memory.max").exists():  # version 2
                    names, cached = ("memory.max", "memory.current"), "inactive_file"
                else:
                    names, cached = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"
                limit, used = (int((group / name).read_text()) for name in names)  # "max": ValueError
                counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                left.append(limit - used + int(counts[cached]))
            if group == top:
                break
    return max(0, int(min(left)))


def shared_folders() -> list[Path]:
    """Return where memory can be shared, the best first: /dev/shm, and the folder for temporary files (``TMPDIR``)."""
    return [folder for folder in (SHARED_MEMORY, Path(tempfile.gettempdir())) if folder.is_dir()]


def create_shared(nbytes: int) -> Path:
    """Make a zeroed file of ``nbytes`` that other processes of this host can map, with all of its room reserved.

    Whoever writes into memory for which there is no room dies by a bus error; so it is asked for at once. Raises
    OSError where there is none.
    """
    failure: OSError = FileNotFoundError("no folder for temporary files")
    for folder in shared_folders():
        try:
            descriptor, name = tempfile.mkstemp(prefix="cnnmpi-", dir=folder)
        except OSError as error:
            failure = error
            continue
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, nbytes)
            else:
                os.truncate(descriptor, nbytes)
            return Path(name)
        except OSError as error:
            Path(name).unlink()
            failure = error
        finally:
            os.close(descriptor)
    raise failure


def open_shared(path: Path, nbytes: int) -> mmap.mmap:
    """Map the file that ``create_shared`` made; its memory is free again when nobody has it mapped or linked."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(descriptor, nbytes)
    finally:
        os.close(descriptor)


def free_mib(folder: Path) -> int:
    """Return the free space of the file system that ``folder`` is on, in MiB."""
    there = os.statvfs(folder)
    return there.f_bavail * there.f_frsize >> 20


def keep_freed_memory() -> None:
    """Let this process keep the memory of arrays that are freed, for the next ones, where its C library can (glibc).

    Otherwise every large array comes from the kernel and goes back there, page by page (docs/scaling.md has figures).
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # before 2.35 arrays beyond 32 MiB come from the kernel whatever one asks for
        if mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 1 << 25):
            mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


# -- BLAS --------------------------------------------------------------------------------------------------------------

FORCING_BLAS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # let OpenBLAS run what it would not choose by itself
_lock = threading.Lock()
_inside = 0  # how many threads are inside one_blas_thread() now
_before: list[tuple[Any, int]] = []  # each library with one limit for the process, and its number of threads outside


@functools.cache
def _libraries() -> tuple[list[Any], list[Any]]:
    """Return the libraries that have one limit for the whole process, and those that have one for each thread."""
    libraries = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
    each = [lib for lib in libraries if lib.internal_api == "mkl" or getattr(lib, "threading_layer", "") == "openmp"]
    return [lib for lib in libraries if lib not in each], each


def blas_kernels() -> str:
    """Return which BLAS NumPy uses, and the kernels that it chose for this processor, such as "openblas SkylakeX"."""
    libraries = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
    kernels = {f"{lib.internal_api} {getattr(lib, 'architecture', None) or ''}".strip() for lib in libraries}
    return ", ".join(sorted(kernels)) or "unknown"


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let BLAS use no threads of its own meanwhile, for this thread at least; afterwards as many as before.

    Our matrix products are too small for these threads to help, and their number would change the last bits. Also a
    decorator, which takes some microseconds; any number of threads may be inside at the same time.
    """
    global _inside
    process, each = _libraries()
    mine = [(library, library.get_num_threads()) for library in each]
    for library, _ in mine:
        library.set_num_threads(1)
    with _lock:
        if _inside == 0:
            _before[:] = [(library, library.get_num_threads()) for library in process]
            for library, _ in _before:
                _set_threads(library, 1)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                for library, threads in _before:
                    _set_threads(library, threads)
        for library, threads in mine:
            library.set_num_threads(threads)


def _set_threads(library: Any, threads: int) -> None:
    """Set the number of threads; threadpoolctl listens only to the first thread that did, until that one gives way."""
    give_way = getattr(library, "clear_controlling_thread", lambda force: None)
    give_way(force=True)
    library.set_num_threads(threads)
    give_way(force=True)

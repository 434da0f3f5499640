"""What the machine gives: cores after affinity and quotas, in made-up /proc and control groups; BLAS's threads."""

import os
import platform
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import threadpoolctl

from cnnmpi import functional, machine
from cnnmpi.functional.blocks import share_out
from cnnmpi.machine import Allowance, allowance, cores_of, one_blas_thread, usable_cores

# -- cores -------------------------------------------------------------------------------------------------------------

V1 = "31 23 0:28 {root} {point} rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "32 23 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
V2 = "41 31 0:38 {root} {point} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"


def host(tmp_path: Path, cgroup: str, mounts: list[str], files: dict[str, str]) -> Path:
    """Make a root with /proc/self and control groups in ``tmp_path``."""
    for name, text in {"proc/self/cgroup": cgroup, "proc/self/mountinfo": "\n".join(mounts), **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return tmp_path


def v1(folder: str, quota: int, period: int = 100000) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": str(quota), f"{folder}/cpu.cfs_period_us": str(period)}


UNIFIED, CPU = "sys/fs/cgroup", "sys/fs/cgroup/cpu,cpuacct"
V2_HERE, V1_HERE = V2.format(root="/", point="/" + UNIFIED), V1.format(root="/", point="/" + CPU)


@pytest.mark.parametrize(
    "cgroup, mounts, files, quota",
    [
        ("0::/", [V2_HERE], {}, None),  # the outermost group has no cpu.max
        ("0::/", [V2_HERE], {f"{UNIFIED}/cpu.max": "max 100000"}, None),
        ("0::/", [V2_HERE], {f"{UNIFIED}/cpu.max": "350000 100000"}, 3.5),  # a container of its own namespace
        ("0::/a/b", [V2_HERE], {f"{UNIFIED}/a/b/cpu.max": "200000 50000"}, 4),
        ("0::/a/b", [V2_HERE], {f"{UNIFIED}/a/b/cpu.max": "max 100000", f"{UNIFIED}/a/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", [V2_HERE], {f"{UNIFIED}/a/b/cpu.max": "100000 100000", f"{UNIFIED}/a/cpu.max": "900000 100000"}, 1),
        ("0::/a", [V2_HERE], {f"{UNIFIED}/b/cpu.max": "100000 100000"}, None),  # another group's
        ("0::/../../other", [V2_HERE], {f"{UNIFIED}/cpu.max": "250000 100000"}, 2.5),  # moved out of its namespace
        ("4:cpuacct,cpu:/\n3:memory:/x", [V1_MEMORY, V1_HERE], v1(CPU, -1), None),
        ("4:cpuacct,cpu:/\n3:memory:/x", [V1_MEMORY, V1_HERE], v1(CPU, 250000), 2.5),
        ("4:cpu,cpuacct:/a/b", [V1_HERE], v1(f"{CPU}/a/b", -1) | v1(f"{CPU}/a", 120000, 60000), 2),
        # without a namespace: the group's path on the host, of which the container has mounted the end
        ("4:cpu:/docker/c0", [V1.format(root="/docker/c0", point="/" + CPU)], v1(CPU, 700000), 7),
        ("4:cpu:/docker/c0/x", [V1.format(root="/docker/c0", point="/" + CPU)], v1(f"{CPU}/x", 600000), 6),
        ("4:cpu:/a\n0::/b", [V1_HERE, V2_HERE], v1(f"{CPU}/a", 500000) | {f"{UNIFIED}/b/cpu.max": "30000 10000"}, 3),
        ("0::/a", [V2.format(root="/", point="/my\\040groups")], {"my groups/a/cpu.max": "200000 100000"}, 2),
        ("0::/", [V2_HERE], {f"{UNIFIED}/cpu.max": "nonsense"}, None),
        ("0::/", [V2_HERE], {f"{UNIFIED}/cpu.max": "1 0"}, None),
        ("4:memory:/", [V1_MEMORY], {}, None),
    ],
)
def test_the_tightest_quota_of_a_group_and_its_parents_counts(cgroup, mounts, files, quota, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(100)), raising=False)
    root = host(tmp_path, cgroup, mounts, files)
    assert allowance(root).quota == (quota or float("inf"))
    assert usable_cores(root) == (int(quota) if quota else 100)


def test_affinity_counts_and_one_core_is_the_least(tmp_path, monkeypatch):
    root = host(tmp_path, "0::/", [V2_HERE], {f"{UNIFIED}/cpu.max": "350000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert usable_cores(root) == 2
    (root / UNIFIED / "cpu.max").write_text("20000 100000\n")
    assert usable_cores(root) == 1
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS, which has no /proc either
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert usable_cores(tmp_path / "nowhere") == 12


def test_processes_of_a_host_add_up_their_cores_and_share_a_quota():
    bound = [Allowance(frozenset({core}), "/job", 2.5) for core in range(4)]
    assert cores_of(bound) == 2
    assert cores_of([Allowance(each.cores) for each in bound]) == 4
    assert cores_of([Allowance(frozenset(range(8)), f"/task{n}", 1.0) for n in range(3)]) == 3, "a quota for each"
    assert cores_of([Allowance(frozenset(range(8)), "/task", 1.0), Allowance(frozenset(range(8)))]) == 8


# -- BLAS --------------------------------------------------------------------------------------------------------------


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"}


@pytest.fixture
def three_threads():
    np.ones((2, 2)) @ np.ones((2, 2))
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        if blas_threads() != {3}:
            pytest.skip("this BLAS has no threads of its own")
        yield


def test_blas_has_one_thread_inside_ops_and_as_before_outside(three_threads, monkeypatch):
    seen = []
    original = functional.conv.column_sums
    monkeypatch.setattr(functional.conv, "column_sums", lambda rows: (seen.append(blas_threads()), original(rows))[1])
    functional.set_threads(1)
    assert blas_threads() == {3}, "what a person's own products use is not ours to change"
    x, W = np.ones((4, 8, 8, 8), np.float32), np.ones((8, 8, 3, 3), np.float32)
    _, cache = functional.conv2d(x, W, np.zeros(8, np.float32), padding=1)
    functional.conv2d_backward(np.ones((4, 8, 8, 8), np.float32), cache)
    assert seen and all(threads == {1} for threads in seen) and blas_threads() == {3}
    with pytest.raises(ValueError):
        functional.linear(np.ones((2, 3)), np.ones((4, 5)))
    assert blas_threads() == {3}, "also after an error"


def test_threads_that_are_inside_at_the_same_time_leave_it_as_it_was(three_threads):
    inside, leave = threading.Barrier(2), threading.Event()

    def other():
        with one_blas_thread():
            inside.wait(60)
            leave.wait(60)

    thread = threading.Thread(target=other)
    with one_blas_thread(), one_blas_thread():
        thread.start()
        inside.wait(60)
    assert blas_threads() == {1}, "the other thread is still inside"
    leave.set()
    thread.join()
    assert blas_threads() == {3}


class ForEachThread(threading.local):
    """A library whose limit is each thread's own, as MKL's and that of OpenBLAS with OpenMP."""

    threads = 5

    def get_num_threads(self):
        return self.threads

    def set_num_threads(self, threads):
        self.threads = threads


def test_a_limit_for_each_thread_is_set_on_all_threads_of_ours(monkeypatch):
    library = ForEachThread()
    monkeypatch.setattr(machine, "_libraries", lambda: ([], [library]))
    seen, together = [], threading.Barrier(2)

    def body(item):
        together.wait(60)  # each thread gets an item
        seen.append(library.threads)

    with ThreadPoolExecutor(1) as pool:
        one_blas_thread()(lambda: share_out([0, 1], [body, body], pool))()
        assert seen == [1, 1]
        assert library.threads == pool.submit(library.get_num_threads).result() == 5


def test_a_process_needs_at_least_one_thread():
    with pytest.raises(ValueError, match="at least 1 thread"):
        functional.set_threads(0)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_that_is_freed_is_kept_for_the_next_array_where_the_c_library_can():
    """In a process of its own: its faults of pages while large arrays come and go."""
    code = (
        "import resource, sys; import numpy as np; from cnnmpi.machine import keep_freed_memory; "
        "keep_freed_memory() if sys.argv[1] == 'keep' else None; touch = lambda: np.ones(1 << 23); touch(); "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt; all(touch().any() for _ in range(4)); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    environment = os.environ | {"NUMPY_MADVISE_HUGEPAGE": "0"}
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", code, how], env=environment, capture_output=True, check=True).stdout)
        for how in ("keep", "give back")
    )
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    assert kept < given_back / 10, "64 MiB are 16384 pages of 4 KiB"


@pytest.mark.parametrize(
    "most, told",
    [(1 << 40, [(-3, 1 << 30), (-1, (1 << 31) - 1)]), (1 << 25, [(-3, 1 << 25), (-1, (1 << 31) - 1)]), (0, [])],
)
def test_a_c_library_that_refuses_a_threshold_is_told_nothing_else(monkeypatch, most, told):
    """The one without the other would take every large array from the kernel, for good."""
    accepted = []

    def mallopt(parameter, value):
        if parameter == -3 and value > most:
            return 0
        accepted.append((parameter, value))
        return 1

    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    machine.keep_freed_memory()
    assert accepted == told


def test_memory_to_share_is_reserved_where_there_is_room(monkeypatch, tmp_path):
    little, much = tmp_path / "little", tmp_path / "much"
    little.mkdir(), much.mkdir()
    monkeypatch.setattr(machine, "SHARED_MEMORY", little)
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(much))
    reserve = os.posix_fallocate

    def with_limit(descriptor, offset, nbytes):
        if Path(f"/proc/self/fd/{descriptor}").readlink().parent == little:
            raise OSError(28, "No space left on device")
        reserve(descriptor, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", with_limit)
    path = machine.create_shared(5000)
    assert path.parent == much and path.stat().st_size == 5000 and path.stat().st_blocks * 512 >= 5000
    assert not list(little.iterdir()), "nothing half-made stays"
    first, second = machine.open_shared(path, 5000), machine.open_shared(path, 5000)
    path.unlink()
    first[4999] = 7
    assert second[4999] == 7 and first[0] == 0
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "none")
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(little))
    with pytest.raises(OSError, match="No space"):
        machine.create_shared(5000)


# -- where it runs -----------------------------------------------------------------------------------------------------


def test_on_windows_the_import_says_where_it_runs():
    code = "import sys; sys.platform = 'win32'; sys.modules['fcntl'] = None; import cnnmpi"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.stderr.splitlines()[-1].startswith("ImportError: cnnmpi runs on Linux, not on Windows: ")

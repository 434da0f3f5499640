"""Ranks and the reduction, on as many ranks as this test runs on; each expectation is computed without them."""

import contextlib
import errno
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from cnnmpi import Config, set_up
from cnnmpi.data import synthetic, write_hdf5
from cnnmpi.distributed import (
    DeviceReducer,
    ExactReducer,
    NotFiniteError,
    Ranks,
    Reducer,
    RemoteError,
    UserError,
    failing_together,
    find_launcher,
    split_words,
    start,
)
from tests.jobs import MPIRUN, needs_mpirun

SHARDS = 8


def contributions(seed=0):
    """For each shard, float32 gradients over 12 orders of magnitude and three counts."""
    draw = np.random.default_rng(seed)
    scale = 10.0 ** draw.integers(-8, 5, (SHARDS, 1000))
    return [
        ((draw.standard_normal(1000) * scale[s]).astype(np.float32), np.array([draw.random(), s, 1.0]))
        for s in range(SHARDS)
    ]


def reduce(kind, ranks, shards=range(SHARDS)):
    reducer = kind(ranks, SHARDS, [1000, 3])
    for shard, arrays in enumerate(contributions()):
        if shard in shards[ranks.rank :: ranks.size]:
            reducer.add(shard, *arrays)
    return reducer.reduce()


@pytest.mark.mpi(min_size=1)
def test_exact_sum_has_the_bits_of_one_rank_in_any_order(ranks):
    expected = reduce(ExactReducer, Ranks())
    for order in (range(SHARDS), [7, 6, 5, 4, 3, 2, 1, 0], [3, 1, 4, 0, 5, 2, 7, 6]):
        for mine, theirs in zip(reduce(ExactReducer, ranks, order), expected, strict=True):
            assert mine.tobytes() == theirs.tobytes()


@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize("kind, tolerance", [(ExactReducer, 1e-10), (Reducer, 1e-2)])
def test_sums_are_right(ranks, kind, tolerance):
    gradients, counts = reduce(kind, ranks)
    parts = contributions()
    # exact: 8 contributions rounded by at most 2**-41 each, and float64 sums up to 1e5 (1.5e-11); float32: 24 bits
    np.testing.assert_allclose(gradients, sum(g.astype(float) for g, _ in parts), rtol=0, atol=tolerance)
    np.testing.assert_allclose(counts, sum(c for _, c in parts), rtol=1e-6)


def test_values_are_rounded_to_the_nearest_multiple():
    values = np.array([0.6, -0.6, 2.4, 1e-13]) * 2.0**-40
    reducer = ExactReducer(Ranks(), 1, [4])
    reducer.add(0, values)
    assert (reducer.reduce()[0] * 2.0**40).tolist() == [1, -1, 2, 0]


def test_exact_sums_lose_nothing_from_the_largest_value_to_the_smallest():
    """From 2**22 / shards, which all shards may reach together, to 2**-40: more bits than any float64 has."""
    largest, reducer = 2.0**22 / SHARDS, ExactReducer(Ranks(), SHARDS, [1])
    for shard, value in enumerate([largest, 2.0**-40, -largest]):
        reducer.add(shard, np.array([value]))
    assert reducer.reduce()[0] == 2.0**-40
    for shard in range(SHARDS):
        reducer.add(shard, np.array([-largest]))
    assert reducer.reduce()[0] == -(2.0**22)
    reducer.add(0, np.array([np.nextafter(largest, np.inf)]))
    with pytest.raises(UserError, match="shard 0"):
        reducer.reduce()


@pytest.mark.mpi(min_size=1)
def test_a_sum_on_a_device_has_the_same_bits(ranks):
    torch = pytest.importorskip("torch")
    device, host = (kind(ranks, SHARDS, [1000, 3]) for kind in (DeviceReducer, ExactReducer))
    for seed in range(2):  # the second sum starts at zero
        for shard, (gradient, counts) in enumerate(contributions(seed)):
            if shard % ranks.size == ranks.rank:
                tensor = torch.from_numpy(gradient.copy())
                device.add(shard, tensor, counts)
                device.add(shard, None, None)
                host.add(shard, gradient, counts)
                assert tensor.numpy().tobytes() == gradient.tobytes(), "left alone"
        for mine, theirs in zip(device.reduce(), host.reduce(), strict=True):
            assert mine.tobytes() == theirs.tobytes() and mine.any()


@pytest.mark.mpi(min_size=1)
def test_any_is_true_on_all_ranks_where_it_is_on_one(ranks):
    assert not ranks.any(False)
    assert ranks.any(ranks.rank == ranks.size - 1)


@pytest.mark.mpi(min_size=1)
def test_a_reducer_starts_anew_and_none_adds_nothing(ranks):
    reducer = ExactReducer(ranks, SHARDS, [2, 1])
    for _ in range(2):
        reducer.add(ranks.rank, np.array([1.0, 2.0], np.float32), np.array([1.0]))
        reducer.add(ranks.rank, None, np.array([1.0]))
        first, second = reducer.reduce()
        assert first.tolist() == [ranks.size, 2 * ranks.size] and second[0] == 2 * ranks.size


@pytest.mark.fault
@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize("kind", [ExactReducer, Reducer, DeviceReducer])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("place, name", [(0, "weight"), (2, "weight"), (3, "bias"), (4, "bias"), (5, "scale")])
def test_every_rank_hears_of_a_bad_value_on_one(ranks, kind, bad, place, name):
    reducer = kind(ranks, SHARDS, [6, 1], names=[("weight", 3), ("bias", 2), ("scale", 1)])
    array = pytest.importorskip("torch").from_numpy if kind.on_device else np.asarray
    for step in (17, 18):  # the first bad value is named; what is good in the second sum is not
        mine = np.ones(6, np.float32)
        if ranks.rank == ranks.size - 1:
            mine[place:] = bad
        reducer.add(ranks.rank, array(mine), np.array([1.0]))
        said = rf"step {step}, shard {ranks.size - 1}: the gradient of {name} is not finite or beyond"
        with pytest.raises(UserError, match=said), np.errstate(all="ignore"):
            reducer.reduce(step)
    assert not reducer.reduce()[0].any(), "a shard without images, in the next step"
    reducer.add(ranks.rank, array(np.ones(6, np.float32)), np.array([1.0]))
    assert reducer.reduce()[0].tolist() == [ranks.size] * 6


@pytest.mark.fault
@pytest.mark.parametrize("kind", [ExactReducer, Reducer, DeviceReducer])
def test_a_bad_loss_is_named_before_the_gradients_that_came_of_it(kind):
    array = pytest.importorskip("torch").from_numpy if kind.on_device else np.asarray
    reducer = kind(Ranks(), SHARDS, [2, 1], names=[("weight", 2)])
    for loss, said, backward in ((1.0, "the gradient of weight", True), (np.nan, "the loss, a metric or", False)):
        reducer.add(0, array(np.array([np.nan, 1], np.float32)), np.array([loss]))
        with pytest.raises(NotFiniteError, match=said) as caught, np.errstate(all="ignore"):
            reducer.reduce()
        assert caught.value.backward == backward


@pytest.mark.mpi(min_size=1)
def test_broadcast_gather_and_rank0(ranks):
    array = np.arange(5) + ranks.rank
    ranks.broadcast(array)
    assert array.tolist() == [0, 1, 2, 3, 4]
    assert ranks.gather(ranks.rank) == list(range(ranks.size))
    assert ranks.on_rank0(lambda: ranks.rank) == 0

    def fail():
        raise UserError("no such file")

    with pytest.raises(UserError if ranks.rank == 0 else RemoteError):
        ranks.on_rank0(fail)


@pytest.mark.fault
@pytest.mark.mpi(min_size=1)
def test_agree_names_the_ranks_that_differ(ranks):
    ranks.agree("the seed", 5)
    if ranks.size > 1:
        with pytest.raises(UserError, match=rf"differ in the seed: rank {ranks.size - 1} "):
            ranks.agree("the seed", ranks.rank == ranks.size - 1)


@pytest.mark.mpi(min_size=1)
def test_shared_array_is_one_for_all_ranks_of_a_host(ranks):
    array = ranks.shared_array((ranks.local_size, 3), np.int64)
    assert array.shape == (ranks.local_size, 3) and not array[ranks.local_rank].any()
    array[ranks.local_rank] = ranks.local_rank + 1
    ranks.node_barrier()
    assert array[:, 0].tolist() == list(range(1, ranks.local_size + 1))
    ranks.node_barrier()


def shared_maps() -> int:
    """How many shared arrays this process has mapped."""
    return sum("/cnnmpi-" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
@pytest.mark.mpi(min_size=2)
def test_shared_memory_is_free_when_a_run_is_no_longer_used(ranks, shared_tmp):
    gc.collect()  # what other tests have left in cycles
    before = shared_maps()
    if ranks.rank == 0:
        write_hdf5(shared_tmp / "data.h5", synthetic(train=40, test=20))
    for number in range(3):
        out, settings = shared_tmp / str(number), {"batch_size": 20, "max_steps": 1, "threads": 1}
        trainer = set_up(Config(data=str(shared_tmp / "data.h5"), out=out, **settings), ranks)
        assert shared_maps() == before + 4, "images and labels, of two parts"
        trainer.run()
        del trainer
        assert shared_maps() == before
    with pytest.raises(UserError, match="cutout"):
        set_up(
            Config(data=str(shared_tmp / "data.h5"), out=shared_tmp / "bad", batch_size=20, augment="cutout=99"), ranks
        )
    gc.collect()
    assert shared_maps() == before


@pytest.mark.mpi(min_size=2)
def test_every_rank_hears_that_there_is_no_room_to_share(ranks, monkeypatch):
    def full(nbytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("cnnmpi.distributed.ranks.create_shared", full)
    with pytest.raises(UserError, match=r"no room for 2 MiB .*No space left.* MiB free.*docker run --shm-size"):
        ranks.shared_array((2 << 20,), np.uint8)


@pytest.mark.mpi(min_size=2)
def test_every_rank_hears_that_one_does_not_see_the_memory(ranks, monkeypatch):
    if ranks.rank == ranks.size - 1:
        monkeypatch.setattr("cnnmpi.distributed.ranks.open_shared", lambda path, nbytes: Path("/nowhere").stat())
    with pytest.raises(UserError, match=r"cannot be opened \(No such file"):
        ranks.shared_array((5,), np.uint8)
    monkeypatch.undo()
    assert ranks.shared_array((5,), np.uint8).tolist() == [0] * 5


IN_SMALL = """
mount -t tmpfs -o size={size} tmpfs /dev/shm || exit 99
exec "$@"
"""


def run_in_small_shared_memory(size, *args, **environment):
    """Run a command with a /dev/shm of its own, of ``size``."""
    command = ["unshare", "--mount", "sh", "-c", IN_SMALL.format(size=size), "sh", *map(str, args)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if result.returncode == 99 or "unshare" in result.stderr:
        pytest.skip("only root may mount here")
    return result


SHARE = """
import numpy as np
from cnnmpi.distributed import failing_together, start
ranks = start()
with failing_together(ranks):
    array = ranks.shared_array((100 << 20,), np.uint8)
    array[ranks.rank :: ranks.size] = 1
    ranks.node_barrier()
    assert array.sum(dtype=np.int64) == 100 << 20
"""


@pytest.mark.fault
@needs_mpirun
@pytest.mark.mpi_skip
def test_shared_memory_as_small_as_dockers(tmp_path):
    job = [MPIRUN, "-n", "2", sys.executable, "-c", SHARE]
    elsewhere = run_in_small_shared_memory("64m", *job, TMPDIR=str(tmp_path))
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert not list(tmp_path.iterdir()), "nothing stays"
    nowhere = run_in_small_shared_memory("64m", *job, TMPDIR="/dev/shm")
    assert nowhere.returncode == 2, nowhere.stderr
    assert nowhere.stderr.count("no room for 100 MiB") == 1 and "--shm-size" in nowhere.stderr
    warn = "from cnnmpi.distributed.job import _warn_of_little_shared_memory as warn; warn()"  # before MPI may crash
    launched = {"MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "0"}
    tiny = run_in_small_shared_memory("1m", sys.executable, "-c", warn, **launched)
    assert tiny.stderr.count("warning: /dev/shm has 1 MiB free, but MPI may need 28 for 2 ranks") == 1


LAST_WORDS = """
import sys
from cnnmpi.distributed import failing_together, start
ranks = start()
{streams}
def body():
    if ranks.rank == 1:
        raise RuntimeError("oops")
    ranks.comm.Barrier()
if {hook}:
    body()
with failing_together(ranks):
    body()
"""


@pytest.mark.fault
@needs_mpirun
@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    "streams, hook",
    [
        ("pass", True),
        ("sys.stdout = sys.stderr = None", True),
        ("sys.stdout = sys.stderr = object()", True),
        ("sys.stdout = sys.stderr = None", False),
        ("sys.stderr.close()", False),
    ],
)
def test_a_job_ends_whatever_becomes_of_its_output(streams, hook):
    job = [sys.executable, "-c", LAST_WORDS.format(streams=streams, hook=hook)]
    full = ["sh", "-c", 'exec "$@" >/dev/full 2>&1', "sh"]
    result = subprocess.run([*full, MPIRUN, "-n", "2", *full, *job], timeout=60, check=False)  # a hang is the fault
    assert result.returncode != 0


@pytest.mark.fault
@pytest.mark.mpi_skip  # slow, and the same on each rank
@pytest.mark.parametrize("unbuffered", ["", "1"])  # as usual, and as in many containers
@pytest.mark.parametrize("error, code", [("RuntimeError", 1), ("UserError('x')", 2)])
def test_last_words_into_a_pipe_that_nobody_reads_do_not_hold_up_the_end(error, code, unbuffered):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    program = "from cnnmpi.distributed import Ranks, UserError, failing_together, last_words\n"
    program += "last_words.SPEAK_S = 1.0\n"
    program += f"with failing_together(Ranks()): raise {error}"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=writer, timeout=60, check=False, env=environment
    )
    os.close(reader), os.close(writer)
    assert result.returncode == code


@pytest.mark.mpi(min_size=2)
def test_start_may_be_called_again(ranks):
    hooks = sys.excepthook, threading.excepthook
    try:
        assert start() is ranks and start() is ranks
    finally:
        sys.excepthook, threading.excepthook = hooks


def test_exit_codes_of_one_process(capsys):
    for error, code, text in (
        (UserError("bad flag"), 2, "cnnmpi: error: bad flag\n"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt"),
        (RuntimeError("oops"), 1, "RuntimeError: oops"),
    ):
        with pytest.raises(SystemExit) as end, failing_together(Ranks()):
            raise error
        assert end.value.code == code
        assert text in capsys.readouterr().err


def run_start(**environment):
    code = "from cnnmpi.distributed import start; print('size', start().size)"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI", "SLURM", "HYDI", "HYDRA", "PRTE"))}
    return subprocess.run(
        [sys.executable, "-c", code], env=env | environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.fault
@pytest.mark.mpi_skip
def test_processes_that_do_not_find_each_other_are_refused():
    assert run_start().stdout == "size 1\n"
    alone = run_start(SLURM_STEP_NUM_TASKS="4")
    assert alone.returncode != 0 and "the launcher started 4 processes" in alone.stderr


@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_JOB_ID": "1"},  # in the shell of salloc, or of a batch job
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},  # that shell is a step of its own
        {"SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_SIZE": "1"},  # mpirun -n 1, whose helpers run on two hosts
        {"PMI_SIZE": "", "SLURM_STEP_NUM_TASKS": "many"},
    ],
)
def test_a_single_process_under_slurm_is_not_refused(environment):
    result = run_start(**environment)
    assert result.stdout == "size 1\n", result.stderr


@pytest.mark.mpi_skip
def test_without_mpi4py_one_process_works_and_several_are_refused(tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('no mpi4py here')")
    assert run_start(PYTHONPATH=str(tmp_path)).stdout == "size 1\n"
    several = run_start(PYTHONPATH=str(tmp_path), PMI_SIZE="2")
    assert several.returncode != 0 and "pip install" in several.stderr


@pytest.mark.mpi_skip
def test_a_launcher_is_found_in_path_and_beside_the_interpreter(tmp_path, monkeypatch):
    for name in ("bin", "venv", "my folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mpirun").touch(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_launcher("mpirun") == [str(tmp_path / "bin" / "mpirun")]
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert find_launcher("mpirun -x 'A B'") == [str(tmp_path / "venv" / "mpirun"), "-x", "A B"]
    spaced = str(tmp_path / "my folder" / "mpirun")
    assert find_launcher(spaced) == find_launcher(f"'{spaced}'") == [spaced]
    for text in ("gone -n", str(tmp_path / "mpirun"), ""):
        with pytest.raises(UserError, match=rf"^--mpirun {text}: no such command; pip install 'cnnmpi"):
            find_launcher(text)
    with pytest.raises(UserError, match=r"^--probe a 'b: no closing quotation$"):
        split_words("--probe", "a 'b")

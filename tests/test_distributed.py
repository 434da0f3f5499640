"""Ranks and the reduction, on as many ranks as this test runs on; each expectation is computed without them."""

import os
import subprocess
import sys

import numpy as np
import pytest

from cnnmpi.distributed import ExactReducer, Ranks, Reducer, RemoteError, UserError, failing_together

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
@pytest.mark.parametrize("kind", [ExactReducer, Reducer])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_every_rank_hears_of_a_bad_value_on_one(ranks, kind, bad):
    reducer = kind(ranks, SHARDS, [4, 1], names=[("conv.weight", 3), ("conv.bias", 1)])
    mine = np.array([1, 2, 3, bad if ranks.rank == ranks.size - 1 else 4], np.float32)
    reducer.add(ranks.rank, mine, np.array([1.0]))
    with pytest.raises(UserError, match=rf"step 17, shard {ranks.size - 1}: the gradient of conv.bias"):
        reducer.reduce(step=17)


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
def test_without_mpi4py_one_process_works_and_several_are_refused(tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('no mpi4py here')")
    assert run_start(PYTHONPATH=str(tmp_path)).stdout == "size 1\n"
    several = run_start(PYTHONPATH=str(tmp_path), PMI_SIZE="2")
    assert several.returncode != 0 and "pip install" in several.stderr

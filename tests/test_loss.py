"""Losses and metrics: against torch's, on both engines, and what they refuse."""

import functools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnmpi import functional
from tests.test_functional import TOLERANCE, assert_close, convert, engines, in_memory, needs_torch, random, sweep

pytestmark = pytest.mark.mpi_skip  # the same on each rank

INF, NAN = math.inf, math.nan


@needs_torch
@sweep
@given(
    st.integers(1, 6),
    st.integers(1, 7),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from(["mean", "sum"]),
    st.sampled_from([1.0, 30.0, 1e4]),
    st.sampled_from(sorted(TOLERANCE)),
)
def test_cross_entropy_matches_autograd(
    N: int, K: int, smoothing: float, reduction: str, scale: float, dtype: str
) -> None:
    import torch

    z = scale * random(N, K, seed=5)
    z[0] -= 100 * scale  # a row far below all others
    z = z.astype(dtype)
    targets = np.random.default_rng(N).integers(0, K, N)
    logits = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    how = {"label_smoothing": smoothing, "reduction": reduction}
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets), **how)
    expected.backward()
    for F in engines():
        given_ = in_memory(z, False)
        loss, dlogits = F.cross_entropy_loss(convert(F, given_), convert(F, targets), **how)
        # rounding grows with the differences within a row, which are of the size of ``scale``
        assert loss == pytest.approx(expected.item(), rel=TOLERANCE[dtype], abs=TOLERANCE[dtype] * scale)
        assert isinstance(loss, float)
        assert_close([F.to_numpy(dlogits)], [logits.grad.numpy()], dtype)
        assert np.array_equal(given_, z)


MASKED = [  # logits, targets: -inf rules classes out
    ([[0, 1, -INF]], [1]),
    ([[0, 1, -INF]], [2]),
    ([[-INF, 3, -INF], [0.5, -INF, -2]], [1, 0]),
    ([[-INF, -INF]], [0]),
    ([[INF, 0]], [0]),
    ([[INF, 0]], [1]),
    ([[NAN, 0], [1, 2]], [1, 1]),
]


@needs_torch
@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("z", "targets"), MASKED)
def test_cross_entropy_of_masked_classes_is_torchs(z, targets, smoothing: float, reduction: str, dtype: str) -> None:
    import torch

    logits = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    how = {"label_smoothing": smoothing, "reduction": reduction}
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(targets), **how)
    expected.backward()
    for F in engines():
        loss, dlogits = F.cross_entropy_loss(convert(F, np.array(z, dtype)), convert(F, np.array(targets)), **how)
        assert loss == pytest.approx(expected.item(), rel=TOLERANCE[dtype], nan_ok=True)
        np.testing.assert_allclose(F.to_numpy(dlogits), logits.grad.numpy(), atol=TOLERANCE[dtype])


def test_a_class_that_is_ruled_out_costs_nothing() -> None:
    for F in engines():
        loss, dlogits = F.cross_entropy_loss(convert(F, np.array([[0, 1, -np.inf]])), convert(F, np.array([1])))
        p = 1 / (1 + math.e)  # of class 0
        assert loss == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-15)  # 0.3133
        np.testing.assert_allclose(F.to_numpy(dlogits), [[p, -p, 0]], rtol=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
def test_finite_logits_give_the_bits_of_the_plain_formula(dtype: str, smoothing: float) -> None:
    """Runs end in the same digest only if not one bit of the loss or its gradient changes."""
    for seed, (N, K, scale) in enumerate([(1, 1, 1), (16, 10, 1), (125, 10, 50), (7, 1000, 5), (64, 3, 1e4)]):
        z = (scale * np.random.default_rng(seed).standard_normal((N, K))).astype(dtype)
        targets = np.random.default_rng(seed).integers(0, K, N)
        q = np.full((N, K), smoothing / K, z.dtype)
        q[np.arange(N), targets] += 1 - smoothing
        shifted = z - z.max(axis=1, keepdims=True)
        total = np.exp(shifted).sum(axis=1, keepdims=True)
        expected = math.fsum((np.log(total[:, 0]) - (q * shifted).sum(axis=1)).tolist())
        loss, dlogits = functional.cross_entropy_loss(z, targets, label_smoothing=smoothing, reduction="sum")
        assert loss == expected and dlogits.tobytes() == (np.exp(shifted) / total - q).tobytes()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_targets_may_be_of_any_integer_dtype(dtype: str) -> None:
    z, targets = 3 * random(5, 100), [99, 0, 3, 98, 60]
    for F in engines():
        loss, dlogits = F.cross_entropy_loss(convert(F, z), convert(F, np.array(targets, "int64")))
        for given_ in (convert(F, np.array(targets, dtype)), targets):
            got, dgot = F.cross_entropy_loss(convert(F, z), given_)
            assert got == loss and np.array_equal(F.to_numpy(dgot), F.to_numpy(dlogits))


@pytest.mark.parametrize("dtype", ["float16", "int64", "uint8"])
def test_logits_of_other_dtypes_are_refused(dtype: str) -> None:
    for F in engines():
        with pytest.raises(ValueError, match=f"logits of float32 or float64, got {dtype}"):
            F.cross_entropy_loss(convert(F, np.ones((2, 3), dtype)), convert(F, np.array([0, 1])))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_gradient_matches_finite_differences(reduction: str) -> None:
    z, direction, targets = random(5, 4), random(5, 4, seed=1), np.array([0, 3, 1, 1, 2])

    def loss(t: float) -> float:
        how = {"label_smoothing": 0.2, "reduction": reduction}
        return float(functional.cross_entropy_loss(z + t * direction, targets, **how)[0])

    dlogits = functional.cross_entropy_loss(z, targets, label_smoothing=0.2, reduction=reduction)[1]
    difference = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert difference == pytest.approx(float((dlogits * direction).sum()), rel=1e-6)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (np.array([0, 1, 3]), r"targets must lie in 0\.\.2, got 0\.\.3"),
        (np.array([0, -1, 2]), r"targets must lie in 0\.\.2, got -1\.\.2"),
        (np.array([0, 1]), r"expected logits \(N, K\) and integer targets \(N,\), got \(3, 3\) and int64 \(2,\)"),
        (np.array([[0, 1, 2]]), r"int64 \(1, 3\)"),
        (np.array([0.0, 1.0, 2.0]), r"float64 \(3,\)"),
        (np.array([True, False, True]), r"bool \(3,\)"),
    ],
)
def test_targets_that_do_not_fit_are_refused(targets: np.ndarray, message: str) -> None:
    for F in engines():
        with pytest.raises(ValueError, match=message):
            F.cross_entropy_loss(convert(F, random(3, 3)), convert(F, targets))


def test_losses_that_mean_nothing_are_refused() -> None:
    for F in engines():
        with pytest.raises(ValueError, match="an empty batch"):
            F.cross_entropy_loss(convert(F, np.zeros((0, 3))), convert(F, np.zeros(0, np.int64)))
        with pytest.raises(ValueError, match="'mean' or 'sum', got 'none'"):
            F.cross_entropy_loss(convert(F, random(1, 3)), convert(F, np.array([0])), reduction="none")
        for smoothing in (-0.1, 1.5, NAN):
            with pytest.raises(ValueError, match=r"label_smoothing must lie in 0\.\.1"):
                F.cross_entropy_loss(convert(F, random(1, 3)), convert(F, np.array([0])), label_smoothing=smoothing)


# -- with weights, probabilities, several labels, values -------------------------------------------------------------


def check(name: str, twin: Any, z: np.ndarray, targets: np.ndarray, scale: float = 1, **how: Any) -> None:
    """Both engines must give what autograd gives in float64."""
    import torch

    dtype = z.dtype.name
    logits = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    expected = twin(logits)
    expected.backward()
    for F in engines():
        given_, given_targets = in_memory(z, False), in_memory(targets, False)
        own = {key: convert(F, value) for key, value in how.items()}
        loss, dlogits = getattr(F, name)(convert(F, given_), convert(F, given_targets), **own)
        assert isinstance(loss, float)
        assert loss == pytest.approx(expected.item(), rel=TOLERANCE[dtype], abs=TOLERANCE[dtype] * scale)
        assert_close([F.to_numpy(dlogits)], [logits.grad.numpy()], dtype)
        assert np.array_equal(given_, z) and np.array_equal(given_targets, targets)


SIZES = {"N": st.integers(1, 6), "K": st.integers(1, 7), "seed": st.integers(0, 1000)}
REDUCTIONS, DTYPES = st.sampled_from(["mean", "sum"]), st.sampled_from(sorted(TOLERANCE))


@needs_torch
@sweep
@given(**SIZES, smoothing=st.sampled_from([0.0, 0.1, 1.0]), scale=st.sampled_from([1.0, 30.0]), weighted=st.booleans(),
       soft=st.booleans(), reduction=REDUCTIONS, dtype=DTYPES)  # fmt: skip
def test_cross_entropy_with_weights_and_probabilities_is_torchs(
    N: int, K: int, seed: int, smoothing: float, scale: float, weighted: bool, soft: bool, reduction: str, dtype: str
) -> None:
    import torch

    z = (scale * random(N, K, seed=seed)).astype(dtype)
    draw = np.random.default_rng(seed)
    # probabilities need not add up to 1; some are 0
    targets = np.maximum(draw.uniform(-0.5, 1, (N, K)), 0).astype(dtype) if soft else draw.integers(0, K, N)
    weight = draw.uniform(0.1, 3, K).astype(dtype) if weighted else None
    how = {"label_smoothing": smoothing, "reduction": reduction}

    def twin(logits: Any) -> Any:
        theirs = torch.from_numpy(targets.astype("float64") if soft else targets)
        w = None if weight is None else torch.from_numpy(weight.astype("float64"))
        return torch.nn.functional.cross_entropy(logits, theirs, weight=w, **how)

    check("cross_entropy_loss", twin, z, targets, scale * K, weight=weight, **how)


@needs_torch
@sweep
@given(**SIZES, scale=st.sampled_from([1.0, 30.0, 1000.0]), weighted=st.booleans(), hard=st.booleans(),
       reduction=REDUCTIONS, dtype=DTYPES)  # fmt: skip
def test_binary_cross_entropy_is_torchs(
    N: int, K: int, seed: int, scale: float, weighted: bool, hard: bool, reduction: str, dtype: str
) -> None:
    import torch

    z, draw = (scale * random(N, K, seed=seed)).astype(dtype), np.random.default_rng(seed)
    targets = draw.uniform(0, 1, (N, K))
    targets = (targets.round() if hard else targets).astype(dtype)
    weight = draw.uniform(0, 3, K).astype(dtype) if weighted else None

    def twin(logits: Any) -> Any:
        w = None if weight is None else torch.from_numpy(weight.astype("float64"))
        mean = torch.nn.BCEWithLogitsLoss(pos_weight=w)(logits, torch.from_numpy(targets.astype("float64")))
        return mean if reduction == "mean" else N * mean  # the sum of the samples' means

    check("binary_cross_entropy_loss", twin, z, targets, scale * N, pos_weight=weight, reduction=reduction)


@needs_torch
@sweep
@given(**SIZES, reduction=REDUCTIONS, dtype=DTYPES)
def test_mse_is_torchs(N: int, K: int, seed: int, reduction: str, dtype: str) -> None:
    import torch

    z, targets = random(N, K, seed=seed, dtype=dtype), random(N, K, seed=seed + 1, dtype=dtype)

    def twin(outputs: Any) -> Any:
        mean = torch.nn.MSELoss()(outputs, torch.from_numpy(targets.astype("float64")))
        return mean if reduction == "mean" else N * mean

    check("mse_loss", twin, z, targets, N, reduction=reduction)


LOSSES = {  # name: targets (6, 4), options
    "cross_entropy_loss": (abs(random(6, 4, seed=1)), {"label_smoothing": 0.1, "weight": np.array([1.0, 2, 0, 3])}),
    "binary_cross_entropy_loss": (abs(random(6, 4, seed=1)), {"pos_weight": np.array([1.0, 2, 0, 3])}),
    "mse_loss": (random(6, 4, seed=1), {}),
}


@pytest.mark.parametrize("name", LOSSES)
def test_sums_of_shards_are_the_sum_of_the_batch_and_n_times_the_mean(name: str) -> None:
    z, (targets, how) = 3 * random(6, 4), LOSSES[name]
    for F in engines():
        loss = functools.partial(getattr(F, name), **{key: convert(F, value) for key, value in how.items()})
        whole, dwhole = loss(convert(F, z), convert(F, targets), reduction="sum")
        parts = [loss(convert(F, z[s]), convert(F, targets[s]), reduction="sum") for s in (slice(0, 2), slice(2, 6))]
        mean, dmean = loss(convert(F, z), convert(F, targets))
        assert sum(part for part, _ in parts) == pytest.approx(whole, rel=1e-14)
        assert 6 * mean == pytest.approx(whole, rel=1e-14)
        expected = np.concatenate([F.to_numpy(dpart) for _, dpart in parts])
        np.testing.assert_allclose(F.to_numpy(dwhole), expected, rtol=1e-14, atol=1e-16)
        np.testing.assert_allclose(6 * F.to_numpy(dmean), expected, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("name", LOSSES)
def test_the_samples_order_does_not_change_the_loss(name: str) -> None:
    targets, how = LOSSES[name]
    z, targets = (1e3 * random(6, 4)).astype("float32"), targets.astype("float32")
    loss = functools.partial(getattr(functional, name), reduction="sum", **how)
    assert loss(z, targets)[0] == loss(z[::-1], targets[::-1])[0] == loss(np.roll(z, 2, 0), np.roll(targets, 2, 0))[0]


@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
def test_extreme_logits_of_labels_cost_what_they_should(dtype: str) -> None:
    z = np.array([[1e4, 1e4], [-1e4, -1e4], [INF, -INF], [-100, 100]], dtype)
    y = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], dtype)
    for F in engines():
        each = [F.binary_cross_entropy_loss(convert(F, z[i : i + 1]), convert(F, y[i : i + 1])) for i in range(4)]
        assert [loss for loss, _ in each[:3]] == [5000, 5000, 0]
        assert each[3][0] == pytest.approx(math.exp(-100), rel=1e-5)  # not 0: exp(-100) does not cancel with 1
        np.testing.assert_array_equal(F.to_numpy(each[0][1]), [[0, 0.5]])
        np.testing.assert_array_equal(F.to_numpy(each[1][1]), [[-0.5, 0]])
        np.testing.assert_array_equal(F.to_numpy(each[2][1]), [[0, 0]])


def test_classes_ruled_out_cost_nothing_where_they_have_no_probability_or_no_weight() -> None:
    z = np.array([[0, 1, -INF]])
    for F in engines():
        known, _ = F.cross_entropy_loss(convert(F, z[:, :2]), convert(F, np.array([1])))
        soft, dsoft = F.cross_entropy_loss(convert(F, z), convert(F, np.array([[0, 1.0, 0]])))
        assert soft == pytest.approx(known, rel=1e-15)
        assert np.isfinite(F.to_numpy(dsoft)).all()
        weight = convert(F, np.array([1.0, 1, 0]))
        assert F.cross_entropy_loss(convert(F, z), convert(F, np.array([2])), weight=weight, reduction="sum")[0] == 0


def test_a_network_that_diverged_has_an_infinite_loss_without_a_warning() -> None:
    for F in engines():
        for z, y in [([[1e30]], np.float32), ([[1e200]], np.float64), ([[1e154], [1e154]], np.float64)]:
            outputs = convert(F, np.array(z, y))
            loss, dlogits = F.mse_loss(outputs, convert(F, np.zeros_like(z, y)), reduction="sum")
            assert loss == INF and not np.isnan(F.to_numpy(dlogits)).any()


CROSS, LABELS, MSE = LOSSES


@pytest.mark.parametrize(
    ("name", "targets", "how", "message"),
    [
        (CROSS, np.full((3, 4), -0.1), {}, r"probabilities must be finite and at least 0, got -0\.1\.\."),
        (CROSS, np.full((3, 4), NAN), {}, "probabilities must be finite and at least 0, got nan"),
        (CROSS, np.full((3, 4), INF), {}, "probabilities must be finite and at least 0, got inf"),
        (CROSS, np.ones((3, 5)), {}, r"\(3, 4\) and float64 \(3, 5\); probabilities are floats \(N, K\)"),
        (CROSS, np.ones((3, 4), int), {}, r"and int64 \(3, 4\); probabilities are floats \(N, K\)"),
        (CROSS, np.arange(3), {"weight": np.ones(3)}, r"weight must have the shape \(4,\), .* got \(3,\)"),
        (CROSS, np.arange(3), {"weight": 2.0}, r"weight must have the shape \(4,\), .* got \(\)"),
        (CROSS, np.arange(3), {"weight": [1, 1, -1, 1]}, "weight must be finite and at least 0, got -1"),
        (CROSS, np.arange(3), {"weight": [1, NAN, 1, 1]}, "weight must be finite and at least 0, got nan"),
        (CROSS, np.arange(3), {"weight": [0, 0, 0, 1]}, "have the weight 0: there is no mean"),
        (LABELS, np.full((3, 4), 1.5), {}, r"targets must lie in 0\.\.1, got 1\.5\.\.1\.5"),
        (LABELS, np.full((3, 4), NAN), {}, r"targets must lie in 0\.\.1, got nan"),
        (LABELS, np.arange(3), {}, r"logits \(N, K\) and float targets \(N, K\), got \(3, 4\) and int64 \(3,\)"),
        (LABELS, np.ones((3, 4)), {"pos_weight": np.ones(3)}, r"pos_weight must have the shape \(4,\)"),
        (LABELS, np.ones((3, 4)), {"pos_weight": -np.ones(4)}, "pos_weight must be finite and at least 0"),
        (LABELS, np.ones((3, 4)), {"reduction": "none"}, "'mean' or 'sum', got 'none'"),
        (MSE, np.full((3, 4), NAN), {}, "targets must be finite, got nan"),
        (MSE, np.full((3, 4), -INF), {}, "targets must be finite, got -inf"),
        (MSE, np.ones((3, 1)), {}, r"float targets \(N, K\), got \(3, 4\) and float64 \(3, 1\)"),  # no broadcasting
        (MSE, np.ones((3, 4)), {"reduction": None}, "'mean' or 'sum', got None"),
    ],
)  # fmt: skip
def test_what_a_loss_refuses(name: str, targets: np.ndarray, how: dict[str, Any], message: str) -> None:
    for F in engines():
        with pytest.raises(ValueError, match=message) as caught:
            own = {key: convert(F, value) for key, value in how.items()}
            getattr(F, name)(convert(F, random(3, 4)), convert(F, targets), **own)
        assert str(caught.value).startswith(f"{name}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_samples_or_outputs_has_no_loss(name: str) -> None:
    for F in engines():
        for shape in ((0, 3), (3, 0)):
            with pytest.raises(ValueError, match="an empty batch has no loss"):
                getattr(F, name)(convert(F, np.zeros(shape)), convert(F, np.zeros(shape)))


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_accuracy_counts_the_largest_logit() -> None:
    z = np.array([[1, 3, 2], [5, 5, 0], [0, 0, 1], [NAN, 0, 0], [-INF, -INF, 0]], "float32")
    targets = np.array([1, 0, 0, 0, 2], "uint8")
    assert functional.accuracy(z, targets) == (3, 5)
    assert functional.accuracy(z, np.eye(3, dtype="float32")[targets]) == (3, 5)
    assert functional.accuracy(z[:0], targets[:0]) == (0, 0)


def test_top5_counts_targets_that_fewer_than_5_logits_exceed() -> None:
    z = np.tile(np.arange(20.0), (4, 1))
    assert functional.top5_accuracy(z, np.array([19, 15, 14, 0])) == (2, 4)
    tied = np.zeros((1, 20))
    assert functional.top5_accuracy(tied, np.array([19])) == (1, 1)  # none is greater
    tied[0, :5] = 1
    assert functional.top5_accuracy(tied, np.array([4])) == (1, 1)
    assert functional.top5_accuracy(tied, np.array([5])) == (0, 1)
    tied[0, 9] = NAN
    assert functional.top5_accuracy(tied, np.array([4])) == (0, 1)
    assert functional.top5_accuracy(random(3, 4), np.array([0, 1, 3])) == (3, 3)
    assert functional.top5_accuracy(z, np.eye(20)[[19, 15, 14, 0]]) == (2, 4)


@needs_torch
@sweep
@given(st.integers(1, 9), st.integers(5, 30), st.integers(0, 1000))
def test_top5_is_torchs_where_no_logits_are_equal(N: int, K: int, seed: int) -> None:
    import torch

    z, targets = random(N, K, seed=seed), np.random.default_rng(seed).integers(0, K, N)
    top = torch.from_numpy(z).topk(5, dim=1).indices.numpy()
    assert functional.top5_accuracy(z, targets) == ((top == targets[:, None]).any(1).sum(), N)


def test_label_accuracy_counts_each_label() -> None:
    z = np.array([[2, -1, 0.5], [0, -3, NAN]])
    y = np.array([[1, 0, 0], [1, 0.7, 0]])
    assert functional.label_accuracy(z, y) == (3, 6)


@pytest.mark.parametrize("metric", [functional.accuracy, functional.top5_accuracy])
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (np.array([0, 1, 4]), r"targets must lie in 0\.\.3, got 0\.\.4"),
        (np.array([0, -1, 2]), r"targets must lie in 0\.\.3, got -1\.\.2"),
        (np.array([0, 1]), r"got \(3, 4\) and int64 \(2,\)"),
        (np.array([0.0, 1, 2]), r"got \(3, 4\) and float64 \(3,\)"),
        (np.ones((3, 5)), r"got \(3, 4\) and float64 \(3, 5\)"),
        (np.ones((3, 4), bool), r"got \(3, 4\) and bool \(3, 4\)"),
    ],
)
def test_targets_that_a_metric_refuses(metric: Any, targets: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{metric.__name__}: .*{message}$"):
        metric(random(3, 4), targets)


def test_label_accuracy_refuses_classes() -> None:
    with pytest.raises(ValueError, match=r"expected logits and targets \(N, K\), got \(3, 4\) and \(3,\)"):
        functional.label_accuracy(random(3, 4), np.arange(3))

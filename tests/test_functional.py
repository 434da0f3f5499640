"""The operations: against torch's autograd, against finite differences, and against each other.

Torch computes the expected values in float64, so that a difference is our own rounding and not torch's.
"""

import functools
import importlib.util
import inspect
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnmpi import functional, layers
from cnnmpi.functional import blocks, conv, init, winograd

pytestmark = pytest.mark.mpi_skip  # the same on each rank

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="compares with PyTorch")
sweep = settings(max_examples=40, deadline=None, derandomize=True)  # derandomized: all MPI ranks draw the same examples

# Errors are measured relative to the largest expected value where that exceeds 1, since rounding grows with the size
# of a sum. A sum of the few hundred terms that occur here is off by some 10 units in the last place: 1e-6 in float32.
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    functional.set_threads(1)
    yield
    functional.set_threads(1)


def engines() -> list[ModuleType]:
    if importlib.util.find_spec("torch") is None:
        return [functional]
    from cnnmpi import functional_torch

    return [functional, functional_torch]


def random(*shape: int, seed: int = 0, dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng([seed, *shape]).uniform(-1, 1, shape).astype(dtype)


def in_memory(a: np.ndarray, channels_last: bool) -> np.ndarray:
    """A read-only copy of ``a``, channels-last in memory or C-contiguous."""
    if channels_last and a.ndim == 4:
        copy = a.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)
    else:
        copy = a.copy(order="C")
    copy.flags.writeable = False
    return copy


def convert(F: ModuleType, a: Any) -> Any:
    """An array for the engine ``F`` with memory of its own; None and numbers as they are."""
    if not isinstance(a, np.ndarray):
        return a
    return a if F is functional else F.tensor(a.copy(order="K"), "cpu")


def run(
    F: ModuleType,
    name: str,
    arrays: list[np.ndarray | None],
    *args: Any,
    channels_last: bool = True,
    dout_channels_last: bool = True,
    **options: Any,
) -> list[np.ndarray]:
    """Return y, the gradients of ``arrays`` for a random dy, and the options that are arrays, after they changed.

    Asserts that neither the inputs nor dy were written to.
    """
    originals = [None if a is None else in_memory(a, channels_last) for a in arrays]
    inputs = [convert(F, a) for a in originals]
    options = {key: convert(F, v.copy() if isinstance(v, np.ndarray) else v) for key, v in options.items()}
    result = getattr(F, name)(*inputs, *(convert(F, a) for a in args), **options)
    y, cache = result if isinstance(result, tuple) else (result, result)  # softmax keeps its output only
    original_dy = in_memory(random(*y.shape, seed=99, dtype=F.to_numpy(y).dtype.name), dout_channels_last)
    dy = convert(F, original_dy)
    y_before = F.to_numpy(y).copy()
    grads = getattr(F, f"{name}_backward")(dy, cache)
    grads = grads if isinstance(grads, tuple) else (grads,)

    assert np.array_equal(F.to_numpy(y), y_before), f"{name}_backward wrote into the output"
    for given_, original in zip([*inputs, dy], [*originals, original_dy], strict=True):
        assert original is None or np.array_equal(F.to_numpy(given_), original), f"{name} wrote into its input"
    changed = [F.to_numpy(v) for v in options.values() if not isinstance(v, int | float | str | tuple | None)]
    return [F.to_numpy(a) for a in (y, *grads) if a is not None] + changed


def autograd(twin: Callable[..., Any], arrays: list[np.ndarray | None]) -> list[np.ndarray]:
    """Return y and the gradients of ``arrays`` for the dy of ``run``, by torch's autograd in float64."""
    import torch

    tensors = [None if a is None else torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arrays]
    y = twin(*tensors)
    dtype = next(a.dtype.name for a in arrays if a is not None)
    y.backward(torch.from_numpy(random(*y.shape, seed=99, dtype=dtype)).double())
    return [y.detach().numpy(), *(t.grad.numpy() for t in tensors if t is not None)]


def assert_close(got: list[np.ndarray], expected: list[np.ndarray], dtype: str) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == theirs.shape
        atol = TOLERANCE[dtype] * max(1, abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def check(
    draw: st.DrawFn, name: str, twin: Callable[..., Any], arrays: list[np.ndarray | None], *args: Any, **options: Any
) -> None:
    """Compare both engines with ``twin``, in a drawn memory layout and with blocks of a drawn size."""
    dtype = next(a.dtype.name for a in arrays if a is not None)
    layouts = {"channels_last": draw(st.booleans()), "dout_channels_last": draw(st.booleans())}
    expected = autograd(twin, arrays)
    with (
        mock.patch.object(blocks, "BLOCK_BYTES", draw(st.sampled_from([1, 3000, blocks.BLOCK_BYTES]))),
        mock.patch.object(conv, "FEW_CHANNELS", draw(st.sampled_from([1, conv.FEW_CHANNELS]))),
    ):
        for F in engines():
            got = run(F, name, arrays, *args, **layouts, **options)
            assert_close(got[: len(expected)], expected, dtype)


@st.composite
def windows(draw: st.DrawFn, *, pool: bool) -> dict[str, Any]:
    """Draw a batch x (N, C, H, W) and a window that fits: kernel k, stride and padding, equal or not along H and W."""
    k, stride, padding, size = [], [], [], []
    for _ in "HW":
        k.append(draw(st.integers(1, 5)))
        stride.append(draw(st.integers(1, 4)))
        padding.append(draw(st.integers(0, k[-1] // 2 if pool else 3)))
        size.append(draw(st.integers(max(1, k[-1] - 2 * padding[-1]), 9)))
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 5)), *size
    x = random(*shape, seed=draw(st.integers(0, 1000)), dtype=draw(st.sampled_from(["float32", "float64"])))
    one_or_two = [a[0] if a[0] == a[1] else tuple(a) for a in (k, stride, padding)]
    return {"x": x, "k": one_or_two[0], "stride": one_or_two[1], "padding": one_or_two[2], "kHkW": tuple(k)}


# -- against torch's autograd ----------------------------------------------------------------------------------------


@needs_torch
@sweep
@given(windows(pool=False), st.integers(1, 4), st.booleans(), st.data())
def test_conv2d_matches_autograd(window: dict[str, Any], O: int, bias: bool, data: st.DataObject) -> None:
    import torch

    x, how = window["x"], {"stride": window["stride"], "padding": window["padding"]}
    W = random(O, x.shape[1], *window["kHkW"], seed=1, dtype=x.dtype.name)
    b = random(O, seed=2, dtype=x.dtype.name) if bias else None
    check(data.draw, "conv2d", lambda x, W, b: torch.conv2d(x, W, b, **how), [x, W, b], **how)


@sweep
@given(
    st.tuples(*(st.integers(1, high) for high in (5, 6, 5, 12, 12))),
    st.sampled_from(["float32", "float64"]),
    st.booleans(),
)
def test_winograd_equals_im2col(sizes: tuple[int, ...], dtype: str, bias: bool) -> None:
    N, C, O, height, width = sizes
    x, W = random(N, C, height, width, dtype=dtype), random(O, C, 3, 3, seed=1, dtype=dtype)
    arrays = [x, W, random(O, seed=2, dtype=dtype) if bias else None]
    with mock.patch.object(winograd, "LEAST_CHANNELS", 99):
        expected = run(functional, "conv2d", arrays, padding=1)
    with (
        mock.patch.object(winograd, "LEAST_CHANNELS", 1),
        mock.patch.object(winograd, "LEAST_FILLED", 0),
        mock.patch.object(winograd, "PIECE", 7),  # several, and the last one smaller
        mock.patch.object(blocks, "BLOCK_BYTES", 1),  # as many blocks as images
        mock.patch.object(conv, "im2col", side_effect=AssertionError("im2col was called")),
    ):
        assert_close(run(functional, "conv2d", arrays, padding=1), expected, dtype)


def test_winograd_loses_few_bits() -> None:
    """With many channels: relative to the largest output, a quarter of what the usual points 0, 1, -1, 2, -2 lose."""
    x, W = random(2, 128, 16, 16), random(64, 128, 3, 3, seed=1)
    arrays = [[x, W, None], [x.astype("f"), W.astype("f"), None]]
    exact, rounded = (run(functional, "conv2d", each, padding=1) for each in arrays)
    for name, a, b in zip(("y", "dx", "dW"), exact, rounded, strict=False):
        assert np.abs(a - b).max() < 3e-6 * np.abs(a).max(), name


def test_winograd_without_the_inputs_gradient() -> None:
    x, W, dy = random(5, 24, 8, 8), random(24, 24, 3, 3, seed=1), random(5, 24, 8, 8, seed=2)
    with mock.patch.object(blocks, "BLOCK_BYTES", 1), mock.patch.object(conv, "im2col", side_effect=AssertionError):
        _, cache = functional.conv2d(x, W, padding=1)
        dx, dW, db = functional.conv2d_backward(dy, cache, input_grad=False)
        _, expected, _ = functional.conv2d_backward(dy, cache)
    assert dx is None and db is None
    np.testing.assert_array_equal(dW, expected)


@pytest.mark.parametrize("C", [3, 8])
def test_a_bias_of_another_length_is_refused(C: int) -> None:
    with pytest.raises(ValueError, match="broadcast"):
        functional.conv2d(random(2, C, 8, 8), random(4, C, 3, 3), random(8), padding=1)


def test_a_convolution_of_no_images() -> None:
    for C in (3, 24):
        y, cache = functional.conv2d(np.zeros((0, C, 8, 8)), random(24, C, 3, 3), np.zeros(24), padding=1)
        dx, dW, db = functional.conv2d_backward(y, cache)
        assert dx.shape == (0, C, 8, 8) and not dW.any() and not db.any()


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4)])
@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_of_no_images(shape: tuple[int, ...], relu: bool) -> None:
    x, C = np.zeros(shape), np.ones(3)
    y, cache = functional.batch_norm(x, C, C, running_mean=C, running_var=C, training=False, relu=relu)
    dx, dgamma, dbeta = functional.batch_norm_backward(y, cache)
    assert y.shape == dx.shape == shape and not dgamma.any() and not dbeta.any()


@needs_torch
@sweep
@given(windows(pool=True), st.booleans(), st.data())
def test_max_pool2d_matches_autograd(window: dict[str, Any], ties: bool, data: st.DataObject) -> None:
    from torch.nn.functional import max_pool2d

    x, k, how = window["x"], window["k"], {"stride": window["stride"], "padding": window["padding"]}
    if ties:
        x = np.maximum(np.round(2 * x), 0)  # 0, 1 and 2 only, most of them 0, as after a ReLU
    check(data.draw, "max_pool2d", lambda x: max_pool2d(x, k, **how), [x], k, **how)


@needs_torch
@sweep
@given(windows(pool=True), st.data())
def test_avg_pool2d_matches_autograd(window: dict[str, Any], data: st.DataObject) -> None:
    from torch.nn.functional import avg_pool2d

    x, k, how = window["x"], window["k"], {"stride": window["stride"], "padding": window["padding"]}
    check(data.draw, "avg_pool2d", lambda x: avg_pool2d(x, k, **how), [x], k, **how)


@needs_torch
@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
def test_a_pool_has_the_stride_of_its_kernel_unless_told(name: str) -> None:
    import torch

    x = random(2, 3, 7, 8)
    expected = autograd(lambda x: getattr(torch.nn.functional, name)(x, (2, 3)), [x])
    for F in engines():
        assert_close(run(F, name, [x], (2, 3)), expected, "float64")


@needs_torch
@sweep
@given(windows(pool=True), st.data())
def test_elementwise_operations_match_autograd(window: dict[str, Any], data: st.DataObject) -> None:
    import torch

    x = window["x"]
    x = np.where(abs(x) < 0.2, x.dtype.type(0), x)  # exact zeros: the kink of ReLU
    rows = x.reshape(-1, x.shape[3])
    keep = random(*x.shape, seed=3) < 0.4
    for each in (x, rows):
        check(data.draw, "relu", torch.relu, [each])
        check(data.draw, "leaky_relu", lambda x: torch.nn.functional.leaky_relu(x, 0.3), [each], negative_slope=0.3)
        check(data.draw, "sigmoid", torch.sigmoid, [10 * each])
        check(data.draw, "tanh", torch.tanh, [10 * each])
        check(data.draw, "silu", torch.nn.functional.silu, [10 * each])
        check(data.draw, "gelu", torch.nn.functional.gelu, [10 * each])
        tanh = functools.partial(torch.nn.functional.gelu, approximate="tanh")
        check(data.draw, "gelu", tanh, [10 * each], approximate="tanh")
    check(data.draw, "dropout", lambda x: x * torch.from_numpy(keep) / 0.7, [x], keep, p=0.3)
    check(data.draw, "flatten", lambda x: x.flatten(1), [x])
    check(data.draw, "global_avg_pool2d", lambda x: x.mean((2, 3)), [x])
    check(data.draw, "softmax", lambda x: torch.softmax(x, -1), [20 * rows])


@needs_torch
@sweep
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from(sorted(TOLERANCE)),
    st.data(),
)
def test_linear_matches_autograd(N: int, In: int, Out: int, bias: bool, dtype: str, data: st.DataObject) -> None:
    from torch.nn.functional import linear

    x, W = random(N, In, dtype=dtype), random(Out, In, seed=1, dtype=dtype)
    check(data.draw, "linear", linear, [x, W, random(Out, seed=2, dtype=dtype) if bias else None])


@needs_torch
@sweep
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 6)),
    st.one_of(st.just(()), st.tuples(st.integers(1, 5), st.integers(1, 5))),
    st.booleans(),
    st.booleans(),
    st.sampled_from(sorted(TOLERANCE)),
    st.floats(-2, 2),
    st.data(),
)
def test_batch_norm_matches_autograd(
    NC: tuple[int, int], HW: tuple[int, ...], training: bool, relu: bool, dtype: str, mean: float, data: st.DataObject
) -> None:
    import torch

    N, C = NC
    if training and N * math.prod(HW) < 3:
        N = 3  # with 2 samples y is +1 and -1 whatever they are, and dx the rounding of a difference that should be 0
    x = (random(N, C, *HW) + mean).astype(dtype)
    arrays: list[np.ndarray | None] = [x, *(random(C, seed=seed, dtype=dtype) for seed in (1, 2))]
    running = {"running_mean": random(C, seed=3, dtype=dtype), "running_var": 1.5 + random(C, seed=4, dtype=dtype)}
    how = {"training": training, "momentum": 0.3, "eps": 1e-3}
    expected_running = [torch.tensor(a, dtype=torch.float64) for a in running.values()]

    def twin(x: Any, gamma: Any, beta: Any) -> Any:
        y = torch.nn.functional.batch_norm(x, *expected_running, gamma, beta, **how)
        return y.relu() if relu else y

    expected = autograd(twin, arrays) + [t.numpy() for t in expected_running]
    with mock.patch.object(blocks, "BLOCK_BYTES", data.draw(st.sampled_from([1, 100, blocks.BLOCK_BYTES]))):
        for F in engines():
            got = run(F, "batch_norm", arrays, channels_last=data.draw(st.booleans()), relu=relu, **running, **how)
            assert_close(got, expected, dtype)


@needs_torch
@sweep
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.one_of(st.just(()), st.tuples(st.integers(1, 6), st.integers(1, 6))),
    st.sampled_from([0.0, 10.0]),
    st.sampled_from(sorted(TOLERANCE)),
    st.data(),
)
def test_group_norm_matches_autograd(
    N: int, groups: int, width: int, HW: tuple[int, ...], mean: float, dtype: str, data: st.DataObject
) -> None:
    import torch

    C = groups * width
    if N * width * math.prod(HW) < 2:
        return  # torch refuses
    x = (mean + random(N, C, *HW, seed=data.draw(st.integers(0, 1000)))).astype(dtype)
    gamma, beta = random(C, seed=1, dtype=dtype), random(C, seed=2, dtype=dtype)
    options = {
        "num_groups": groups,
        "eps": 0.1,
    }  # one value in a group has no variance: 1 / sqrt(eps) enlarges rounding

    def twin(x: Any, gamma: Any, beta: Any) -> Any:
        return torch.nn.functional.group_norm(x, groups, gamma, beta, eps=0.1)

    check(data.draw, "group_norm", twin, [x, gamma, beta], **options)


def test_group_norm_does_not_depend_on_the_batch() -> None:
    x = random(9, 8, 5, 6, dtype="float32")
    gamma, beta = random(8, seed=1, dtype="float32"), random(8, seed=2, dtype="float32")
    for F in engines():
        arrays = [convert(F, a) for a in (x, gamma, beta)]
        y, _ = F.group_norm(*arrays, num_groups=4)
        alone = [F.group_norm(convert(F, x[i : i + 1]), *arrays[1:], num_groups=4)[0] for i in range(9)]
        assert np.array_equal(F.to_numpy(y), np.concatenate([F.to_numpy(each) for each in alone]))


def test_group_norm_does_not_cancel_when_the_mean_is_large() -> None:
    x = (1000 + np.random.default_rng(0).standard_normal((2, 4, 32, 32))).astype(np.float32)
    one, zero = np.ones(4, np.float32), np.zeros(4, np.float32)
    y, _ = functional.group_norm(x, one, zero, num_groups=2)
    wide = x.astype(np.float64).reshape(2, 2, -1)
    exact = (wide - wide.mean(2, keepdims=True)) / np.sqrt(wide.var(2, keepdims=True) + 1e-5)
    # x - centre is exact, and what centre lacks of the mean is known: a few units of float32 near 4 are left
    np.testing.assert_allclose(y.reshape(2, 2, -1), exact, rtol=0, atol=2e-6)


def test_group_norm_of_no_images_and_of_groups_that_do_not_fit() -> None:
    one = np.ones(6)
    for F in engines():
        arrays = [convert(F, a) for a in (np.zeros((0, 6, 4, 4)), one, one)]
        y, cache = F.group_norm(*arrays, num_groups=3)
        dx, dgamma, dbeta = F.group_norm_backward(y, cache)
        assert tuple(y.shape) == tuple(dx.shape) == (0, 6, 4, 4)
        assert not F.to_numpy(dgamma).any() and not F.to_numpy(dbeta).any()
        for groups in (4, 0, -1, 12):
            with pytest.raises(ValueError, match=f"^group_norm: 6 channels cannot be shared out to {groups} groups"):
                F.group_norm(*arrays, num_groups=groups)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_with_relu_has_the_bits_of_both_in_turn(training: bool) -> None:
    x, gamma, beta, dy = (
        random(*shape, seed=seed) for seed, shape in enumerate([(6, 5, 4, 4), (5,), (5,), (6, 5, 4, 4)])
    )
    options = {"running_mean": random(5, seed=5), "running_var": np.ones(5), "training": training}
    y, cache = functional.batch_norm(x, gamma, beta, relu=True, **{k: np.copy(v) for k, v in options.items()})
    plain, plain_cache = functional.batch_norm(x, gamma, beta, **{k: np.copy(v) for k, v in options.items()})
    positive, relu_cache = functional.relu(plain)
    np.testing.assert_array_equal(y, positive)
    expected = functional.batch_norm_backward(functional.relu_backward(dy, relu_cache), plain_cache)
    for got, want in zip(functional.batch_norm_backward(dy, cache), expected, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "N, H, C, width",
    [(8, 16, 64, 8192), (3, 7, 8, 147 * 8), (31, 15, 14, 465 * 14), (0, 4, 4, 8192), (4, 1, 10000, 10000)],
)
def test_wide_rows_hold_each_channel_equally_often(N: int, H: int, C: int, width: int) -> None:
    rows = blocks.wide_rows(np.broadcast_to(np.arange(C), (N, H, H, C)).copy(), C)
    assert rows.shape == (N * H * H * C // width, width)
    np.testing.assert_array_equal(rows, np.tile(np.arange(C), (len(rows), width // C)))


def test_batch_norm_does_not_cancel_when_the_mean_is_large() -> None:
    x, zero, one = random(64, 3, 8, 8) + 1000, np.zeros(3, np.float32), np.ones(3, np.float32)
    running = {"running_mean": zero, "running_var": one}
    y, *_, var = run(
        functional, "batch_norm", [x.astype(np.float32), one, zero], training=True, momentum=1.0, **running
    )
    exact = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    # float32 has steps of 6e-5 at 1000. Each value is rounded once, so what differs within a channel is about 1e-4;
    # the mean, summed in float32, is off by some 30 steps, for all values alike (torch's is, too).
    offset = y.mean((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(y - offset, exact, atol=3e-4)
    np.testing.assert_allclose(offset, 0, atol=5e-3)
    # E[x^2] - E[x]^2 in float32 would be a multiple of 0.06: float32 has such steps at 1000^2
    np.testing.assert_allclose(var, x.var((0, 2, 3), ddof=1), rtol=1e-4)


@needs_torch
def test_softmax_of_masked_rows_is_torchs() -> None:
    import torch

    INF, NAN = math.inf, math.nan
    z = np.array([[0, 1, -INF], [-INF, 3, -INF], [-INF, -INF, -INF], [INF, 0, 0], [NAN, 0, 0]])
    for F in engines():
        p = F.to_numpy(F.softmax(convert(F, z)))
        np.testing.assert_allclose(p, torch.softmax(torch.from_numpy(z), -1).numpy(), rtol=1e-15)


def test_softmax_of_extreme_rows_sums_to_one() -> None:
    z = np.array([[1e4, 0, -1e4], [-1e4, -1e4, -1e4], [88.8, 88.8, 0]], np.float32)
    for F in engines():
        p = F.to_numpy(F.softmax(convert(F, z)))
        assert np.isfinite(p).all()
        np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-6)  # one division's rounding for each of 3 terms
        np.testing.assert_allclose(p[0], [1, 0, 0])


# -- finite differences, layouts, threads: one table of operations ---------------------------------------------------


def cases(N: int = 3, C: int = 3, H: int = 7, W: int = 6, dtype: str = "float64") -> dict[str, Any]:
    """Return {label: (operation, differentiated arrays, other arguments, options)} for every operation."""
    x, rows = random(N, C, H, W, dtype=dtype), random(N, H, dtype=dtype)
    filters, bias = random(4, C, 3, 2, seed=1, dtype=dtype), random(4, seed=2, dtype=dtype)
    gamma, beta, mean = (random(C, seed=seed, dtype=dtype) for seed in (3, 4, 5))
    running = {"running_mean": mean, "running_var": abs(mean) + gamma.dtype.type(1)}
    keep = random(*x.shape, seed=6) < 0.2
    many = random(N, 24, H, W, dtype=dtype)  # 7x6 pixels: three of Winograd's four tiles are partial
    return {
        "conv2d winograd": ("conv2d", [many, random(24, 24, 3, 3, seed=8, dtype=dtype), None], (), {"padding": 1}),
        "conv2d image": (
            "conv2d",
            [random(N, 3, H, W, dtype=dtype), random(4, 3, 3, 3, seed=9, dtype=dtype), bias],
            (),
            {"padding": 1},
        ),
        "conv2d": ("conv2d", [x, filters, bias], (), {"padding": 1}),
        "conv2d unpadded": ("conv2d", [x, filters, bias], (), {}),
        "conv2d strided": ("conv2d", [x, filters, None], (), {"stride": (2, 3), "padding": (1, 2)}),
        "conv2d dilated": ("conv2d", [x, filters, bias], (), {"dilation": (2, 3), "padding": (1, 2)}),
        "conv2d grouped": (
            "conv2d",
            [many, random(36, 2, 3, 3, seed=10, dtype=dtype), random(36, seed=11, dtype=dtype)],
            (),
            {"groups": 12, "stride": (1, 2), "padding": 1},
        ),
        "conv2d depthwise": (
            "conv2d",
            [many, random(24, 1, 3, 3, seed=12, dtype=dtype), random(24, seed=13, dtype=dtype)],
            (),
            {"groups": 24, "padding": 1},
        ),
        "conv2d depthwise strided": (
            "conv2d",
            [many, random(24, 1, 3, 2, seed=14, dtype=dtype), None],
            (),
            {"groups": 24, "stride": 2, "padding": (2, 1), "dilation": (2, 1)},
        ),
        "conv_transpose2d": (
            "conv_transpose2d",
            [x, random(C, 4, 3, 2, seed=15, dtype=dtype), bias],
            (),
            {"stride": 2, "padding": 1, "output_padding": (1, 0)},
        ),
        "conv_transpose2d grouped": (
            "conv_transpose2d",
            [many, random(24, 2, 3, 3, seed=16, dtype=dtype), None],
            (),
            {"groups": 12, "padding": 1, "dilation": 2, "output_padding": 1},
        ),
        "upsample_nearest2d": ("upsample_nearest2d", [x], ((2, 3),), {}),
        "linear": ("linear", [rows, random(4, H, seed=7, dtype=dtype), bias], (), {}),
        "relu": ("relu", [x], (), {}),
        "leaky_relu": ("leaky_relu", [x], (), {"negative_slope": 0.2}),
        "sigmoid": ("sigmoid", [x], (), {}),
        "tanh": ("tanh", [x], (), {}),
        "silu": ("silu", [x], (), {}),
        "gelu": ("gelu", [x], (), {}),
        "gelu tanh": ("gelu", [x], (), {"approximate": "tanh"}),
        "dropout": ("dropout", [x], (keep,), {"p": 0.4}),
        "flatten": ("flatten", [x], (), {}),
        "softmax": ("softmax", [rows], (), {}),
        "batch_norm": ("batch_norm", [x, gamma, beta], (), {"training": True, **running}),
        "batch_norm eval": ("batch_norm", [x, gamma, beta], (), {"training": False, **running}),
        "batch_norm relu": ("batch_norm", [x, gamma, beta], (), {"training": True, "relu": True, **running}),
        "batch_norm 2-D": ("batch_norm", [x[:, :, 0, 0], gamma, beta], (), {"training": True, **running}),
        "group_norm": ("group_norm", [x, gamma, beta], (), {"num_groups": C}),
        "group_norm together": ("group_norm", [x, gamma, beta], (), {"num_groups": 1, "eps": 0.1}),
        "group_norm 2-D": ("group_norm", [x[:, :, 0, 0], gamma, beta], (), {"num_groups": 1}),
        "max_pool2d": ("max_pool2d", [x], (3,), {"stride": 2, "padding": 1}),
        "avg_pool2d": ("avg_pool2d", [x], ((2, 3),), {"padding": (1, 0)}),
        "global_avg_pool2d": ("global_avg_pool2d", [x], (), {}),
    }


each_case = pytest.mark.parametrize("label", cases())


def test_the_table_names_every_pair_of_operations() -> None:
    pairs = {name for name in functional.__all__ if f"{name}_backward" in functional.__all__}
    assert pairs == {case[0] for case in cases().values()}


@each_case
def test_gradients_match_finite_differences(label: str) -> None:
    name, arrays, args, options = cases()[label]
    directions = [None if a is None else random(*a.shape, seed=50 + i) for i, a in enumerate(arrays)]
    step = 1e-5  # error step^2 by the third derivative, and 1e-16 / step by rounding; no kink lies so close

    def objective(t: float) -> float:
        moved = [None if a is None else a + t * d for a, d in zip(arrays, directions, strict=True)]
        y = run(functional, name, moved, *args, **options)[0]
        return float((y * random(*y.shape, seed=99)).sum())

    _, *grads = run(functional, name, arrays, *args, **options)
    present = [d for d in directions if d is not None]
    slope = sum(float((grad * d).sum()) for grad, d in zip(grads[: len(present)], present, strict=True))
    difference = (objective(step) - objective(-step)) / (2 * step)
    # values of about 10, known to 1e-15, divided by 2e-5: 1e-9
    assert difference == pytest.approx(slope, rel=1e-6, abs=1e-8)
    assert abs(slope) > 1e-3  # or the comparison says nothing


@each_case
@pytest.mark.parametrize("C", [1, 3])  # with one channel NumPy calls both layouts contiguous
def test_the_memory_layout_does_not_change_the_result(label: str, C: int) -> None:
    name, arrays, args, options = cases(C=C)[label]
    expected = run(functional, name, arrays, *args, **options)
    for layouts in ({"channels_last": False}, {"dout_channels_last": False}):
        got = run(functional, name, arrays, *args, **layouts, **options)
        assert [a.tobytes() for a in got] == [a.tobytes() for a in expected]


@needs_torch
@each_case
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_both_engines_agree(label: str, dtype: str) -> None:
    name, arrays, args, options = cases(dtype=dtype)[label]
    ours, theirs = (run(F, name, arrays, *args, **options) for F in engines())
    assert_close(theirs, ours, dtype)


@each_case
def test_the_number_of_threads_does_not_change_a_bit(label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 18)
    name, arrays, args, options = cases(N=64, C=16, H=32, W=30, dtype="float32")[label]
    if arrays[0].ndim == 4 and label != "conv2d image":
        assert arrays[0].nbytes > 2 * blocks.BLOCK_BYTES, "one block only"
    alone = run(functional, name, arrays, *args, **options)
    functional.set_threads(2)
    together = run(functional, name, arrays, *args, **options)
    for a, b in zip(alone, together, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("nhwc", [False, True])
def test_concat_joins_channels_and_split_cuts_them(threads: int, nhwc: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 12)  # many blocks
    functional.set_threads(threads)
    for shape in ((9, 4, 5, 6), (9, 4), (9, 4, 5)):
        parts = [in_memory(random(shape[0], c, *shape[2:]), nhwc) for c in (3, 1, 4)]
        expected = np.concatenate(parts, 1)
        for F in engines():
            joined = F.concat([convert(F, part) for part in parts])
            assert np.array_equal(F.to_numpy(joined), expected)
            cut = [F.to_numpy(part) for part in F.split(joined, (3, 1, 4))]
            assert all(np.array_equal(ours, part) for ours, part in zip(cut, parts, strict=True))
            if len(shape) == 4:
                for a in (F.to_numpy(joined), *cut):
                    assert a.transpose(0, 2, 3, 1).flags.c_contiguous
            other = convert(F, np.zeros((8, 4, *shape[2:])))
            for arrays in ([], [joined, other], [joined, convert(F, np.zeros((9, 4, 1, 1, 1)))]):
                with pytest.raises(ValueError, match=r"^concat: arrays to join may differ in their channels .* only"):
                    F.concat(arrays)
            for sizes in ((3, 4), (3, 1, 5), (9, -1), ()):
                with pytest.raises(ValueError, match=r"^split: 8 channels cannot be cut into "):
                    F.split(joined, sizes)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("nhwc", [False, True])
def test_add_is_the_sum_and_refuses_to_repeat_or_cut(threads: int, nhwc: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 12)  # many blocks
    x, y = in_memory(random(9, 4, 5, 6), nhwc), random(9, 4, 5, 6, seed=1)
    single = x.astype(np.float32)
    for F in engines():
        F.set_threads(threads)
        np.testing.assert_array_equal(F.to_numpy(F.add(convert(F, x), convert(F, y))), x + y)
        for shape in ((4, 5, 6), (3, 4, 5, 6), (9, 1, 5, 6)):
            with pytest.raises(ValueError, match="add: expected two arrays of one shape"):
                F.add(convert(F, x), convert(F, random(*shape)))
    np.testing.assert_array_equal(functional.add(single, y), single + y)  # float64, as NumPy has it


def test_blocks_run_on_as_many_threads_as_set() -> None:
    both = threading.Barrier(2)
    functional.set_threads(2)
    arrived = blocks.for_each_block(lambda block: both.wait(timeout=20), 2, blocks.BLOCK_BYTES)
    assert sorted(arrived) == [0, 1]  # neither block could have passed alone


def test_every_item_is_done_once_by_one_of_the_threads() -> None:
    done: list[int] = []
    with ThreadPoolExecutor(3) as pool:
        for _ in range(100):  # with one list iterator for all, Python without GIL gave items twice in most rounds
            done.clear()
            results = blocks.share_out(range(200), [lambda i: done.append(i) or -i] * 4, pool)
            assert sorted(done) == list(range(200))
            assert results == [-i for i in range(200)]


def test_an_error_on_the_calling_thread_ends_the_work_of_the_others() -> None:
    done: list[int] = []

    def body(i: int) -> None:
        if threading.current_thread() is threading.main_thread():
            raise ValueError("here")
        time.sleep(0.001)
        done.append(i)

    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="here"):
        blocks.share_out(range(1000), [body, body], pool)
    assert len(done) < 900


@sweep
@given(st.integers(0, 60), st.integers(1, 3 * blocks.BLOCK_BYTES))
def test_blocks_cover_everything_once_in_pieces_of_bounded_size(count: int, bytes_each: int) -> None:
    pieces = blocks.for_each_block(lambda block: block, count, bytes_each)
    assert [i for piece in pieces for i in range(count)[piece]] == list(range(count))
    sizes = [piece.stop - piece.start for piece in pieces]
    assert max(sizes) <= 1 or max(sizes) * bytes_each <= blocks.BLOCK_BYTES
    assert max(sizes) - min(sizes) <= 1
    assert len(pieces) == count or len(pieces) & (len(pieces) - 1) == 0  # a power of 2, for threads to share


def test_input_grad_false_leaves_out_dx_and_nothing_else() -> None:
    x, W, b = random(2, 3, 5, 5), random(4, 3, 3, 3, seed=1), random(4, seed=2)
    for F in engines():
        y, cache = F.conv2d(*(convert(F, a) for a in (x, W, b)), padding=1)
        _, *expected = F.conv2d_backward(y, cache)
        dx, *got = F.conv2d_backward(y, cache, input_grad=False)
        assert dx is None
        for a, b_ in zip(got, expected, strict=True):
            # torch may choose another algorithm; the sums have 50 terms
            np.testing.assert_allclose(F.to_numpy(a), F.to_numpy(b_), rtol=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_dropout_scales_what_it_keeps(p: float) -> None:
    x, keep = 1 + random(4, 5) ** 2, random(4, 5, seed=1) < 0
    for F in engines():
        y, _ = F.dropout(convert(F, x), convert(F, keep), p=p)
        expected = np.where(keep, x / (1 - p), 0) if p < 1 else np.zeros_like(x)
        np.testing.assert_allclose(F.to_numpy(y), expected, rtol=1e-15)  # 1 / (1 - p) is rounded once more


# -- im2col and col2im -----------------------------------------------------------------------------------------------


@sweep
@given(windows(pool=False), st.booleans())
def test_col2im_is_the_transpose_of_im2col(window: dict[str, Any], channels_last: bool) -> None:
    x = in_memory(window["x"].astype("float64"), channels_last)
    where = (*window["kHkW"], window["stride"], window["padding"])
    cols = functional.im2col(x, *where)
    c = random(*cols.shape, seed=7)
    image = functional.col2im(c, x.shape, *where)
    assert image.shape == x.shape
    assert np.vdot(cols, c) == pytest.approx(np.vdot(x, image), rel=1e-10, abs=1e-10)  # sums of up to 20,000 terms


@needs_torch
@sweep
@given(windows(pool=False), st.booleans())
def test_im2col_is_torchs_unfold_in_another_order(window: dict[str, Any], channels_last: bool) -> None:
    import torch

    x, (kH, kW) = window["x"], window["kHkW"]
    cols = functional.im2col(in_memory(x, channels_last), kH, kW, window["stride"], window["padding"])
    unfold = torch.nn.Unfold((kH, kW), stride=window["stride"], padding=window["padding"])
    N, C = x.shape[:2]
    theirs = unfold(torch.from_numpy(x)).numpy().reshape(N, C, kH, kW, -1)  # (N, C, kH, kW, Ho*Wo)
    assert np.array_equal(cols, theirs.transpose(0, 4, 2, 3, 1).reshape(-1, kH * kW * C))


# -- errors ----------------------------------------------------------------------------------------------------------


def test_a_window_that_does_not_fit_is_refused() -> None:
    x, W = random(2, 3, 4, 6), random(1, 3, 5, 3)
    message = "kernel of size 5 does not fit into an input of size 4 with padding 0"
    with pytest.raises(ValueError, match=message):
        functional.im2col(x, 5, 3, 1, 0)
    for F in engines():
        with pytest.raises(ValueError, match=message):
            F.conv2d(convert(F, x), convert(F, W))
        for pool in (F.max_pool2d, F.avg_pool2d):
            with pytest.raises(ValueError, match=message):
                pool(convert(F, x), (5, 3))
            with pytest.raises(ValueError, match="stride 0 must be at least 1"):
                pool(convert(F, x), 2, stride=0)
            with pytest.raises(ValueError, match="at most half"):
                pool(convert(F, x), 3, padding=2)


@pytest.mark.parametrize(
    "three", [np.int64(3), np.uint8(3), np.array(3), (np.int32(3), 3), [3, np.int64(3)], np.array([3, 3], np.uint8)]
)
def test_sizes_may_be_numpys(three: Any) -> None:
    x, W, b = random(2, 3, 9, 8), random(4, 3, 3, 3, seed=1), random(4, seed=2)
    cases = [("conv2d", [x, W, b], (), {"stride": three, "padding": three})]
    cases += [(pool, [x], (three,), {"stride": three}) for pool in ("max_pool2d", "avg_pool2d")]
    for F in engines():
        for name, arrays, sizes, options in cases:
            plain = dict.fromkeys(options, 3)
            expected = run(F, name, arrays, *(3 for _ in sizes), **plain)
            y, cache = getattr(F, name)(*(convert(F, a) for a in arrays), *sizes, **options)
            assert np.array_equal(F.to_numpy(y), expected[0])
            grads = getattr(F, f"{name}_backward")(convert(F, random(*y.shape, seed=99)), cache)
            for got, want in zip(grads if isinstance(grads, tuple) else (grads,), expected[1:], strict=True):
                assert np.array_equal(F.to_numpy(got), want)
    assert functional.conv2d(x, W, padding=three)[0].shape == (2, 4, 13, 12)
    assert functional.col2im(functional.im2col(x, 3, 3, three, three), x.shape, 3, 3, three, three).shape == x.shape


@pytest.mark.parametrize(
    "size", [3.0, np.float32(3), True, np.True_, (3, True), "33", "3", (3,), (3, 3, 3), None, [[3], 3]]
)
def test_what_is_no_size_is_refused(size: Any) -> None:
    x, W = random(2, 3, 9, 8), random(4, 3, 3, 3, seed=1)
    message = "a size must be one whole number, or two for height and width, got"
    for F in engines():
        for option in ("stride", "padding"):
            with pytest.raises(ValueError, match=message):
                F.conv2d(convert(F, x), convert(F, W), **{option: size})
        for pool in (F.max_pool2d, F.avg_pool2d):
            with pytest.raises(ValueError, match=message):
                pool(convert(F, x), size)
            with pytest.raises(ValueError, match=message):
                pool(convert(F, x), 3, padding=size)
    with pytest.raises(ValueError, match=message):
        layers.Conv2d(3, 4, size)


def test_a_layer_takes_numpys_sizes() -> None:
    three, x = np.int64(3), random(2, 3, 8, 8, dtype="float32")
    layer = layers.Conv2d(three, np.uint8(4), three, np.int64(1), np.int8(1))
    assert layer.params["weight"].shape == (4, 3, 3, 3) and layer.forward(x).shape == (2, 4, 8, 8)
    assert layers.MaxPool2d(np.int64(2)).forward(x).shape == layers.AvgPool2d(np.uint8(2)).forward(x).shape


def test_batch_norm_of_a_single_value_is_refused_in_training_only() -> None:
    x, one = random(1, 3), np.ones(3)
    for F in engines():
        arrays = [convert(F, a) for a in (x, one, one)]
        running = {"running_mean": convert(F, 0 * one), "running_var": convert(F, one.copy())}
        with pytest.raises(ValueError, match="more than one value per channel"):
            F.batch_norm(*arrays, training=True, **running)
        y, _ = F.batch_norm(*arrays, training=False, eps=0.0, **running)
        np.testing.assert_allclose(F.to_numpy(y), x + 1, rtol=1e-12)


# -- arrays and engines ----------------------------------------------------------------------------------------------


def test_channels_last_views_share_the_flat_memory() -> None:
    for F in engines():
        flat = convert(F, np.arange(120.0))
        view = F.channels_last_view(flat, (5, 4, 3, 2))
        expected = np.arange(120.0).reshape(5, 3, 2, 4).transpose(0, 3, 1, 2)
        assert np.array_equal(F.to_numpy(view), expected)
        matrix = F.channels_last_view(flat, (10, 12))
        view[...] = 7
        matrix[0, 0] = 8
        assert F.to_numpy(flat).sum() == 7 * 119 + 8
        with pytest.raises(ValueError, match="1-D"):
            F.channels_last_view(matrix, (120,))


def test_copy_into_converts_to_the_targets_dtype() -> None:
    source = in_memory(random(2, 3, 4, 5), True)
    for F in engines():
        target = F.channels_last_view(convert(F, np.zeros(120, np.float32)), (2, 3, 4, 5))
        F.copy_into(target, source)
        assert np.array_equal(F.to_numpy(target), source.astype(np.float32))
        F.copy_into(target, np.arange(120).reshape(2, 3, 4, 5))
        assert np.array_equal(F.to_numpy(target).ravel(), np.arange(120))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8", "bool"])
def test_arrays_go_to_an_engine_and_back(dtype: str) -> None:
    for F in engines():
        like = convert(F, np.zeros(1, np.float32))
        plain = (3 * random(2, 3, 4, 5)).astype(dtype)
        for a in (plain, in_memory(plain, True), plain[..., ::-1], plain[0, 0, 0, 0, ...]):  # read-only, backwards, 0-D
            back = F.to_numpy(F.as_array(a, like=like))
            assert back.dtype == dtype
            assert np.array_equal(back, a)


@needs_torch
def test_the_torch_engine_has_the_same_operations_and_signatures() -> None:
    _, functional_torch = engines()
    numpy_only = {name for name in functional.__all__ if name.startswith(("kaiming", "xavier"))}
    numpy_only |= {"im2col", "col2im", "whitening", "accuracy", "top5_accuracy", "label_accuracy"}
    for name in set(functional.__all__) - numpy_only:
        ours, theirs = (inspect.signature(getattr(F, name)).parameters for F in (functional, functional_torch))
        shape = [[(p.name, p.kind, p.default) for p in each.values()] for each in (ours, theirs)]
        assert shape[0] == shape[1], name


@needs_torch
def test_the_torch_engine_keeps_images_channels_last_and_builds_no_graph() -> None:
    import torch

    _, F = engines()
    for name, arrays, args, options in cases().values():
        if arrays[0].ndim != 4 or name in ("flatten", "global_avg_pool2d", "dropout"):
            continue
        inputs = [convert(F, None if a is None else in_memory(a, False)) for a in arrays]
        options = {key: convert(F, value) for key, value in options.items()}
        y, cache = getattr(F, name)(*inputs, *args, **options)
        grads = getattr(F, f"{name}_backward")(y.contiguous(), cache)
        dx = grads[0] if isinstance(grads, tuple) else grads
        for image in (y, dx):
            assert image.is_contiguous(memory_format=torch.channels_last), name
            assert not image.requires_grad


@needs_torch
def test_a_tensor_shares_the_arrays_memory_on_the_cpu() -> None:
    _, F = engines()
    a = np.zeros(3)
    t = F.tensor(a, "cpu")
    t += 1
    assert a.tolist() == [1, 1, 1]
    assert np.shares_memory(F.to_numpy(t), a)


@needs_torch
def test_devices_that_are_not_there_are_refused() -> None:
    _, F = engines()
    assert F.choose_device("cpu", 3) == "cpu"
    with pytest.raises(ValueError, match="'cuda:99' is not available"):
        F.choose_device("cuda:99")
    for unknown in ("tpu", "cuda:x", ""):
        with pytest.raises(ValueError, match="unknown device"):
            F.choose_device(unknown)


@needs_torch
def test_the_torch_engine_sets_torchs_threads() -> None:
    import torch

    _, F = engines()
    before = torch.get_num_threads()
    try:
        for count in (2, 1):
            F.set_threads(count)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)


# -- initial values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "variance"),
    [
        ("kaiming_normal", 2 / (16 * 9)),
        ("kaiming_uniform", 2 / (16 * 9)),
        ("xavier_normal", 2 / (16 * 9 + 48 * 9)),
        ("xavier_uniform", 2 / (16 * 9 + 48 * 9)),
    ],
)
def test_initial_values_have_the_variance_of_their_definition(name: str, variance: float) -> None:
    draw = getattr(functional, name)
    W = draw(np.random.default_rng(0), (48, 16, 3, 3))
    # of 6,912 values, the standard error of the variance is 1.7 % for a normal distribution, 1.1 % for a uniform one
    assert W.var() == pytest.approx(variance, rel=0.06)
    assert abs(W.mean()) < 4 * math.sqrt(variance / W.size)
    if name.endswith("uniform"):
        assert abs(W).max() <= math.sqrt(3 * variance)
    assert np.array_equal(W, draw(np.random.default_rng(0), (48, 16, 3, 3)))
    with pytest.raises(ValueError, match="fan-in"):
        draw(np.random.default_rng(0), (5,))


def test_whitening_gives_what_it_says_on_images_of_its_model() -> None:
    """Pixels and channels that correlate as assumed: outputs of variance 1, nearly without correlation."""
    C, k = 3, 3
    pixels = init.PIXELS ** np.abs(np.subtract.outer(np.arange(k), np.arange(k)))
    colours = init.COLOURS ** np.abs(np.subtract.outer(np.arange(C), np.arange(C)))
    covariance = np.kron(colours, np.kron(pixels, pixels))
    filters = functional.whitening((2 * C * k * k, C, k, k)).reshape(2 * C * k * k, -1)
    half = filters[: C * k * k]
    np.testing.assert_array_equal(filters[C * k * k :], -half)
    outputs = half @ covariance @ half.T
    np.testing.assert_allclose(np.diag(outputs), 1, rtol=1e-4)  # the filters are rounded to 2^-20
    assert np.abs(outputs - np.diag(np.diag(outputs))).max() < 0.1  # the cosines are not exactly the components
    assert np.linalg.cond(covariance) > 1000 > 2 > np.linalg.cond(outputs)
    few = functional.whitening((24, C, k, k)).reshape(24, -1)[:12]
    np.testing.assert_array_equal(few, half[:12])  # largest variances first
    norms = np.linalg.norm(half, axis=1)  # 1 / standard deviation
    assert (np.diff(norms) > -1e-9).all() and np.ptp(few[0]) < 1e-6, "the brightness comes first"
    assert (half.astype(np.float32) == half).all() and not np.signbit(filters[filters == 0]).any()
    for channels in (1, 2, 3):  # of two components with the same variance, the rougher one along the width comes first
        once = functional.whitening((2 * channels * k * k, channels, k, k))[: channels * k * k]
        for f, g in itertools.pairwise(once):
            if np.array_equal(f, g.swapaxes(1, 2)) and not np.array_equal(f, g):
                assert (np.diff(f, axis=1) ** 2).sum() < (np.diff(f, axis=2) ** 2).sum()
    for out in (5, 56):
        with pytest.raises(ValueError, match="even and at most 54"):
            functional.whitening((out, C, k, k))

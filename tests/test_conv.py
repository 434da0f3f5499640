"""Convolutions in groups, dilated and transposed, and upsampling: against torch.nn on random shapes, both engines."""

import copy
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cnnmpi
from cnnmpi import functional, functional_torch
from cnnmpi import layers as L
from cnnmpi.functional import depthwise
from tests.twins import DTYPES, SIZES, SWEEP, Wrapped, check, rng, torch

pytestmark = pytest.mark.mpi_skip  # the same on each rank

nn = torch.nn
ENGINES = st.sampled_from(["numpy", "torch"])


def fits(size: int, k: int, padding: int, dilation: int) -> bool:
    return size + 2 * padding >= dilation * (k - 1) + 1


@SWEEP
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), SIZES, SIZES, st.integers(1, 4),
       st.integers(1, 3), st.integers(0, 3), st.integers(1, 3), st.booleans(), DTYPES, ENGINES)  # fmt: skip
def test_conv2d_in_groups(n, groups, in_each, out_each, h, w, k, stride, padding, dilation, bias, dtype, engine):
    if not (fits(h, k, padding, dilation) and fits(w, k, padding, dilation)):
        return
    in_c, out_c = groups * in_each, groups * out_each
    options = {"groups": groups, "dilation": dilation}
    layer = L.Conv2d(in_c, out_c, k, stride, padding, bias, **options, rng=rng(0), dtype=dtype)
    x = rng(1).standard_normal((n, in_c, h, w)).astype(dtype)
    check(layer, nn.Conv2d(in_c, out_c, k, stride, padding, bias=bias, **options), x, engine=engine)


@SWEEP
@given(st.integers(1, 3), st.integers(2, 40), SIZES, SIZES, st.tuples(st.integers(1, 4), st.integers(1, 4)),
       st.tuples(st.integers(1, 3), st.integers(1, 3)), st.tuples(st.integers(0, 3), st.integers(0, 3)),
       st.tuples(st.integers(1, 2), st.integers(1, 2)), st.booleans(), DTYPES, ENGINES)  # fmt: skip
def test_depthwise_conv2d(n, channels, h, w, k, stride, padding, dilation, bias, dtype, engine):
    sizes = itertools.starmap(fits, zip((h, w), k, padding, dilation, strict=True))
    if not all(sizes):
        return
    options = {"groups": channels, "dilation": dilation}
    layer = L.Conv2d(channels, channels, k, stride, padding, bias, **options, rng=rng(0), dtype=dtype)
    x = rng(1).standard_normal((n, channels, h, w)).astype(dtype)
    check(layer, nn.Conv2d(channels, channels, k, stride, padding, bias=bias, **options), x, engine=engine)


@SWEEP
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(2, 7), st.integers(2, 7),
       st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2), st.integers(1, 2), st.booleans(),
       DTYPES, ENGINES)  # fmt: skip
def test_conv_transpose2d(n, groups, in_each, out_each, h, w, k, stride, padding, more, dilation, bias, dtype, engine):
    more = min(more, max(stride, dilation) - 1)
    smallest = (min(h, w) - 1) * stride + dilation * (k - 1) + 1 + more - 2 * padding
    if smallest < 1:
        return
    in_c, out_c = groups * in_each, groups * out_each
    options = {"groups": groups, "dilation": dilation}
    layer = L.ConvTranspose2d(in_c, out_c, k, stride, padding, more, bias, **options, rng=rng(0), dtype=dtype)
    x = rng(1).standard_normal((n, in_c, h, w)).astype(dtype)
    check(layer, nn.ConvTranspose2d(in_c, out_c, k, stride, padding, more, bias=bias, **options), x, engine=engine)


@SWEEP
@given(st.integers(1, 3), st.integers(1, 4), SIZES, SIZES, st.integers(1, 4), st.integers(1, 4), DTYPES, ENGINES)
def test_upsample(n, channels, h, w, tall, wide, dtype, engine):
    x = rng(1).standard_normal((n, channels, h, w)).astype(dtype)
    check(L.Upsample((tall, wide)), nn.Upsample(scale_factor=(tall, wide)), x, engine=engine)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_no_number_of_threads_changes_a_bit(groups):
    """64 images, so that they are cut into several blocks."""
    x = rng(1).standard_normal((64, 16, 32, 32)).astype(np.float32)
    W = rng(2).standard_normal((16, 16 // groups, 3, 3)).astype(np.float32)
    results = []
    try:
        for threads in (1, 2, 3):
            functional.set_threads(threads)
            y, cache = functional.conv2d(x, W, None, padding=1, groups=groups, stride=2)
            results.append([y, *functional.conv2d_backward(y, cache)[:2]])
    finally:
        functional.set_threads(1)
    for result in results[1:]:
        assert all(np.array_equal(one, other) for one, other in zip(results[0], result, strict=True))


def test_a_filter_a_channel_goes_its_own_way():
    for shape, groups, own in [((4, 1, 3, 3), 4, True), ((8, 1, 3, 3), 4, False), ((4, 2, 3, 3), 2, False)]:
        assert depthwise.suits(np.zeros(shape), groups) == own
    assert not depthwise.suits(np.zeros((1, 1, 3, 3)), 1), "one channel is an ordinary convolution"


def test_copies_and_names_are_whole():
    layer = L.Conv2d(4, 6, 3, groups=2, dilation=(1, 2))
    assert repr(layer) == "Conv2d(4, 6, 3, stride=1, padding=0, dilation=(1, 2), groups=2)"
    x = rng(0).standard_normal((2, 4, 7, 7)).astype(np.float32)
    assert np.array_equal(copy.deepcopy(layer).forward(x), layer.forward(x))
    up = L.ConvTranspose2d(4, 6, 2, 2, output_padding=1)
    assert "output_padding=1" in repr(up) and repr(L.Upsample(2)) == "Upsample(2)"


@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: L.Conv2d(4, 6, 3, groups=3), "Conv2d: 4 channels cannot be shared out to 3 groups"),
        (lambda: L.Conv2d(4, 6, 3, groups=4), "Conv2d: 6 channels cannot be shared out to 4 groups"),
        (lambda: L.Conv2d(4, 4, 3, groups=0), "cannot be shared out to 0 groups"),
        (lambda: L.Conv2d(4, 4, 3, groups=1.5), "Conv2d: groups must be a whole number, got 1.5"),
        (lambda: L.Conv2d(4, 4, 3, dilation=0), "Conv2d: dilation 0 must be at least 1"),
        (lambda: L.Conv2d(4, 4, 3, stride=(1, 0)), r"Conv2d: stride \(1, 0\) must be at least 1"),
        (lambda: L.Conv2d(4, 4, 3, padding=-1), "Conv2d: padding -1 must be at least 0"),
        (lambda: L.ConvTranspose2d(4, 6, 3, groups=4), "ConvTranspose2d: 6 channels cannot be shared out"),
        (lambda: L.Upsample(0), "Upsample: scale_factor 0 must be at least 1"),
        (lambda: L.Upsample(1.5), "whole number"),
        (lambda: L.Conv2d(4, 4, 3, dilation=4), r"kernel of size 3 and dilation 4 does not fit into .* size 7"),
        (lambda: L.ConvTranspose2d(4, 4, 3, 2, output_padding=2), "output_padding 2 must be .* below stride 2"),
        (lambda: L.ConvTranspose2d(4, 4, 1, padding=4), "padding 4 leaves nothing of the output"),
        (lambda: L.Conv2d(5, 4, 3), r"expected an input of shape \(N, 5, H, W\)"),
    ],
)
def test_what_cannot_be_is_one_line(make, message, engine):
    with pytest.raises(ValueError, match=message) as error:
        layer = make()
        model = Wrapped(layer)
        if engine == "torch":
            model.to_torch()
        model.forward(model.as_array(np.zeros((1, 4, 7, 7), np.float32)))
    assert "\n" not in str(error.value)


def test_public_names():
    assert {"ConvTranspose2d", "Upsample"} <= set(cnnmpi.__all__)


@pytest.mark.parametrize("F", [functional, functional_torch], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    "op, options",
    [
        ("conv2d", {"padding": 1}),  # by Winograd's way
        ("conv2d", {"padding": 1, "stride": 2}),
        ("conv2d", {"padding": 1, "groups": 16}),
        ("conv_transpose2d", {"padding": 1, "stride": 2}),
    ],
)
def test_without_weight_grad_dx_is_the_same_and_the_others_are_not_computed(F, op, options):
    x, W, b = (F.as_array(rng(1).standard_normal(shape)) for shape in ((4, 16, 12, 12), (16, 16, 3, 3), (16,)))
    W = W[:, :1] if "groups" in options else W
    results = []
    for wanted in (True, False):
        y, cache = getattr(F, op)(x, W, b, **options)
        results.append(getattr(F, f"{op}_backward")(y, cache, weight_grad=wanted))
    (dx, dW, db), (same, no_dW, no_db) = results
    assert dW is not None and db is not None and no_dW is None and no_db is None
    np.testing.assert_array_equal(F.to_numpy(dx), F.to_numpy(same))


def test_a_frozen_convolution_asks_for_no_weight_grad(monkeypatch):
    asked = []

    def backward(dy, cache, *, input_grad, weight_grad):
        asked.append(weight_grad)
        return dy, None, None

    monkeypatch.setattr(functional, "conv2d_backward", backward)
    layer = L.Conv2d(3, 3, 1)
    x = np.ones((1, 3, 4, 4), np.float32)
    layer.backward(layer.forward(x))
    layer.freeze()
    layer.backward(layer.forward(x))
    assert asked == [True, False]

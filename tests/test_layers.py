"""Every layer against its torch.nn twin: outputs, input gradients, parameter gradients; and what all layers promise."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cnnmpi
from cnnmpi import layers as L
from tests.every_layer import LAYERS
from tests.twins import ATOL, DTYPES, SIZES, SWEEP, Wrapped, check, rng, torch

nn = torch.nn


@SWEEP
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), SIZES, SIZES, st.integers(1, 5), st.integers(1, 4),
       st.integers(0, 2), st.booleans(), DTYPES)  # fmt: skip
def test_conv2d(n, in_c, out_c, h, w, k, stride, padding, bias, dtype):
    layer = L.Conv2d(in_c, out_c, k, stride, padding, bias, rng=rng(0), dtype=dtype)
    x = rng(1).standard_normal((n, in_c, h, w)).astype(dtype)
    check(layer, nn.Conv2d(in_c, out_c, k, stride, padding, bias=bias), x)


@pytest.mark.parametrize("k, stride, padding", [((3, 2), (2, 1), (1, 0)), ((1, 5), (1, 3), (0, 2)), (1, 2, 1)])
def test_conv2d_sizes_that_differ_by_axis(k, stride, padding):
    x = rng(1).standard_normal((2, 3, 9, 11))
    check(L.Conv2d(3, 4, k, stride, padding, dtype=np.float64), nn.Conv2d(3, 4, k, stride, padding), x)


@SWEEP
@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7), st.booleans(), DTYPES)
def test_linear(n, features, out, bias, dtype):
    x = rng(1).standard_normal((n, features)).astype(dtype)
    check(L.Linear(features, out, bias, rng=rng(0), dtype=dtype), nn.Linear(features, out, bias), x)


@SWEEP
@given(st.integers(1, 3), st.integers(1, 3), SIZES, SIZES, st.integers(1, 4), st.sampled_from([None, 1, 2, 3, 5]),
       DTYPES, st.sampled_from(["max", "avg"]), st.booleans())  # fmt: skip
def test_pools(n, c, h, w, k, stride, dtype, kind, pad):
    x = rng(1).standard_normal((n, c, h, w)).astype(dtype)
    x[x < 0] = 0  # as after a ReLU: ties, of which the first must receive the gradient
    ours, theirs = (L.MaxPool2d, nn.MaxPool2d) if kind == "max" else (L.AvgPool2d, nn.AvgPool2d)
    padding = k // 2 if pad else 0
    check(ours(k, stride, padding), theirs(k, stride, padding), x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5, 7), (2, 3, 1, 1)])
def test_batch_norm(shape, training, dtype):
    x = (3 + 2 * rng(1).standard_normal(shape)).astype(dtype)
    layer = L.BatchNorm(3, dtype=dtype)
    layer.params["weight"][...], layer.params["bias"][...] = [0.5, 1, 2], [1, 0, -1]
    twin = nn.BatchNorm1d(3) if len(shape) == 2 else nn.BatchNorm2d(3)
    check(layer, twin, x)  # also moves the running statistics
    layer.train_mode(training)
    layer.zero_grad()
    twin.train(training).zero_grad()
    check(layer, twin, x)
    for name in ("running_mean", "running_var"):
        np.testing.assert_allclose(layer.buffers[name], getattr(twin, name).numpy(), rtol=ATOL[dtype], atol=ATOL[dtype])


@SWEEP
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.lists(st.integers(2, 7), min_size=2, max_size=2),
       st.booleans(), DTYPES, st.sampled_from(["numpy", "torch"]))  # fmt: skip
def test_group_norm(n, groups, width, size, images, dtype, engine):
    channels = groups * width
    shape = (n, channels, *size) if images else (n, channels)
    eps = 0.1  # where a group is one value, the slope is 1 / sqrt(eps)
    layer = L.GroupNorm(groups, channels, eps, dtype=dtype)
    for key in ("weight", "bias"):
        layer.params[key][...] = rng(2).standard_normal(channels)
    if images or n * width > 1:  # torch refuses one value
        x = (3 + 2 * rng(1).standard_normal(shape)).astype(dtype)
        check(layer, nn.GroupNorm(groups, channels, eps), x, engine=engine)


def test_group_norm_refuses_groups_that_do_not_fit():
    for groups, channels in ((4, 6), (0, 6), (12, 6), (-2, 6), (2, 0), (2, -6)):
        message = f"^GroupNorm: {channels} channels cannot be shared out to {groups} groups"
        with pytest.raises(ValueError, match=message):
            L.GroupNorm(groups, channels)
    with pytest.raises(ValueError, match=r"^GroupNorm: num_groups must be a whole number, got 2\.5"):
        L.GroupNorm(2.5, 6)
    with pytest.raises(
        ValueError, match=r"^GroupNorm\(2, 6\): expected an input of shape \(N, 6, H, W\), got \(1, 4, 3, 3\)"
    ):
        L.GroupNorm(2, 6).forward(np.zeros((1, 4, 3, 3), np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "ours, theirs, shape",
    [
        (L.ReLU(), nn.ReLU(), (3, 2, 5, 4)),
        (L.ReLU(), nn.ReLU(), (3, 4)),
        (L.Flatten(), nn.Flatten(), (3, 2, 5, 4)),
        (L.Softmax(), nn.Softmax(dim=-1), (3, 6)),
        (L.Identity(), nn.Identity(), (3, 6)),
        (L.GlobalAvgPool2d(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), (3, 4, 5, 7)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_without_parameters(ours, theirs, shape, dtype):
    check(ours, theirs, rng(1).standard_normal(shape).astype(dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_whitening_is_a_convolution_that_learns_nothing(dtype):
    layer, twin = L.Whitening(3, 12, (3, 5), dtype=dtype), nn.Conv2d(3, 12, (3, 5), padding=(1, 2), bias=False)
    twin.weight.requires_grad_(False)
    twin.weight.data = torch.from_numpy(np.array(layer.buffers["weight"], order="C"))
    x = rng(1).standard_normal((2, 3, 6, 8)).astype(dtype)
    tx = torch.from_numpy(x.copy()).requires_grad_()
    y, ty = layer.forward(x), twin(tx)
    np.testing.assert_allclose(y, ty.detach().numpy(), rtol=ATOL[dtype], atol=ATOL[dtype])
    dout = rng(7).standard_normal(y.shape).astype(dtype)
    ty.backward(torch.from_numpy(dout))
    np.testing.assert_allclose(layer.backward(dout), tx.grad.numpy(), rtol=ATOL[dtype], atol=ATOL[dtype])
    assert layer.parameters() == []
    with pytest.raises(ValueError, match="odd"):
        L.Whitening(3, 12, 2)


class TorchResidual(nn.Module):
    def __init__(self, body, shortcut):
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x):
        return self.body(x) + self.shortcut(x)


@pytest.mark.parametrize("widen", [False, True])
def test_residual_of_sequentials(widen):
    out = 5 if widen else 3
    ours = L.Residual(
        L.Sequential(L.Conv2d(3, out, 3, padding=1, dtype=np.float64), L.BatchNorm(out, dtype=np.float64), L.ReLU()),
        L.Conv2d(3, out, 1, bias=False, dtype=np.float64) if widen else None,
    )
    body = nn.Sequential(nn.Conv2d(3, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU())
    theirs = TorchResidual(body, nn.Conv2d(3, out, 1, bias=False) if widen else nn.Identity())
    check(ours, theirs, rng(1).standard_normal((2, 3, 6, 5)))


class TorchConcat(nn.Sequential):
    def forward(self, x):
        return torch.cat([branch(x) for branch in self], 1)


@SWEEP
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), SIZES, DTYPES,
       st.sampled_from(["numpy", "torch"]))  # fmt: skip
def test_concat(n, in_c, first, second, size, dtype, engine):
    ours = L.Concat(
        L.Conv2d(in_c, first, 1, dtype=dtype),
        L.Identity(),
        L.Sequential(L.Conv2d(in_c, second, 3, padding=1, bias=False, dtype=dtype), L.Sigmoid()),
    )
    body = nn.Sequential(nn.Conv2d(in_c, second, 3, padding=1, bias=False), nn.Sigmoid())
    theirs = TorchConcat(nn.Conv2d(in_c, first, 1), nn.Identity(), body)
    check(ours, theirs, rng(1).standard_normal((n, in_c, size, size + 1)).astype(dtype), engine=engine)


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_concat_of_features_in_a_model(engine):
    """A DenseNet's growth: each layer sees what came before it. Rows, too, have channels: their features."""
    ours, theirs = L.Sequential(), nn.Sequential()
    for width in (3, 5, 7):
        ours = L.Sequential(*ours, L.Concat(L.Identity(), L.Linear(width, 2, dtype=np.float64)))
        theirs.append(TorchConcat(nn.Identity(), nn.Linear(width, 2)))
    x = rng(1).standard_normal((4, 3))
    check(ours, theirs, x, engine=engine)
    assert list(ours.named_parameters()) == [f"{i}.1.{key}" for i in range(3) for key in ("weight", "bias")]


def test_a_concat_leaves_dx_out_only_as_a_whole():
    convs = [L.Conv2d(2, 3, 1, rng=rng(i)) for i in range(2)]
    x = rng(1).standard_normal((2, 2, 4, 4)).astype(np.float32)
    whole = L.Concat(L.Identity(), *convs)
    dout = rng(2).standard_normal(whole.forward(x).shape).astype(np.float32)
    dx = whole.backward(dout)
    grads = [grad.copy() for _, grad in whole.parameters()]
    expected = dout[:, :2]
    for conv, part in zip(convs, (dout[:, 2:5], dout[:, 5:]), strict=True):
        expected = expected + np.einsum("oc,nohw->nchw", conv.params["weight"][:, :, 0, 0], part)
    np.testing.assert_allclose(dx, expected, atol=1e-5)
    whole.zero_grad()
    whole.skip_input_grad()
    assert not any(conv.input_grad for conv in convs)
    whole.forward(x)
    assert whole.backward(dout) is None
    assert all(np.array_equal(grad, old) for (_, grad), old in zip(whole.parameters(), grads, strict=True))
    chain = L.Sequential(L.Concat(L.Identity(), L.ReLU()), L.Conv2d(4, 1, 1), L.Conv2d(1, 1, 1))
    chain.skip_input_grad()
    assert [layer.input_grad for layer in chain[1:]] == [False, True]


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_what_concat_refuses(engine):
    with pytest.raises(ValueError, match=r"^Concat: expected branches, one after another, got none$"):
        L.Concat()
    with pytest.raises(TypeError, match=r"^Concat: expected layers, one after another, got a list$"):
        L.Concat([L.Identity()])
    model = Wrapped(L.Sequential(L.Concat(L.Identity(), L.MaxPool2d(2))))
    if engine == "torch":
        model.to_torch()
    shapes = r"\[\(2, 3, 4, 4\), \(2, 3, 2, 2\)\]"
    with pytest.raises(ValueError, match=rf"^layer\.0 Concat: arrays to join may differ .* only, got {shapes}$"):
        model.forward(model.as_array(np.zeros((2, 3, 4, 4), np.float32)))
    flat = L.Concat(L.Identity(), L.Flatten())
    with pytest.raises(ValueError, match=r"got \[\(2, 3, 4, 4\), \(2, 48\)\]$"):
        flat.forward(np.zeros((2, 3, 4, 4), np.float32))


def test_a_branch_is_replaced_like_a_layer_of_a_chain():
    whole = L.Concat(L.Linear(3, 2), L.Identity())
    whole[1] = L.Linear(3, 4)
    assert len(whole) == 2 and whole[1].name == "1"
    assert whole.forward(np.zeros((1, 3), np.float32)).shape == (1, 6)
    assert repr(whole) == "Concat(Linear(3, 2), Linear(3, 4))"


def test_dropout_keeps_the_expectation_and_masks_the_gradient_alike():
    layer = L.Dropout(0.3, seed=1)
    x = np.ones((100, 100), np.float32)
    y = layer.forward(x)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.7)}
    assert abs(y.mean() - 1) < 0.03  # 10,000 draws: standard deviation 0.0065
    np.testing.assert_array_equal(layer.backward(x), y)
    assert not np.array_equal(layer.forward(x), y), "the next mask must be another one"
    layer.reseed(1)
    np.testing.assert_array_equal(layer.forward(x), y)
    layer.train_mode(False)
    np.testing.assert_array_equal(layer.forward(x), x)
    np.testing.assert_array_equal(layer.backward(x), x)


@pytest.mark.parametrize("layer, shape", LAYERS, ids=[type(layer).__name__ for layer, _ in LAYERS])
def test_no_layer_writes_into_its_input_or_its_dout(layer, shape):
    x = rng(0).standard_normal(shape).astype(np.float32)
    x.flags.writeable = False
    dout = rng(1).standard_normal(layer.forward(x).shape).astype(np.float32)
    dout.flags.writeable = False
    layer.backward(dout)


@pytest.mark.parametrize("layer, shape", LAYERS, ids=[type(layer).__name__ for layer, _ in LAYERS])
def test_backward_needs_a_forward_of_its_own(layer, shape):
    x = rng(0).standard_normal(shape).astype(np.float32)
    dout = layer.forward(x)
    layer.backward(dout)
    with pytest.raises(RuntimeError, match=r"backward\(\) needs a forward\(\)"):
        layer.backward(dout)


@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize("layer, shape", LAYERS, ids=[type(layer).__name__ for layer, _ in LAYERS])
def test_backward_refuses_a_dout_of_another_shape_than_the_output(layer, shape, engine):
    model = Wrapped(copy.deepcopy(layer))
    if engine == "torch":
        model.to_torch()
    inside = model.layer
    y = inside.forward(model.as_array(rng(0).standard_normal(shape).astype(np.float32)))
    n, *rest = y.shape
    for wrong in ((1, *rest), (n + 1, *rest), (n, *rest, 1), (n, rest[0] + 1, *rest[1:]), (n,), ()):
        dout = model.as_array(np.ones(wrong, np.float32))
        with pytest.raises(ValueError, match=r"expected a dout of shape \(.*\), as y has, got"):
            inside.backward(dout)
    inside.backward(model.as_array(np.ones(tuple(y.shape), np.float32)))  # the cache is still there


@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize("layer, shape", LAYERS, ids=[type(layer).__name__ for layer, _ in LAYERS])
def test_an_output_changed_in_place_is_refused_or_harmless(layer, shape, engine):
    model = Wrapped(copy.deepcopy(layer))
    if engine == "torch":
        model.to_torch()
    x = rng(0).standard_normal(shape).astype(np.float32)
    model.reseed(0, 0, 0)
    y = model.layer.forward(model.as_array(x.copy()))
    dout = model.as_array(rng(1).standard_normal(tuple(y.shape)).astype(np.float32))
    expected = np.array(model.F.to_numpy(model.layer.backward(dout)))
    model.reseed(0, 0, 0)
    y = model.layer.forward(model.as_array(x.copy()))
    try:
        y += 1
        dx = np.array(model.F.to_numpy(model.layer.backward(dout)))
    except (ValueError, RuntimeError) as error:
        assert "read-only" in str(error) or "changed in place" in str(error)
    else:
        np.testing.assert_array_equal(dx, expected)


def test_a_relu_whose_output_is_added_to_in_place_is_refused():
    relu = L.ReLU()
    h = relu.forward(np.array([[-1.0, 2.0]], np.float32))
    with pytest.raises(ValueError, match="read-only"):
        h += 1
    np.testing.assert_array_equal(relu.backward(np.ones((1, 2), np.float32)), [[0, 1]])


def test_dropouts_of_one_chain_have_masks_of_their_own():
    chain = L.Sequential(L.Dropout(0.5), L.Dropout(0.5), L.Residual(L.Dropout(0.5)))
    kept = chain.forward(np.ones((200, 200), np.float32)) > 4  # passed all three: 1/2 * 1/2 * 1/2
    assert abs(kept.mean() - 1 / 8) < 0.01  # 40,000 draws: standard deviation 0.0017
    assert len({layer.name for _, layer in chain.walk()}) == 6


def test_gradients_add_up_until_zero_grad():
    layer, x = L.Linear(3, 2, rng=rng(0)), np.ones((4, 3), np.float32)
    layer.backward(layer.forward(x))
    once = layer.grads["weight"].copy()
    layer.backward(layer.forward(x))
    np.testing.assert_array_equal(layer.grads["weight"], 2 * once)
    layer.zero_grad()
    assert not layer.grads["weight"].any()


@pytest.mark.parametrize(
    "layer, x, message",
    [
        (
            L.Conv2d(3, 8, 3),
            np.zeros((2, 4, 9, 9), "f"),
            r"Conv2d\(3, 8, 3.*expected .*\(N, 3, H, W\), got \(2, 4, 9, 9\)",
        ),
        (L.Conv2d(3, 8, 3), np.zeros((2, 3, 9, 9)), "Conv2d.*dtype float32, got float64"),
        (L.Conv2d(3, 8, 5), np.zeros((2, 3, 4, 9), "f"), "Conv2d.*size 5 does not fit into an input of size 4"),
        (L.Linear(4, 2), np.zeros((3, 5), "f"), r"Linear\(4, 2\).*\(N, 4\), got \(3, 5\)"),
        (L.BatchNorm(4), np.zeros((3, 5), "f"), r"BatchNorm\(4\).*\(N, 4\), got \(3, 5\)"),
        (L.BatchNorm(4), np.zeros((1, 4), "f"), r"BatchNorm\(4\).*more than one value"),
        (L.MaxPool2d(3), np.zeros((1, 1, 2, 9), "f"), "MaxPool2d.*does not fit"),
        (L.AvgPool2d(3), np.zeros((2, 9), "f"), r"AvgPool2d.*\(N, C, H, W\), got \(2, 9\)"),
        (L.Residual(L.Linear(3, 2)), np.zeros((1, 3), "f"), r"Residual: the body gives \(1, 2\).*\(1, 3\)"),
    ],
)
def test_errors_name_layer_and_shapes(layer, x, message):
    with pytest.raises(ValueError, match=message):
        layer.forward(x)


def test_the_public_names():
    for name in cnnmpi.__all__:
        assert getattr(cnnmpi, name) is not None
    assert L.Conv2d(1, 1, 1).use_torch is False


@pytest.mark.parametrize("precision", ["numpy", "float32", "bfloat16"])
def test_linear_computes_only_the_gradients_that_are_wanted(precision):
    model = Wrapped(L.Linear(6, 4))
    if precision != "numpy":
        model.to_torch(precision=precision)
    F, layer = model.layer.F, model.layer
    x, dout = (model.as_array(rng(3).standard_normal(shape).astype(np.float32)) for shape in ((5, 6), (5, 4)))
    _, cache = F.linear(x, layer.params["weight"], layer.params["bias"])
    whole = F.linear_backward(dout, cache)
    assert all(grad is not None for grad in whole)
    for input_grad, weight_grad in ((True, False), (False, True), (False, False)):
        grads = F.linear_backward(dout, cache, input_grad=input_grad, weight_grad=weight_grad)
        for grad, full, wanted in zip(grads, whole, (input_grad, weight_grad, weight_grad), strict=True):
            assert (grad is not None) == wanted and (grad is None or bool((grad == full).all()))
    model.layer.skip_input_grad()
    model.forward(x)
    assert model.layer.backward(dout) is None

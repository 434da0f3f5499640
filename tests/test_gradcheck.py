"""check_gradients: every layer and loss passes, and each kind of wrong backward is named, with place and amount."""

import copy
import functools
from typing import Any

import numpy as np
import pytest

import cnnmpi
from cnnmpi import functional
from cnnmpi import layers as L
from tests.every_layer import LAYERS
from tests.test_functional import needs_torch

pytestmark = pytest.mark.mpi_skip  # the same on each rank


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[type(layer).__name__ for layer, _ in LAYERS])
@pytest.mark.parametrize("training", [True, False])
def test_every_layer_has_the_gradient_of_its_forward(layer: L.Layer, shape: tuple[int, ...], training: bool) -> None:
    layer = copy.deepcopy(layer)
    layer.train_mode(training)
    errors = cnnmpi.check_gradients(layer, shape)
    assert list(errors) == ["x", *layer.named_parameters()]
    assert max(errors.values()) < 1e-8  # rounding, 1e-16, over steps of 1e-5


def test_no_layer_is_left_out() -> None:
    public = [getattr(L, name) for name in L.__all__]
    named = {kind.__name__ for kind in public if isinstance(kind, type) and issubclass(kind, L.Layer)} - {
        "Layer",
        "Convolution",
    }
    tried = {type(each).__name__ for layer, _ in LAYERS for _, each in layer.walk()}
    assert named - tried == set()


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (functional.cross_entropy_loss, np.array([0, 3, 3, 1, 2])),
        (functools.partial(functional.cross_entropy_loss, label_smoothing=0.2), np.array([0, 3, 3, 1, 2])),
        (functools.partial(functional.cross_entropy_loss, weight=[1, 2, 0.5, 3]), np.array([0, 3, 3, 1, 2])),
        (functional.cross_entropy_loss, np.full((5, 4), 0.25, np.float32)),
        (
            functools.partial(functional.cross_entropy_loss, label_smoothing=0.2, weight=[1, 2, 0.5, 3]),
            0.3 * np.eye(5, 4) + 0.7 * np.eye(5, 4)[::-1],  # as mixup makes them
        ),
        (functional.binary_cross_entropy_loss, np.eye(5, 4)),
        (functools.partial(functional.binary_cross_entropy_loss, pos_weight=[1, 2, 0.5, 3]), np.eye(5, 4)),
        (functional.mse_loss, np.eye(5, 4)),
    ],
)
def test_every_loss_has_the_gradient_of_its_value(loss: Any, targets: np.ndarray) -> None:
    errors = cnnmpi.check_gradients(loss, (5, 4), targets=targets)
    assert list(errors) == ["sum", "mean"] and max(errors.values()) < 1e-8
    cnnmpi.check_gradients(loss, (1, 4), targets=targets[:1])


def test_a_model_is_checked_in_float64_and_stays_as_it_is() -> None:
    model = cnnmpi.SimpleCNN(image_size=8)
    model.eval()  # keeps nothing for a backward: the copy does
    before, grads = model.state_dict(), [grad.copy() for _, grad in model.parameters()]
    errors = cnnmpi.check_gradients(model, (2, 3, 8, 8))
    assert set(errors) == {"x", *before} and max(errors.values()) < 1e-8
    assert all(np.array_equal(array, before[name]) for name, array in model.state_dict().items())
    assert all(np.array_equal(grad, old) for (_, grad), old in zip(model.parameters(), grads, strict=True))
    assert not any(layer.training or layer.caching for _, layer in model.walk())


@needs_torch
def test_a_model_that_computes_with_torch_can_be_checked() -> None:
    model = cnnmpi.SimpleCNN(image_size=8).to_torch()
    assert max(cnnmpi.check_gradients(model, (2, 3, 8, 8)).values()) < 1e-8
    assert model.use_torch and all(param.shape for param, _ in model.parameters())


def test_running_statistics_and_masks_are_the_same_in_every_forward() -> None:
    chain = L.Sequential(L.BatchNorm(3), L.Dropout(0.5), L.Linear(3, 2))
    chain.forward(np.random.default_rng(0).standard_normal((9, 3)).astype("float32"))
    before = chain[0].buffers["running_mean"].copy()
    for training in (True, False):
        chain.train_mode(training)
        cnnmpi.check_gradients(chain, (6, 3))
    assert np.array_equal(chain[0].buffers["running_mean"], before)


# -- what is wrong is named ------------------------------------------------------------------------------------------


class Faulty(L.Linear):
    """A Linear(3, 3) whose backward is right unless a subclass says otherwise."""

    def __init__(self) -> None:
        super().__init__(3, 3, rng=np.random.default_rng(0))

    def backward(self, dout: Any) -> Any:
        x, W, _ = self._taken(dout)
        return self.wrong(dout, x, W)

    def wrong(self, dout: Any, x: Any, W: Any) -> Any:
        self.add_grads(weight=dout.T @ x, bias=dout.sum(0))
        return dout @ W


class Overwrites(Faulty):
    def wrong(self, dout, x, W):
        self.grads["weight"][...] = dout.T @ x
        self.add_grads(bias=dout.sum(0))
        return dout @ W


class Rebinds(Faulty):
    def wrong(self, dout, x, W):
        self.grads["bias"] = dout.sum(0)
        self.add_grads(weight=dout.T @ x)
        return dout @ W


class Twice(Faulty):
    def wrong(self, dout, x, W):
        self.add_grads(weight=2 * dout.T @ x, bias=dout.sum(0))
        return dout @ W


class Transposed(Faulty):
    def wrong(self, dout, x, W):
        self.add_grads(weight=x.T @ dout, bias=dout.sum(0))
        return dout @ W


class NoBias(Faulty):
    def wrong(self, dout, x, W):
        self.add_grads(weight=dout.T @ x)
        return dout @ W


class TransposedInput(Faulty):
    def wrong(self, dout, x, W):
        self.add_grads(weight=dout.T @ x, bias=dout.sum(0))
        return dout @ W.T


class OneElement(Faulty):
    def wrong(self, dout, x, W):
        super().wrong(dout, x, W)
        dx = dout @ W
        dx[1, 2] *= 1.01
        return dx


class Shape(Faulty):
    def wrong(self, dout, x, W):
        super().wrong(dout, x, W)
        return (dout @ W)[0]


class NoInput(Faulty):
    def wrong(self, dout, x, W):
        super().wrong(dout, x, W)


class WritesDout(Faulty):
    def wrong(self, dout, x, W):
        dx = super().wrong(dout, x, W)
        dout *= 2
        return dx


class WritesX(Faulty):
    def forward(self, x):
        y = super().forward(x)
        x += 1
        return y


class WritesWeight(Faulty):
    def wrong(self, dout, x, W):
        dx = super().wrong(dout, x, W)
        W -= 0.1 * self.grads["weight"]
        return dx


class Random(Faulty):
    def forward(self, x):
        return super().forward(x) * np.random.default_rng().uniform()


class Single(Faulty):
    def forward(self, x):
        return super().forward(x).astype(np.float32)


class SingleBackward(Faulty):
    def wrong(self, dout, x, W):
        return super().wrong(dout, x, W).astype(np.float32)


class Infinite(Faulty):
    def forward(self, x):
        return super().forward(x) + np.inf


class NoGradient(Faulty):
    def __init__(self):
        super().__init__()
        self.params["scale"] = np.ones(3, np.float32)


NUMBER = r"-?\d[\d.e-]*"
WRONG = rf"is wrong: along a random direction {NUMBER} by central differences, {NUMBER} by backward \(ratio {NUMBER}\)"


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Overwrites, "backward must add to the gradient of weight, but after two calls it is the same as after one"),
        (Rebinds, "backward must add to the gradient of bias, but after two calls it is the same as after one"),
        (
            Twice,
            r"backward's gradient of weight is wrong: .*\(ratio 2\); worst element \[\d, \d\]: .*; right: bias, x$",
        ),
        (
            Transposed,
            rf"backward's gradient of weight {WRONG}; worst element \[\d, \d\]: {NUMBER} against {NUMBER}; right",
        ),
        (
            NoBias,
            r"gradient of bias is 0 everywhere: .*, 0 by backward \(ratio 0\); worst .* against 0; right: weight, x",
        ),
        (TransposedInput, rf"backward's gradient of x {WRONG}; .*; right: bias, weight$"),
        (OneElement, rf"backward's gradient of x {WRONG}; worst element \[1, 2\]: "),
        (Shape, r"backward returns a dx of shape \(3,\), but x has \(4, 3\)"),
        (NoInput, r"backward returns no dx \(None\), but nobody asked it to skip_input_grad\(\)"),
        (WritesDout, "backward writes into dout, which must stay as it was"),
        (WritesX, "forward writes into x, which must stay as it was"),
        (WritesWeight, "backward writes into weight, which must stay as it was"),
        (Random, "forward gives another y for the same x the second time"),
        (Single, "forward gives an array of float32 where x is a NumPy array of float64"),
        (SingleBackward, "backward gives an array of float32 where x is a NumPy array of float64"),
        (Infinite, "forward gives NaN or infinite numbers"),
        (NoGradient, "the parameter scale has no gradient"),
    ],
)
def test_what_is_wrong_with_a_layer_is_named(layer: type[L.Layer], message: str) -> None:
    cnnmpi.check_gradients(Faulty(), (4, 3))
    with pytest.raises(cnnmpi.GradientError, match=rf"^{layer.__name__}\(3, 3\): .*{message}") as caught:
        cnnmpi.check_gradients(layer(), (4, 3))
    assert "\n" not in str(caught.value) and isinstance(caught.value, AssertionError)


def test_the_wrong_gradient_of_a_model_is_found_and_named_first() -> None:
    """A wrong dx makes wrong what lies before it, whose parameters are named after the wrong ones nearest to it."""
    model = cnnmpi.Model()
    model.first, model.second, model.third = L.Linear(3, 3), TransposedInput(), L.Linear(3, 2)
    wrong = (
        r"gradient of first\.bias is wrong: .*; also wrong: first\.weight, x; right: third\.bias, third\.weight, second"
    )
    with pytest.raises(cnnmpi.GradientError, match=wrong):
        cnnmpi.check_gradients(model, (4, 3))


def test_one_wrong_element_of_thousands_is_found_with_its_values() -> None:
    class Scale(L.Layer):
        def forward(self, x):
            return self._keep((x * 3, ()))

        def backward(self, dout):
            self._taken(dout)
            dx = 3 * dout
            dx[2, 5, 7, 11] *= 0.9
            return dx

    with pytest.raises(cnnmpi.GradientError, match=r"worst element \[2, 5, 7, 11\]: ") as caught:
        cnnmpi.check_gradients(Scale(), (4, 8, 16, 16))
    difference, own = map(float, str(caught.value).rpartition(": ")[2].split(" against "))
    assert own == pytest.approx(0.9 * difference, rel=1e-4)


def test_dx_may_be_left_out_where_the_layer_was_asked_to() -> None:
    layer = L.Conv2d(2, 3, 3)
    layer.skip_input_grad()
    assert list(cnnmpi.check_gradients(layer, (2, 2, 5, 5))) == ["weight", "bias"]


def test_kinks_are_a_warning_and_never_an_error() -> None:
    """Zeros: the derivative of ReLU is 0 there, differences say 1/2."""
    with pytest.warns(UserWarning, match=r"ReLU\(\): 15 random directions crossed a kink.*not checked at all: x"):
        errors = cnnmpi.check_gradients(L.ReLU(), x=np.zeros((2, 3)))
    assert np.isnan(errors["x"])
    tied = np.tile(np.random.default_rng(0).standard_normal((2, 2, 1, 4)), (1, 1, 4, 1))
    with pytest.warns(UserWarning, match=r"MaxPool2d.* not checked at all: x"):
        cnnmpi.check_gradients(L.MaxPool2d(2), x=tied)


def test_kinks_near_by_are_avoided_by_other_directions_and_shorter_steps() -> None:
    x = np.random.default_rng(0).choice([-1.0, 1.0], (2, 1000)) * 2e-6  # less than a step from the kink
    with pytest.warns(UserWarning, match=r"ReLU\(\): \d+ random directions crossed a kink.*; others were drawn"):
        errors = cnnmpi.check_gradients(L.ReLU(), x=np.concatenate([x, np.ones_like(x)]))
    assert errors["x"] < 1e-7


def test_a_wrong_gradient_is_an_error_though_there_are_kinks() -> None:
    class Wrong(L.ReLU):
        def backward(self, dout):
            return 2 * super().backward(dout)

    x = np.random.default_rng(0).standard_normal((2, 300))
    x[0, 0] = 0  # one kink
    with pytest.raises(cnnmpi.GradientError, match=r"gradient of x is wrong: .*; worst element \[\d, [1-9]\d*\]"):
        cnnmpi.check_gradients(Wrong(), x=x)


def mse(logits: Any, targets: Any, reduction: str = "mean", *, factor: float = 2) -> Any:
    difference = logits - targets
    count = len(logits) if reduction == "mean" else 1
    return float((difference**2).sum() / count), factor * difference / count


def mean_only(logits: Any, targets: Any, reduction: str = "mean") -> Any:
    return mse(logits, targets)


def odd_mean(logits: Any, targets: Any, reduction: str = "mean") -> Any:
    if reduction == "sum":
        return mse(logits, targets, "sum")
    return float(((logits - targets) ** 4).mean()), 4 * (logits - targets) ** 3 / logits.size


def random_loss(logits: Any, targets: Any, reduction: str = "mean") -> Any:
    return np.random.default_rng().uniform(), logits


def writes(logits: Any, targets: Any, reduction: str = "mean") -> Any:
    result = mse(logits, targets, reduction)
    logits -= logits.max()
    return result


def test_targets_may_be_missing() -> None:
    def known(logits: Any, targets: Any, reduction: str = "mean") -> Any:
        there = ~np.isnan(targets)
        return mse(np.where(there, logits, 0), np.where(there, targets, 0), reduction)

    targets = np.where(np.eye(5, 4) > 0, np.nan, 1.0)
    assert max(cnnmpi.check_gradients(known, (5, 4), targets=targets).values()) < 1e-8


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            functools.partial(mse, factor=1),
            r"mse\(reduction='sum'\): the gradient of logits is wrong: .*\(ratio 0\.5\)",
        ),
        (mean_only, "mean_only: two halves of a batch have other gradients than the whole, for reduction='sum'"),
        (odd_mean, "odd_mean: reduction='mean' must be the 'sum' over a number"),
        (random_loss, "random_loss gives another loss for the same logits the second time"),
        (writes, r"writes\(reduction='sum'\) writes into logits, which must stay as it was"),
        (lambda z, y, reduction: 1.0, r"<lambda>\(reduction='sum'\) must return \(loss, dlogits\), got a float"),
        (lambda z, y, reduction: (np.ones(3), z), "must give one finite number, got array"),
        (lambda z, y, reduction: (np.nan, z), "must give one finite number, got nan"),
        (lambda z, y, reduction: (1.0, z[0]), r"gives a gradient of shape \(4,\), but the logits have \(5, 4\)"),
        (lambda z, y, reduction: (1.0, z.astype("f")), "gives an array of float32"),
    ],
)
def test_what_is_wrong_with_a_loss_is_named(loss: Any, message: str) -> None:
    with pytest.raises(cnnmpi.GradientError, match=message) as caught:
        cnnmpi.check_gradients(loss, (5, 4), targets=np.ones((5, 4)))
    assert "\n" not in str(caught.value)


def test_what_check_gradients_is_asked_must_make_sense() -> None:
    for error, message, args, how in [
        (ValueError, "say the shape of the input", [L.ReLU()], {}),
        (ValueError, r"x has the shape \(2, 3\), not \(3, 3\)", [L.ReLU(), (3, 3)], {"x": np.ones((2, 3))}),
        (ValueError, r"at least one sample, got \(0, 3\)", [L.ReLU(), (0, 3)], {}),
        (ValueError, "a layer has no targets", [L.ReLU(), (3, 3)], {"targets": np.arange(3)}),
        (ValueError, "a loss needs targets", [mse, (3, 3)], {}),
        (TypeError, "expected a layer or a loss, got a int", [3, (3, 3)], {}),
    ]:
        with pytest.raises(error, match=f"^check_gradients: .*{message}"):
            cnnmpi.check_gradients(*args, **how)

"""Convolutions: the operations and the layers."""

import copy
import pickle
import threading
from unittest import mock

import numpy as np
import pytest

from cnnmpi import functional
from cnnmpi import layers as L
from cnnmpi.functional import winograd
from cnnmpi.train.team import Team
from tests.twins import Wrapped, rng


def gradients_by(W: np.ndarray, filters: dict[str, np.ndarray] | None) -> np.ndarray:
    """The sum of what forward and backward return, so that it depends on the transforms of both."""
    y, cache = functional.conv2d(rng(0).standard_normal((2, 8, 8, 8)), W, padding=1, filters=filters)
    return y + functional.conv2d_backward(y, cache)[0]


# -- what is derived from filters -------------------------------------------------------------------------------------


def test_what_is_derived_from_filters_is_kept_where_the_caller_says():
    W, filters = rng(1).standard_normal((8, 8, 3, 3)), {}
    before = gradients_by(W, None)
    np.testing.assert_array_equal(gradients_by(W, filters), before)
    assert len(filters) == 2  # forward's and backward's
    with mock.patch.object(winograd, "_transform_filters", side_effect=AssertionError("transformed again")):
        np.testing.assert_array_equal(gradients_by(W, filters), before)
    W *= 2
    np.testing.assert_array_equal(gradients_by(W, {}), gradients_by(W, None))
    assert np.abs(gradients_by(W, None) - before).max() > 0.1


class Two(L.Layer):
    """Two convolutions of the same sizes, which must not be taken for each other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = L.Conv2d(8, 8, 3, padding=1, rng=rng(0)), L.Whitening(8, 8)

    def forward(self, x):
        return self.second.forward(self.first.forward(x))


def two() -> Wrapped:
    return Wrapped(Two())


def test_the_models_of_a_team_transform_each_filter_once_in_a_map_or_an_evaluation():
    x = rng(1).standard_normal((2, 8, 8, 8)).astype(np.float32)
    team, calls = Team([two(), two()]), []
    transform, expected = winograd._transform_filters, two().forward(x)
    one_at_a_time = threading.Lock()  # threads that come at once may both transform

    def counting(taps: np.ndarray) -> np.ndarray:
        calls.append(taps)
        return transform(taps)

    def body(model, _):
        with one_at_a_time:
            np.testing.assert_array_equal(model.forward(x), expected)

    with mock.patch.object(winograd, "_transform_filters", counting):
        team.map(body, range(6))
        assert len(calls) == 2
        team.map(body, range(6))  # the next step, for which the optimizer changed the weights
        assert len(calls) == 4
        with team.evaluating():
            team.map(body, range(6))
            team.map(body, range(6))
        assert len(calls) == 6
    convolutions = [layer for model in team.models for _, layer in model.walk() if isinstance(layer, L.Convolution)]
    assert len(convolutions) == 4 and all(layer.filters is None for layer in convolutions)


def test_a_team_sees_weights_that_changed_between_two_maps_also_after_a_failure():
    x, team = rng(1).standard_normal((2, 8, 8, 8)).astype(np.float32), Team([two()])

    def fail(model, _):
        model.forward(x)
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        team.map(fail, range(1))
    before = team.models[0].forward(x)
    for param, _ in team.models[0].parameters():
        param *= 2
    (after,) = team.map(lambda model, _: model.forward(x), range(1))
    np.testing.assert_allclose(after, 2 * before, rtol=1e-5, atol=1e-5)  # biases are 0; float32


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_of_a_convolution_begin_without_what_was_derived(how):
    for layer in (L.Conv2d(8, 8, 3, padding=1), L.Whitening(8, 8)):
        layer.filters = {}
        layer.forward(np.ones((1, 8, 8, 8), np.float32))
        assert layer.filters and how(layer).filters is None


@pytest.mark.parametrize("move", ["to_torch", "to_numpy", "astype"])
def test_a_convolution_that_moves_drops_what_was_derived(move):
    if move == "to_torch":
        pytest.importorskip("torch")
    model = Wrapped(L.Conv2d(8, 8, 3, padding=1))
    model.layer.filters = {}
    model.forward(np.ones((1, 8, 8, 8), np.float32))
    assert model.layer.filters
    getattr(model, move)(*([np.float64] if move == "astype" else []))
    assert model.layer.filters is None


def test_layers_can_be_walked_while_another_thread_keeps_what_it_derived():
    layer = L.Conv2d(8, 8, 3)

    class Adds:
        @property
        def __class__(self):  # asked for by the walk, which looks whether this is a layer
            layer.filters[str(len(layer.filters))] = None
            return object

    layer.filters = {"forward": Adds(), "backward": Adds()}
    assert [at for at, _ in layer.walk()] == [""]
    assert len(layer.filters) > 2

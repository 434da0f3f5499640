"""Activations against torch.nn on both engines, far from 0 and at infinity, and what they refuse."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnmpi import functional
from cnnmpi import layers as L
from tests.test_functional import engines
from tests.twins import DTYPES, SWEEP, check, rng, torch

pytestmark = pytest.mark.mpi_skip  # the same on each rank

nn = torch.nn

TWINS: dict[str, tuple[Any, Any]] = {
    "LeakyReLU": (L.LeakyReLU, nn.LeakyReLU),
    "LeakyReLU(0.3)": (lambda: L.LeakyReLU(0.3), lambda: nn.LeakyReLU(0.3)),
    "LeakyReLU(-2)": (lambda: L.LeakyReLU(-2), lambda: nn.LeakyReLU(-2)),
    "LeakyReLU(2)": (lambda: L.LeakyReLU(2), lambda: nn.LeakyReLU(2)),
    "SiLU": (L.SiLU, nn.SiLU),
    "GELU": (L.GELU, nn.GELU),
    "GELU tanh": (lambda: L.GELU(approximate="tanh"), lambda: nn.GELU(approximate="tanh")),
    "Sigmoid": (L.Sigmoid, nn.Sigmoid),
    "Tanh": (L.Tanh, nn.Tanh),
}
each_twin = pytest.mark.parametrize("name", TWINS)
SHAPES = st.lists(st.integers(1, 6), min_size=2, max_size=4)


@each_twin
@SWEEP
@given(SHAPES, st.sampled_from([0.01, 1.0, 5.0]), st.integers(0, 1000), DTYPES, st.sampled_from(["numpy", "torch"]))
def test_activations_are_torchs(name, shape, scale, seed, dtype, engine):
    ours, theirs = TWINS[name]
    x = (scale * rng(seed).standard_normal(shape)).astype(dtype)
    x[0, 0] = 0  # LeakyReLU's kink
    check(ours(), theirs(), x, engine=engine)


@each_twin
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_activations_far_from_0_are_torchs(name, dtype):
    """From where exp overflows to the largest numbers: no warning, which would be an error here."""
    ours, theirs = TWINS[name]
    many = np.concatenate([np.linspace(-50, 50, 10001), [s * 10.0**e for e in range(2, 38) for s in (-1, 1)]])
    x = many.astype(dtype)[None]
    layer, tx = ours(), torch.from_numpy(x.copy()).requires_grad_()
    y, ty = layer.forward(x), theirs()(tx)
    one = np.ones_like(x)
    dx = layer.backward(one)
    inner = abs(x) < 1e10  # beyond, torch's own GELU gives NaN
    ty.backward(torch.from_numpy(one))
    eps = np.finfo(dtype).eps
    # where a GELU and its slope are nearly 0, torch subtracts numbers near 1 and multiplies what is left by up to 8
    np.testing.assert_allclose(y[inner], ty.detach().numpy()[inner], rtol=4 * eps, atol=16 * eps)
    np.testing.assert_allclose(dx[inner], tx.grad.numpy()[inner], rtol=0, atol=32 * eps)
    if name in ("SiLU", "GELU", "GELU tanh"):
        np.testing.assert_allclose(y, np.maximum(x, 0), atol=1)
        np.testing.assert_allclose(dx[~inner], x[~inner] > 0, atol=1e-30)


def test_activations_at_infinity():
    x = np.array([[np.inf, -np.inf, np.nan]])
    for layer, expected in [
        (L.ReLU(), [np.inf, 0]),
        (L.LeakyReLU(0.5), [np.inf, -np.inf]),
        (L.LeakyReLU(0), [np.inf, np.nan]),
        (L.Sigmoid(), [1, 0]),
        (L.Tanh(), [1, -1]),
        (L.SiLU(), [np.inf, np.nan]),
        (L.GELU(), [np.inf, 0]),
        (L.GELU("tanh"), [np.inf, 0]),
    ]:
        np.testing.assert_allclose(layer.forward(x), [[*expected, np.nan]], atol=1e-30)
        assert np.isnan(layer.backward(np.full_like(x, np.nan))).any()


def test_gelu_is_exact_to_some_units_in_the_last_place():
    """By the mathematics of math.erfc, which torch's formula x (1 + erf) / 2 loses below 0."""
    x = np.linspace(-11.9, 11.9, 4001)
    y = functional.gelu(x[None])[0][0]
    exact = [v * math.erfc(-v / math.sqrt(2)) / 2 for v in x.tolist()]
    np.testing.assert_allclose(y, exact, rtol=1e-12)  # exp(-72) is known to 72 units


def test_what_activations_refuse():
    for approximate in ("erf", None, True):
        with pytest.raises(ValueError, match=f"^GELU: approximate must be 'none' or 'tanh', got {approximate!r}$"):
            L.GELU(approximate)
        for F in engines():
            with pytest.raises(ValueError, match=f"^gelu: approximate must be 'none' or 'tanh', got {approximate!r}$"):
                F.gelu(F.as_array(np.ones((2, 3))), approximate=approximate)
    for slope in ("0.1", None, np.nan, np.inf, True, [0.1, 0.2]):
        with pytest.raises(ValueError, match=r"^LeakyReLU: negative_slope must be a finite number, got"):
            L.LeakyReLU(slope)
    assert L.LeakyReLU(np.float32(0.5)).options == {"negative_slope": 0.5}


def test_activations_say_what_they_are():
    layers = [L.ReLU(), L.LeakyReLU(), L.SiLU(), L.GELU(), L.Sigmoid(), L.Tanh()]
    shown = "[ReLU(), LeakyReLU(negative_slope=0.01), SiLU(), GELU(approximate='none'), Sigmoid(), Tanh()]"
    assert repr(layers) == shown

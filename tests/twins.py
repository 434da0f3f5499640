"""A layer beside its torch.nn twin: the same weights, the same input, and then the same outputs and gradients."""

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

import cnnmpi
from cnnmpi import layers as L

torch = pytest.importorskip("torch")

# float32 sums of up to a few thousand products of values near 1 differ by some 1e-6 between orders of summation
ATOL = {np.float32: 1e-5, np.float64: 1e-10}
SWEEP = settings(max_examples=25, deadline=None, derandomize=True)
SIZES = st.integers(5, 12)
DTYPES = st.sampled_from([np.float32, np.float64])
Engine = Literal["numpy", "torch"]


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


class Wrapped(cnnmpi.Model):
    """Any layer, as a model, which knows the engines."""

    def __init__(self, layer: L.Layer) -> None:
        super().__init__()
        self.layer = layer


def numpy_of(layer: L.Layer, a: Any) -> np.ndarray:
    """A copy of an array of the layer's engine, C-contiguous."""
    return np.array(layer.F.to_numpy(a), order="C")


def copy_into_twin(layer: L.Layer, twin: torch.nn.Module) -> None:
    named = dict(twin.named_parameters())
    for name, (param, _) in layer.named_parameters().items():
        named[name].data = torch.from_numpy(numpy_of(layer, param))


def check(layer: L.Layer, twin: torch.nn.Module, x: np.ndarray, rounds: int = 2, *, engine: Engine = "numpy") -> None:
    """Both must give the same y, dx and, summed over ``rounds``, the same parameter gradients.

    With ``engine="torch"`` the layer is moved there first, if it is not there yet, and stays.
    """
    if engine == "torch" and not layer.use_torch:
        Wrapped(layer).to_torch()
    assert layer.use_torch == (engine == "torch")
    F, dtype = layer.F, x.dtype.type
    twin = twin.to(torch.float64 if dtype is np.float64 else torch.float32)
    copy_into_twin(layer, twin)
    for _ in range(rounds):
        tx = torch.from_numpy(x.copy()).requires_grad_()
        ty = twin(tx)
        ours = F.as_array(np.array(x))
        y = layer.forward(ours)
        assert F.to_numpy(y).dtype == dtype
        np.testing.assert_allclose(F.to_numpy(y), ty.detach().numpy(), rtol=ATOL[dtype], atol=ATOL[dtype])
        dout = rng(7).standard_normal(tuple(y.shape)).astype(dtype)
        our_dout = F.as_array(dout.copy())
        ty.backward(torch.from_numpy(dout.copy()))
        dx = layer.backward(our_dout)
        np.testing.assert_allclose(F.to_numpy(dx), tx.grad.numpy(), rtol=ATOL[dtype], atol=ATOL[dtype])
        np.testing.assert_array_equal(F.to_numpy(ours), x)
        np.testing.assert_array_equal(F.to_numpy(our_dout), dout)
    grads = {name: p.grad.numpy() for name, p in twin.named_parameters()}
    assert set(grads) == set(layer.named_parameters())
    for name, (_, grad) in layer.named_parameters().items():
        scale = max(1.0, float(np.abs(grads[name]).max()))  # a gradient sums over all positions: error grows with it
        np.testing.assert_allclose(F.to_numpy(grad), grads[name], rtol=ATOL[dtype], atol=ATOL[dtype] * scale)

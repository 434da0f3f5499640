"""The torch engine with products of fewer bits: as exact as these allow, float32 where numbers are summed."""

import copy
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import cnnmpi
from cnnmpi import functional_torch
from cnnmpi import layers as L
from cnnmpi.data import synthetic
from cnnmpi.train import Config
from cnnmpi.train.report import greeting
from cnnmpi.train.setup import gpus
from tests.every_layer import LAYERS
from tests.twins import Wrapped, rng, torch

pytestmark = pytest.mark.mpi_skip

# an input, a weight and an output are each rounded once to 8 bits (float16: 11), by at most 2**-9 (2**-12) of their
# size; over many products and outputs such errors add up as their squares do, so sqrt(3) 2**-9 is expected, and more
# than four times that rounding is something else
BOUNDS = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def apart(ours, exact) -> float:
    """The relative error of an array, by its norm."""
    ours = np.asarray(ours, np.float64)
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


CONVOLUTIONS = [
    (lambda: L.Conv2d(16, 24, 3, padding=1, rng=rng(0)), (4, 16, 12, 12)),
    (lambda: L.Conv2d(16, 24, 3, 2, 1, rng=rng(0)), (4, 16, 12, 12)),
    (lambda: L.Conv2d(16, 16, 3, padding=1, groups=16, rng=rng(0)), (4, 16, 12, 12)),
    (lambda: L.ConvTranspose2d(16, 8, 3, 2, 1, rng=rng(0)), (4, 16, 6, 6)),
    (lambda: L.Linear(64, 10, rng=rng(0)), (32, 64)),
]


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("make, shape", CONVOLUTIONS)
def test_products_are_those_of_float64_within_the_rounding_of_the_type(make, shape, precision):
    x = rng(1).standard_normal(shape)
    exact, low = Wrapped(make()).astype(np.float64), Wrapped(make()).to_torch(precision=precision)
    y64, y = exact.forward(x), low.forward(low.as_array(x.astype(np.float32)))
    dout = rng(2).standard_normal(y64.shape)
    dx64, dx = exact.backward(dout), low.backward(low.as_array(dout.astype(np.float32)))
    errors = {"y": apart(low.F.to_numpy(y), y64), "dx": apart(low.F.to_numpy(dx), dx64)}
    for (name, (_, grad)), (_, grad64) in zip(low.named_parameters().items(), exact.parameters(), strict=True):
        assert grad.dtype == torch.float32
        errors[name] = apart(low.F.to_numpy(grad), grad64)
    bound = BOUNDS[precision]
    assert max(errors.values()) < bound, errors
    assert min(errors["y"], errors["dx"]) > bound / 64, f"the type has more digits than asked for: {errors}"


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("layer, shape", LAYERS)
def test_every_layer_takes_what_convolutions_give(layer, shape, precision):
    layer = Wrapped(copy.deepcopy(layer)).to_torch(precision=precision)
    x = torch.from_numpy(rng(1).standard_normal(shape).astype(np.float32)).to(TYPES[precision])
    x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    y = layer.forward(x)
    layer.backward(torch.ones_like(y))
    assert all(grad.dtype == torch.float32 for _, grad in layer.parameters())


@pytest.mark.parametrize("precision", TYPES)
def test_activations_stay_in_the_type_between_convolutions_and_logits_are_float32(precision):
    model = cnnmpi.SmallResNet(image_size=16).to_torch(precision=precision)
    kept = {}
    for name, layer in model.walk():
        layer._keep = lambda result, name=name, keep=layer._keep: kept.setdefault(name, keep(result))
    x = rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    logits = model.forward(model.as_array(x))
    assert logits.dtype == torch.float32
    assert {kept[name].dtype for name in kept if name.startswith("stage")} == {TYPES[precision]}


@pytest.mark.parametrize("precision", TYPES)
def test_three_backward_passes_are_bit_equal_and_a_copy_computes_alike(precision):
    model = cnnmpi.SmallResNet(image_size=16).to_torch(precision=precision)
    x = model.as_array(rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32))
    seen = []
    for each in (model, model, copy.deepcopy(model)):
        each.zero_grad()
        logits = each.forward(x)
        each.backward(logits)
        seen.append(b"".join(each.F.to_numpy(grad).tobytes() for _, grad in each.parameters()))
    assert len(set(seen)) == 1


def test_the_greeting_names_the_precision_and_a_gpu_that_several_ranks_share():
    data = synthetic(train=8, test=4)
    parts = {name: SimpleNamespace(labels=data.test_labels) for name in ("train", "test")}
    ranks = SimpleNamespace(size=4, local_size=4, cores_on_node=4, oversubscribed=False)
    config = Config(model="simplecnn", shards=8, backend="torch", device="cuda", precision="bfloat16")
    first, *notes = greeting(config, data, parts, ranks, 1, gpus=2)
    assert first.endswith("4 ranks with 1 thread, torch in bfloat16")
    assert len(notes) == 1 and notes[0].startswith("note: 4 ranks share 2 GPUs of this host: the result is the same")
    assert len(greeting(config, data, parts, ranks, 1, gpus=4)) == len(greeting(config, data, parts, ranks, 1)) == 1
    plain = replace(config, backend="numpy", device="cpu", precision="float32")
    assert greeting(plain, data, parts, ranks, 1)[0].endswith("4 ranks with 1 thread, numpy")


def test_the_gpus_that_ranks_share_are_all_or_the_one_that_is_named():
    model = SimpleNamespace(F=SimpleNamespace(count_gpus=lambda: 3))
    assert [gpus(Config(device=device), model) for device in (None, "cpu", "cuda", "cuda:2")] == [0, 0, 3, 1]
    assert functional_torch.count_gpus() == torch.cuda.device_count()


def test_on_a_gpu_kernels_are_deterministic_and_products_rounded_only_for_tf32(monkeypatch):
    """What PyTorch is told, without a GPU; it is put back afterwards."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    told = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]
    before = [each.fp32_precision for each in told]
    try:
        for precision, products in (("tf32", "tf32"), ("float32", "ieee"), ("tf32", "tf32"), ("bfloat16", "ieee")):
            functional_torch.engine(precision, "cuda:0")
            assert [each.fp32_precision for each in told] == [products] * 2
            assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            torch.use_deterministic_algorithms(False)
    finally:
        torch.use_deterministic_algorithms(False)
        for each, value in zip(told, before, strict=True):
            each.fp32_precision = value


def test_an_unknown_precision_is_refused_and_numpy_comes_back():
    model = cnnmpi.SimpleCNN(image_size=8)
    before = model.state_dict()
    with pytest.raises(ValueError, match="unknown precision 'int8': expected one of float32, tf32, bfloat16, float16"):
        model.to_torch(precision="int8")
    with pytest.raises(ValueError, match="precision tf32 is a GPU's"):
        model.to_torch(precision="tf32")
    model.to_torch(precision="bfloat16").to_numpy()
    assert all((array == before[name]).all() for name, array in model.state_dict().items())
    assert model.F is cnnmpi.functional and functional_torch.engine("float32") is functional_torch

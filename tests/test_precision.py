"""The torch engine with products of fewer bits: as exact as these allow, float32 where numbers are summed."""

import copy
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import cnnmpi
from cnnmpi import functional_torch
from cnnmpi import layers as L
from cnnmpi.data import synthetic
from cnnmpi.distributed import Ranks
from cnnmpi.rng import first_draws
from cnnmpi.train import Config, set_up
from cnnmpi.train.code import Code
from cnnmpi.train.reporter import greeting
from cnnmpi.train.setup import gpus
from tests.every_layer import LAYERS
from tests.twins import Wrapped, rng, torch

pytestmark = pytest.mark.mpi_skip

# an input, a weight and an output are each rounded once to 8 bits (float16: 11), by at most 2**-8 (2**-11) of their
# size and 0.0016 (0.0002) in root mean square; over many products such errors add up as their squares do, so 0.0028
# is expected, and nearly three times that is something else
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
        errors[name] = apart(low.F.to_numpy(grad), grad64)
    bound = BOUNDS[precision]
    assert max(errors.values()) < bound, errors
    assert min(errors["y"], errors["dx"]) > bound / 64, f"the type has more digits than asked for: {errors}"


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("x_short", [True, False])
@pytest.mark.parametrize("dout_short", [True, False])
@pytest.mark.parametrize("layer, shape", LAYERS)
def test_every_layer_takes_either_type_and_gives_dx_in_that_of_x(layer, shape, x_short, dout_short, precision):
    """Where float32 and the short type meet, as behind a Concat, either may come from either side."""
    exact = Wrapped(copy.deepcopy(layer)).astype(np.float64)
    low = Wrapped(copy.deepcopy(layer)).to_torch(precision=precision)
    draw = rng(1).standard_normal(shape).astype(np.float32)
    x = low.F.channels_last(low.as_array(draw).to(TYPES[precision] if x_short else torch.float32))
    y, y64 = low.forward(x), exact.forward(low.F.to_numpy(x).astype(np.float64))
    assert y.dtype in (x.dtype, TYPES[precision], torch.float32)
    dout = low.as_array(rng(2).standard_normal(y64.shape).astype(np.float32))
    dout = low.F.channels_last(dout.to(TYPES[precision] if dout_short else torch.float32))
    dx, dx64 = low.backward(dout), exact.backward(low.F.to_numpy(dout).astype(np.float64))
    if isinstance(layer, L.Conv2d | L.ConvTranspose2d | L.Linear | L.BatchNorm | L.GroupNorm):
        assert dx.dtype == x.dtype
    if isinstance(layer, L.Sequential | L.Residual):
        return  # rounding may carry a value over the kink of the ReLU inside
    bound = 2 * BOUNDS[precision]  # sums of few terms may cancel; those over overlapping windows are in the type, too
    assert apart(low.F.to_numpy(y), y64) < bound and apart(low.F.to_numpy(dx), dx64) < bound
    for (name, (_, grad)), (_, grad64) in zip(low.named_parameters().items(), exact.parameters(), strict=True):
        assert apart(low.F.to_numpy(grad), grad64) < 3 * bound, (
            f"{name}: terms of both signs cancel, their errors do not"
        )


class Scale(L.Layer):
    """A person's layer, whose parameter is float32 as all are."""

    def __init__(self) -> None:
        super().__init__()
        self.add_parameter("scale", 1.5)

    def forward(self, x):
        return self._keep((x * self.params["scale"], x))

    def backward(self, dout):
        x = self._taken(dout)
        self.add_grads(scale=(dout * x).sum())
        return dout * self.params["scale"]


def net(*layers: L.Layer) -> cnnmpi.Model:
    model = cnnmpi.Model()
    model.chain = L.Sequential(*layers)
    return model


MIXED = {
    "BatchNorm first": lambda: net(L.BatchNorm(3), L.Conv2d(3, 8, 3), L.GlobalAvgPool2d(), L.Linear(8, 10)),
    "heads of both types": lambda: net(
        L.Conv2d(3, 8, 3, 2, 1),
        L.Concat(L.GlobalAvgPool2d(), L.Sequential(L.MaxPool2d(8), L.Flatten())),
        L.Linear(16, 10),
    ),
    "images joined": lambda: net(
        L.Concat(L.Identity(), L.Conv2d(3, 5, 3, padding=1)), L.BatchNorm(8), L.GlobalAvgPool2d(), L.Linear(8, 10)
    ),
    "images added": lambda: net(
        L.Residual(L.Conv2d(3, 3, 3, padding=1)), L.MaxPool2d(2), L.AvgPool2d(2), L.Flatten(), L.Linear(48, 10)
    ),
    "a person's layer": lambda: net(
        L.Conv2d(3, 8, 3), L.BatchNorm(8), Scale(), L.MaxPool2d(2), Scale(), L.GELU(), L.Flatten(), L.Linear(392, 10)
    ),
    "logits of a convolution": lambda: net(L.Conv2d(3, 8, 3, 4), L.Softmax(), L.Conv2d(8, 10, 4), L.Flatten()),
}


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("name", MIXED)
def test_models_in_which_both_types_meet_learn_and_evaluate(name, precision, tmp_path):
    small = synthetic(train=24, test=8)
    halved = {name: getattr(small, name)[:, :, ::2, ::2] for name in ("train_images", "test_images")}
    small = replace(small, **halved)
    setting = {"model": "mixed", "lr": 0.01, "batch_size": 8, "shards": 2, "epochs": 1, "warmup": 0.0}
    weights = {}
    for engine in ({}, {"backend": "torch", "precision": precision}):
        config = Config(out=tmp_path / "-".join(["run", *engine]), **setting, **engine)
        code = Code({"mixed": lambda seed=0: first_drawn(MIXED[name])})
        trainer = set_up(config, Ranks(), code, data=small)
        assert trainer.run() == 0
        assert math.isfinite(trainer.history[-1]["test_loss"])
        weights[len(engine)] = trainer.model.state_dict()
    for key, array in weights[0].items():
        # three steps of a rate of 0.01, with gradients of order 1 that are off by some percent
        np.testing.assert_allclose(weights[2][key], array, rtol=0, atol=0.01, err_msg=key)


def test_a_loss_of_ones_own_gets_float32(tmp_path):
    seen = set()

    def mine(logits, targets, reduction="sum"):
        seen.add(logits.dtype)
        return functional_torch.cross_entropy_loss(logits, targets, reduction=reduction)

    code = Code({"mixed": lambda seed=0: first_drawn(MIXED["logits of a convolution"]), "mine": mine})
    setting = {"model": "mixed", "loss": "mine", "backend": "torch", "precision": "bfloat16", "epochs": 1}
    small = synthetic(train=16, test=8)
    small = replace(
        small, train_images=small.train_images[:, :, ::2, ::2], test_images=small.test_images[:, :, ::2, ::2]
    )
    trainer = set_up(Config(out=tmp_path / "run", batch_size=8, shards=2, **setting), Ranks(), code, data=small)
    assert trainer.run() == 0 and seen == {torch.float32}


def first_drawn(make):
    with first_draws(0):
        return make()


def test_losses_take_the_outputs_of_a_convolution_as_they_are():
    F = functional_torch.engine("bfloat16")
    logits = torch.from_numpy(rng(0).standard_normal((4, 5)).astype(np.float32)).bfloat16()
    labels, targets = torch.arange(4), torch.full((4, 5), 0.2)
    for name, y in (("cross_entropy", labels), ("binary_cross_entropy", targets), ("mse", targets)):
        low, wide = getattr(F, f"{name}_loss")(logits, y), getattr(functional_torch, f"{name}_loss")(logits.float(), y)
        assert low[0] == wide[0] and low[1].dtype == torch.float32 and torch.equal(low[1], wide[1])


def test_models_of_float64_are_refused_in_one_line():
    model = cnnmpi.SimpleCNN(image_size=8).astype(np.float64)
    with pytest.raises(ValueError, match="precision bfloat16 is for models of float32: call astype"):
        model.to_torch(precision="bfloat16")
    assert not model.use_torch and model.to_torch().use_torch


@pytest.mark.parametrize("precision", TYPES)
def test_activations_stay_in_the_type_between_convolutions_and_logits_are_float32(precision):
    model = cnnmpi.SmallResNet(image_size=16).to_torch(precision=precision)
    kept = {}
    for name, layer in model.walk():
        layer._keep = lambda result, name=name, keep=layer._keep: kept.setdefault(name, keep(result))
    x = rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    logits = model.forward(model.as_array(x))
    assert logits.dtype == kept["pool"].dtype == torch.float32
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

"""Optimizers against torch.optim, schedules at their corners, clipping."""

import inspect
import math

import numpy as np
import pytest

from cnnmpi import layers, optim

torch = pytest.importorskip("torch")

CASES = [
    (optim.SGD, torch.optim.SGD, {"lr": 0.1}),
    (optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (optim.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    (optim.Adam, torch.optim.Adam, {"lr": 0.02}),
    (optim.Adam, torch.optim.Adam, {"lr": 0.02, "weight_decay": 0.05, "betas": (0.8, 0.95)}),
    (optim.AdamW, torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.05}),
]


@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize("ours, theirs, options", CASES, ids=lambda v: str(v).split(".")[-1][:40])
def test_ten_steps_equal_torch(ours, theirs, options, engine):
    draw = np.random.default_rng(0)
    start = [draw.standard_normal(shape) for shape in ((4, 3), (3,))]
    twins = [torch.nn.Parameter(torch.from_numpy(p.copy())) for p in start]
    make = (lambda a: a.copy()) if engine == "numpy" else (lambda a: torch.from_numpy(a.copy()))
    pairs = [(make(p), make(np.zeros_like(p))) for p in start]
    mine, reference = ours(pairs, **options, decay_all=True), theirs(twins, **options)
    for step in range(10):
        for (_, grad), twin in zip(pairs, twins, strict=True):
            value = draw.standard_normal(tuple(grad.shape))
            grad[...] = make(value)
            twin.grad = torch.from_numpy(value.copy())
        mine.lr = options["lr"] * (1 + step)  # a loop may change the rate at any time
        reference.param_groups[0]["lr"] = mine.lr
        mine.step()
        reference.step()
    for (param, _), twin in zip(pairs, twins, strict=True):
        # float64; Adam divides by roots, so a few units in the last place per step
        np.testing.assert_allclose(np.asarray(param), twin.detach().numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_the_defaults_of_optimizers_are_torchs(name):
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (optim, torch.optim))
    own = {"parameters", "decay_all"}
    assert {option: ours[option].default for option in ours if option not in own} == {
        option: theirs[option].default for option in ours if option not in own
    }


@pytest.mark.parametrize(
    ("name", "twin", "named"),  # named: what the two call the same
    [
        ("Conv2d", "Conv2d", {"in_c": "in_channels", "out_c": "out_channels", "k": "kernel_size"}),
        ("Linear", "Linear", {}),
        ("BatchNorm", "BatchNorm2d", {}),
        ("Dropout", "Dropout", {}),
        ("MaxPool2d", "MaxPool2d", {"k": "kernel_size"}),
        ("AvgPool2d", "AvgPool2d", {"k": "kernel_size"}),
    ],
)
def test_the_defaults_of_layers_are_torchs(name, twin, named):
    ours, theirs = (inspect.signature(kind).parameters for kind in (getattr(layers, name), getattr(torch.nn, twin)))
    own = {"rng", "dtype", "relu", "seed"}
    shared = [option for option in ours if option not in own]
    assert shared and {option: ours[option].default for option in shared} == {
        option: theirs[named.get(option, option)].default for option in shared
    }


def test_adamw_decays_unless_told_not_to():
    for options, expected in (({}, 1 - 0.1 * 0.01), ({"weight_decay": 0.0}, 1.0)):
        pairs = [(np.ones((2, 2)), np.zeros((2, 2)))]
        optim.AdamW(pairs, lr=0.1, **options).step()
        assert (pairs[0][0] == expected).all()


@pytest.mark.parametrize("dtype", ["float16", "int64"])
def test_parameters_too_narrow_to_learn_are_refused(dtype):
    for array in (np.ones(2, dtype), torch.ones(2, dtype=getattr(torch, dtype))):
        with pytest.raises(ValueError, match="expected float32 or float64 parameters"):
            optim.Adam([(array, array)])


def test_biases_are_not_decayed_by_default():
    pairs = [(np.ones((2, 2)), np.zeros((2, 2))), (np.ones(2), np.zeros(2))]
    optim.SGD(pairs, lr=0.5, weight_decay=0.1).step()
    assert (pairs[0][0] == 0.95).all() and (pairs[1][0] == 1).all()


def test_the_gradient_is_left_alone_and_zero_grad_clears_it():
    pairs = [(np.ones((2, 2)), np.full((2, 2), 3.0))]
    optimizer = optim.SGD(pairs, lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.1)
    optimizer.step()
    assert (pairs[0][1] == 3).all()
    optimizer.zero_grad()
    assert not pairs[0][1].any()


def test_arrays_that_were_moved_away_are_refused():
    param = np.ones(2)
    param.flags.writeable = False
    with pytest.raises(RuntimeError, match="no longer the model's"):
        optim.SGD([(param, np.ones(2))], lr=0.1).step()


def test_clip_grad_norm():
    pairs = [(np.zeros(1), np.array([3.0])), (np.zeros(1), np.array([4.0]))]
    assert optim.clip_grad_norm(pairs, 10) == 5 and pairs[0][1] == 3
    assert optim.clip_grad_norm(pairs, 1) == 5
    np.testing.assert_allclose([pairs[0][1][0], pairs[1][1][0]], [0.6, 0.8], rtol=1e-15)


def test_schedules_at_their_corners():
    cosine = [optim.warmup_cosine(s, peak=2.0, total=10, warmup=4) for s in range(11)]
    assert cosine[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert (
        math.isclose(cosine[7], 1.0) and abs(cosine[10]) < 1e-15 and optim.warmup_cosine(99, peak=2.0, total=10) < 1e-15
    )
    linear = [optim.warmup_linear(s, peak=2.0, total=8, warmup=4) for s in range(9)]
    assert linear == [0.5, 1.0, 1.5, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0]
    assert [optim.step_decay(s, initial=1.0, every=3, factor=0.5) for s in (0, 2, 3, 6)] == [1, 1, 0.5, 0.25]

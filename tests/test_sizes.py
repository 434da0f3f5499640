"""Sizes and counts of NumPy's kinds, at every entrance that takes one."""

import numpy as np
import pytest

from cnnmpi import (
    AvgPool2d,
    BatchNorm,
    Config,
    Conv2d,
    DataLoader,
    Linear,
    MaxPool2d,
    SimpleCNN,
    SmallResNet,
)
from cnnmpi.data import cutout, normalize, random_horizontal_flip
from cnnmpi.data.augment import to_unit
from cnnmpi.distributed import Ranks
from cnnmpi.functional.init import fans
from cnnmpi.layers import Whitening
from cnnmpi.sizes import pair, whole
from cnnmpi.train import set_up

KINDS = [np.uint8, np.int8, np.uint16, np.int32, np.int64]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_and_models_take_them(kind):
    x = np.zeros((2, 3, 32, 32), np.float32)
    assert Conv2d(kind(3), kind(100), kind(3), kind(2), kind(1)).forward(x).shape == (2, 100, 16, 16)
    assert BatchNorm(kind(3)).forward(x + np.arange(3)[:, None, None].astype("f")).shape == x.shape
    assert Linear(kind(3), kind(100)).forward(x[:, :, 0, 0]).shape == (2, 100)
    for model in (SimpleCNN, SmallResNet):
        assert model(kind(3), kind(10), np.array([32, 32], kind)).forward(x).shape == (2, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_gives_the_same_batches(kind):
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (120, 3, 32, 32), np.uint8), draw.integers(0, 100, 120)
    options = {"batch_size": 100, "shards": 3}
    plain = DataLoader(x, y, **options, augment="flip,crop=4,cutout=6")
    numpys = {name: kind(value) for name, value in options.items()}
    given = DataLoader(x, y.astype(kind), **numpys, augment="flip,crop=4,cutout=6")
    assert len(plain) == len(given) == 2
    for (ours, labels), (theirs, numbers) in zip(plain, given, strict=True):
        assert np.array_equal(ours, theirs) and np.array_equal(labels, numbers) and numbers.dtype == np.int64


@pytest.mark.parametrize("name", ["batch_size", "shards"])
@pytest.mark.parametrize("value", [2.0, True, "2", None, np.float32(2)])
def test_what_is_no_whole_number_is_refused_by_name(name, value):
    x, y = np.zeros((4, 1, 8, 8), np.uint8), np.zeros(4, int)
    with pytest.raises(ValueError, match=f"DataLoader: {name} must be a whole number, got "):
        DataLoader(x, y, **({"batch_size": 2} | {name: value}))


@pytest.mark.parametrize("wrong", [3.0, True, "3", None, np.float32(3), (1, 2, 3)])
def test_layers_refuse_at_once_what_is_no_whole_number(wrong):
    counts = [
        lambda n: Conv2d(n, 4, 3), lambda n: Conv2d(3, n, 3), lambda n: Linear(n, 4), lambda n: Linear(3, n),
        lambda n: BatchNorm(n), lambda n: Whitening(n, 4), lambda n: Whitening(3, n),
    ]  # fmt: skip
    sizes = [
        lambda n: Conv2d(3, 4, n), lambda n: Conv2d(3, 4, 3, n), lambda n: Conv2d(3, 4, 3, 1, n),
        lambda n: MaxPool2d(2, padding=n),
    ]  # fmt: skip
    for make in counts:
        with pytest.raises(ValueError, match=r"^\w+: \w+ must be a whole number, got "):
            make(wrong)
    for make in (*sizes, MaxPool2d, AvgPool2d):
        with pytest.raises(ValueError, match="a size must be one whole number, or two"):
            make(wrong)


def test_fans_do_not_overflow():
    assert fans((np.uint8(200), np.uint8(200), np.uint8(3), np.uint8(3))) == (1800, 1800)
    for make in (lambda: Conv2d(3, 4, 0), lambda: Conv2d(3, 4, -1), lambda: Conv2d(0, 4, 3), lambda: Linear(0, 3)):
        with pytest.raises(ValueError, match="every size must be at least 1"):
            make()


@pytest.mark.filterwarnings("error")
def test_narrow_draws_do_not_overflow():
    images = np.full((2, 1, 300, 300), 7, np.uint8)
    top, left = np.array([250, 0]), np.array([255, 3])
    assert np.array_equal(
        cutout(images, top.astype(np.uint8), left.astype(np.uint8), 40), cutout(images, top, left, 40)
    )


def test_images_of_an_unknown_range_are_refused():
    for dtype in (np.int8, np.uint16, np.int64, bool):
        images = np.ones((1, 1, 2, 2), dtype)
        for scale in (to_unit, lambda x: normalize(x, (0.5,), (0.5,))):
            with pytest.raises(ValueError, match=r"images of uint8, or of floats in 0\.\.1"):
                scale(images)


def test_flips_that_are_no_answers_are_refused():
    images = np.zeros((2, 1, 4, 4), np.uint8)
    for flip in (np.array([0, 1]), np.array([True])):  # as indices they would choose other images
        with pytest.raises(ValueError, match="expected 2 draws of bool"):
            random_horizontal_flip(images, flip)


def test_settings_may_be_numpys(tmp_path):
    given = {"batch_size": np.uint8(200), "epochs": np.int64(1), "seed": np.int32(3), "max_steps": np.int8(1)}
    given |= {"lr": np.float64(0.1), "warmup": np.float32(0.25), "shards": np.int64(2), "balance": np.True_}
    config = set_up(Config(data="synthetic", out=tmp_path / "run", **given), Ranks()).config
    for key, value in given.items():
        assert getattr(config, key) == value and type(getattr(config, key)) is type(value.item())
    assert "batch_size = 200\n" in (tmp_path / "run" / "config.toml").read_text()


def test_pairs_and_whole_numbers():
    assert pair(3) == pair(np.int64(3)) == pair((3, 3)) == pair([3, np.uint8(3)]) == pair(np.array([3, 3])) == (3, 3)
    assert pair(np.array(3)) == (3, 3) and pair((2, 5)) == (2, 5)
    assert all(type(side) is int for side in (*pair(np.array([3, 3])), whole("n", np.uint8(3))))

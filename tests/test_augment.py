"""Transformations against slow formulas, what they draw and in which order they come; balanced epochs and weights."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnmpi import checkpoint
from cnnmpi.data import (
    DataError,
    DataLoader,
    color_jitter,
    cutmix,
    mixup,
    random_erasing,
    random_resized_crop,
    synthetic,
    write_hdf5,
)
from cnnmpi.data.augment import probabilities
from cnnmpi.data.loader import balanced_order
from cnnmpi.data.transforms import entries, text_of
from cnnmpi.distributed import Ranks, UserError
from cnnmpi.rng import generator
from cnnmpi.train import Config, Trainer, set_up
from cnnmpi.train.config import from_plain, parse
from cnnmpi.train.measures import class_weights

pytestmark = pytest.mark.mpi_skip  # the same on each rank

H, W = 6, 9  # not square, so that a mistake of rows and columns shows


def noise(count: int = 7, dtype: Any = np.uint8, channels: int = 3) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (count, channels, H, W), np.uint8)
    return pixels if dtype == np.uint8 else pixels.astype(dtype) / 255


def boxes(count: int = 7, least: int = 0) -> np.ndarray:
    """Rectangles top, left, height, width of all kinds; the first is the whole image, the second one pixel."""
    draw = np.random.default_rng(1)
    height, width = draw.integers(least, H + 1, count), draw.integers(least, W + 1, count)
    height[:2], width[:2] = (H, 1), (W, 1)
    return np.array([draw.integers(0, H - height + 1), draw.integers(0, W - width + 1), height, width])


# -- each against a slow formula ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_resized_crop_interpolates_between_the_four_nearest_pixels_of_its_window(dtype):
    images, windows = noise(dtype=dtype), boxes(least=1)
    before, result = images.copy(), random_resized_crop(images, *windows)
    assert result.dtype == dtype and result.shape == images.shape and np.array_equal(images, before)
    assert np.array_equal(result[0], images[0]), "the whole image stays"
    top, left = windows[:2, 1]
    assert (result[1] == images[1, :, top, left][:, None, None]).all(), "one pixel fills the image"
    for i, (top, left, height, width) in enumerate(windows.T):
        window = images[i, :, top : top + height, left : left + width].astype(float)
        for row in range(H):
            for column in range(W):
                y = min(max((row + 0.5) * height / H - 0.5, 0), height - 1)
                x = min(max((column + 0.5) * width / W - 0.5, 0), width - 1)
                y0, x0 = int(y), int(x)
                y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
                above = window[:, y0, x0] * (1 - x + x0) + window[:, y0, x1] * (x - x0)
                below = window[:, y1, x0] * (1 - x + x0) + window[:, y1, x1] * (x - x0)
                expected = above * (1 - y + y0) + below * (y - y0)
                off = np.abs(result[i, :, row, column] - expected).max()
                assert off < (0.501 if dtype == np.uint8 else 1e-6)  # half a level; float32 against float64


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_color_jitter_is_brightness_then_contrast_then_saturation(dtype, channels):
    images, before = noise(dtype=dtype, channels=channels), noise(dtype=dtype, channels=channels)
    white = 255 if dtype == np.uint8 else 1
    factors = np.random.default_rng(2).uniform(0.3, 1.7, (3, 7))
    factors[:, 0] = 1
    result = color_jitter(images, *factors)
    assert np.array_equal(images, before) and result.dtype == dtype
    np.testing.assert_allclose(result[0], images[0], atol=1e-6)  # float32: L is added and taken away again
    shares = np.array([0.299, 0.587, 0.114]) if channels == 3 else np.full(channels, 1 / channels)
    cut_off = 0
    for i, (brightness, contrast, saturation) in enumerate(factors.T):
        x = images[i].astype(float) * brightness
        mean = np.tensordot(shares, x, 1).mean()
        x = mean + contrast * (x - mean)
        grey = np.tensordot(shares, x, 1)
        x = grey + saturation * (x - grey)
        cut_off += np.count_nonzero((x < 0) | (x > white))
        off = np.abs(result[i] - np.clip(x, 0, white)).max()
        assert off < (0.501 if dtype == np.uint8 else 2e-6)  # half a level; float32 against float64
    assert cut_off > 10, "or clipping was not seen"


def test_random_erasing_blanks_a_rectangle_of_each_image():
    images, draws = noise(dtype=np.float32) + 1, boxes()
    draws[2, 2] = 0
    result = random_erasing(images, *draws)
    for i, (top, left, height, width) in enumerate(draws.T):
        expected = images[i].copy()
        expected[:, top : top + height, left : left + width] = 0
        assert np.array_equal(result[i], expected)
    assert np.array_equal(result[2], images[2]) and (result[0] == 0).all() and images.min() >= 1


def test_mixup_is_the_weighted_mean_of_two_images_and_of_their_targets():
    images, targets = noise(dtype=np.float32), probabilities(np.arange(7) % 4, 5)
    before, partner = images.copy(), np.array([1, 2, 0, 3, 3, 6, 5])
    share = np.array([1, 0, 0.5, 0.2, 0.9, 0.25, 0.75])
    mixed, shares = mixup(images, targets, partner, share)
    for i in range(7):
        np.testing.assert_allclose(mixed[i], share[i] * before[i] + (1 - share[i]) * before[partner[i]], atol=1e-6)
        expected = np.zeros(5)
        expected[i % 4] += share[i]
        expected[partner[i] % 4] += 1 - share[i]
        np.testing.assert_allclose(shares[i], expected, atol=1e-6)  # float32 against float64
    assert np.array_equal(images, before) and mixed.dtype == shares.dtype == np.float32
    assert np.array_equal(mixed[0], before[0]) and np.array_equal(mixed[1], before[2])


def test_cutmix_pastes_rectangles_of_the_unmixed_partners_and_mixes_by_area():
    images, targets = noise(dtype=np.float32), probabilities(np.arange(7) % 4, 5)
    draws, partner = boxes(), np.array([1, 2, 0, 3, 0, 6, 5])
    draws[2, 2] = 0
    mixed, shares = cutmix(images, targets, partner, *draws)
    for i, (top, left, height, width) in enumerate(draws.T):
        for row in range(H):
            for column in range(W):
                inside = top <= row < top + height and left <= column < left + width
                assert np.array_equal(mixed[i, :, row, column], images[partner[i] if inside else i, :, row, column])
        area = height * width / (H * W)
        expected = (1 - area) * targets[i] + area * targets[partner[i]]
        np.testing.assert_allclose(shares[i], expected, atol=1e-6)  # float32 against float64
    assert np.array_equal(shares[0], targets[1]) and np.array_equal(mixed[2], images[2])


def test_what_transformations_refuse():
    x, y, few = noise(dtype=np.float32), probabilities(np.arange(7) % 4, 5), np.ones(6)
    inside, partner, share = boxes(least=1), np.arange(7), np.full(7, 0.5)
    beyond, flat = inside.copy(), inside.copy()
    beyond[0] += 1
    flat[2] = 0
    for call, message in [
        (lambda: random_resized_crop(x, *beyond), "rectangles that do not lie in images of 6x9"),
        (lambda: random_resized_crop(x, *flat), "rectangles that do not lie"),
        (lambda: random_erasing(x, *-inside), "rectangles that do not lie"),
        (lambda: random_erasing(x, *inside[:, 1:]), "7 integers"),
        (lambda: random_erasing(x, *inside.astype(float)), "7 integers"),
        (lambda: color_jitter(x, share, share, -share), "7 finite factors"),
        (lambda: color_jitter(x, share, few, share), "7 finite factors"),
        (lambda: color_jitter(x, share, share, share * np.nan), "7 finite factors"),
        (lambda: mixup(x, y, partner, share + 1), "7 shares"),
        (lambda: mixup(x, y, partner, share * np.nan), "7 shares"),
        (lambda: mixup(x, y, partner + 1, share), r"7 partners in 0\.\.6"),
        (lambda: mixup(x, np.arange(7), partner, share), r"float32 targets \(N, K\), got .* and int64 \(7,\)"),
        (lambda: cutmix(noise(), y, partner, *inside), "float32 images"),
        (lambda: cutmix(x, y, partner[:6], *inside), "7 partners"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_narrow_integers_do_not_overflow():
    x, y = np.zeros((1, 1, 300, 300), np.float32), np.eye(1, dtype=np.float32)
    x[0, 0, 250:] = 1
    draws = [np.array([number]) for number in (20, 30, 255, 250)]
    narrow = [draw.astype(np.uint8) for draw in draws]
    assert np.array_equal(random_erasing(x, *narrow), random_erasing(x, *draws))
    assert np.array_equal(random_resized_crop(x, *narrow), random_resized_crop(x, *draws))
    other = np.array([0], np.uint8)
    for ours, theirs in zip(cutmix(x, y, other, *narrow), cutmix(x, y, other, *draws), strict=True):
        assert np.array_equal(ours, theirs)


# -- in the loader -----------------------------------------------------------------------------------------------------

BY_SAMPLE = "flip,crop=2,resized_crop=0.2,jitter=0.5,cutout=2,erasing=0.8"


def loader(augment: Any, count: int = 50, batch: int = 16, shards: int = 3, **options: Any) -> DataLoader:
    usual = {"seed": 5, "classes": 4, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    return DataLoader(noise(count), np.arange(count) % 4, batch, shards=shards, augment=augment, **usual | options)


@pytest.mark.parametrize("augment", [*BY_SAMPLE.split(","), BY_SAMPLE])
def test_a_samples_draws_depend_on_seed_epoch_and_sample_alone(augment):
    def images(loader: DataLoader, epoch: int = 0) -> np.ndarray:
        """Of each sample, in the order of the data set."""
        order = generator(loader.seed, "order", epoch).permutation(50)
        batches = [loader.batch(epoch * len(loader) + index)[0] for index in range(len(loader))]
        return np.concatenate(batches)[order.argsort()]

    first = images(loader(augment))
    assert np.array_equal(first, images(loader(augment, batch=50)))
    cut = loader(augment)
    parts = [[cut.batch(step, shard)[0] for shard in (2, 0, 1)] for step in (7, 2, 1, 0, 3)]
    for step, (last, *others) in zip((7, 2, 1, 0, 3), parts, strict=True):
        assert np.array_equal(np.concatenate([*others, last]), loader(augment).batch(step)[0])
    for changed in (images(loader(augment), 1), images(loader(augment, seed=6)), images(loader("none"))):
        assert not np.array_equal(first, changed)


@pytest.mark.parametrize("augment", ["mixup=1", "cutmix=1", "flip,mixup=0.3,cutmix=0.3"])
def test_images_are_mixed_with_others_of_their_shard_by_step_and_shard(augment):
    fresh, used = loader(augment), loader(augment)
    for step in (5, 0, 3):
        for shard in (1, 2, 0):
            x, y = used.batch(step, shard)
            again = loader(augment).batch(step, shard)
            assert np.array_equal(x, again[0]) and np.array_equal(y, again[1])
            assert y.shape == (len(x), 4) and y.dtype == np.float32
            np.testing.assert_allclose(y.sum(axis=1), 1, atol=1e-6)  # of float32
            labels = loader("none").batch(step, shard)[1]
            assert (y[:, np.setdiff1d(range(4), labels)] == 0).all(), "nothing of another shard"
    assert not np.array_equal(fresh.batch(0, 0)[1], fresh.batch(0)[1][:6]), "the whole batch is mixed as a whole"
    assert np.count_nonzero(fresh.batch(0)[1].max(axis=1) < 0.99) > 3, "images of other classes were mixed"


def test_mixing_draws_what_the_papers_say():
    x, y = np.full((4000, 1, 10, 20), 7, np.float32), np.arange(4000)
    for augment in ("mixup=0.5", "cutmix=0.5"):
        rng = generator(0, f"augment/{augment[:6].rstrip('=')}", 0, 0)
        partner, share = rng.permutation(4000), rng.beta(0.5, 0.5, 4000)
        targets = DataLoader(x, y, 4000, False, augment=augment).batch(0)[1]
        others = partner != y
        own = targets[y, y][others]
        np.testing.assert_allclose(own + targets[y, partner][others], 1, atol=1e-6)  # of float32
        if augment == "mixup=0.5":
            np.testing.assert_allclose(own, share[others], atol=1e-6)
        else:  # boxes of that share of the area, but for what lies beyond the border
            assert (own > share[others] - 0.11).all() and own.min() < 0.05  # a box's sides are rounded to pixels


def test_windows_and_factors_are_drawn_in_their_ranges():
    ramp = np.broadcast_to(np.arange(32, dtype=np.float32) / 255, (500, 1, 32, 32))
    ones = np.ones((500, 1, 32, 32), np.float32)
    labels = np.zeros(500, int)
    wide = DataLoader(ramp, labels, 500, False, augment="resized_crop=0.25").batch(0)[0]
    widths = np.rint((wide[:, 0, 0].max(axis=1) - wide[:, 0, 0].min(axis=1)) * 255) + 1
    # a quarter of the area, as narrow as 3/4 of its height, is 32 sqrt(1/4) sqrt(3/4) = 13.9 pixels wide
    assert 14 <= widths.min() <= 15 and widths.max() == 32
    erased = DataLoader(ones, labels, 500, False, augment="erasing=0.4").batch(0)[0]
    shares = (erased == 0).mean(axis=(1, 2, 3))
    assert 0.3 < (shares > 0).mean() < 0.5 and shares.max() < 0.36 and 0 < shares[shares > 0].min() < 0.05
    for edge in (erased[:, 0, 0], erased[:, 0, -1], erased[:, 0, :, 0], erased[:, 0, :, -1]):
        assert (edge == 0).any(), "a rectangle may lie at any edge"
    bright = DataLoader(ones / 2, labels, 500, False, augment="jitter=0.3").batch(0)[0][:, 0, 0, 0]
    assert 0.35 <= bright.min() < 0.37 and 0.63 < bright.max() <= 0.65


def test_transformations_come_in_the_order_of_the_list_and_normalisation_before_what_needs_it():
    seen = []

    def spy(images, labels, draw):
        seen.append((images.dtype, labels.shape, float(images.min())))
        return images

    for augment, dtype, shape in [
        ([spy, "mixup=1"], np.uint8, (50,)),
        (["crop=1", spy, "cutout=2"], np.uint8, (50,)),
        (["cutout=2", spy], np.float32, (50,)),
        (["mixup=1", spy], np.float32, (50, 4)),
        (spy, np.uint8, (50,)),
    ]:
        loader(augment, batch=50).batch(0)
        assert seen[-1][:2] == (dtype, shape) and (seen[-1][2] < 0) == (dtype == np.float32)
    once = loader("flip,cutout=2").batch(0)[0]
    assert not np.array_equal(once, loader("cutout=2,flip").batch(0)[0]), "the square is mirrored, too"


def test_a_function_of_ones_own_may_change_labels_and_draws_for_its_shard():
    def swap(images, labels, draw):
        assert draw("order").random() == draw("order").random() != draw("noise").random()
        order = draw("order").permutation(len(images))
        return images[order], labels[order]

    def soften(images, labels, draw):
        return images, np.full((len(labels), 4), 0.25)

    (x, y), (plain, labels) = loader(swap).batch(1, 2), loader(None).batch(1, 2)
    order = generator(5, "augment/order", 1, 3).permutation(len(x))
    assert np.array_equal(x, plain[order]) and np.array_equal(y, labels[order]) and y.dtype == np.int64
    assert loader([swap, soften]).batch(0)[1].dtype == np.float32
    mixed = loader([soften, "mixup=1"]).batch(0)[1]
    np.testing.assert_allclose(mixed, 0.25, atol=1e-6)  # of float32
    for wrong in (lambda x, y, draw: (x, y[1:]), lambda x, y, draw: (x, y * 1.0), lambda x, y, draw: (x, "cat")):
        with pytest.raises(DataError, match=r"returned labels .*; expected int64"):
            loader(wrong).batch(0)
    for wrong in (lambda x, y, draw: x[:, :, 1:], lambda x, y, draw: x.astype(int), lambda x, y, draw: None):
        with pytest.raises(DataError, match=r"returned .* for images uint8 .*; expected uint8, or float32"):
            loader(wrong).batch(0)
    with pytest.raises(DataError, match=r"returned uint8 .* for images float32 .*; expected float32 of the same shape"):
        loader(["cutout=1", lambda x, y, draw: x.astype(np.uint8)]).batch(0)


def test_targets_of_several_numbers_are_mixed_as_they_are():
    y = np.random.default_rng(0).random((50, 3))
    targets = DataLoader(noise(50), y, 50, False, augment="mixup=1").batch(0)[1]
    rng = generator(0, "augment/mixup", 0, 0)
    partner, share = rng.permutation(50), rng.beta(1, 1, 50)[:, None]
    np.testing.assert_allclose(targets, share * y + (1 - share) * y[partner], atol=1e-6)  # of float32


def test_shards_without_samples_are_empty_batches():
    def own(images, labels, draw):
        raise AssertionError("there is nothing to change")

    everything = loader([own, f"{BY_SAMPLE},mixup=1,cutmix=1"], count=2, batch=2)
    x, y = everything.batch(0, 2)
    assert x.shape == (0, 3, H, W) and y.shape == (0, 4) and x.dtype == y.dtype == np.float32


# -- texts -------------------------------------------------------------------------------------------------------------


def test_a_list_has_one_text():
    for given, text in [
        (" flip , crop=04,mixup=.2 ", "flip,crop=4,mixup=0.2"),
        (["flip", "crop=2,cutout=3", "own.py:f"], "flip,crop=2,cutout=3,own.py:f"),
        ("cutmix=1.0", "cutmix=1"),
        ("erasing=0.1234567891234", "erasing=0.1234567891234"),
        *((nothing, "none") for nothing in (None, "", "none", [], ["none", ""])),
    ]:
        assert text_of(entries(given)) == text == text_of(entries(text))


@pytest.mark.parametrize(
    "text, message",
    [
        ("crop=abc", "crop=abc: crop takes whole pixels from 1 up"),
        ("crop", "crop: crop takes whole pixels from 1 up"),
        ("crop=0", "crop takes whole pixels"),
        ("crop=1.5", "crop takes whole pixels"),
        ("mixup=-1", "mixup=-1: mixup takes an alpha from 0.01 to 100"),
        ("mixup=nan", "mixup takes an alpha"),
        ("cutmix=inf", "cutmix takes an alpha"),
        ("jitter=2", "jitter takes a strength from 0.01 to 1"),
        ("erasing=1=1", "erasing takes a probability"),
        ("flip=1", "flip=1: flip takes no number"),
        ("mirror", "'mirror' is none of flip, crop=NUMBER, .*cutmix=NUMBER, and no FILE.py:FUNCTION"),
        ("crop=2,flip,crop=3", "crop is listed twice"),
        ("mixup=1,jitter=0.1", "jitter=0.1 works on pixels: list it before mixup, which normalises them"),
        ("cutout=7", "cutout=7 does not fit into images of 6x9 pixels"),
        ("crop=7", "crop=7 does not fit into images of 6x9 pixels"),
        (3, "expected a text, a function, or a list of both, got 3"),
        ("own.py:f", "own.py:f: give the function itself"),
        (lambda images, rng: images, "lambda> must take three arguments: images, labels, draw"),
    ],
)
def test_a_bad_entry_is_named(text, message):
    with pytest.raises(ValueError, match=f"DataLoader: augment: .*{message}"):
        loader(text)
    if isinstance(text, str) and ":" not in text:
        with pytest.raises(UserError, match=f"--augment .*{message}") as error:
            pixels = noise(20)
            labels = np.arange(20) % 4
            data = dataclasses.replace(
                synthetic(train=20, test=20), train_images=pixels, test_images=pixels, train_labels=labels
            )
            set_up(Config(model="simplecnn", augment=text), Ranks(), data=data)
        assert "\n" not in str(error.value)


# -- uneven classes ----------------------------------------------------------------------------------------------------


def test_a_balanced_epoch_has_each_class_equally_often_and_its_samples_as_evenly_as_can_be():
    labels = np.array([0] * 70 + [2] * 25 + [5] * 6 + [7] * 2)
    orders = [balanced_order(labels, np.random.default_rng(seed)) for seed in range(20)]
    more = Counter()
    for order in orders:
        assert order.shape == (103,)
        times = np.bincount(order, minlength=103)
        for label in (0, 2, 5, 7):
            of_class = times[labels == label]
            assert of_class.sum() in (25, 26) and of_class.max() - of_class.min() <= 1
            more[label] += of_class.sum() == 26
    assert min(more.values()) >= 10 and max(more.values()) < 20, "3 of 4 classes have one more, not always the same"
    assert len({tuple(order) for order in orders}) == 20
    seen = np.unique(np.concatenate(orders))
    assert len(seen) == 103, "none is left out for ever"
    assert np.count_nonzero(labels[orders[0][:52]] == 7) in range(5, 22), "in random order"


def test_a_sample_that_comes_again_in_an_epoch_is_augmented_anew():
    def balanced(batch: int) -> DataLoader:
        labels = np.array([0] * 39 + [1])
        return DataLoader(noise(40), labels, batch, augment="crop=2,jitter=0.5", sample="balanced", seed=5)

    images, labels = balanced(40).batch(0)
    assert np.count_nonzero(labels == 1) == 20
    assert len({image.tobytes() for image in images[labels == 1]}) == 20
    parts = {step: balanced(10).batch(step)[0] for step in (3, 0, 2, 1)}
    assert np.array_equal(np.concatenate([parts[step] for step in range(4)]), images)
    assert not np.array_equal(balanced(40).batch(1)[0], images)


def test_class_weights_are_inversely_proportional_to_the_images_and_1_in_the_mean():
    labels = np.array([0] * 6 + [1] * 3 + [3])
    weights = class_weights(labels, 4)
    np.testing.assert_allclose(weights, [10 / 18, 10 / 9, 1, 10 / 3])
    np.testing.assert_allclose(weights[labels].mean(), 1)


# -- a run -------------------------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {"model": "simplecnn", "batch_size": 20, "shards": 4, "epochs": 2, "threads": 1, "seed": 5}


@pytest.fixture
def uneven(tmp_path) -> str:
    """Images of 16x16 pixels, of which most are of one class."""
    data = synthetic(seed=3, train=60, test=20)
    small = {name: getattr(data, name)[:, :, ::2, ::2] for name in ("train_images", "test_images")}
    labels = np.where(np.arange(60) % 6 > 0, 2, data.train_labels)
    write_hdf5(tmp_path / "uneven.h5", dataclasses.replace(data, **small, train_labels=labels))
    return str(tmp_path / "uneven.h5")


def trained(out: Path, data: str, **settings: Any) -> Trainer:
    trainer = set_up(Config(**{**QUICK, "out": out, "data": data, **settings}), Ranks())
    assert trainer.run() == 0
    return trainer


def test_the_test_loss_is_not_weighted_and_the_training_loss_is(tmp_path, uneven):
    plain, weighted = (trained(tmp_path / str(b), uneven, lr=0.0, balance=b, epochs=1) for b in (False, True))
    before, after = plain.history[0], weighted.history[0]
    assert before["test_loss"] == after["test_loss"] and before["test_acc"] == after["test_acc"]
    assert before["train_acc"] == after["train_acc"] and before["train_loss"] != after["train_loss"]


def test_training_accuracy_counts_the_larger_share(tmp_path, uneven):
    trainer = trained(tmp_path / "run", uneven, augment="mixup=1", lr=0.0, epochs=1)
    right = 0
    for step in range(3):
        for shard in range(4):
            x, y = trainer.loader.batch(step, shard)
            right += np.count_nonzero(trainer.model.forward(x).argmax(axis=1) == y.argmax(axis=1))
    assert trainer.history[0]["train_acc"] == right / 60


@pytest.mark.parametrize("settings", [{"balance": True}, {"sample": "balanced"}])
def test_targets_of_several_numbers_have_no_classes_to_balance(tmp_path, settings):
    data = synthetic(train=20, test=20)
    soft = dataclasses.replace(data, train_labels=np.full((20, 10), 0.1, "f"), test_labels=np.full((20, 10), 0.1, "f"))
    with pytest.raises(UserError, match=f"--{next(iter(settings))}.* needs .*a class for each image") as error:
        set_up(Config(model="simplecnn", out=tmp_path / "run", **settings), Ranks(), data=soft)
    assert "\n" not in str(error.value)


# -- settings of earlier versions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before, now",
    [
        ({"flip": True, "crop": 2, "cutout": 0}, "flip,crop=2"),
        ({"flip": False, "crop": 0, "cutout": 0}, "none"),
        ({"flip": True, "crop": 4, "cutout": 8, "augment": "own.py:f"}, "flip,crop=4,own.py:f,cutout=8"),
        ({"cutout": 8, "model": "nets.py:Net"}, "flip,crop=2,cutout=8"),
        ({"flip": False, "model": "smallresnet"}, "crop=4"),
        ({"crop": 3, "model": "smallresnet"}, "flip,crop=3"),
    ],
)
def test_settings_of_earlier_versions_are_one_augment(before, now):
    others = {key: value for key, value in before.items() if key == "model"}
    assert from_plain({**before, "lr": 0.5}, "c.toml") == {**others, "lr": 0.5, "augment": now}


def test_a_settings_file_may_give_a_list_or_a_text():
    for given, text in ((["flip", "crop=3"], "flip,crop=3"), ([], "none"), ("flip,crop=3", "flip,crop=3")):
        assert from_plain({"augment": given}, "c.toml") == {"augment": text}


def test_settings_of_earlier_versions_that_make_no_sense_are_refused():
    for before in (
        {"crop": "far"},
        {"flip": "yes"},
        {"cutout": 8},
        {"flip": "yes", "crop": 2},
        {"cutout": -1},
        {"augment": "mirror"},
    ):
        with pytest.raises(UserError, match=r"^c\.toml: "):
            from_plain(before, "c.toml")


@pytest.mark.parametrize(
    "flags, instead",
    [
        ("--crop 4", "--crop: .* write --augment flip,crop=4$"),
        ("--no-flip --cutout=8 --model smallresnet", "--flip, --cutout: .* write --augment crop=4,cutout=8$"),
        ("--flip", "--flip: .* write --augment flip,crop=2$"),
        ("--no-flip --crop 0", "write --augment none$"),
        ("--crop --lr 1", "write --augment flip,crop=N$"),
    ],
)
def test_flags_of_earlier_versions_say_what_to_write_now(flags, instead):
    assert parse([]).augment is None and parse(["--augment", "crop=4"]).augment == "crop=4"
    with pytest.raises(UserError, match=instead):
        parse(flags.split())


def test_a_run_of_an_earlier_version_goes_on_with_the_same_bits(tmp_path, uneven):
    whole = trained(tmp_path / "whole", uneven, augment="flip,crop=3,cutout=5")
    part = trained(tmp_path / "part", uneven, augment="flip,crop=3,cutout=5", max_steps=2)
    arrays, attributes = checkpoint.load(part.out / "last.h5")
    config = json.loads(attributes["config"])
    for new in ("augment", "sample", "balance"):
        del config[new]
    old = json.dumps(config | {"flip": True, "crop": 3, "cutout": 5})
    checkpoint.save(part.out / "last.h5", arrays, attributes | {"config": old})
    with pytest.raises(UserError, match=r"--augment flip \(the run has flip,crop=3,cutout=5\)"):
        set_up(Config(out=part.out, resume="auto", augment="flip"), Ranks())
    resumed = set_up(Config(out=part.out, resume="auto", augment="flip,crop=03,cutout=5"), Ranks())
    assert resumed.run() == 0
    ours, theirs = (checkpoint.weights_digest(run.model.state_dict()) for run in (resumed, whole))
    assert ours == theirs


def test_a_run_with_code_of_ones_own_goes_on_with_code_of_ones_own_at_the_same_place(tmp_path, uneven, monkeypatch):
    (tmp_path / "own.py").write_text(
        "def dark(x, y, draw): return x // 2\ndef light(x, y, draw): return x // 2 + 100\n"
    )
    monkeypatch.chdir(tmp_path)
    run = trained(tmp_path / "run", uneven, augment="flip,own.py:dark,own.py:light,cutout=3", max_steps=2)
    sources = json.loads(checkpoint.load(run.out / "last.h5")[1]["sources"])
    assert len(sources["augment"]) == 2 * 64
    for augment, message in [
        (None, "name it, as --augment flip,own.py:dark,own.py:light,cutout=3"),
        ("flip,crop=3,own.py:dark,own.py:light,cutout=3", "which these contradict: --augment"),
        ("own.py:dark,own.py:light", "which these contradict: --augment"),
        ("flip,own.py:dark,own.py:dark,own.py:light,cutout=3", "which these contradict: --augment"),
    ]:
        with pytest.raises(UserError, match=message):
            set_up(Config(out=run.out, resume="auto", augment=augment), Ranks())
    moved = set_up(Config(out=run.out, resume="auto", augment="flip,own:dark,own:light,cutout=3"), Ranks())
    assert math.isfinite(moved.train_step())

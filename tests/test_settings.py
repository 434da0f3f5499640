"""Every setting does what it says: a row for each field of ``Config``, and none without one.

What shapes the result is compared with a twin: the same small network in torch.nn, trained in float64 by torch.optim on
batches that are read here by hand, pixel by pixel, from the draws that docs/numerics.md names. So a setting that no
longer reaches training fails, although all runs still agree with each other. Each row also shows that the twin without
the setting ends elsewhere, or the row could not fail.
"""

import contextlib
import dataclasses
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tomli_w

from cnnmpi import checkpoint, functional, layers, load_checkpoint
from cnnmpi.data import Dataset, synthetic, write_hdf5
from cnnmpi.distributed import Ranks, UserError
from cnnmpi.models import Model
from cnnmpi.rng import generator
from cnnmpi.train import Config, Trainer, entry, evaluate, fit, set_up
from cnnmpi.train.code import Code
from cnnmpi.train.config import parse

torch = pytest.importorskip("torch")

# all that shapes the result, at its plainest: plain SGD at one rate, nothing added to loss or images
PLAIN: dict[str, Any] = {
    "model": "simplecnn", "epochs": 2, "batch_size": 24, "shards": 2, "optimizer": "sgd", "lr": 0.1,
    "schedule": "constant", "warmup": 0.0, "momentum": 0.0, "weight_decay": 0.0, "label_smoothing": 0.0, "clip": 0.0,
    "augment": "none", "sample": "all", "balance": False, "seed": 5, "threads": 1,
}  # fmt: skip


def images(train: int = 45, test: int = 20, seed: int = 3) -> Dataset:
    """16x16 images; an epoch's last batch is smaller, and shards are unequal."""
    whole = synthetic(seed=seed, train=train, test=test)
    return dataclasses.replace(
        whole, train_images=whole.train_images[:, :, ::2, ::2], test_images=whole.test_images[:, :, ::2, ::2]
    )


class SmallNet(Model):
    """Convolution, BatchNorm, affine map: smooth, so that float32 and float64 stay close; its shards can be told."""

    def __init__(self, in_channels=3, num_classes=10, image_size=16, seed=0):
        super().__init__()
        draw = np.random.default_rng(seed)
        self.conv = layers.Conv2d(in_channels, 4, 3, 2, bias=False, rng=draw)
        self.norm = layers.BatchNorm(4)
        self.flatten = layers.Flatten()
        self.head = layers.Linear(4 * 7 * 7, num_classes, rng=draw)
        self.keys: list[tuple[int, ...]] = []

    def reseed(self, *key: int) -> None:
        self.keys.append(key)
        super().reseed(*key)


class OtherNet(SmallNet):
    pass


NETWORKS = {"simplecnn": SmallNet, "smallresnet": OtherNet}


def new(config: Config, ranks: Ranks, **networks: Any) -> Trainer:
    return set_up(config, ranks, Code(NETWORKS | networks))


# -- the twin ----------------------------------------------------------------------------------------------------------


def batch_by_hand(data: Dataset, s: dict[str, Any], step: int) -> tuple[np.ndarray, np.ndarray]:
    """The images (n, C, H, W) and the classes' probabilities (n, K) of a step, float64, one pixel after the other."""
    pixels, (N, _, H, W) = data.train_images / 255.0, data.train_images.shape
    mean, std = pixels.mean(axis=(0, 2, 3)), pixels.std(axis=(0, 2, 3))
    numbers = {name: float(value or 1) for name, _, value in (word.partition("=") for word in s["augment"].split(","))}
    crop, cutout = (int(numbers.get(name, 0)) for name in ("crop", "cutout"))
    epoch, index = divmod(step, math.ceil(N / s["batch_size"]))
    order = order_by_hand(data.train_labels, s, epoch)
    mirrored = (generator(s["seed"], "flip").random(N) < 0.5) ^ (epoch % 2 == 1)
    shift = generator(s["seed"], "crop", epoch).integers(0, 2 * crop + 1, (2, N))
    square = generator(s["seed"], "cutout", epoch).integers(0, H - cutout + 1, (2, N))
    places = range(N)[index * s["batch_size"] :][: s["batch_size"]]
    batch = []
    for place in places:
        image = pixels[order[place]]
        drawn = order[place] if s["sample"] == "all" else place
        if "flip" in numbers and mirrored[drawn]:
            image = image[:, :, ::-1]
        top, left = shift[:, drawn]
        image = np.pad(image, ((0, 0), (crop, crop), (crop, crop)))[:, top : top + H, left : left + W]
        image = (image - mean[:, None, None]) / std[:, None, None]
        top, left = square[:, drawn]
        image[:, top : top + cutout, left : left + cutout] = 0
        batch.append(image)
    x, y = np.stack(batch), np.eye(10)[data.train_labels[order[places.start : places.stop]]]
    for shard, part in enumerate(np.array_split(np.arange(len(x)), s["shards"])):
        for mix in numbers.keys() & {"mixup", "cutmix"}:
            rng = generator(s["seed"], f"augment/{mix}", step, shard + 1)
            others, shares = part[rng.permutation(len(part))], rng.beta(numbers[mix], numbers[mix], len(part))
            old, labels, centres = x.copy(), y.copy(), rng.random((2, len(part)))
            for i, other, share, (middle, centre) in zip(part, others, shares, centres.T, strict=True):
                if mix == "mixup":
                    x[i] = share * old[i] + (1 - share) * old[other]
                else:
                    half = math.sqrt(1 - share) / 2
                    top, bottom = (round(min(max(H * (middle + h), 0), H)) for h in (-half, half))
                    left, right = (round(min(max(W * (centre + h), 0), W)) for h in (-half, half))
                    x[i, :, top:bottom, left:right] = old[other, :, top:bottom, left:right]
                    share = 1 - (bottom - top) * (right - left) / (H * W)
                y[i] = share * labels[i] + (1 - share) * labels[other]
    return x, y


def order_by_hand(labels: np.ndarray, s: dict[str, Any], epoch: int) -> np.ndarray:
    """The samples of an epoch."""
    N, rng = len(labels), generator(s["seed"], "order", epoch)
    if s["sample"] == "all":
        return rng.permutation(N)
    present = sorted(set(labels.tolist()))
    luckier = rng.permutation(len(present))[: N % len(present)]
    chosen: list[int] = []
    for number, label in enumerate(present):
        members = np.flatnonzero(labels == label)
        times, more = divmod(N // len(present) + (number in luckier), len(members))
        chosen += [member for member in members for _ in range(times)]
        chosen += rng.permutation(members)[:more].tolist()
    return rng.permutation(chosen)


def rate_by_hand(s: dict[str, Any], step: int, total: int) -> float:
    warmup = round(s["warmup"] * total) if s["schedule"] in ("cosine", "linear") else 0
    if step < warmup:
        return s["lr"] * (step + 1) / warmup
    part = (step - warmup) / (total - warmup)
    shape = {
        "constant": 1.0,
        "linear": 1 - part,
        "cosine": (1 + math.cos(math.pi * part)) / 2,
        "step": 0.1 ** (step // math.ceil(total / 3)),
    }
    return s["lr"] * shape[s["schedule"]]


def trained_by_torch(data: Dataset, s: dict[str, Any], losses: list[float] | None = None) -> dict[str, np.ndarray]:
    """The weights and running statistics in which training with the settings ``s`` must end.

    ``losses`` receives each step's share of the mean loss of its epoch.
    """
    torch.set_num_threads(1)  # a second one makes these small sums slower, on a busy machine by far
    net = torch.nn.Sequential()
    net.add_module("conv", torch.nn.Conv2d(3, 4, 3, 2, bias=False))
    net.add_module("norm", torch.nn.BatchNorm2d(4))
    net.add_module("flatten", torch.nn.Flatten())
    net.add_module("head", torch.nn.Linear(4 * 7 * 7, 10))
    first = {name: torch.from_numpy(array) for name, array in SmallNet(seed=s["seed"]).state_dict().items()}
    net.load_state_dict(first, strict=False)  # but for num_batches_tracked
    net.double()
    decayed = [p for p in net.parameters() if p.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": s["weight_decay"]},
        {"params": [p for p in net.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = {
        "sgd": lambda: torch.optim.SGD(groups, s["lr"], momentum=s["momentum"], nesterov=s["momentum"] > 0),
        "adam": lambda: torch.optim.Adam(groups, s["lr"]),
        "adamw": lambda: torch.optim.AdamW(groups, s["lr"]),
    }[s["optimizer"]]()
    steps = math.ceil(len(data.train_images) / s["batch_size"])
    total = s["epochs"] * steps
    counts = np.bincount(data.train_labels, minlength=10)
    balanced = torch.tensor([len(data.train_labels) / (np.count_nonzero(counts) * max(n, 1)) for n in counts])
    weight = balanced.double() if s["balance"] else None
    loss_of = torch.nn.CrossEntropyLoss(weight, reduction="sum", label_smoothing=s["label_smoothing"])
    statistics = (net.norm.running_mean, net.norm.running_var)
    for step in range(total):
        x, y = batch_by_hand(data, s, step)
        optimizer.zero_grad()
        step_loss = 0.0
        before = [array.clone() for array in statistics]
        after = [torch.zeros(4, dtype=torch.float64) for _ in statistics]
        for part in np.array_split(np.arange(len(y)), s["shards"]):  # each with a BatchNorm of its own
            for array, old in zip(statistics, before, strict=True):
                array.copy_(old)
            loss = loss_of(net(torch.from_numpy(x[part])), torch.from_numpy(y[part])) / len(y)
            loss.backward()
            step_loss += loss.item() * len(y)
            for total_of, array in zip(after, statistics, strict=True):
                total_of += array * len(part) / len(y)
        for array, new in zip(statistics, after, strict=True):
            array.copy_(new)
        if s["clip"]:
            torch.nn.utils.clip_grad_norm_(net.parameters(), s["clip"])
        for group in optimizer.param_groups:
            group["lr"] = rate_by_hand(s, step, total)
        optimizer.step()
        if losses is not None:
            losses.append(step_loss / len(data.train_images))
    return {name: array.numpy() for name, array in net.state_dict().items() if name != "norm.num_batches_tracked"}


# -- what a row needs --------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Where a row trains."""

    folder: Path
    patch: pytest.MonkeyPatch

    def config(self, **settings: Any) -> Config:
        path = self.folder / "data.h5"
        if not path.exists():
            write_hdf5(path, images())
        return Config(**{**PLAIN, "data": str(path), "out": self.folder / "run", **settings})

    def trainer(self, ranks: Ranks | None = None, **settings: Any) -> Trainer:
        return new(self.config(**settings), ranks or Ranks())

    def finished(self, **settings: Any) -> Trainer:
        trainer = self.trainer(**settings)
        assert trainer.run() == 0
        return trainer


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def saved_step(folder: Path) -> int:
    return int(checkpoint.load(folder / "last.h5")[1]["step"])


def largest_difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


Check = Callable[[Bench, str, Any], None]


def like_torch(**others: Any) -> Check:
    """With the settings ``others``, training ends where the twin does, and without the row's one it does not."""

    def check(bench: Bench, field: str, value: Any) -> None:
        settings = {**PLAIN, **others, field: value}
        twin = trained_by_torch(images(), settings)
        without = trained_by_torch(images(), {**PLAIN, **others})
        trainer = bench.trainer(**{**others, field: value})
        while trainer.step < trainer.last_step:
            trainer.train_step()
        # four steps of float32 against float64, on numbers of order 1; a setting moves them by 1e-3 and more
        assert largest_difference(trainer.model.state_dict(), twin) < TOLERANCE
        assert largest_difference(without, twin) > 10 * TOLERANCE

    return check


TOLERANCE = 3e-5


# -- rows of their own -------------------------------------------------------------------------------------------------


def is_built(bench: Bench, field: str, value: Any) -> None:
    trainer = bench.finished(model=value)
    assert type(trainer.model) is OtherNet and type(bench.trainer(out=bench.folder / "b").model) is SmallNet
    assert checkpoint.load(trainer.out / "last.h5")[1]["model"] == value


def are_reported(bench: Bench, field: str, value: Any) -> None:
    trainer = bench.finished(epochs=value)
    lines = [json.loads(line) for line in (trainer.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, value + 1))
    assert trainer.step == saved_step(trainer.out) == value * math.ceil(45 / 24)
    losses: list[float] = []
    trained_by_torch(images(), {**PLAIN, "epochs": value}, losses)
    means = np.reshape(losses, (value, -1)).sum(axis=1)
    np.testing.assert_allclose([line["train_loss"] for line in lines], means, rtol=1e-4)  # float32 against float64


def end_the_run(bench: Bench, field: str, value: Any) -> None:
    trainer = bench.finished(max_steps=value)
    assert trainer.step == saved_step(trainer.out) == value < bench.finished(out=bench.folder / "b").step


def keys_every_draw(bench: Bench, field: str, value: Any) -> None:
    """Order, flip, crop, cutout and first weights are the twin's; the masks of dropout get the key here."""
    like_torch(augment="flip,crop=2,cutout=3,mixup=1")(bench, field, value)
    trainer = bench.trainer(seed=value, out=bench.folder / "b")
    for _ in range(2):
        trainer.train_step()
    assert trainer.model.keys == [(value, step, shard) for step in range(2) for shard in range(2)]


def computes_in_torch(bench: Bench, field: str, value: Any) -> None:
    trainer = bench.finished(backend=value)
    assert isinstance(trainer.flat.params, torch.Tensor) and trainer.model.use_torch
    assert largest_difference(trainer.model.state_dict(), trained_by_torch(images(), PLAIN)) < TOLERANCE
    assert isinstance(bench.trainer(backend="numpy", out=bench.folder / "b").flat.params, np.ndarray)


def is_asked_of_torch(bench: Bench, field: str, value: Any) -> None:
    from cnnmpi import functional_torch

    asked = []
    bench.patch.setattr(functional_torch, "choose_device", lambda device, index=0: asked.append(device) or "cpu")
    bench.trainer(backend="torch", device=value, shards=1)
    assert set(asked) == {value}


def rounds_products(bench: Bench, field: str, value: Any) -> None:
    trainer = bench.finished(**{field: value}, backend="torch")
    assert trainer.model.F.__name__ == f"cnnmpi.functional_torch.{value}"
    assert trainer.flat.params.dtype == trainer.flat.grads.dtype == trainer.flat.buffers.dtype == torch.float32
    twin = trained_by_torch(images(), PLAIN)
    # four steps with products of 8 bits: 2**-9 each, on weights of order 1 that move by 0.1
    assert 10 * TOLERANCE < largest_difference(trainer.model.state_dict(), twin) < 0.02
    with pytest.raises(UserError, match="--precision bfloat16 needs --backend torch: NumPy computes in float32"):
        bench.trainer(**{field: value})


def are_used(bench: Bench, field: str, value: Any) -> None:
    asked = []
    bench.patch.setattr(functional, "set_threads", lambda count, callers=1: asked.append((count, callers)))
    bench.trainer(threads=value, shards=value)
    assert asked[-1] == (value, value), "every thread works on a shard of its own"
    bench.patch.setattr(Ranks, "default_threads", lambda self: 5)
    bench.trainer(threads=0, shards=1, out=bench.folder / "b")
    assert asked[-1] == (5, 1), "0 takes the rank's part of the cores"


def rounds_as_it_says(bench: Bench, field: str, value: Any) -> None:
    """One image with a small gradient, which is the sum: exact sums are multiples of 2**-40, float32 keeps all bits."""

    def multiples(reduction: str) -> np.ndarray:
        trainer = bench.trainer(reduction=reduction, batch_size=1, shards=1, out=bench.folder / reduction)
        backward = trainer.model.backward
        trainer.model.backward = lambda dout: backward(dout * np.float32(1e-6))  # type: ignore[method-assign]
        trainer.train_step()
        gradient = np.asarray(trainer.flat.grads, np.float64)
        assert np.abs(gradient).max() > 2.0**-24
        return gradient * 2.0**40 % 1 == 0

    assert multiples("exact").all() and not multiples(value).all()


def are_the_ones_trained_on(bench: Bench, field: str, value: Any) -> None:
    other = images(train=30, seed=4)
    path = bench.folder / value
    write_hdf5(path, other)
    trainer = bench.finished(data=str(path))
    assert np.array_equal(trainer.dataset.train_images, other.train_images)
    sha256 = checkpoint.load(trainer.out / "last.h5")[1]["data_sha256"]
    assert sha256 == other.digest() != images().digest()
    assert largest_difference(trainer.model.state_dict(), trained_by_torch(other, PLAIN)) < TOLERANCE


def are_held_out(bench: Bench, field: str, value: Any) -> None:
    """Of each class the same share: the rest is trained on, and best.h5 is the best by the images held out."""
    data, rng, held = images(), generator(PLAIN["seed"], "validation"), []
    for label in range(10):
        of_class = rng.permutation(np.flatnonzero(data.train_labels == label))
        held += sorted(of_class[: round(value * len(of_class))].tolist())
    rest = sorted(set(range(len(data.train_labels))) - set(held))
    trainer = bench.finished(**{field: value})
    assert len(held) > 3 and trainer.loader.labels.tolist() == data.train_labels[rest].tolist()
    seen = np.concatenate([trainer.loader.batch(step, shard)[1] for step in range(2) for shard in range(2)])
    assert sorted(seen.tolist()) == sorted(data.train_labels[rest].tolist()), "an epoch"
    line = json.loads((trainer.out / "metrics.jsonl").read_text().splitlines()[-1])
    options = {"classes": 10, "mean": trainer.loader.mean, "std": trainer.loader.std}
    by_hand = evaluate(trainer.model, data.train_images[sorted(held)], data.train_labels[sorted(held)], **options)
    assert line["val_acc"] == by_hand.accuracy and line["val_loss"] == by_hand.loss and "test_acc" not in line
    assert checkpoint.load(trainer.out / "best.h5")[1]["best_val_acc"] == trainer.best


def are_read_from_there(bench: Bench, field: str, value: Any) -> None:
    """The file or memory: the same bits. By itself, the file where memory is short."""
    ends = {}
    for place in (value, "memory", "auto"):
        trainer = bench.finished(**{field: place}, out=bench.folder / place, augment="flip,crop=2")
        ends[place] = checkpoint.weights_digest(trainer.model.state_dict())
        assert isinstance(trainer.dataset.train_images, np.ndarray) == (place != value)
    assert len(set(ends.values())) == 1
    bench.patch.setattr("cnnmpi.train.inputs.available_memory", lambda: 4 * images().train_images.nbytes)
    trainer = bench.trainer(**{field: "auto"}, out=bench.folder / "short")
    assert not isinstance(trainer.dataset.train_images, np.ndarray)


def receives_the_files(bench: Bench, field: str, value: Any) -> None:
    bench.patch.chdir(bench.folder)
    bench.finished(out=value)
    assert {"last.h5", "best.h5", "metrics.jsonl", "config.toml"} <= {p.name for p in (bench.folder / value).iterdir()}
    bench.finished(out=None, seed=8)
    assert (bench.folder / "runs" / "simplecnn-8" / "last.h5").exists()


def goes_on(bench: Bench, field: str, value: Any) -> None:
    whole = bench.finished(momentum=0.9, out=bench.folder / "whole")
    part = bench.finished(momentum=0.9, max_steps=3).out
    copied = new(Config(resume=str(part / "last.h5"), out=bench.folder / "other"), Ranks())
    assert copied.step == 3
    resumed = new(Config(resume=value, out=part), Ranks())
    assert resumed.step == 3
    for trainer in (copied, resumed):
        assert trainer.run() == 0
        assert largest_difference(trainer.model.state_dict(), whole.model.state_dict()) == 0
    assert bench.trainer(resume=None, out=part).step == 0


def saves(bench: Bench, field: str, value: Any) -> None:
    def seen(every: int) -> list[int]:
        trainer = bench.trainer(checkpoint_every=every, batch_size=16, out=bench.folder / str(every))
        original, steps = trainer.train_step, []

        def step() -> float:
            steps.append(saved_step(trainer.out))
            return original()

        trainer.train_step = step  # type: ignore[method-assign]
        assert trainer.run() == 0
        return steps

    assert seen(value) == [0, 0, 2, 3, 4, 4]  # what each of the steps 0..5 finds; an epoch has three
    assert seen(0) == [0, 0, 0, 3, 3, 3]


def keeps(bench: Bench, field: str, value: Any) -> None:
    def there(**options: int) -> list[str]:
        out = bench.folder / "-".join(map(str, options.values()))
        assert bench.trainer(epochs=4, out=out, **options).run() == 0
        kept = sorted((out / "kept").glob("*"))
        steps = [checkpoint.load(path)[1]["step"] for path in kept]
        assert [f"epoch-{step // 2:04}.h5" for step in steps] == [path.name for path in kept]  # two steps an epoch
        return [path.stem for path in kept]

    every = there(keep_every=1)
    assert every == ["epoch-0001", "epoch-0002", "epoch-0003", "epoch-0004"] and there(keep_every=0) == []
    assert there(keep_every=3) == ["epoch-0003"] and there(keep_every=1, keep_last=2) == every[2:]


def enters(bench: Bench, field: str, value: Any) -> None:
    def steps(every: int) -> list[int]:
        trainer = bench.trainer(ledger_every=every, batch_size=16, out=bench.folder / str(every))
        assert trainer.run() == 0
        path = trainer.out / "ledger.jsonl"
        return [json.loads(line).get("step") for line in path.read_text().splitlines()] if path.exists() else []

    assert steps(value) == [None, 0, 2, 3, 4, 6] and steps(0) == []  # an epoch has three


def takes_fingerprints(bench: Bench, field: str, value: Any) -> None:
    def steps(wanted: str | None) -> set[int]:
        trainer = bench.trainer(fingerprint=wanted, batch_size=16, out=bench.folder / str(wanted))
        assert trainer.run() == 0
        path = trainer.out / "fingerprint.jsonl"
        return {json.loads(line).get("step") for line in path.read_text().splitlines()} if path.exists() else set()

    assert steps(value) == {None, 2, 3} and steps(None) == set()


def writes_down(bench: Bench, field: str, value: Any) -> None:
    def seen(every: int) -> list[int]:
        trainer = bench.trainer(log_every=every, batch_size=16, out=bench.folder / str(every))
        assert trainer.run() == 0
        path = trainer.out / "steps.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    assert seen(value) == [2, 4, 6] and seen(0) == []


def leaves_events(bench: Bench, field: str, value: Any) -> None:
    for wanted in (value, not value):
        trainer = bench.trainer(tensorboard=wanted, out=bench.folder / str(wanted))
        assert trainer.run() == 0
        assert len([*trainer.out.glob("tensorboard/*tfevents*")]) == wanted


def leaves_a_page(bench: Bench, field: str, value: Any) -> None:
    for wanted in (value, not value):
        trainer = bench.trainer(report=wanted, out=bench.folder / str(wanted))
        with mock.patch("cnnmpi.train.trainer.write_report") as write:
            assert trainer.run() == 0
        assert write.called == wanted


def hushes(bench: Bench, field: str, value: Any) -> None:
    def said(quiet: bool) -> list[str]:
        trainer, output = bench.trainer(quiet=quiet, out=bench.folder / str(quiet)), io.StringIO()
        with contextlib.redirect_stdout(output):
            assert trainer.run() == 0
        return output.getvalue().splitlines()

    (only,) = said(value)
    assert only.startswith("done: ") and len(said(not value)) > 10


def compares_the_ranks(bench: Bench, field: str, value: Any) -> None:
    class Listening(Ranks):
        def agree_on_arrays(self, when, arrays):
            heard.append((when, frozenset(arrays)))

    def asked(every: int) -> list[str]:
        trainer = bench.trainer(Listening(), agree_every=every, batch_size=16, out=bench.folder / str(every))
        heard.clear()
        while trainer.step < trainer.last_step:
            trainer.train_step()
        assert all("model/head.weight" in names and "optimizer/momentum/head.weight" in names for _, names in heard)
        return [when for when, _ in heard]

    heard: list[tuple[str, frozenset[str]]] = []
    assert asked(value) == ["step 2", "step 4", "step 6"] and asked(0) == []


def decides(bench: Bench, field: str, value: Any) -> None:
    def poisoned(on_nan: str) -> Trainer:
        trainer = bench.trainer(on_nan=on_nan, out=bench.folder / on_nan)
        original = trainer.loader.batch

        def batch(step: int, shard: int) -> tuple[Any, Any]:
            x, y = original(step, shard)
            return (np.full_like(x, np.nan), y) if step == 1 else (x, y)

        trainer.loader.batch = batch  # type: ignore[method-assign, assignment]
        return trainer

    skipping, stopping = poisoned(value), poisoned("stop")
    with np.errstate(all="ignore"):
        assert skipping.run() == 0 and skipping.step == 4
        with pytest.raises(UserError, match=r"step 1, shard 0: .*not finite"):
            stopping.run()
    assert stopping.step == 1


def reaches_the_watchdog(bench: Bench, field: str, value: Any) -> None:
    made = []

    class Watching(entry.Watchdog):
        def __init__(self, ranks: Ranks, warning_s: float, limit_s: float, *more: Any) -> None:
            made.append((warning_s, limit_s))
            super().__init__(ranks, warning_s, limit_s, *more)

    bench.patch.setattr(entry, "start", Ranks)  # each rank for itself
    bench.patch.setattr(entry, "Watchdog", Watching)
    bench.trainer()
    flag = "--" + field.replace("_", "-")
    argv = [flag, str(value), "--data", str(bench.folder / "data.h5"), "--max-steps", "0"]
    assert fit(SmallNet, argv=[*argv, "--out", str(bench.folder / "watched")]) == 0
    usual = {"hang_warning": 60, "hang_limit": 600}
    assert made == [tuple((usual | {field: value}).values())]


class WideNet(SmallNet):
    """The small network with another number of channels."""

    def __init__(self, width=4, **options):
        super().__init__(**options)
        draw = np.random.default_rng(1)
        self.conv = layers.Conv2d(3, width, 3, 2, bias=False, rng=draw)
        self.norm = layers.BatchNorm(width)
        self.head = layers.Linear(width * 7 * 7, 10, rng=draw)


def reach_the_constructor(bench: Bench, field: str, value: Any) -> None:
    config = bench.config(model_options=value)
    trainer = new(config, Ranks(), simplecnn=WideNet)
    assert trainer.run() == 0 and trainer.model.conv.out_c == value["width"]
    loaded = load_checkpoint(trainer.out / "last.h5", model=WideNet)
    assert largest_difference(loaded.state_dict(), trainer.model.state_dict()) == 0
    resumed = new(Config(resume="auto", out=trainer.out), Ranks(), simplecnn=WideNet)
    assert resumed.model.conv.out_c == value["width"]


def lends_its_weights(bench: Bench, field: str, value: Any) -> None:
    """A run from the weights of another, but for the head, which has another shape there."""
    other = new(bench.config(out=bench.folder / "other", max_steps=2), Ranks())
    assert other.run() == 0
    arrays, attributes = checkpoint.load(other.out / "last.h5")
    arrays["model/head.weight"] = arrays["model/head.weight"][:3]
    checkpoint.save(bench.folder / value, arrays, attributes)
    begun = bench.trainer(init=str(bench.folder / value)).model.state_dict()
    fresh = SmallNet(seed=PLAIN["seed"]).state_dict()
    for name, array in begun.items():
        expected = fresh[name] if name == "head.weight" else other.model.state_dict()[name]
        assert np.array_equal(array, expected), name
    assert not np.array_equal(begun["conv.weight"], fresh["conv.weight"])


def halved(logits: np.ndarray, targets: np.ndarray, reduction: str = "mean") -> tuple[float, np.ndarray]:
    """A loss of one's own: half of the cross-entropy, so that it trains as half the rate does."""
    loss, dlogits = functional.cross_entropy_loss(logits, targets, reduction=reduction)
    return loss / 2, dlogits / 2


def is_minimised(bench: Bench, field: str, value: Any) -> None:
    def trained(**settings: Any) -> dict[str, np.ndarray]:
        trainer = set_up(bench.config(**settings), Ranks(), Code(NETWORKS | {value: halved}))
        assert trainer.run() == 0
        return trainer.model.state_dict()

    at_half_the_rate = trained_by_torch(images(), {**PLAIN, "lr": PLAIN["lr"] / 2})
    assert largest_difference(trained(loss=value), at_half_the_rate) < TOLERANCE
    assert largest_difference(trained(loss="cross_entropy", out=bench.folder / "b"), at_half_the_rate) > 10 * TOLERANCE


def brightened(images: np.ndarray, labels: np.ndarray, draw: Any) -> np.ndarray:
    """An augmentation of one's own."""
    assert images.dtype == np.uint8 and labels.shape == images.shape[:1]
    return images // 2 + draw("brightness").integers(0, 100, (len(images), 1, 1, 1)).astype(np.uint8)


def changes_the_images(bench: Bench, field: str, value: Any) -> None:
    def batches(**settings: Any) -> list[np.ndarray]:
        trainer = set_up(bench.config(**settings), Ranks(), Code(NETWORKS | {value: brightened}))
        return [trainer.loader.batch(step, shard)[0] for step in range(2) for shard in range(2)]

    plain, changed = batches(out=bench.folder / "b"), batches(augment=value)
    loader = bench.trainer(out=bench.folder / "c").loader
    for number, (one, other) in enumerate(zip(plain, changed, strict=True)):
        step, shard = divmod(number, 2)
        mean, std = (np.reshape(a, (3, 1, 1)) for a in (loader.mean, loader.std))
        pixels = np.rint((one * std + mean) * 255).astype(np.uint8)
        draws = generator(PLAIN["seed"], "augment/brightness", step, shard + 1)
        expected = (brightened(pixels, np.zeros(len(pixels)), {"brightness": draws}.get) / 255 - mean) / std
        np.testing.assert_allclose(other, expected, atol=1e-5)  # float32 against float64, on numbers of order 1


# -- the table ---------------------------------------------------------------------------------------------------------

# field: (a value that is not the usual one, what it does)
ROWS: dict[str, list[tuple[Any, Check]]] = {
    "model": [("smallresnet", is_built)],
    "model_options": [({"width": 6}, reach_the_constructor)],
    "init": [("begin.h5", lends_its_weights)],
    "loss": [("own.py:halved", is_minimised)],
    "epochs": [(3, like_torch(schedule="linear")), (3, are_reported)],
    "max_steps": [(3, end_the_run)],
    "batch_size": [(16, like_torch())],
    "shards": [(3, like_torch())],
    "optimizer": [
        ("adam", like_torch(weight_decay=0.1, lr=0.01)),
        ("adamw", like_torch(weight_decay=0.1, lr=0.01)),
        ("sgd", like_torch(optimizer="adam", lr=0.01, momentum=0.9)),
    ],
    "lr": [(0.05, like_torch()), (0.005, like_torch(optimizer="adamw"))],
    "schedule": [("cosine", like_torch()), ("linear", like_torch()), ("step", like_torch())],
    "warmup": [(0.5, like_torch(schedule="linear")), (0.25, like_torch(schedule="cosine"))],
    "momentum": [(0.8, like_torch())],
    "weight_decay": [(0.1, like_torch()), (0.3, like_torch(optimizer="adamw", lr=0.01))],
    "label_smoothing": [(0.2, like_torch())],
    "clip": [(0.5, like_torch(momentum=0.9, weight_decay=0.1))],
    "augment": [
        ("flip", like_torch()),
        ("crop=3", like_torch()),
        ("cutout=5", like_torch()),
        ("mixup=0.4", like_torch()),
        ("cutmix=1", like_torch(label_smoothing=0.2)),
        ("own.py:brightened", changes_the_images),
    ],
    "sample": [("balanced", like_torch()), ("balanced", like_torch(augment="flip,crop=3,cutout=5"))],
    "balance": [(True, like_torch()), (True, like_torch(augment="mixup=1", label_smoothing=0.2))],
    "seed": [(6, keys_every_draw)],
    "backend": [("torch", computes_in_torch)],
    "device": [("cuda:1", is_asked_of_torch)],
    "precision": [("bfloat16", rounds_products)],
    "threads": [(3, are_used)],
    "reduction": [("float32", rounds_as_it_says)],
    "data": [("other.h5", are_the_ones_trained_on)],
    "validation": [(0.3, are_held_out)],
    "data_in": [("file", are_read_from_there)],
    "out": [(Path("there"), receives_the_files)],
    "resume": [("auto", goes_on)],
    "checkpoint_every": [(2, saves)],
    "keep_every": [(1, keeps)],
    "keep_last": [(2, keeps)],
    "ledger_every": [(2, enters)],
    "fingerprint": [("2:3", takes_fingerprints)],
    "log_every": [(2, writes_down)],
    "tensorboard": [(True, leaves_events)],
    "report": [(False, leaves_a_page)],
    "quiet": [(True, hushes)],
    "agree_every": [(2, compares_the_ranks)],
    "on_nan": [("skip", decides)],
    "hang_warning": [(7.0, reaches_the_watchdog)],
    "hang_limit": [(9.0, reaches_the_watchdog)],
}
FIELDS = [field.name for field in dataclasses.fields(Config)]
CASES = [pytest.param(field, *row, id=f"{field}-{row[0]}") for field, rows in ROWS.items() for row in rows]


def test_every_setting_has_a_row():
    assert sorted(ROWS) == sorted(FIELDS)


@pytest.mark.parametrize("field, value, check", CASES)
def test_a_setting_does_what_it_says(field, value, check, bench):
    check(bench, field, value)


def test_the_plain_run_is_the_twins(bench):
    trainer = bench.finished()
    assert largest_difference(trainer.model.state_dict(), trained_by_torch(images(), PLAIN)) < TOLERANCE


@pytest.mark.parametrize("field", FIELDS)
def test_a_setting_has_a_flag_and_a_key(field, tmp_path):
    value = ROWS[field][0][0]
    usual = parse([])
    path = tmp_path / "settings.toml"
    path.write_text(tomli_w.dumps({field: str(value) if isinstance(value, Path) else value}))
    flag = "--" + field.replace("_", "-")
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    for argv in ([flag] if value is True else [flag, text], ["--config", str(path)]):
        config = parse(argv)
        assert getattr(config, field) == value
        assert [name for name in FIELDS if getattr(config, name) != getattr(usual, name)] == [field]


# -- what no setting changes -------------------------------------------------------------------------------------------


@pytest.mark.mpi(min_size=2)
def test_all_ranks_start_from_the_weights_and_statistics_of_the_first(ranks, shared_tmp, monkeypatch):
    """They may differ at first: hosts of different kinds draw other last bits."""

    class Own(SmallNet):
        def __init__(self, seed=0, **options):
            super().__init__(seed=seed + ranks.rank, **options)
            self.norm.buffers["running_mean"][...] = ranks.rank

    ranks.on_rank0(lambda: write_hdf5(shared_tmp / "data.h5", images()))
    config = Config(**{**PLAIN, "shards": 8, "data": str(shared_tmp / "data.h5"), "out": shared_tmp / "run"})
    trainer = new(config, ranks, simplecnn=Own)
    assert largest_difference(trainer.model.state_dict(), SmallNet(seed=PLAIN["seed"]).state_dict()) == 0
    digests = ranks.gather(checkpoint.weights_digest(trainer.model.state_dict()))
    assert len(set(digests)) == 1


def test_a_resumed_run_keeps_the_best_checkpoint_until_it_is_better(bench):
    out = bench.finished(max_steps=2).out  # one epoch
    arrays, attributes = checkpoint.load(out / "last.h5")
    best = checkpoint.load(out / "best.h5")[1]["step"]
    checkpoint.save(out / "last.h5", arrays, {**attributes, "best_test_acc": 1.0})  # no epoch can be better
    assert new(Config(out=out, resume="auto"), Ranks()).run() == 0
    assert checkpoint.load(out / "best.h5")[1]["step"] == best == 2
    assert checkpoint.load(out / "last.h5")[1]["best_test_acc"] == 1.0

"""Training as a whole: the number of ranks, threads, crashes and resumes change nothing but time.

Runs on as many ranks as pytest does; the reference is always the same run on this process alone.
"""

import dataclasses
import itertools
import json
import signal
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from cnnmpi import checkpoint, layers, load_checkpoint
from cnnmpi.data import Dataset, synthetic, write_hdf5
from cnnmpi.distributed import Ranks, RemoteError, UserError
from cnnmpi.functional import blocks, cross_entropy_loss, whitening
from cnnmpi.models import MobileNet, Model, ResNet18, SimpleCNN, SmallResNet
from cnnmpi.train import Config, Trainer, evaluate, evaluation, scaling, set_up, setup
from cnnmpi.train import config as settings
from cnnmpi.train.code import Code
from cnnmpi.train.team import Team

SMALL = {
    "batch_size": 24, "shards": 4, "epochs": 2, "threads": 1, "seed": 5, "lr": 0.05, "warmup": 0.0,
    "augment": "flip,crop=4",
}  # fmt: skip


def tiny(train=101, test=33) -> Dataset:
    """16x16 images, of numbers that nothing divides."""
    whole = synthetic(seed=3, train=train, test=test)
    return dataclasses.replace(
        whole, train_images=whole.train_images[:, :, ::2, ::2], test_images=whole.test_images[:, :, ::2, ::2]
    )


class DropoutNet(Model):
    """Small, with everything that draws or keeps statistics."""

    def __init__(self, in_channels=3, num_classes=10, image_size=16, seed=0):
        super().__init__()
        draw = np.random.default_rng(seed)
        self.body = layers.Sequential(
            layers.Conv2d(in_channels, 8, 3, 2, rng=draw), layers.BatchNorm(8), layers.ReLU(), layers.Dropout(0.3)
        )
        self.pool = layers.GlobalAvgPool2d()
        self.drop = layers.Dropout(0.2)
        self.head = layers.Linear(8, num_classes, rng=draw)


class NarrowResNet(SmallResNet):
    def __init__(self, **options):
        super().__init__(**options, widths=(24, 24, 24, 10))  # by Winograd, but the 2x2 images of the last unit


class NarrowResNet18(ResNet18):
    def __init__(self, **options):
        super().__init__(**options, width=4)


class NarrowMobileNet(MobileNet):
    def __init__(self, **options):
        super().__init__(**options, width=4)


NETWORKS = {
    "simplecnn": DropoutNet,
    "smallresnet": NarrowResNet,
    "resnet18": NarrowResNet18,
    "mobilenet": NarrowMobileNet,
}


def new(config: Config, ranks: Ranks, **networks) -> Trainer:
    return set_up(config, ranks, Code(NETWORKS | networks))


@pytest.fixture
def data(ranks, shared_tmp) -> str:
    path = shared_tmp / "tiny.h5"
    ranks.on_rank0(lambda: write_hdf5(path, tiny()))
    return str(path)


def train(out: Path, ranks: Ranks, **options) -> Trainer:
    trainer = new(Config(**{**SMALL, "out": out, **options}), ranks)
    assert trainer.run() == 0
    return trainer


def state(trainer: Trainer) -> dict[str, bytes]:
    """Everything that a run results in: weights, statistics, optimizer."""
    arrays = {name: array.tobytes() for name, array in trainer.model.state_dict().items()}
    for slot, values in trainer.optimizer.state.items():
        arrays |= {f"{slot} {index}": np.asarray(value).tobytes() for index, value in enumerate(values)}
    return arrays


@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize(
    "model, optimizer",
    [
        ("simplecnn", "sgd"),
        ("simplecnn", "adam"),
        ("smallresnet", "sgd"),
        ("smallresnet", "adam"),
        ("resnet18", "sgd"),
        ("mobilenet", "adam"),
    ],
)
def test_any_number_of_ranks_gives_the_bits_of_one(ranks, shared_tmp, tmp_path, data, model, optimizer):
    options = {"model": model, "optimizer": optimizer, "data": data, "clip": 1.0}
    together = train(shared_tmp / "together", ranks, **options)
    alone = train(tmp_path / "alone", Ranks(), **options)
    assert together.step == 2 * 5 and state(together) == state(alone)
    if ranks.rank == 0:
        ours, theirs = (
            [json.loads(line) for line in (t.out / "metrics.jsonl").read_text().splitlines()] for t in (together, alone)
        )
        for mine, reference in zip(ours, theirs, strict=True):
            for key in ("epoch", "step", "train_loss", "train_acc", "test_loss", "test_acc", "lr", "data"):
                assert mine[key] == reference[key], key
            assert mine["ranks"] == ranks.size
        digests = [checkpoint.load(t.out / "last.h5")[1]["weights_sha256"] for t in (together, alone)]
        assert digests[0] == digests[1] == checkpoint.weights_digest(together.model.state_dict())


@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize("sample", ["all", "balanced"])
def test_mixed_and_balanced_batches_are_the_same_on_any_number_of_ranks(ranks, shared_tmp, tmp_path, data, sample):
    options = {
        "augment": "flip,crop=4,resized_crop=0.3,jitter=0.4,cutout=3,erasing=0.5,mixup=0.4,cutmix=1",
        "sample": sample, "balance": True, "label_smoothing": 0.1, "data": data,
    }  # fmt: skip
    together = train(shared_tmp / "together", ranks, **options)
    alone = train(tmp_path / "alone", Ranks(), threads=3, max_steps=6, **options)
    resumed = new(Config(out=alone.out, resume="auto"), Ranks())
    assert resumed.run() == 0 and resumed.step == together.step
    assert state(together) == state(resumed)


@pytest.mark.mpi(min_size=1)
def test_gradients_that_are_summed_on_their_device_give_the_same_bits(ranks, shared_tmp, tmp_path, data, monkeypatch):
    pytest.importorskip("torch")
    options = {"model": "smallresnet", "data": data, "backend": "torch"}
    usual = train(tmp_path / "alone", Ranks(), **options)
    monkeypatch.setattr(setup, "ExactReducer", setup.DeviceReducer)  # as for a GPU; here, the device is the host
    together = train(shared_tmp / "together", ranks, **options)
    assert together.reducer.on_device and not usual.reducer.on_device
    assert state(together) == state(usual)


@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_any_number_of_ranks_and_threads_gives_the_bits_of_one_in_each_precision(
    ranks, shared_tmp, tmp_path, data, precision
):
    pytest.importorskip("torch")
    options = {"model": "smallresnet", "data": data, "backend": "torch", "precision": precision}
    together = train(shared_tmp / "together", ranks, **options)
    alone = train(tmp_path / "alone", Ranks(), threads=2, **options)
    assert state(together) == state(alone)
    exact = train(tmp_path / "exact", Ranks(), **options | {"precision": "float32"})
    assert state(exact) != state(alone)


@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize("stop", [0, 3, 5, 7])
def test_resume_on_other_ranks_in_the_middle_of_an_epoch(ranks, shared_tmp, tmp_path, data, stop):
    """Part on all ranks, part on one, and the reverse: all end as the undisturbed run does."""
    whole = train(tmp_path / "whole", Ranks(), data=data)
    first = train(shared_tmp / "run", ranks, data=data, max_steps=stop)
    assert first.step == stop
    ranks.gather(None)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "last.h5").write_bytes((shared_tmp / "run" / "last.h5").read_bytes())
    if (shared_tmp / "run" / "metrics.jsonl").exists():
        (copy / "metrics.jsonl").write_bytes((shared_tmp / "run" / "metrics.jsonl").read_bytes())
    ranks.gather(None)
    alone = new(Config(out=copy, resume="auto"), Ranks())
    assert alone.step == stop and alone.run() == 0
    assert state(alone) == state(whole)
    together = new(Config(out=shared_tmp / "run", resume="auto"), ranks)
    assert together.run() == 0
    assert state(together) == state(whole)
    lines = [json.loads(line) for line in (alone.out / "metrics.jsonl").read_text().splitlines()]
    whole_lines = [json.loads(line) for line in (whole.out / "metrics.jsonl").read_text().splitlines()]
    for mine, reference in zip(lines, whole_lines, strict=True):
        assert (mine["step"], mine["train_loss"], mine["test_acc"]) == (
            reference["step"], reference["train_loss"], reference["test_acc"],
        )  # fmt: skip


@pytest.mark.parametrize("model, backend", [("simplecnn", "numpy"), ("smallresnet", "numpy"), ("smallresnet", "torch")])
def test_threads_do_not_change_a_bit(tmp_path, data, model, backend, monkeypatch):
    """1: none; 2 and 3: over shards, of which there are 4; 9: two or three inside each shard's operations."""
    if backend == "torch":
        pytest.importorskip("torch")
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)  # several blocks in every operation
    options = {"data": data, "model": model, "backend": backend}
    results = [state(train(tmp_path / str(t), Ranks(), threads=t, **options)) for t in (1, 2, 3, 9)]
    assert all(result == results[0] for result in results)


@pytest.mark.fault
@pytest.mark.parametrize("batch_size, shards", [(101, 8), (500, 3), (1, 2), (7, 7)])
def test_sizes_that_do_not_divide(tmp_path, data, batch_size, shards):
    """Every sample counts once: the training counts of an epoch add up, whatever the sizes."""
    trainer = new(
        Config(
            **{**SMALL, "batch_size": batch_size, "shards": shards, "epochs": 1, "data": data, "out": tmp_path / "r"}
        ),
        Ranks(),
    )
    while trainer.step < trainer.last_step:
        trainer.train_step()
    assert trainer.epoch_sums[1] == 101


def test_what_is_fixed_stays_as_it_is_to_the_bit(tmp_path, data):
    """The whitening filters take no part in the sums over shards and ranks, as running statistics do."""
    trainer = train(tmp_path / "run", Ranks(), data=data, model="smallresnet", batch_size=33, shards=3)
    assert trainer.model.state_dict()["stem.0.weight"].tobytes() == whitening((24, 3, 3, 3)).astype("f").tobytes()
    statistics = [a.size for name, a in trainer.model.named_buffers().items() if "running" in name]
    assert trainer.reducer.sizes[1] == sum(statistics) and trainer.flat.frozen.size == 24 * 27


@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize("batch_size, shards", [(40, 8), (500, 7)])
def test_a_steps_gradient_is_the_mean_over_the_whole_batch(ranks, shared_tmp, data, batch_size, shards):
    """Not the mean of the shards' or the ranks' means: the last batch has 21 images, shards of 3 and 2."""
    options = {"batch_size": batch_size, "shards": shards, "data": data, "epochs": 1, "weight_decay": 0.0}
    config = Config(**{**SMALL, **options, "out": shared_tmp / "run"})
    trainer = new(config, ranks, simplecnn=SimpleCNN)  # without dropout and BatchNorm its parts add up to the whole
    reference = SimpleCNN(image_size=16)
    while trainer.step < trainer.last_step:
        reference.load_state_dict(trainer.model.state_dict())
        reference.zero_grad()
        x, y = trainer.loader.batch(trainer.step)
        loss, dlogits = cross_entropy_loss(reference.forward(x), y)
        reference.backward(dlogits)
        assert abs(trainer.train_step() - loss) < 1e-6
        # float32 sums in another order differ by some 1e-7 of their parts, of order 1; a mean of means, by percents
        for (_, grad), (_, expected) in zip(trainer.model.parameters(), reference.parameters(), strict=True):
            np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"backend": "torch"}, {"reduction": "float32"}])
def test_other_engines_and_reductions_train_alike(tmp_path, data, options):
    if "backend" in options:
        pytest.importorskip("torch")
    reference = train(tmp_path / "a", Ranks(), data=data)
    other = train(tmp_path / "b", Ranks(), data=data, **options)
    for key, array in other.model.state_dict().items():
        # ten steps of float32 arithmetic in another order
        np.testing.assert_allclose(array, reference.model.state_dict()[key], rtol=1e-2, atol=1e-3, err_msg=key)


@pytest.mark.parametrize(
    "schedule, rates",
    [
        ("cosine", [0.05 * (1 + np.cos(np.pi * step / 10)) / 2 for step in range(10)]),
        ("linear", [0.05 * (10 - step) / 10 for step in range(10)]),
        ("step", [0.05] * 4 + [0.005] * 4 + [0.0005] * 2),
        ("constant", [0.05] * 10),
    ],
)
def test_schedules_reach_the_optimizer(tmp_path, data, schedule, rates):
    trainer = new(Config(**{**SMALL, "data": data, "out": tmp_path / "r", "schedule": schedule}), Ranks())
    seen = []
    for _ in range(10):
        trainer.train_step()
        seen.append(trainer.optimizer.lr)
    np.testing.assert_allclose(seen, rates, rtol=1e-12)


@pytest.mark.mpi(min_size=1)
def test_evaluation_counts_each_image_once(ranks, shared_tmp, data, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 5)  # batches and their last one on every rank
    trainer = train(shared_tmp / "run", ranks, data=data, epochs=1)
    images, labels = tiny().test_images, tiny().test_labels
    options = {"classes": 10, "mean": trainer.loader.mean, "std": trainer.loader.std}
    spread, alone = (evaluate(trainer.team, images, labels, **options, ranks=r) for r in (ranks, None))
    assert spread.confusion.sum() == 33 and (spread.confusion == alone.confusion).all() and spread.loss == alone.loss
    assert spread.confusion.sum(axis=1).tolist() == np.bincount(labels, minlength=10).tolist()
    assert spread.accuracy == np.trace(spread.confusion) / 33
    with trainer.model.evaluating():  # all at once, by hand
        mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in (trainer.loader.mean, trainer.loader.std))
        z = trainer.model.forward(((images / 255 - mean) / std).astype(np.float32)).astype(np.float64)
    losses = np.log(np.exp(z).sum(axis=1)) - z[np.arange(33), labels]
    assert abs(spread.loss - losses.mean()) < 1e-5  # float32 against float64
    assert spread.guesses.tolist() == z.argmax(axis=1).tolist()
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(spread.confidence, p.max(axis=1), rtol=1e-5)  # float32 against float64
    np.testing.assert_allclose(spread.of_label, p[np.arange(33), labels], rtol=1e-5)
    assert (spread.confidence == alone.confidence).all() and (spread.of_label == alone.of_label).all()
    assert trainer.model.training


@pytest.mark.fault
@pytest.mark.mpi(min_size=1)
def test_a_stop_of_one_rank_stops_all_at_the_same_step_and_resumes_to_the_bit(ranks, shared_tmp, tmp_path, data):
    whole = train(tmp_path / "whole", Ranks(), data=data)
    trainer = new(Config(**{**SMALL, "out": shared_tmp / "run", "data": data}), ranks)
    original = trainer.loader.batch

    def batch(step, shard):
        if step == 6 and ranks.rank == ranks.size - 1:
            trainer.signals.receive(10)
        return original(step, shard)

    trainer.loader.batch = batch
    assert trainer.run() == 75
    assert ranks.gather(trainer.step) == [7] * ranks.size
    resumed = new(Config(out=shared_tmp / "run", resume="auto"), ranks)
    assert resumed.step == 7 and resumed.run() == 0
    assert state(resumed) == state(whole)


def test_load_checkpoint_gives_the_trained_model(tmp_path, data):
    trainer = train(tmp_path / "run", Ranks(), data=data)
    model = load_checkpoint(tmp_path / "run" / "last.h5", model=DropoutNet)
    assert not model.training
    assert model.info.classes == list(trainer.dataset.classes) and model.info.mean == list(trainer.loader.mean)
    x = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    trainer.model.eval()
    np.testing.assert_array_equal(model.forward(x), trainer.model.forward(x))


def test_synthetic_data_is_said_everywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cnnmpi.train.inputs.synthetic", lambda: tiny(40, 20))
    train(tmp_path / "run", Ranks(), data="synthetic", epochs=1)
    assert "SYNTHETIC" in capsys.readouterr().out
    assert "SYNTHETIC" in json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["data"]
    assert "SYNTHETIC" in checkpoint.load(tmp_path / "run" / "last.h5")[1]["data_source"]
    assert 'data = "synthetic"' in (tmp_path / "run" / "config.toml").read_text()


def test_an_earlier_run_is_moved_aside(tmp_path, data, capsys):
    train(tmp_path / "run", Ranks(), data=data, max_steps=1)
    first = (tmp_path / "run" / "last.h5").read_bytes()
    train(tmp_path / "run", Ranks(), data=data, max_steps=2)
    assert (tmp_path / "run" / "old-1" / "last.h5").read_bytes() == first
    assert "was moved to" in capsys.readouterr().out


@pytest.mark.fault
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, data, capsys):
    whole = train(tmp_path / "whole", Ranks(), data=data)
    run = tmp_path / "run"
    train(run, Ranks(), data=data, max_steps=7, checkpoint_every=2)
    blob = bytearray((run / "last.h5").read_bytes())
    blob[len(blob) // 2] ^= 1
    (run / "last.h5").write_bytes(blob)
    trainer = new(Config(out=run, resume="auto"), Ranks())
    assert "last.h5" in capsys.readouterr().out
    assert trainer.step == 6 and trainer.run() == 0
    assert state(trainer) == state(whole)
    (run / "last.h5").write_bytes(blob)
    (run / "previous.h5").write_bytes(blob)
    with pytest.raises(UserError, match="no checkpoint in it is good"):
        new(Config(out=run, resume="auto"), Ranks())


@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize(
    "options, message",
    [
        ({"shards": 0}, "--shards must be a number of at least 1"),
        ({"lr": -1.0}, "--lr must be a number of at least 0"),
        ({"lr": float("inf")}, "--lr must be a number"),
        ({"label_smoothing": 1.0}, "--label-smoothing must be below 1"),
        ({"device": "cuda"}, "--device cuda needs --backend torch"),
        ({"lr": "fast"}, "--lr must be float, got 'fast'"),
        ({"model": "vgg"}, "--model must be one of simplecnn, smallresnet, resnet18, mobilenet, or FILE.py:CLASS"),
        ({"epochs": 2.5}, "--epochs must be int, got 2.5"),
        ({"data": "nowhere.h5"}, "nowhere.h5"),
        ({"resume": "nowhere.h5"}, "nowhere.h5"),
    ],
)
def test_bad_settings_are_one_clear_error_on_all_ranks(ranks, shared_tmp, options, message):
    with pytest.raises((UserError, RemoteError)) as error:
        new(Config(**{**SMALL, "out": shared_tmp / "run", **options}), ranks)
    if ranks.rank == 0:
        assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.mpi(min_size=2)
def test_more_ranks_than_shards_says_which_value_to_use(ranks, shared_tmp):
    with pytest.raises(UserError, match=f"--shards {ranks.size}"):
        new(Config(**{**SMALL, "shards": ranks.size - 1, "out": shared_tmp / "r"}), ranks)


@pytest.mark.fault
def test_resume_refuses_what_contradicts_the_checkpoint(tmp_path, data, ranks):
    run = tmp_path / "run"
    train(run, Ranks(), data=data, max_steps=1)
    config = Config(out=run, resume="auto", lr=0.3, seed=1, shards=4)
    with pytest.raises(UserError) as error:
        new(config, Ranks())
    text = str(error.value)
    assert "--lr 0.3 (the run has 0.05)" in text and "--seed 1 (the run has 5)" in text and "--shards" not in text
    write_hdf5(tmp_path / "other.h5", tiny(90, 30))
    with pytest.raises(UserError, match="other data"):
        new(Config(out=run, resume="auto", data=str(tmp_path / "other.h5")), Ranks())


@pytest.mark.fault
@pytest.mark.mpi(min_size=1)
def test_a_resume_takes_how_it_runs_from_who_resumes_and_what_it_computes_from_the_checkpoint(ranks, shared_tmp, data):
    run = shared_tmp / "run"
    train(run, ranks, data=data, max_steps=4, checkpoint_every=2)
    with pytest.raises(UserError, match=r"--lr 0\.5 \(the run has 0\.05\)"):
        new(Config(out=run, resume="auto", max_steps=6, lr=0.5), ranks)
    with pytest.raises(UserError, match=r"--augment crop=4 \(the run has flip,crop=4\)"):
        new(Config(out=run, resume="auto", augment="crop=4"), ranks)
    trainer = new(Config(out=run, resume="auto", max_steps=6, lr=0.05, threads=2, agree_every=3), ranks)
    config = trainer.config
    assert (config.max_steps, config.threads, config.agree_every, config.checkpoint_every) == (6, 2, 3, 0)
    assert (config.seed, config.shards, config.batch_size, config.lr) == (5, 4, 24, 0.05)
    assert trainer.run() == 0 and trainer.step == 6
    kept = json.loads(checkpoint.load(run / "last.h5")[1]["config"])
    left_out = {"model_options", "init"}
    assert set(kept) == {item.name for item in dataclasses.fields(settings.Experiment)} - left_out


@pytest.mark.fault
@pytest.mark.mpi(min_size=1)
def test_an_end_before_the_step_that_was_reached_is_refused_and_leaves_all_as_it_is(ranks, shared_tmp, tmp_path, data):
    run = shared_tmp / "run"
    train(run, ranks, data=data, max_steps=6)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(UserError, match=r"--max-steps 3 comes too late: .* is at step 6 of 10; name a larger number"):
        new(Config(out=run, resume="auto", max_steps=3), ranks)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert new(Config(out=run, resume="auto", max_steps=6), ranks).run() == 0
    resumed = new(Config(out=run, resume="auto", max_steps=1000), ranks)
    assert resumed.run() == 0 and resumed.step == 10, "epochs end it all the same"
    assert state(resumed) == state(train(tmp_path / "whole", Ranks(), data=data))


@pytest.mark.fault
def test_a_checkpoint_beyond_the_end_of_its_run_is_refused(tmp_path, data):
    run = tmp_path / "run"
    train(run, Ranks(), data=data, max_steps=1)
    arrays, attributes = checkpoint.load(run / "last.h5")
    del attributes["format_version"]
    checkpoint.save(run / "last.h5", arrays, attributes | {"step": 11})
    with pytest.raises(UserError, match="is at step 11 of 10; it was not written by this program"):
        new(Config(out=run, resume="auto"), Ranks())


def lines(out: Path) -> list[dict]:
    """The lines of metrics.jsonl, read as strict JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.fault
@pytest.mark.parametrize("before", ["best.h5", "last.h5"])
def test_a_crash_at_an_epochs_end_loses_no_line_and_doubles_none(tmp_path, data, before):
    whole = train(tmp_path / "whole", Ranks(), data=data)
    trainer = new(Config(**{**SMALL, "data": data, "out": tmp_path / "run", "checkpoint_every": 4}), Ranks())
    save = trainer.folder.save

    def crashing(name, content):
        if name == before and trainer.step == 5:
            raise RuntimeError("the power failed")
        save(name, content)

    trainer.folder.save = crashing
    with pytest.raises(RuntimeError, match="power"):
        trainer.run()
    for _ in range(2):  # the second time nothing is left to do
        resumed = new(Config(out=tmp_path / "run", resume="auto"), Ranks())
        assert resumed.run() == 0 and state(resumed) == state(whole)
    keys = ("epoch", "step", "train_loss", "train_acc", "test_loss", "test_acc", "lr")
    ours, theirs = ([[line[key] for key in keys] for line in lines(out)] for out in (tmp_path / "run", whole.out))
    assert ours == theirs and len(ours) == 2
    best = [checkpoint.load(out / "best.h5")[1]["weights_sha256"] for out in (tmp_path / "run", whole.out)]
    assert best[0] == best[1]


@pytest.mark.fault
@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_null_in_the_metrics_and_never_the_best(tmp_path, data, loss):
    trainer = new(Config(**{**SMALL, "data": data, "out": tmp_path / "run"}), Ranks())
    evaluate_all = trainer._evaluate

    def spoilt(part):
        result = evaluate_all(part)
        return dataclasses.replace(result, loss=loss) if trainer.step == 5 else result

    trainer._evaluate = spoilt
    trainer.best = 0.0  # any accuracy of the first epoch would be better
    assert trainer.run() == 0
    first, second = lines(tmp_path / "run")
    assert first["test_loss"] is None and second["test_loss"] is not None
    assert checkpoint.load(tmp_path / "run" / "best.h5")[1]["step"] == 10


@pytest.mark.fault
@pytest.mark.mpi(min_size=1)
def test_damaged_metrics_are_mended_on_resume(ranks, shared_tmp, data, capsys):
    run = shared_tmp / "run"
    train(run, ranks, data=data, max_steps=5)
    if ranks.rank == 0:
        whole = (run / "metrics.jsonl").read_bytes()
        damage = [b"\xff\xfe\x00", b'{"step": "5"}', b'{"step": true}', b"[5]", b"[" * 100_000, b'{"step": 1e999}', b""]
        (run / "metrics.jsonl").write_bytes(b"\n".join(damage) + b"\n" + whole + whole[: len(whole) // 2])
    ranks.gather(None)
    capsys.readouterr()
    new(Config(out=run, resume="auto"), ranks)
    if ranks.rank == 0:
        assert (run / "metrics.jsonl").read_bytes() == whole
        assert f"dropped {len(damage) + 1} damaged lines" in capsys.readouterr().out


@pytest.mark.fault
@pytest.mark.mpi(min_size=1)
def test_a_resume_on_a_full_disk_is_one_line_on_rank_0_and_ends_all(ranks, shared_tmp, data, monkeypatch):
    run = shared_tmp / "run"
    train(run, ranks, data=data, max_steps=7)

    def full(path, blob):
        raise checkpoint.CheckpointError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr("cnnmpi.train.records.write_atomically", full)
    with pytest.raises((UserError, RemoteError)) as error:  # the line of step 7 has to go
        new(Config(out=run, resume="auto"), ranks)
    if ranks.rank == 0:
        assert "metrics.jsonl: cannot be written: No space left" in str(error.value)


@pytest.mark.fault
@pytest.mark.parametrize(
    "lr, message",
    [
        (1e30, r"step \d+, shard \d+: the loss, a metric or a running statistic is not finite"),
        (1e39, "made weights that are not finite"),
    ],
)
def test_a_diverging_run_stops_with_a_finite_checkpoint(tmp_path, data, lr, message):
    out = tmp_path / "run"
    config = Config(**{**SMALL, "data": data, "out": out, "lr": lr, "schedule": "constant", "checkpoint_every": 1})
    trainer = new(config, Ranks())
    with np.errstate(all="ignore"), warnings.catch_warnings(), pytest.raises(UserError, match=message):
        warnings.simplefilter("ignore")
        trainer.run()
    for array in checkpoint.load(out / "last.h5")[0].values():
        assert np.isfinite(array).all()


@pytest.mark.fault
def test_a_second_job_in_the_same_folder_is_refused(tmp_path, data):
    config = Config(**{**SMALL, "data": data, "out": tmp_path / "run"})
    first = new(config, Ranks())
    with pytest.raises(UserError, match="another job is training there"):
        new(config, Ranks())
    assert first.run() == 0
    assert new(config, Ranks()).run() == 0


def test_a_stop_at_the_end_of_an_epoch_loses_nothing(tmp_path, data):
    """The epoch's evaluation, metrics line and best.h5 come with the resume."""
    whole = train(tmp_path / "whole", Ranks(), data=data)
    trainer = new(Config(**{**SMALL, "data": data, "out": tmp_path / "run"}), Ranks())
    original = trainer.train_step

    def step():
        if trainer.step == 4:  # the last one of the first epoch
            trainer.signals.receive(signal.SIGTERM)
        return original()

    trainer.train_step = step
    assert trainer.run() == 75 and trainer.step == 5
    assert new(Config(out=tmp_path / "run", resume="auto"), Ranks()).run() == 0
    keys = ("epoch", "step", "train_loss", "test_acc", "lr")
    lines = [
        [[json.loads(line)[key] for key in keys] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "run", whole.out)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 2
    best = [checkpoint.load(folder / "best.h5")[1]["weights_sha256"] for folder in (tmp_path / "run", whole.out)]
    assert best[0] == best[1]


def test_resume_into_another_folder_is_complete(tmp_path, data):
    whole = train(tmp_path / "one", Ranks(), data=data)
    train(tmp_path / "part", Ranks(), data=data, max_steps=7)
    config = Config(out=tmp_path / "other", resume=str(tmp_path / "part" / "last.h5"))
    trainer = new(config, Ranks())
    assert trainer.run() == 0 and state(trainer) == state(whole)
    assert (tmp_path / "other" / "best.h5").exists()
    assert checkpoint.load(tmp_path / "part" / "last.h5")[1]["step"] == 7


def test_the_configuration_round_trips_through_toml(tmp_path):
    config = settings.resolve(
        Config(
            model="smallresnet", lr=0.25, augment="none", max_steps=7, data="x y.h5", model_options={"widths": [8, 8]}
        ),
        Code(),
    )
    path = tmp_path / "c.toml"
    path.write_text(settings.to_toml(config))
    assert settings.resolve(settings.parse(["--config", str(path)]), Code()) == config
    parsed = settings.parse(["--config", str(path), "--lr", "0.5", "--resume", "--epochs=3", "--balance"])
    assert (parsed.lr, parsed.epochs, parsed.resume, parsed.balance) == (0.5, 3, "auto", True)
    assert settings.parse([]) == Config() and settings.parse(["--no-balance"]) == Config(balance=False)


@pytest.mark.parametrize(
    "text, message",
    [
        ("lr = 'fast'", "wrong kind"),
        ("learning_rate = 0.1", "'learning_rate' is not a setting"),
        ("optimizer = 'lars'", "wrong kind"),
        ("lr = ", "not a TOML file"),
    ],
)
def test_a_bad_toml_file_is_refused_by_key(tmp_path, text, message, capsys):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        settings.parse(["--config", str(path)])
    assert capsys.readouterr() == ("", ""), "the one line is the error's"


# -- threads over shards ----------------------------------------------------------------------------------------------


def test_a_team_returns_results_in_order_and_works_at_the_same_time():
    both = threading.Barrier(2, timeout=200)

    def body(model, item):
        both.wait()  # passes only if two threads are here
        return model, item

    team = Team([DropoutNet(), DropoutNet()])
    results = team.map(body, range(6))
    assert [item for _, item in results] == list(range(6))
    assert {id(model) for model, _ in results} == {id(model) for model in team.models}


def test_a_failure_on_any_thread_of_a_team_is_raised_and_ends_the_others():
    done = []

    def body(model, item):
        if model is not team.models[0]:
            raise ValueError("on the other thread")
        time.sleep(0.01)
        done.append(item)

    team = Team([DropoutNet(), DropoutNet()])
    with pytest.raises(ValueError, match="on the other thread"):
        team.map(body, range(10_000))
    assert len(done) < 1000


def test_all_threads_of_a_team_evaluate_with_the_same_running_statistics(tmp_path, data, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 3)  # many batches, so that every thread has some
    trainer = train(tmp_path / "r", Ranks(), data=data, model="smallresnet", threads=3)
    images, labels = trainer.dataset.test_images, trainer.dataset.test_labels
    options = {"classes": 10, "mean": trainer.loader.mean, "std": trainer.loader.std}
    together, alone = (evaluate(model, images, labels, **options) for model in (trainer.team, trainer.model))
    assert len(trainer.team.models) > 1
    assert together.loss == alone.loss and np.array_equal(together.confusion, alone.confusion)


def test_a_cutout_larger_than_the_images_is_refused_by_its_flag(tmp_path, data):
    with pytest.raises(UserError, match="--augment cutout=17 does not fit into images of 16x16"):
        new(Config(**{**SMALL, "data": data, "out": tmp_path / "r", "augment": "cutout=17"}), Ranks())


# -- numbers that are not finite --------------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_skipped_step_changes_nothing_but_the_count_and_resumes_to_the_bit(
    ranks, shared_tmp, tmp_path, data, optimizer
):
    """Step 3 is spoilt in shard 2: on one rank, on all, and with a resume right after it."""
    options = {"data": data, "optimizer": optimizer, "on_nan": "skip", "model": "smallresnet"}

    def spoil(trainer):
        original = trainer.loader.batch

        def batch(step, shard):
            x, y = original(step, shard)
            if (step, shard) == (3, 2):
                x[0, 0, 0, 0] = np.inf
            return x, y

        trainer.loader.batch = batch
        return trainer

    def run(out, ranks, **more):
        trainer = spoil(new(Config(**{**SMALL, "out": out, **options, **more}), ranks))
        before = None
        while trainer.step < trainer.last_step:
            if trainer.step == 3:
                before = state(trainer)
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer.train_step()
            if trainer.step == 4:
                assert state(trainer) == before
        trainer._save("last.h5")
        return trainer

    alone = run(tmp_path / "alone", Ranks())
    assert state(run(shared_tmp / "together", ranks)) == state(alone)
    run(shared_tmp / "part", ranks, max_steps=4).folder.close()
    resumed = new(Config(out=shared_tmp / "part", resume="auto"), ranks)
    while resumed.step < resumed.last_step:
        resumed.train_step()
    assert state(resumed) == state(alone)


@pytest.mark.fault
@pytest.mark.mpi(min_size=1)
def test_all_ranks_scale_the_loss_of_float16_alike_and_a_resume_goes_on_with_it(
    ranks, shared_tmp, tmp_path, data, monkeypatch, capfd
):
    """A factor that overflows in the first steps is halved until it does not; every third good step doubles it."""
    pytest.importorskip("torch")
    monkeypatch.setattr(scaling, "FIRST", 2.0**24)
    monkeypatch.setattr(scaling, "GROWTH", 3)
    options = {"model": "smallresnet", "data": data, "backend": "torch", "precision": "float16", "epochs": 6}

    def run(out, ranks, **more):
        trainer = new(Config(**{**SMALL, "out": out, **options, **more}), ranks)
        factors = []
        while trainer.step < trainer.last_step:
            trainer.train_step()
            factors.append(trainer.scale.factor)
        trainer._save("last.h5")
        return trainer, factors

    alone, factors = run(tmp_path / "alone", Ranks())
    capfd.readouterr()
    together, also = run(shared_tmp / "together", ranks)
    steps = list(itertools.pairwise(factors))
    assert factors[0] == 2.0**23 and also == factors and state(together) == state(alone)
    assert {later / earlier for earlier, later in steps} == {0.5, 1, 2}, "halved, kept and doubled"
    if ranks.rank == 0:
        skipped = factors[0] < 2.0**24, *(later < earlier for earlier, later in steps)
        said = capfd.readouterr().out
        assert said.count("the step was skipped, and the loss is scaled by") == sum(skipped)
        assert "step 0, shard 0: the gradient of stage1.0.0.weight is not finite" in said
    middle = factors.index(min(factors)) + 2  # in the middle of three good steps
    run(shared_tmp / "part", ranks, max_steps=middle)[0].folder.close()
    resumed = new(Config(out=shared_tmp / "part", resume="auto"), ranks)
    assert resumed.scale == scaling.LossScale(factors[middle - 1], resumed.scale.steady, moves=True)
    assert resumed.scale.steady > 0
    while resumed.step < resumed.last_step:
        resumed.train_step()
    assert resumed.scale == alone.scale and state(resumed) == state(alone)


@pytest.mark.fault
def test_what_a_smaller_factor_cannot_mend_is_left_to_on_nan(tmp_path, data, capfd):
    """In float16, too: an update that overflows, and a forward pass that does."""
    pytest.importorskip("torch")
    options = {**SMALL, "data": data, "backend": "torch", "precision": "float16", "lr": 1e39}
    with pytest.raises(UserError, match="step 0: the update made weights that are not finite"):
        new(Config(**options, out=tmp_path / "update"), Ranks()).run()
    trainer = new(Config(**options, out=tmp_path / "forward"), Ranks())
    batch = trainer.loader.batch
    trainer.loader.batch = lambda step, shard: (np.inf * batch(step, shard)[0], batch(step, shard)[1])
    with pytest.raises(UserError, match="step 0, shard 0: the loss, a metric or a running statistic is not finite"):
        trainer.run()
    assert "the loss is scaled by" not in capfd.readouterr().out


class Times(layers.Layer):
    """With a parameter that is one number, of shape ()."""

    def __init__(self):
        super().__init__()
        self.add_parameter("factor", 1.0)

    def forward(self, x):
        return self._keep((x * self.params["factor"], x))

    def backward(self, dout):
        self.add_grads(factor=(dout * self._taken(dout)).sum())
        return dout * self.params["factor"]


class Scaled(SimpleCNN):
    def __init__(self, **options):
        super().__init__(**options)
        self.times = Times()


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_parameter_may_be_a_single_number(tmp_path, data, backend, optimizer):
    if backend == "torch":
        pytest.importorskip("torch")
    options = {**SMALL, "data": data, "backend": backend, "optimizer": optimizer, "model": "scaled"}
    trainer = new(Config(**options, out=tmp_path / "run", max_steps=3), Ranks(), scaled=Scaled)
    assert trainer.run() == 0
    assert abs(float(trainer.model.times.params["factor"]) - 1) > 1e-4
    resumed = new(Config(out=tmp_path / "run", resume="auto", max_steps=5), Ranks(), scaled=Scaled)
    assert resumed.run() == 0 and resumed.step == 5


def test_a_resume_may_name_the_precision_that_the_run_has(tmp_path, data):
    pytest.importorskip("torch")
    train(tmp_path / "run", Ranks(), data=data, backend="torch", precision="bfloat16", max_steps=1)
    again = new(Config(out=tmp_path / "run", resume="auto", precision="bfloat16", max_steps=2), Ranks())
    assert again.run() == 0
    with pytest.raises(UserError, match=r"precision"):
        new(Config(out=tmp_path / "run", resume="auto", precision="float32"), Ranks())


def test_a_scaled_loss_gives_the_gradients_of_the_plain_one_to_the_bit_where_nothing_underflows(tmp_path, data):
    """Powers of two round nothing: only what float16 would lose may differ, and in float32 nothing does."""
    plain = new(Config(**{**SMALL, "data": data, "out": tmp_path / "a", "model": "smallresnet"}), Ranks())
    scaled = new(Config(**{**SMALL, "data": data, "out": tmp_path / "b", "model": "smallresnet"}), Ranks())
    scaled.scale = scaling.LossScale(2.0**12, moves=True)
    assert plain.scale == scaling.LossScale(1.0, moves=False)
    for trainer in (plain, scaled):
        trainer.train_step()
        trainer.train_step()
    assert state(plain) == state(scaled)


@pytest.mark.fault
def test_an_update_that_overflows_is_undone_and_skipping_gives_up(tmp_path, data):
    config = Config(**{**SMALL, "data": data, "out": tmp_path / "run", "lr": 1e39, "on_nan": "skip", "epochs": 9})
    trainer = new(config, Ranks())
    before = {name: bits for name, bits in state(trainer).items() if "running" not in name}
    with np.errstate(all="ignore"), warnings.catch_warnings(), pytest.raises(UserError, match="20 steps in a row"):
        warnings.simplefilter("ignore")
        trainer.run()
    assert before.items() <= state(trainer).items()

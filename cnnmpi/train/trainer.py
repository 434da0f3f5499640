"""The training loop: from a step's number to updated weights, evaluation and checkpoints."""

import contextlib
import dataclasses
import fcntl
import json
import math
import signal
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cnnmpi import checkpoint, optim
from cnnmpi.checkpoint import CheckpointError
from cnnmpi.data import DataError, DataLoader, Dataset, find_data, read_hdf5, statistics, synthetic
from cnnmpi.distributed import ExactReducer, Ranks, Reducer, UserError
from cnnmpi.models import MODELS, Model
from cnnmpi.train.config import Config, continued, resolve, to_plain, to_toml
from cnnmpi.train.evaluation import Evaluation, evaluate
from cnnmpi.train.report import METRICS, Report
from cnnmpi.train.state import BEST, LAST, PREVIOUS, model_attributes, newest, pack, unpack

AGAIN_S = 1.0  # a terminal and mpirun may both deliver one Ctrl-C: a second one comes later than this
STOPPED = 75  # exit code of a run that was asked to stop and saved (EX_TEMPFAIL of sysexits.h: try again later)


def open_data(spec: str, ranks: Ranks, say: Any, data_dir: str = "data") -> Dataset:
    """Return the data set that ``--data`` means, one copy for all ranks of a host, found by rank 0.

    Raises UserError where there is none, or where hosts see different data.
    """

    def find() -> Path | None:
        with _as_user_errors():
            return find_data(spec, data_dir, notify=say)

    path = ranks.on_rank0(find)
    if path is None:
        return synthetic()
    with _as_user_errors():
        dataset = read_hdf5(path, part=(ranks.local_rank, ranks.local_size), empty=ranks.shared_array)
    ranks.node_barrier()
    return dataset


@contextlib.contextmanager
def _as_user_errors() -> Iterator[None]:
    """Turn what data and checkpoints refuse into the one line that a user sees."""
    try:
        yield
    except (DataError, CheckpointError) as error:
        raise UserError(str(error)) from None


class Trainer:
    """One run of ``config`` on ``ranks``: ``run()`` trains to the end and returns the exit code.

    ``named`` holds the settings that the user gave, which must not contradict a resumed checkpoint.
    """

    def __init__(self, config: Config, ranks: Ranks, named: set[str] | None = None) -> None:
        self.ranks = ranks
        self.step = 0  # steps done since the beginning of the run
        self.best = -1.0  # test accuracy of best.h5
        self.epoch_counts = np.zeros(3)  # summed loss, correct, samples: since the beginning of the epoch
        self.asked_to_stop, self.asked_at = False, math.inf  # whether and when this process got a signal
        self.stopping = False  # all ranks have agreed to stop
        say = (lambda text: print(text, flush=True)) if ranks.rank == 0 else (lambda text: None)

        saved = None
        if config.resume is not None:
            saved = ranks.on_rank0(lambda: _find_checkpoint(config, say))
            if saved is not None:
                path, _, attributes = saved
                missing = {"config", "step", "epoch_counts", "best_test_acc", "data_sha256"} - set(attributes)
                if missing:
                    raise UserError(f"{path}: not a checkpoint of cnnmpi.train: it lacks {', '.join(sorted(missing))}")
                config = dataclasses.replace(config, out=config.out or path.parent)
                config = continued(config, named or set(), attributes["config"], path)
        self.config = config = resolve(config)
        if config.shards < ranks.size:
            raise UserError(
                f"{ranks.size} ranks cannot share {config.shards} shards: use --shards {ranks.size} or more"
            )
        assert config.out is not None
        self.out = config.out.resolve()
        elsewhere = saved is None or saved[0].resolve().parent != self.out  # then the folder holds nothing of this run

        self.dataset = open_data(config.data, ranks, say)
        self.data_sha256: str = ranks.on_node(self.dataset.digest)
        ranks.agree("the content of the data", self.data_sha256)
        self.mean, self.std = ranks.on_node(lambda: statistics(self.dataset.train_images))
        assert config.batch_size is not None and config.epochs is not None and config.crop is not None
        self.loader = DataLoader(
            self.dataset.train_images,
            self.dataset.train_labels,
            config.batch_size,
            seed=config.seed,
            shards=config.shards,
            flip=config.flip,
            crop_padding=config.crop,
            mean=self.mean,
            std=self.std,
        )
        self.steps_per_epoch = len(self.loader)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.last_step = self.total_steps if config.max_steps is None else min(self.total_steps, config.max_steps)
        self.shards = [int(s) for s in np.array_split(np.arange(config.shards), ranks.size)[ranks.rank]]

        _, channels, height, width = self.dataset.train_images.shape
        size = height if height == width else (height, width)
        self.options = {"in_channels": channels, "num_classes": len(self.dataset.classes), "image_size": size}
        try:
            self.model: Model = MODELS[config.model](**self.options, seed=config.seed)
            if config.backend == "torch":
                self.model.to_torch(config.device, index=ranks.local_rank)
        except (ValueError, RuntimeError) as error:
            raise UserError(str(error)) from None
        self.F = self.model.F
        # torch cuts its sums by the number of threads: one, unless told otherwise, gives the same bits on any host
        self.threads = config.threads or (1 if config.backend == "torch" else ranks.default_threads())
        self.F.set_threads(self.threads)
        self.model.skip_input_grad()
        self.optimizer = self._make_optimizer()
        names = [(name, math.prod(p.shape)) for name, (p, _) in self.model.named_parameters().items()]
        sizes = [sum(size for _, size in names), math.prod(self.model.flat_buffers.shape), 4]
        self.reducer = (ExactReducer if config.reduction == "exact" else Reducer)(ranks, config.shards, sizes, names)

        if saved is not None:
            self._continue_from(*saved)
        weights = np.array(self.F.to_numpy(self.model.flat_params))
        ranks.broadcast(weights)
        self.F.copy_into(self.model.flat_params, weights)
        self._lock: Any = None
        ranks.on_rank0(lambda: self._open_folder(elsewhere, say))
        self.report = Report(self.out, silent=ranks.rank != 0)
        if elsewhere:
            self.best = -1.0
            self._save(LAST)  # a full disk is better found now than after an epoch
        else:
            self.report.rewind(self.step, self.steps_per_epoch)

    def _make_optimizer(self) -> optim.Optimizer:
        config, parameters = self.config, self.model.parameters()
        assert config.weight_decay is not None
        if config.optimizer == "sgd":
            return optim.SGD(
                parameters, momentum=config.momentum, nesterov=config.momentum > 0, weight_decay=config.weight_decay
            )
        kind = {"adam": optim.Adam, "adamw": optim.AdamW}[str(config.optimizer)]
        return kind(parameters, weight_decay=config.weight_decay)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of ``step``, a function of the configuration alone."""
        config = self.config
        assert config.lr is not None and config.warmup is not None
        warmup = round(config.warmup * self.total_steps)
        if config.schedule == "cosine":
            return optim.warmup_cosine(step, peak=config.lr, total=self.total_steps, warmup=warmup)
        if config.schedule == "linear":
            return optim.warmup_linear(step, peak=config.lr, total=self.total_steps, warmup=warmup)
        if config.schedule == "step":
            return optim.step_decay(step, initial=config.lr, every=math.ceil(self.total_steps / 3))
        return config.lr

    # -- one step ----------------------------------------------------------------------------------------------------

    def train_step(self) -> float:
        """Do the next step and return its mean loss. Equal bits on every rank, and for any number of ranks."""
        model, F = self.model, self.F
        buffers = np.array(F.to_numpy(model.flat_buffers))  # every shard starts from the same running statistics
        for shard in self.shards:
            x, y = self.loader.batch(self.step, shard)
            if len(y) == 0:  # the last batch of an epoch may have fewer samples than there are shards
                continue
            model.reseed(self.config.seed, self.step, shard)
            model.zero_grad()
            F.copy_into(model.flat_buffers, buffers)
            logits = model.forward(F.as_array(x, like=model.flat_params))
            loss, dlogits = F.cross_entropy_loss(
                logits,
                F.as_array(y, like=model.flat_params),
                label_smoothing=self.config.label_smoothing,
                reduction="sum",
            )
            model.backward(dlogits)
            correct = int((F.to_numpy(logits).argmax(axis=1) == y).sum())
            statistics_sum = F.to_numpy(model.flat_buffers) * len(y)
            self.reducer.add(shard, F.to_numpy(model.flat_grads), statistics_sum, np.array([loss, correct, len(y), 0]))
        if self.asked_to_stop:
            self.reducer.add(self.shards[0], None, None, np.array([0, 0, 0, 1]))

        gradient, statistics_sum, counts = self.reducer.reduce(self.step)
        samples = counts[2]
        F.copy_into(model.flat_grads, gradient / samples)
        F.copy_into(model.flat_buffers, statistics_sum / samples)
        if self.config.clip:
            optim.clip_grad_norm(self.optimizer.parameters, self.config.clip)
        self.optimizer.lr = self.learning_rate(self.step)
        self.optimizer.step()
        if not np.isfinite(F.to_numpy(model.flat_params)).all():  # equal weights: all ranks find the same
            raise UserError(f"step {self.step}: the update made weights that are not finite; try a smaller --lr")

        self.step += 1
        self.epoch_counts += counts[:3]
        self.stopping = counts[3] > 0  # a decision of all ranks, at the same step: any of them was asked to stop
        return float(counts[0] / samples)

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Train to the end, or until a signal asks to stop; return 0, or STOPPED. Leaves checkpoints in ``out``."""
        previous = {number: signal.signal(number, self._on_signal) for number in _STOP_SIGNALS}
        try:
            return self._run()
        finally:
            self.report.close()
            if self._lock:
                self._lock.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        self._announce()
        test: Evaluation | None = None
        started, done_before = time.perf_counter(), self.epoch_counts[2]
        while True:
            epoch, index = divmod(self.step, self.steps_per_epoch)
            at_end = self.step == self.last_step
            if self.epoch_counts[2] and (index == 0 or at_end):
                test = self._end_epoch(time.perf_counter() - started, done_before)
            if at_end:
                break
            if index == 0:
                started, done_before = time.perf_counter(), 0.0
            loss = self.train_step()
            test = None
            self.report.step(epoch + 1, index + 1, self.steps_per_epoch, loss)
            if self.stopping and self.step < self.last_step:
                self._save(LAST)
                self.report.line(f"stopped at step {self.step} of {self.last_step}: saved {self.out / LAST}")
                self.report.line(f"to go on: python -m cnnmpi.train --resume --out {self.out}")
                return STOPPED
            if self.config.checkpoint_every and self.step % self.config.checkpoint_every == 0:
                self._save(LAST)
        test = test or self._evaluate()
        digest = checkpoint.weights_digest(self.model.state_dict())
        self.report.line(f"done: test_acc={test.accuracy:.4f} weights_sha256={digest}")
        return 0

    def _on_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and now - self.asked_at > AGAIN_S:
            raise KeyboardInterrupt  # asked twice: at once
        self.asked_to_stop, self.asked_at = True, min(now, self.asked_at)

    def _announce(self) -> None:
        ranks, threads = self.ranks, self.threads
        self.report.line(
            f"{self.config.model} on {self.dataset.source}: {len(self.dataset.train_images)} training and "
            f"{len(self.dataset.test_images)} test images; {ranks.size} rank{'s' * (ranks.size > 1)} with {threads} "
            f"thread{'s' * (threads > 1)}, {self.config.backend}; step {self.step} of {self.last_step}"
        )
        if ranks.oversubscribed:
            self.report.line(
                f"note: {ranks.local_size} ranks share {ranks.cores_on_node} cores of this host: the result is the "
                "same, but as many ranks as cores would be faster"
            )

    def _evaluate(self) -> Evaluation:
        data = self.dataset
        classes = len(data.classes)
        return evaluate(
            self.model, data.test_images, data.test_labels, classes=classes, mean=self.mean, std=self.std,
            ranks=self.ranks,
        )  # fmt: skip

    def _end_epoch(self, seconds: float, done_before: float) -> Evaluation:
        """Evaluate, save and report after the last step of an epoch, or of the run."""
        loss_sum, correct, samples = self.epoch_counts.tolist()
        complete = self.step % self.steps_per_epoch == 0
        test = self._evaluate()
        if test.accuracy > self.best:
            # a run that --max-steps ends inside an epoch may go on: what best.h5 is then must not depend on that
            if complete or self.step == self.total_steps:
                self.best = test.accuracy
            self._save(BEST)
        if complete:
            self.epoch_counts[:] = 0
        self._save(LAST)
        self.report.epoch(
            {
                "epoch": math.ceil(self.step / self.steps_per_epoch),
                "step": self.step,
                "train_loss": loss_sum / samples,
                "train_acc": correct / samples,
                "test_loss": test.loss,
                "test_acc": test.accuracy,
                "lr": self.learning_rate(self.step - 1),
                "images_per_s": (samples - done_before) / seconds,
                "seconds": seconds,
                "ranks": self.ranks.size,
                "data": self.dataset.source,
            }
        )
        return test

    # -- on disk -----------------------------------------------------------------------------------------------------

    def _save(self, name: str) -> None:
        """Write a checkpoint, by rank 0; all ranks are told if that fails."""
        attributes = {
            "config": json.dumps(to_plain(self.config)),
            "epoch": self.step // self.steps_per_epoch,
            "step": self.step,
            "epoch_counts": self.epoch_counts.tolist(),
            "best_test_acc": self.best,
            "classes": list(self.dataset.classes),
            "mean": list(self.mean),
            "std": list(self.std),
            "data_source": self.dataset.source,
            "data_archive_sha256": self.dataset.sha256,
            "data_sha256": self.data_sha256,
        }
        keep = self.out / PREVIOUS if name == LAST else None

        def write() -> None:
            with _as_user_errors():
                described = model_attributes(self.config.model, self.options, self.model) | attributes
                checkpoint.save(self.out / name, pack(self.model, self.optimizer), described, keep=keep)

        self.ranks.on_rank0(write)

    def _continue_from(self, path: Path, arrays: Any, attributes: dict[str, Any]) -> None:
        """Take up the run where its checkpoint left it."""
        if attributes["data_sha256"] != self.data_sha256:
            raise UserError(
                f"{path} was trained on other data ({attributes['data_source']}) than {self.config.data} "
                f"({self.dataset.source}): name the same data with --data"
            )
        try:
            unpack(arrays, self.model, self.optimizer)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        self.step = self.optimizer.steps = int(attributes["step"])
        self.best = float(attributes["best_test_acc"])
        self.epoch_counts[:] = attributes["epoch_counts"]

    def _open_folder(self, fresh: bool, say: Any) -> None:
        """Make and lock the run's folder, on rank 0. What another run left there is moved aside, never overwritten."""
        try:
            if self.out.exists():
                self._lock_folder()
            if fresh and any((self.out / name).exists() for name in (LAST, PREVIOUS, BEST, METRICS)):
                number = 1
                while (aside := self.out.with_name(f"{self.out.name}.old-{number}")).exists():
                    number += 1
                self.out.rename(aside)
                say(f"the earlier run in {self.out} was moved to {aside}")
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock_folder()
            (self.out / "config.toml").write_text(to_toml(self.config))
        except OSError as error:
            raise UserError(f"--out {self.out} cannot be used: {error.strerror}") from None

    def _lock_folder(self) -> None:
        """Hold the folder's lock until the run ends; a second job that wants it is refused."""
        if self._lock:
            self._lock.close()
        self._lock = (self.out / "lock").open("w")
        weakref.finalize(self, self._lock.close)  # of a trainer that never runs
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {self.out}: another job is training there; wait for it, or name another") from None
        except OSError:
            pass  # a file system without locks


_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def _find_checkpoint(config: Config, say: Any) -> tuple[Path, Any, dict[str, Any]] | None:
    """Return the checkpoint that --resume means, or None for auto where there is none; on rank 0."""
    with _as_user_errors():
        if config.resume == "auto":
            folder = resolve(config).out
            assert folder is not None
            found = newest(folder, say)
            if found is None:
                say(f"--resume: no checkpoint in {folder} yet; starting from the beginning")
            return found
        path = Path(str(config.resume))
        return path, *checkpoint.load(path)

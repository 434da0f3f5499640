"""The training loop: from a step's number to updated weights, evaluation and checkpoints."""

import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from cnnmpi import checkpoint, optim
from cnnmpi.data import DataLoader
from cnnmpi.distributed import ExactReducer, NotFiniteError, Ranks, Reducer, UserError
from cnnmpi.machine import one_blas_thread
from cnnmpi.models import FlatArrays, Model
from cnnmpi.train.config import Config, continued, experiment, resolve, to_plain, to_toml
from cnnmpi.train.evaluation import Evaluation, evaluate_unless
from cnnmpi.train.folder import BEST, LAST, RunFolder, Saved, find_checkpoint
from cnnmpi.train.report import Report
from cnnmpi.train.setup import as_user_errors, learning_rate, make_model, make_optimizer, model_options, open_data
from cnnmpi.train.signals import StopSignals
from cnnmpi.train.state import Arrays, model_attributes, pack, unpack
from cnnmpi.train.team import Team, fewest_workers
from cnnmpi.train.watchdog import Watchdog

Array = np.ndarray[Any, np.dtype[Any]]
STOPPED = 75  # exit code of a run that was asked to stop and saved (EX_TEMPFAIL of sysexits.h: try again later)
MOST_SKIPPED = 20  # steps in a row that --on-nan skip leaves out before it gives up


class Trainer:
    """One run of ``config`` on ``ranks``: ``run()`` trains to the end and returns the exit code.

    ``signals`` tell when to save and stop; ``watchdog`` is told what this rank is doing. Raises UserError for settings,
    data or checkpoints that cannot be used, and for settings that contradict a resumed checkpoint.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        signals: StopSignals | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        def say(text: str) -> None:
            if ranks.rank == 0:
                print(text, flush=True)

        self.signals, self.watchdog = signals or StopSignals(), watchdog or Watchdog(ranks)
        self.watchdog.note("preparing data and model", slow=True)
        saved = None
        if config.resume is not None:
            resume, default_out = config.resume, resolve(config).out or Path()
            saved = ranks.on_rank0(lambda: find_checkpoint(resume, default_out, say))
        if saved is not None:
            config = continued(config, saved.run.config, saved.path)
            config = dataclasses.replace(config, out=config.out or saved.path.parent)
        self.config = config = resolve(config)
        shards, seed = config.shards or 1, config.seed or 0
        if shards < ranks.size:
            raise UserError(f"{ranks.size} ranks cannot share {shards} shards: use --shards {ranks.size} or more")
        self.ranks = ranks
        self.shards = [int(shard) for shard in np.array_split(np.arange(shards), ranks.size)[ranks.rank]]

        self.data = open_data(config.data or "auto", ranks, say)
        self.dataset = self.data.dataset
        height, width = self.dataset.train_images.shape[2:]
        if (config.cutout or 0) > min(height, width):
            raise UserError(f"--cutout {config.cutout} does not fit into images of {height}x{width} pixels")
        self.loader = DataLoader(
            self.dataset.train_images,
            self.dataset.train_labels,
            config.batch_size or 1,
            seed=seed,
            shards=shards,
            flip=bool(config.flip),
            crop_padding=config.crop or 0,
            cutout_size=config.cutout or 0,
            mean=self.data.mean,
            std=self.data.std,
        )
        self.steps_per_epoch = len(self.loader)
        self.total_steps = (config.epochs or 0) * self.steps_per_epoch
        self.last_step = self.total_steps if config.max_steps is None else min(self.total_steps, config.max_steps)

        self.options = model_options(self.dataset)
        self.threads = config.threads or (ranks.default_threads() if config.device == "cpu" else 1)
        workers = 1
        if config.reduction == "exact" and config.device == "cpu":
            workers = fewest_workers(len(self.shards), self.threads)
            if config.backend == "torch":  # it cuts its sums by the number of threads inside an operation: none there
                self.threads = workers
        models = [make_model(config, self.options, ranks.local_rank) for _ in range(workers)]
        self.model, self.F = models[0], models[0].F  # F: cnnmpi.functional, or its counterpart in torch
        share_threads = functools.partial(self.F.set_threads, self.threads, workers)
        share_threads()
        self.team = Team(models, prepare=share_threads if config.backend == "torch" else None)
        self.flat = FlatArrays(self.model)
        self.flats = {model: FlatArrays(model, self.flat.params) for model in models[1:]} | {self.model: self.flat}
        self.optimizer = make_optimizer(config, self.model)
        names = [(name, math.prod(param.shape)) for name, (param, _) in self.model.named_parameters().items()]
        sizes = [len(self.flat.grads), len(self.flat.buffers), 4]
        self.reducer = (ExactReducer if config.reduction == "exact" else Reducer)(ranks, shards, sizes, names)

        self.step = 0  # steps done since the beginning of the run
        self.best = -1.0  # test accuracy of best.h5
        self.epoch_counts = np.zeros(3)  # summed loss, correct, samples: since the beginning of the epoch
        self.stopping = False  # all ranks have agreed to stop
        self.skipped = 0  # steps in a row that were left out
        if saved is not None:
            self._continue_from(saved)
        for flat in (self.flat.params, self.flat.buffers):
            array = np.array(self.F.to_numpy(flat))
            ranks.broadcast(array)  # hosts of different kinds may have drawn them with different last bits
            self.F.copy_into(flat, array)

        assert config.out is not None  # resolve() has set it
        self.folder = RunFolder(config.out, ranks)
        self.out = self.folder.path
        elsewhere = saved is None or saved.path.resolve().parent != self.out  # the folder holds nothing of this run
        self.folder.open(elsewhere, to_toml(config), say)
        self.report = Report(self.out, silent=ranks.rank != 0)
        self.unsaved = elsewhere
        if elsewhere:
            self.best = -1.0
        else:
            ranks.on_rank0(as_user_errors()(lambda: self.report.rewind(self.step, self.steps_per_epoch)))

    # -- one step ----------------------------------------------------------------------------------------------------

    @one_blas_thread()
    def train_step(self) -> float:
        """Do the next step and return its mean loss; equal bits on every rank, and (reduced exactly) for any number."""
        self.watchdog.note(f"step {self.step}")
        F, seed = self.F, self.config.seed or 0
        buffers = np.array(F.to_numpy(self.flat.buffers))  # every shard starts from the same running statistics

        def train_shard(model: Model, shard: int) -> None:
            x, y = self.loader.batch(self.step, shard)  # (n, C, H, W), (n,)
            if len(y) == 0:  # a small batch, such as an epoch's last, may have fewer samples than shards
                return
            flat = self.flats[model]
            model.reseed(seed, self.step, shard)
            flat.grads[...] = 0
            F.copy_into(flat.buffers, buffers)
            logits = model.forward(F.as_array(x, like=flat.params))  # (n, classes)
            loss, dlogits = F.cross_entropy_loss(
                logits,
                F.as_array(y, like=flat.params),
                label_smoothing=self.config.label_smoothing,
                reduction="sum",
            )
            model.backward(dlogits)
            correct = int((F.to_numpy(logits).argmax(axis=1) == y).sum())
            # exact in float64, so that the exact reduction leaves fixed filters as they are
            statistics_sum = F.to_numpy(flat.buffers) * np.float64(len(y))
            self.reducer.add(shard, F.to_numpy(flat.grads), statistics_sum, np.array([loss, correct, len(y), 0]))

        self.team.map(train_shard, self.shards)
        if self.signals.asked:
            self.reducer.add(self.shards[0], None, None, np.array([0, 0, 0, 1]))
        try:
            loss = self._update(*self.reducer.reduce(self.step))  # over all shards of all ranks
            self.skipped = 0
        except NotFiniteError as error:  # a decision of all ranks: the same sums, or the same weights, on each
            F.copy_into(self.flat.buffers, buffers)
            loss = math.nan
            self._skip(error)
        self.step += 1
        if self.config.agree_every and self.step % self.config.agree_every == 0:
            self._agree()
        return loss

    def _update(self, gradient: Array, statistics_sum: Array, totals: Array) -> float:
        """Move the weights by the summed ``gradient`` and return the mean loss; NotFiniteError leaves them alone."""
        F, optimizer = self.F, self.optimizer
        loss_sum, _, samples, stops = totals
        # from here on one model: the others share its parameters; the optimizer knows views into its flat gradient
        F.copy_into(self.flat.grads, gradient / samples)
        F.copy_into(self.flat.buffers, statistics_sum / samples)
        if self.config.clip:
            optim.clip_grad_norm(optimizer.parameters, self.config.clip)
        optimizer.lr = learning_rate(self.config, self.step, self.total_steps)
        before = [self.flat.params] + [state for states in optimizer.state.values() for state in states]
        copies = [1 * array for array in before]  # of either engine
        optimizer.step()
        if not np.isfinite(F.to_numpy(self.flat.params)).all():  # equal weights: all ranks find the same
            for array, copy in zip(before, copies, strict=True):
                array[...] = copy
            raise NotFiniteError(f"step {self.step}: the update made weights that are not finite")
        self.epoch_counts += totals[:3]
        self.stopping = stops > 0  # a decision of all ranks, at the same step: any of them was asked to stop
        return float(loss_sum / samples)

    def _skip(self, error: NotFiniteError) -> None:
        """Leave a step out, or end the run, as --on-nan says."""
        if self.config.on_nan == "stop":
            advice = "a smaller --lr may help, and --on-nan skip leaves such steps out"
            raise UserError(f"{error}; the weights were left as they were before this step; {advice}") from None
        self.skipped += 1
        if self.skipped >= MOST_SKIPPED:
            raise UserError(f"{error}; {MOST_SKIPPED} steps in a row had to be skipped: a smaller --lr may help")
        self.report.line(f"warning: {error}; the step was skipped")
        self.optimizer.steps = self.step + 1
        self.stopping = self.ranks.any(self.signals.asked)

    def _agree(self) -> None:
        """Raise DisagreementError unless all ranks hold the same weights, statistics and optimizer state."""
        self.ranks.agree_on_arrays(f"step {self.step}", pack(self.model, self.optimizer))

    # -- the run -----------------------------------------------------------------------------------------------------

    @one_blas_thread()
    def run(self) -> int:
        """Train to the end, or until a signal asks to stop; return 0, or STOPPED. Leaves checkpoints in ``out``."""
        try:
            return self._run()
        finally:
            self.report.close()
            self.folder.close()

    def _run(self) -> int:
        if self.unsaved:
            self._save(LAST)  # a full disk is better found now than after an epoch
        self._announce()
        test: Evaluation | None = None
        started, done_before = time.perf_counter(), self.epoch_counts[2]
        while True:
            epoch, index = divmod(self.step, self.steps_per_epoch)
            at_end = self.step >= self.last_step
            if self.epoch_counts[2] and (index == 0 or at_end):
                test = self._end_epoch(time.perf_counter() - started, done_before)
                if test is None:
                    return self._stop()
            if at_end:
                break
            if index == 0:
                started, done_before = time.perf_counter(), 0.0
            loss = self.train_step()
            test = None
            self.report.step(epoch + 1, index + 1, self.steps_per_epoch, loss)
            if self.stopping and self.step < self.last_step:
                return self._stop()
            if self.config.checkpoint_every and self.step % self.config.checkpoint_every == 0:
                self._save(LAST)
        test = test or self._evaluate()
        if test is None:
            return self._stop()
        digest = checkpoint.weights_digest(self.model.state_dict())
        self.report.line(f"done: test_acc={test.accuracy:.4f} weights_sha256={digest}")
        return 0

    def _stop(self) -> int:
        """Save, and say how to go on."""
        self._save(LAST)
        self.report.line(f"stopped at step {self.step} of {self.last_step}: saved {self.out / LAST}")
        self.report.line(f"to go on: python -m cnnmpi.train --resume --out {self.out}")
        return STOPPED

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
        elif ranks.cores_on_node > (shards := self.reducer.shards):
            self.report.line(
                f"note: {ranks.cores_on_node} cores, {shards} shards: up to {shards} ranks "
                "share the work, and threads the other cores; for more ranks raise --shards, and --batch-size with it"
            )

    def _evaluate(self) -> Evaluation | None:
        """Return the test set's evaluation; None if a signal came meanwhile."""

        def asked_to_stop() -> bool:
            self.watchdog.note(f"the evaluation after step {self.step}")
            return self.ranks.any(self.signals.asked)

        images, labels, data = self.dataset.test_images, self.dataset.test_labels, self.data
        options: dict[str, Any] = {"classes": len(self.dataset.classes), "mean": data.mean, "std": data.std}
        return evaluate_unless(asked_to_stop, self.team, images, labels, **options, ranks=self.ranks)

    def _end_epoch(self, seconds: float, done_before: float) -> Evaluation | None:
        """Evaluate, save and report after the last step of an epoch, or of the run; None if a signal came meanwhile."""
        loss_sum, correct, samples = self.epoch_counts.tolist()
        complete = self.step % self.steps_per_epoch == 0
        test = self._evaluate()
        if test is None:
            return None
        # first the line, then the checkpoint: a resume drops a line that is ahead, but could not bring one back
        self.report.epoch(
            {
                "epoch": math.ceil(self.step / self.steps_per_epoch),
                "step": self.step,
                "train_loss": loss_sum / samples,
                "train_acc": correct / samples,
                "test_loss": test.loss,
                "test_acc": test.accuracy,
                "lr": learning_rate(self.config, self.step - 1, self.total_steps),
                "images_per_s": (samples - done_before) / seconds,
                "seconds": seconds,
                "ranks": self.ranks.size,
                "data": self.dataset.source,
            }
        )
        if test.accuracy > self.best and math.isfinite(test.loss):
            # a run that --max-steps ends inside an epoch may go on: what best.h5 is then must not depend on that
            if complete or self.step == self.total_steps:
                self.best = test.accuracy
            self._save(BEST)
        if complete:
            self.epoch_counts[:] = 0
        self._save(LAST)
        return test

    # -- on disk -----------------------------------------------------------------------------------------------------

    def _save(self, name: str) -> None:
        """Write the checkpoint ``name``, if all ranks agree on what to write."""
        self._agree()
        self.watchdog.note(f"saving {name}", slow=True)

        def content() -> tuple[Arrays, dict[str, Any]]:
            attributes = model_attributes(self.config.model or "", self.options, self.model) | {
                "config": json.dumps(to_plain(experiment(self.config))),
                "epoch": self.step // self.steps_per_epoch,
                "step": self.step,
                "epoch_counts": self.epoch_counts.tolist(),
                "best_test_acc": self.best,
                "classes": list(self.dataset.classes),
                "mean": list(self.data.mean),
                "std": list(self.data.std),
                "data_source": self.dataset.source,
                "data_archive_sha256": self.dataset.sha256,
                "data_sha256": self.data.sha256,
            }
            return pack(self.model, self.optimizer), attributes

        self.folder.save(name, content)
        self.unsaved = False

    def _continue_from(self, saved: Saved) -> None:
        """Take up the run where its checkpoint left it."""
        if saved.run.data_sha256 != self.data.sha256:
            raise UserError(
                f"{saved.path} was trained on other data ({saved.run.data_source}) than {self.config.data} "
                f"({self.dataset.source}): name the same data with --data"
            )
        try:
            unpack(saved.arrays, self.model, self.optimizer)
        except ValueError as error:
            raise UserError(f"{saved.path}: {error}") from None
        if saved.run.step > self.last_step:
            asked = f"--max-steps {self.config.max_steps} comes too late: " if self.last_step < self.total_steps else ""
            raise UserError(
                f"{asked}the run of {saved.path} is at step {saved.run.step} of {self.total_steps}; "
                + ("name a larger number, or none" if asked else "it was not written by this program")
            )
        self.step = self.optimizer.steps = saved.run.step
        self.best = saved.run.best_test_acc
        self.epoch_counts[:] = saved.run.epoch_counts

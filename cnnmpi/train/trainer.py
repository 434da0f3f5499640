"""The training loop: from a step's number to updated weights, evaluation and checkpoints.

Everything it works with is put together by ``setup.set_up``.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from cnnmpi import checkpoint, optim
from cnnmpi.common.arrays import Array
from cnnmpi.data import DataLoader, Dataset
from cnnmpi.distributed import NotFiniteError, Ranks, Reducer
from cnnmpi.machine import one_blas_thread
from cnnmpi.models import MODELS, FlatArrays, Model
from cnnmpi.train.closing import time_table, what_now, write_report
from cnnmpi.train.config import Config, experiment, to_plain
from cnnmpi.train.evaluation import Evaluation, Stopped, evaluate
from cnnmpi.train.fingerprint import Fingerprint
from cnnmpi.train.folder import BEST, LAST, RunFolder, kept_name
from cnnmpi.train.hooks import Hooks
from cnnmpi.train.inputs import Part
from cnnmpi.train.ledger import Ledger, digests_of, exact
from cnnmpi.train.measures import Loss, Measures
from cnnmpi.train.phases import COMPUTE, EVALUATE, LOAD, REDUCE, SAVE, UPDATE, Phases
from cnnmpi.train.reporter import Reporter
from cnnmpi.train.scaling import LossScale
from cnnmpi.train.signals import StopSignals
from cnnmpi.train.state import Arrays, pack
from cnnmpi.train.team import Team
from cnnmpi.train.watchdog import Watchdog

STOPPED = 75  # exit code of a run that was asked to stop and saved (EX_TEMPFAIL of sysexits.h: try again later)
MOST_SKIPPED = 20  # steps in a row that --on-nan skip leaves out before it gives up


@dataclass(eq=False)
class Trainer:
    """One run: ``run()`` trains to the end and returns the exit code, ``train_step()`` does one step.

    ``step`` counts the steps done since the beginning of the run.
    """

    config: Config
    ranks: Ranks
    dataset: Dataset
    parts: dict[str, Part]  # "train", "test" and, if some images are held out, "val"
    loader: DataLoader
    shards: list[int]  # of this rank
    team: Team  # models that share their parameters, one for each thread
    flats: dict[Model, FlatArrays]
    loss: Loss
    test_loss: Loss
    measures: Measures
    optimizer: optim.Optimizer
    rate: Callable[[int], float]  # the learning rate of a step
    reducer: Reducer
    total_steps: int
    attributes: dict[str, Any]  # of every checkpoint: what the data and the model are
    folder: RunFolder
    report: Reporter
    ledger: Ledger  # of rank 0; without entries on others
    fingerprint: Fingerprint
    shaping: dict[str, Any]  # what shapes the run: the ledger's first entry
    hooks: Hooks
    signals: StopSignals
    watchdog: Watchdog
    greeting: list[str]  # what is about to be trained, on what
    how_to_resume: str  # what a person does for that
    step: int = 0
    best: float = -math.inf  # of the evaluation of best.h5, see Evaluation.score
    unsaved: bool = True  # nothing of this run is in its folder yet
    stopping: bool = False  # all ranks have agreed to stop
    skipped: int = 0  # steps in a row that --on-nan left out

    def __post_init__(self) -> None:
        self.scale = LossScale.of(self.config.precision or "float32")
        self.model: Model = self.team.models[0]
        self.F: ModuleType = self.model.F  # cnnmpi.functional, or its counterpart in torch
        self.flat: FlatArrays = self.flats[self.model]
        self.out: Path = self.folder.path
        self.steps_per_epoch: int = len(self.loader)
        limit = self.config.max_steps
        self.last_step: int = self.total_steps if limit is None else min(self.total_steps, limit)
        self.before: list[Array] = []  # copies of what an update moves, from before the newest one
        self.history: list[dict[str, Any]] = []  # the lines of metrics.jsonl since this trainer was made
        self.phases = Phases()  # where this rank's time goes
        self.lined = dict(self.phases.seconds), self.phases.whole  # as it was at the last line of an epoch
        self.saved: dict[str, int] = {}  # how often this trainer wrote each of its checkpoints
        self.grad_norm = math.nan  # of the newest step, if that is written down
        self.epoch_sums = np.zeros(len(self.measures))  # since the beginning of the epoch
        self.judge: Part = self.parts.get("val", self.parts["test"])  # what each epoch is evaluated on, for best.h5

    # -- one step ----------------------------------------------------------------------------------------------------

    @one_blas_thread()
    def train_step(self) -> float:
        """Do the next step and return its mean loss; equal bits on every rank, and (reduced exactly) for any number."""
        self.watchdog.note(f"step {self.step}")
        F, seed = self.F, self.config.seed or 0
        if self.step + 1 < self.last_step:
            self.loader.prepare(self.step + 1, self.shards)
        waits: list[float] = []  # of each shard, for its images
        buffers = np.array(F.to_numpy(self.flat.buffers))  # every shard starts from the same running statistics

        def train_shard(model: Model, shard: int) -> None:
            asked = time.perf_counter()
            x, y = self.loader.batch(self.step, shard)  # (n, C, H, W), and labels (n,) or targets (n, K)
            waits.append(time.perf_counter() - asked)
            if len(y) == 0:  # more shards than samples in the last batch of an epoch
                return
            flat = self.flats[model]
            model.reseed(seed, self.step, shard)
            flat.grads[...] = 0
            F.copy_into(flat.buffers, buffers)
            logits = F.for_loss(model.forward(F.as_array(x, like=flat.params)))  # (n, K)
            loss, dlogits = self.loss(logits, F.as_array(y, like=flat.params), reduction="sum")
            model.backward(dlogits * self.scale.factor)
            if self.scale.factor != 1:
                flat.grads *= 1 / self.scale.factor
            sums = self.measures.sums(loss, F.to_numpy(logits), y)
            # exact in float64, so that the exact reduction leaves statistics that did not move as they are
            statistics_sum = F.to_numpy(flat.buffers) * np.float64(len(y))
            gradient = flat.grads if self.reducer.on_device else F.to_numpy(flat.grads)
            self.reducer.add(shard, gradient, statistics_sum, np.append(sums, 0))

        with self.phases(COMPUTE):
            self.team.map(train_shard, self.shards)
        self.phases.move(sum(waits) / len(self.team.models), COMPUTE, LOAD)
        if self.signals.asked:
            self.reducer.add(self.shards[0], None, None, np.append(np.zeros(len(self.measures)), 1))
        try:
            with self.phases(REDUCE):
                totals = self.reducer.reduce(self.step)  # over all shards of all ranks
            with self.phases(UPDATE):
                loss = self._update(*totals)
            self.skipped = 0
            self.scale.succeeded()
        except NotFiniteError as error:  # a decision of all ranks: the same sums, or the same weights, on each
            F.copy_into(self.flat.buffers, buffers)
            loss = self.grad_norm = math.nan
            self._skip(error)
        self.step += 1
        if self.config.agree_every and self.step % self.config.agree_every == 0:
            self._agree()
        return loss

    def _update(self, gradient: Array, statistics_sum: Array, totals: Array) -> float:
        """Move the weights by the summed ``gradient`` and return the mean loss; NotFiniteError leaves them alone."""
        F, optimizer = self.F, self.optimizer
        loss_sum, samples, *_, stops = totals
        gradient /= samples
        if self.report.records.wants(self.step + 1):
            self.grad_norm = math.sqrt(gradient @ gradient)
        # from here on one model: the others share its parameters; the optimizer knows views into its flat gradient
        F.copy_into(self.flat.grads, gradient)
        F.copy_into(self.flat.buffers, statistics_sum / samples)
        if self.config.clip:
            optim.clip_grad_norm(optimizer.parameters, self.config.clip)
        optimizer.lr = self.rate(self.step)
        moving = [self.flat.params] + [state for states in optimizer.state.values() for state in states]
        self.before = self.before or [optim.zeros_like(array) for array in moving]
        for copy, array in zip(self.before, moving, strict=True):
            copy[...] = array
        optimizer.step()
        if not np.isfinite(F.to_numpy(self.flat.params)).all():  # equal weights: all ranks find the same
            for copy, array in zip(self.before, moving, strict=True):
                array[...] = copy
            raise NotFiniteError(f"step {self.step}: the update made weights that are not finite")
        self.epoch_sums += totals[:-1]
        self.stopping = stops > 0  # a decision of all ranks, at the same step: any of them was asked to stop
        return float(loss_sum / samples)

    def _skip(self, error: NotFiniteError) -> None:
        """Leave a step out: to scale the loss less from then on, or as --on-nan says; else end the run."""
        if error.backward and self.scale.failed():
            self.report.line(
                f"note: {error}; the step was skipped, and the loss is scaled by {self.scale.factor:g} now"
            )
        else:
            if self.config.on_nan == "stop":
                advice = "a smaller --lr may help, and --on-nan skip leaves such steps out"
                raise NotFiniteError(f"{error}; the weights are as before this step; {advice}") from None
            self.skipped += 1
            if self.skipped >= MOST_SKIPPED:
                raise NotFiniteError(
                    f"{error}; {MOST_SKIPPED} steps in a row had to be skipped: a smaller --lr may help"
                )
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
        except Stopped:
            return self._stop()
        finally:
            self.report.close()
            self.folder.close()

    def _run(self) -> int:
        if self.unsaved:
            self.ledger.begin(self.shaping, self.step)
            self.ledger.enter(self.entry())
            self._save(LAST)  # a full disk is better found now than after an epoch
        first, *notes = self.greeting
        for line in (f"{first}; step {self.step} of {self.last_step}", *notes):
            self.report.line(line)
        self.report.begin(self.step, self.last_step, self.ranks, self.team.threads, self.loader, self.shards[0])
        newest: Evaluation | None = None
        started, done_before = time.perf_counter(), self.epoch_sums[1]
        while True:
            epoch, index = divmod(self.step, self.steps_per_epoch)
            at_end = self.step >= self.last_step
            if self.epoch_sums[1] and (index == 0 or at_end):
                newest = self._end_epoch(time.perf_counter() - started, done_before)
            if at_end:
                break
            if index == 0:
                started, done_before = time.perf_counter(), 0.0
            with self.fingerprint.of_step(self):  # if it is to have one
                loss = self.train_step()
            newest = None
            self._record_step(epoch + 1, index, loss)
            self.hooks.call("on_step", self, loss)
            if self.ledger.wants(self.step):
                self.ledger.enter(self.entry(loss))
            if self.stopping and self.step < self.last_step:
                raise Stopped
            if self.config.checkpoint_every and self.step % self.config.checkpoint_every == 0:
                self._save(LAST)
        test = newest if newest and self.judge.name == "test" else self._evaluate(self.parts["test"])
        digest = checkpoint.weights_digest(self.model.state_dict())
        result = f"test_acc={test.metrics['acc']:.4f}" if "acc" in test.metrics else f"test_loss={test.loss:.4f}"
        self._close(test)
        ledger = f" ledger={self.ledger.head}" if self.ledger.head else ""
        self.report.line(f"done: {result} weights_sha256={digest}{ledger}", important=True)
        return 0

    def _stop(self) -> int:
        """Save, and say how to go on."""
        self._save(LAST)
        self.report.line(f"stopped at step {self.step} of {self.last_step}: saved {self.out / LAST}", important=True)
        self.report.line(f"to go on: {self.how_to_resume}", important=True)
        return STOPPED

    def _record_step(self, epoch: int, index: int, loss: float) -> None:
        """Show and write down the step just done, the one of this ``index`` in its ``epoch``."""
        rate = self.rate(self.step - 1)
        line = {"step": self.step, "epoch": epoch, "loss": loss, "lr": rate, "grad_norm": self.grad_norm}
        first = index * self.loader.batch_size
        images = min(self.loader.batch_size, len(self.parts["train"].labels) - first)
        self.report.step(line, self.last_step, math.ceil(self.last_step / self.steps_per_epoch), images)

    def entry(self, loss: float | None = None) -> dict[str, Any]:
        """Return what the ledger says of the step just done, whose mean ``loss`` this was: see ledger.py."""
        to_numpy, optimizer = self.F.to_numpy, self.optimizer
        state = {slot: [to_numpy(array) for array in arrays] for slot, arrays in optimizer.state.items()}
        digests = digests_of(to_numpy(self.flat.params), to_numpy(self.flat.buffers), state, optimizer.steps)
        scale = {"loss_scale": str(self.scale.factor)} if self.scale.moves else {}
        return {"step": self.step, **exact(loss), **digests, **scale}

    def _close(self, test: Evaluation) -> None:
        """Say where the time went, and write the report; what hinders that is a warning: the run is done, and saved."""
        phases, whole = self.ranks.gather(self.phases.seconds), self.phases.whole
        self.watchdog.note("writing the report, of a run that is done and saved", slow=True)

        def write() -> None:
            page = None
            if self.config.report:
                page = write_report(self.out, self.model, test, self.parts["test"], self.report.line)
            self.report.block(time_table(phases, whole))
            own = self.config.model if self.config.model not in MODELS else None
            self.report.block(what_now(self.out, self.saved, self.how_to_resume, own, page))

        self.ranks.on_rank0(write)

    def _evaluate(self, part: Part) -> Evaluation:
        """Return the evaluation of a part of the data. Raises Stopped on all ranks if a signal came meanwhile."""

        def asked_to_stop() -> bool:
            self.watchdog.note(f"the evaluation after step {self.step}")
            return self.ranks.any(self.signals.asked)

        with self.phases(EVALUATE):
            return evaluate(
                self.team,
                part.images,
                part.labels,
                classes=len(self.dataset.classes),
                mean=self.loader.mean,
                std=self.loader.std,
                loss=self.test_loss,
                metrics=self.measures.metrics,
                ranks=self.ranks,
                stop=asked_to_stop,
            )

    def _end_epoch(self, seconds: float, done_before: float) -> Evaluation:
        """Evaluate, save and report after the last step of an epoch, or of the run."""
        samples = float(self.epoch_sums[1])
        complete = self.step % self.steps_per_epoch == 0
        newest, epoch = self._evaluate(self.judge), math.ceil(self.step / self.steps_per_epoch)
        metrics = {
            "epoch": epoch,
            "step": self.step,
            **{f"train_{name}": value for name, value in self.measures.means(self.epoch_sums).items()},
            **{f"{self.judge.name}_{name}": value for name, value in {"loss": newest.loss, **newest.metrics}.items()},
            "lr": self.rate(self.step - 1),
            "images_per_s": (samples - done_before) / seconds,
            "seconds": seconds,
            "ranks": self.ranks.size,
            **self._times(),
            "data": self.dataset.source,
        }
        # first the line, then the checkpoint: a resume drops a line that is ahead, but could not bring one back
        self.report.epoch(metrics, newest, self.judge.name)
        self.history.append(metrics)
        self.hooks.call("on_epoch", self, metrics)
        if newest.score > self.best and math.isfinite(newest.loss):
            # a run that --max-steps ends inside an epoch may go on: what best.h5 is then must not depend on that
            if complete or self.step == self.total_steps:
                self.best = newest.score
            self._save(BEST)
        if complete:
            self.epoch_sums[:] = 0
            if self.config.keep_every and epoch % self.config.keep_every == 0:
                self._keep(epoch)  # before the other: a resume from that would not write this one
        self._save(LAST)
        return newest

    def _times(self) -> dict[str, float]:
        """Return the seconds that went into each phase since the line of the epoch before: means over the ranks."""
        (before, began), now = self.lined, (dict(self.phases.seconds), self.phases.whole)
        self.lined = now
        spent = {name: seconds - before[name] for name, seconds in now[0].items()}
        spent["other"] = now[1] - began - sum(spent.values())
        everybody = self.ranks.gather(spent)
        return {f"time_{name}": round(sum(each[name] for each in everybody) / len(everybody), 4) for name in spent}

    # -- on disk -----------------------------------------------------------------------------------------------------

    def _save(self, name: str) -> None:
        """Write the checkpoint ``name``, if all ranks agree on what to write."""
        self._write(name, lambda: self.folder.save(name, self._content))

    def _keep(self, epoch: int) -> None:
        """Write the checkpoint that is kept of ``epoch``."""
        name = kept_name(epoch)
        self._write(name, lambda: self.folder.keep(name, self._content, self.config.keep_last))

    def _write(self, name: str, write: Callable[[], None]) -> None:
        with self.phases(SAVE):
            self._agree()
            self.watchdog.note(f"saving {name}", slow=True)
            self.ledger.wait()
            write()
        self.unsaved = False
        kind = name.partition("/")[0]
        self.saved[kind] = self.saved.get(kind, 0) + 1
        self.hooks.call("on_save", self, self.out / name)

    def _content(self) -> tuple[Arrays, dict[str, Any]]:
        return pack(self.model, self.optimizer), self.describe()

    def describe(self) -> dict[str, Any]:
        """Return the attributes of a checkpoint of this run, as it is now."""
        sums = dict(zip(self.measures.names, self.epoch_sums.reshape(-1, 2).tolist(), strict=True))
        attributes = self.attributes | {
            "weights_sha256": checkpoint.weights_digest(self.model.state_dict()),
            "config": json.dumps(to_plain(experiment(self.config))),
            "epoch": self.step // self.steps_per_epoch,
            "step": self.step,
            "epoch_sums": json.dumps(sums),
        }
        if self.ledger.head:
            attributes["ledger"] = self.ledger.head
        if self.scale.moves:
            attributes["loss_scale"] = [self.scale.factor, float(self.scale.steady)]
        if "acc" in self.measures.names:
            attributes[f"best_{self.judge.name}_acc"] = max(self.best, -1.0)
        elif math.isfinite(self.best):
            attributes[f"best_{self.judge.name}_loss"] = -self.best
        return attributes

"""What a run needs before its first step, put together in one place: for the command line, scripts and tests."""

import copy
import dataclasses
import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cnnmpi
from cnnmpi import checkpoint, optim
from cnnmpi.console import printable, told_warnings
from cnnmpi.data import Dataset
from cnnmpi.distributed import DeviceReducer, ExactReducer, Ranks, Reducer, UserError
from cnnmpi.machine import keep_freed_memory
from cnnmpi.models import MODELS, FlatArrays, Model
from cnnmpi.rng import first_draws
from cnnmpi.train.code import Code, explained
from cnnmpi.train.config import (
    Config,
    check_kinds,
    check_ranges,
    continued,
    experiment,
    fingerprinted,
    resolve,
    to_plain,
    to_toml,
    with_defaults,
)
from cnnmpi.train.errors import as_user_errors
from cnnmpi.train.fingerprint import Fingerprint
from cnnmpi.train.folder import KEPT, RunFolder, Saved, find_checkpoint
from cnnmpi.train.hooks import Hooks
from cnnmpi.train.inputs import Data, Tell, input_options, make_loader, open_data, parts_of, smallest_shard
from cnnmpi.train.ledger import Ledger, plain_settings
from cnnmpi.train.measures import Metric, class_weights, find_losses, make_measures, with_loss
from cnnmpi.train.probe import probe, probe_loss
from cnnmpi.train.reporter import Reporter, greeting
from cnnmpi.train.signals import StopSignals
from cnnmpi.train.state import accepted, load_checkpoint, model_attributes, unpack, version_of
from cnnmpi.train.team import Team, fewest_workers
from cnnmpi.train.trainer import Trainer
from cnnmpi.train.watchdog import Watchdog


def set_up(
    config: Config,
    ranks: Ranks,
    code: Code | None = None,
    *,
    data: Dataset | None = None,
    metrics: Mapping[str, Metric] | None = None,
    hooks: Hooks | None = None,
    signals: StopSignals | None = None,
    watchdog: Watchdog | None = None,
) -> Trainer:
    """Return the run that ``config`` describes, on ``ranks``: new, or where its checkpoint left it.

    ``code`` finds networks, losses and augmentations of a person's own; ``data`` is used instead of what ``config``
    names; ``metrics`` are measured besides the usual ones; ``signals`` tell when to save and stop, and ``watchdog`` is
    told what this rank is doing. Raises UserError for settings, data, code or checkpoints that cannot be used, and for
    settings that contradict a resumed checkpoint.
    """
    code, signals, watchdog = code or Code(), signals or StopSignals(), watchdog or Watchdog(ranks)
    watchdog.note("preparing data and model", slow=True)
    tell = print_on_rank0(ranks, config.quiet)
    ranks.agree("their settings", dataclasses.astuple(config))
    config, saved = with_checkpoint(config, code, ranks, tell)
    shards = config.shards or 1
    if shards < ranks.size:
        raise UserError(
            f"{ranks.size} ranks cannot share {shards} shards: start fewer, or use --shards {ranks.size} or more"
        )
    network = code.find("model", config.model or "")
    described = open_data(config.data or "auto" if data is None else data, ranks, tell, data_in=config.data_in)
    config = with_loss(config, described.dataset)
    parts = parts_of(described.dataset, config.validation or 0.0, config.seed or 0)
    loader = make_loader(config, described, parts["train"], code)
    options = input_options(described.dataset) | (config.model_options or {}) | {"seed": config.seed or 0}
    model = make_model(network, config, options, ranks.local_rank, smallest_shard(len(loader.labels), config))
    weight = class_weights(loader.labels, loader.classes) if config.balance else None
    loss, test_loss = find_losses(config, code, model.F, weight)
    ranks.agree("the source of the code that they train with", code.sources())
    if warning := probe_loss(loss, config.loss or "", model, loader):
        tell(warning)

    mine = [int(shard) for shard in np.array_split(np.arange(shards), ranks.size)[ranks.rank]]
    team = make_team(config, model, ranks, len(mine))
    flats = share_parameters(team.models)
    optimizer = make_optimizer(config, model)
    own = {**getattr(network, "recipe", {}).get("metrics", {}), **(metrics or {})}
    measures = make_measures(config, described.dataset, own)
    ranks.agree("their metrics", measures.names)
    sizes = [len(flats[model].grads), len(flats[model].buffers), len(measures) + 1]
    names = [(name, math.prod(param.shape)) for name, (param, _) in model.named_parameters().items()]
    exact = DeviceReducer if (config.device or "cpu") != "cpu" else ExactReducer
    reducer = (exact if config.reduction == "exact" else Reducer)(ranks, shards, sizes, names)

    assert config.out is not None  # resolve() has set it
    folder = RunFolder(config.out, ranks)
    total_steps = (config.epochs or 0) * len(loader)
    report = Reporter(folder.path, config, silent=ranks.rank != 0)
    trainer = Trainer(
        config=config,
        ranks=ranks,
        dataset=described.dataset,
        parts=parts,
        loader=loader,
        shards=mine,
        team=team,
        flats=flats,
        loss=loss,
        test_loss=test_loss,
        measures=measures,
        optimizer=optimizer,
        rate=functools.partial(learning_rate, config, total=total_steps),
        reducer=reducer,
        total_steps=total_steps,
        attributes=model_attributes(config.model or "", options, model) | data_attributes(described, code),
        folder=folder,
        report=report,
        ledger=Ledger(folder.path, 0 if ranks.rank else config.ledger_every, len(loader), report.line),
        fingerprint=Fingerprint(folder.path, fingerprinted(config), report.line),
        shaping={},
        hooks=hooks or Hooks(),
        signals=signals,
        watchdog=watchdog,
        greeting=greeting(config, described.dataset, parts, ranks, team.threads, gpus(config, model)),
        how_to_resume=f"python -m cnnmpi.train --resume --out {folder.path}",
    )
    if saved is not None:
        continue_from(saved, trainer, described, code, tell)
    elif config.init is not None:
        start_from(config.init, model, ranks, tell)
    for flat in (trainer.flat.params, trainer.flat.buffers, trainer.flat.frozen):
        array = np.array(trainer.F.to_numpy(flat))
        ranks.broadcast(array)  # hosts of different kinds may have drawn them with different last bits
        trainer.F.copy_into(flat, array)
    trainer.shaping = what_shapes(trainer, described, code)
    open_folder(trainer, saved, tell)
    return trainer


def print_on_rank0(ranks: Ranks, quiet: bool = False) -> Tell:
    """Return a function that prints a line, on rank 0; if ``quiet``, warnings alone ("!" begins the loudest)."""

    def tell(text: str) -> None:
        if ranks.rank == 0 and not (quiet and not text.startswith(("warning:", "!"))):
            print(printable(text), flush=True)

    return tell


def program() -> str:
    """Return what identifies the program that this rank runs: its sources and the versions of what computes."""
    versions = [f"{name} {version_of(name)}" for name in ("cnnmpi", "numpy", "torch")]
    return f"{', '.join(versions)}, sources {sources_sha256()}"


def sources_sha256() -> str:
    """Return the digest of the sources of this package: of each file's path in it, and its bytes."""
    digest, package = hashlib.sha256(), Path(cnnmpi.__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def what_shapes(trainer: Trainer, data: Data, code: Code) -> dict[str, Any]:
    """Return all on which the bits of a run depend: what its ledger begins with."""
    config, flat = trainer.config, trainer.flat
    engines = ("numpy", "torch") if config.backend == "torch" else ("numpy",)
    arrays = [[name, list(array.shape)] for name, array in trainer.model.named_arrays().items()]
    return {
        "config": plain_settings(to_plain(experiment(config))),
        "init": config.init is not None,
        "data_sha256": data.sha256,
        "network": hashlib.sha256(json.dumps(arrays).encode()).hexdigest(),
        "frozen": hashlib.sha256(trainer.F.to_numpy(flat.frozen).data).hexdigest(),
        "code": code.sources(),
        "sources_sha256": sources_sha256(),
        "versions": {name: version_of(name) for name in ("cnnmpi", *engines)},
        "kernels": trainer.F.kernels(config.device or "cpu"),
    }


# -- the model -------------------------------------------------------------------------------------------------------


def make_model(
    network: Callable[..., Model], config: Config, options: dict[str, Any], local_rank: int, smallest: int = 2
) -> Model:
    """Return the model with its first weights, on the engine that ``config`` asks for. Raises UserError.

    Layers that are not given a generator draw their weights from one for the run's seed. ``smallest`` is the number of
    images in the smallest shard.
    """
    arguments = accepted(network, options)
    shown = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    remedy = "--model-options gives it other arguments" if config.model not in MODELS else ""

    def build() -> Model:
        with first_draws(options["seed"]):
            return network(**arguments)

    with explained(f"--model {config.model} cannot be built with {shown}", remedy):
        inspect.signature(network).bind(**arguments)
        model = build()
    if not isinstance(model, Model):
        raise UserError(f"--model {config.model} makes a {type(model).__name__}; expected a subclass of cnnmpi.Model")
    probe(model, build, config.model or "", options, smallest)
    to_engine(model, config, local_rank)
    model.skip_input_grad()
    return model


def to_engine(model: Model, config: Config, local_rank: int = 0) -> None:
    """Let ``model`` compute as ``config`` says: backend, device and precision. Raises UserError where it cannot."""
    check_ranges(config)
    try:
        if config.backend == "torch":
            model.to_torch(config.device or "cpu", index=local_rank, precision=config.precision or "float32")
            keep_freed_memory()
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from None


def gpus(config: Config, model: Model) -> int:
    """Return how many GPUs the ranks of this host share: one, where --device names it."""
    if not (config.device or "cpu").startswith("cuda"):
        return 0
    return 1 if ":" in (config.device or "") else int(model.F.count_gpus())


def load_trained(path: Path, name: str | None) -> Model:
    """Return the model of a checkpoint for a command: a network of a person's own by its ``name``, as --model gives it.

    A source that has changed since is named in a line on standard error.
    """
    network = Code().find("model", name) if name else None
    with told_warnings():
        return load_checkpoint(path, network)


def make_team(config: Config, model: Model, ranks: Ranks, shards: int) -> Team:
    """Return as many copies of ``model`` as threads of this rank work on its ``shards`` at the same time."""
    F, workers = model.F, 1
    threads = config.threads or (ranks.default_threads() if config.device == "cpu" else 1)
    if config.reduction == "exact" and config.device == "cpu":
        workers = fewest_workers(shards, threads)
        if config.backend == "torch":  # it cuts its sums by the number of threads inside an operation: none there
            threads = workers
    share_threads = functools.partial(F.set_threads, threads, workers)
    share_threads()
    copies = [copy.deepcopy(model) for _ in range(workers - 1)]
    return Team([model, *copies], threads, prepare=share_threads if config.backend == "torch" else None)


def share_parameters(models: Sequence[Model]) -> dict[Model, FlatArrays]:
    """Return the flat arrays of all ``models``, which compute with the first one's parameters from now on."""
    first, *others = models
    flat = FlatArrays(first)
    return {first: flat} | {model: FlatArrays(model, flat) for model in others}


# -- how it learns ---------------------------------------------------------------------------------------------------


def make_optimizer(config: Config, model: Model) -> optim.Optimizer:
    """Return the optimizer that ``config`` asks for."""
    parameters, decay, momentum = model.parameters(), config.weight_decay or 0.0, config.momentum or 0.0
    if config.optimizer == "sgd":
        return optim.SGD(parameters, momentum=momentum, nesterov=momentum > 0, weight_decay=decay)
    return (optim.Adam if config.optimizer == "adam" else optim.AdamW)(parameters, weight_decay=decay)


def learning_rate(config: Config, step: int, total: int) -> float:
    """Return the learning rate of ``step`` in a run of ``total`` steps."""
    peak, warmup = config.lr or 0.0, round((config.warmup or 0.0) * total)
    if config.schedule == "cosine":
        return optim.warmup_cosine(step, peak=peak, total=total, warmup=warmup)
    if config.schedule == "linear":
        return optim.warmup_linear(step, peak=peak, total=total, warmup=warmup)
    if config.schedule == "step":
        return optim.step_decay(step, initial=peak, every=math.ceil(total / 3))
    return peak


# -- new, or going on ------------------------------------------------------------------------------------------------


def with_checkpoint(config: Config, code: Code, ranks: Ranks, tell: Tell) -> tuple[Config, Saved | None]:
    """Return the complete configuration, and the checkpoint with which the run begins, if it is a resumed one."""
    saved = None
    if config.resume is not None:
        check_kinds(config)
        resume, default_out = config.resume, with_defaults(config, code).out or Path()  # the checkpoint says the rest
        saved = ranks.on_rank0(lambda: find_checkpoint(resume, default_out, tell))
    if saved is not None:
        config = continued(config, saved.run.config, saved.path, code)
        parent = saved.path.parent
        config = dataclasses.replace(config, out=config.out or (parent.parent if parent.name == KEPT else parent))
    return resolve(config, code), saved


def continue_from(saved: Saved, trainer: Trainer, data: Data, code: Code, tell: Tell) -> None:
    """Take up the run where its checkpoint left it."""
    run = saved.run
    if run.data_sha256 != data.sha256:
        raise UserError(
            f"{saved.path} was trained on other data ({run.data_source}) than {trainer.config.data} "
            f"({data.dataset.source}): name the same data with --data"
        )
    sources = code.sources()
    if changed := [f"--{setting}" for setting in sources if run.sources.get(setting, "") not in ("", sources[setting])]:
        tell(f"warning: the source of {', '.join(changed)} has changed since {saved.path} was saved")
    try:
        unpack(saved.arrays, trainer.model, trainer.optimizer)
    except ValueError as error:
        raise UserError(f"{saved.path}: {error}") from None
    if run.step > trainer.last_step:
        early = trainer.last_step < trainer.total_steps
        asked = f"--max-steps {trainer.config.max_steps} comes too late: " if early else ""
        raise UserError(
            f"{asked}the run of {saved.path} is at step {run.step} of {trainer.total_steps}; "
            + ("name a larger number, or none" if asked else "it was not written by this program")
        )
    trainer.step = trainer.optimizer.steps = run.step
    trainer.best = run.best
    if trainer.scale.moves and run.loss_scale:
        trainer.scale.factor, trainer.scale.steady = run.loss_scale[0], int(run.loss_scale[1])
    sums = [run.epoch_sums.get(name, [0.0, 0.0]) for name in trainer.measures.names]
    trainer.epoch_sums[:] = np.ravel(sums)


def start_from(path: str, model: Model, ranks: Ranks, tell: Tell) -> None:
    """Copy those weights of the checkpoint ``path`` that fit into ``model``, on rank 0, and list what did not."""

    def copy_weights() -> None:
        with as_user_errors():
            arrays, _ = checkpoint.load(path)
        saved = {name.removeprefix("model/"): array for name, array in arrays.items() if name.startswith("model/")}
        state = model.state_dict()
        fitting = {name: array for name, array in saved.items() if name in state and state[name].shape == array.shape}
        if not fitting:
            raise UserError(f"--init {path}: none of its {len(saved)} arrays fits the model: name another checkpoint")
        model.load_state_dict(state | fitting)
        others = [f"{name} {saved[name].shape}, not {state[name].shape}" for name in saved.keys() & state.keys()]
        tell(f"--init {path}: {len(fitting)} of the model's {len(state)} arrays start from there")
        lines = {
            "of another shape": sorted(line for line in others if line.split()[0] not in fitting),
            "only in the checkpoint": sorted(saved.keys() - state.keys()),
            "only in the model": sorted(state.keys() - saved.keys()),
        }
        for kind, names in lines.items():
            if names:
                tell(f"--init {path}: {kind}: {', '.join(names)}")

    ranks.on_rank0(copy_weights)


def data_attributes(data: Data, code: Code) -> dict[str, Any]:
    """Return the attributes that all checkpoints of a run share, besides those of its model."""
    return {
        "sources": json.dumps(code.sources()),
        "classes": list(data.dataset.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "data_source": data.dataset.source,
        "data_archive_sha256": data.dataset.sha256,
        "data_fit": data.dataset.fit,
        "data_sha256": data.sha256,
    }


def open_folder(trainer: Trainer, saved: Saved | None, tell: Tell) -> None:
    """Let the run have its folder: as a resumed run left it there, or with nothing of another run in its way."""
    folder, report = trainer.folder, trainer.report
    trainer.unsaved = saved is None or saved.path.resolve().parent != folder.path
    folder.open(trainer.unsaved, to_toml(trainer.config), tell)
    trainer.ranks.on_rank0(as_user_errors()(lambda: trainer.fingerprint.begin(trainer.step, trainer.shaping)))
    if trainer.unsaved:
        trainer.best = -math.inf
    else:
        head = saved.run.ledger if saved else ""

        def go_on() -> None:
            if trainer.ledger.go_on(trainer.step, head, trainer.shaping):
                trainer.ledger.enter(trainer.entry())

        trainer.ranks.on_rank0(go_on)
        ended = not trainer.epoch_sums[1]  # no images since the last evaluation
        trainer.ranks.on_rank0(as_user_errors()(lambda: report.rewind(trainer.step, trainer.steps_per_epoch, ended)))

"""What a run is: every setting, where it comes from (defaults, a TOML file, the command line) and what it shapes."""

import contextlib
import dataclasses
import inspect
import io
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import tomli_w
import tyro

from cnnmpi.distributed import UserError


@dataclass(frozen=True)
class Experiment:
    """What is computed: all that shapes the result. A resumed run has what its checkpoint says.

    A setting that is left out (None) takes the recipe of the model, or the DEFAULTS.
    """

    model: Literal["simplecnn", "smallresnet"] | None = None
    """Which network to train."""
    epochs: int | None = None
    """Passes over the training images, counted from the beginning of the run; they shape the learning rate."""
    batch_size: int | None = None
    """Images in a global batch, over all ranks."""
    shards: int | None = None
    """Pieces of a global batch, shared out to the ranks; at least as many as ranks."""
    optimizer: Literal["sgd", "adam", "adamw"] | None = None
    """Update rule; sgd is Nesterov momentum."""
    lr: float | None = None
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "step", "constant"] | None = None
    """Course of the learning rate: cosine or linear down to 0, a tenth after each third of the run, or level."""
    warmup: float | None = None
    """Part of all steps, 0..1, in which the learning rate rises to its peak (cosine and linear)."""
    momentum: float | None = None
    """Momentum of sgd."""
    weight_decay: float | None = None
    """L2 regularisation of weights; biases and BatchNorm are left alone."""
    label_smoothing: float | None = None
    """Probability, 0..1, that the loss's targets spread over all classes."""
    clip: float | None = None
    """Largest global norm of the gradient; 0 does not clip."""
    flip: bool | None = None
    """Mirror half of the training images, in turn: --flip or --no-flip."""
    crop: int | None = None
    """Shift training images at random by up to this many pixels."""
    cutout: int | None = None
    """Blank a square of this many pixels a side, at random, in each training image."""
    seed: int | None = None
    """Of every draw: weights, order, augmentation, dropout."""
    backend: Literal["numpy", "torch"] | None = None
    """Engine under the layers."""
    device: str | None = None
    """Where torch computes: cpu, cuda, cuda:N."""
    reduction: Literal["exact", "float32"] | None = None
    """Sum of the gradients: the same bits for any number of ranks, or half the bytes."""
    data: str | None = None
    """auto, cifar10, synthetic, an HDF5 file, or a CIFAR archive; a resumed run compares the content, not the name."""
    on_nan: Literal["stop", "skip"] | None = None
    """What to do with a step whose gradient is not finite; weights stay finite either way."""


@dataclass(frozen=True)
class Execution:
    """How it is computed: what does not shape the result. A resumed run has what the one says who resumes it."""

    max_steps: int | None = None
    """Stop after this many steps, counted from the beginning of the run, if that is earlier."""
    threads: int = 0
    """Threads of each rank; 0 shares the cores out to the ranks."""
    out: Path | None = None
    """Folder of the run; runs/<model>-<seed> by default."""
    resume: str | None = None
    """Continue a run: auto takes the newest checkpoint in the folder of the run; or name a file."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 writes one at the end of each epoch only."""
    agree_every: int = 50
    """Steps between checks that all ranks hold the same weights; 0 checks at checkpoints only."""
    hang_warning: float = 60.0
    """Seconds after which a rank that keeps the others waiting is named; 0 names none."""
    hang_limit: float = 600.0
    """Seconds after which a job that hangs shows where its ranks are and ends; 0 waits for ever."""


@dataclass(frozen=True)
class Config(Execution, Experiment):
    """Train a convolutional network on one or more MPI ranks; the result does not depend on their number."""


DEFAULTS: dict[str, Any] = {
    "model": "simplecnn", "shards": 8, "momentum": 0.9, "clip": 0.0, "flip": True, "seed": 0, "backend": "numpy",
    "device": "cpu", "reduction": "exact", "data": "auto", "on_nan": "stop",
}  # fmt: skip

# What is left out of the command line: found by training for the best test accuracy on two cores, within 4 minutes for
# SimpleCNN and 40 for SmallResNet.
RECIPES: dict[str, dict[str, Any]] = {
    "simplecnn": {
        "epochs": 12,
        "batch_size": 128,
        "optimizer": "sgd",
        "lr": 0.06,
        "schedule": "linear",
        "warmup": 0.2,
        "weight_decay": 5e-4,
        "label_smoothing": 0.0,
        "crop": 2,
        "cutout": 0,
    },
    "smallresnet": {
        "epochs": 23,
        "batch_size": 256,
        "optimizer": "sgd",
        "lr": 0.25,
        "schedule": "linear",
        "warmup": 0.2,
        "weight_decay": 5e-4,
        "label_smoothing": 0.1,
        "crop": 4,
        "cutout": 0,
    },
}
ADAM_LR = 1e-3  # the peak where Adam is chosen without a rate: the recipes' rates are SGD's


def with_defaults(config: Config) -> Config:
    """Return ``config`` with every setting that was left out: the model's recipe, and what all models share."""
    model = config.model or DEFAULTS["model"]
    defaults = DEFAULTS | RECIPES[model]
    if config.optimizer in ("adam", "adamw"):
        defaults["lr"] = ADAM_LR
    config = dataclasses.replace(config, **{k: v for k, v in defaults.items() if getattr(config, k) is None})
    return dataclasses.replace(config, out=Path(config.out or f"runs/{config.model}-{config.seed}"))


def resolve(config: Config) -> Config:
    """Fill in what was left out and check every value. Raises UserError naming the flag."""
    for name, kind in get_type_hints(Config).items():
        value, choices = getattr(config, name), [c for part in get_args(kind) for c in get_args(part)]
        if value is not None and not (value in choices if choices else isinstance(value, _accepted(kind))):
            wanted = f"one of {', '.join(choices)}" if choices else str(kind).removesuffix(" | None")
            raise UserError(f"{flag(name)} must be {wanted}, got {value!r}")
    numpys = {name: value.item() for name, value in vars(config).items() if isinstance(value, np.generic)}
    config = with_defaults(dataclasses.replace(config, **numpys))  # with Python's numbers, which TOML and JSON know
    lowest: dict[str, float] = {
        "epochs": 1, "max_steps": 0, "batch_size": 1, "shards": 1, "lr": 0, "momentum": 0, "weight_decay": 0,
        "warmup": 0, "label_smoothing": 0, "clip": 0, "crop": 0, "cutout": 0, "seed": 0, "threads": 0,
        "checkpoint_every": 0, "agree_every": 0, "hang_warning": 0, "hang_limit": 0,
    }  # fmt: skip
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is not None and not low <= value < math.inf:
            raise UserError(f"{flag(name)} must be a number of at least {low:g}, got {value}")
    for name in ("warmup", "label_smoothing", "momentum"):
        if not getattr(config, name) < 1:
            raise UserError(f"{flag(name)} must be below 1, got {getattr(config, name)}")
    if config.device != "cpu" and config.backend != "torch":
        raise UserError(f"--device {config.device} needs --backend torch")
    return config


def _accepted(kind: Any) -> tuple[type, ...]:
    """Return the types whose values a setting of this type takes: NumPy's numbers and paths as text, too."""
    also = {bool: (np.bool_,), int: (np.integer,), float: (int, np.integer, np.floating), Path: (str,)}
    kinds = get_args(kind) or (kind,)
    return (*kinds, *(more for known in kinds for more in also.get(known, ())))


def flag(name: str) -> str:
    """Return the command line's name of a field."""
    return "--" + name.replace("_", "-")


def parse(argv: Sequence[str]) -> Config:
    """Return the configuration that command line and TOML file give; what neither names is left out (None).

    Raises UserError for a bad TOML file; a bad command line ends in SystemExit(2) with an explanation.
    """
    args, base = _without_file(argv)
    switches = [flag(name) for name, kind in get_type_hints(Experiment).items() if kind == bool | None]
    for position, argument in enumerate(args):  # what may stand alone
        following = args[position + 1] if position + 1 < len(args) else "--"
        if argument == "--resume" and following.startswith("--"):
            args[position] = "--resume=auto"
        elif argument in switches and following.startswith("--"):
            args[position] = f"{argument}=True"
        elif argument.replace("--no-", "--") in switches and argument.startswith("--no-"):
            args[position] = f"{argument.replace('--no-', '--')}=False"
    default = Config(**base)
    if {"-h", "--help"} & set(args):  # then the defaults that a run would get are shown, those of its model
        words = " ".join(args).replace("=", " ")
        named: Any = next((model for model in RECIPES if f"--model {model}" in words), default.model)
        default = with_defaults(dataclasses.replace(default, model=named))
    return tyro.cli(Config, args=args, default=default, prog="cnnmpi.train", description=_description())


def _without_file(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the arguments but for --config, and the settings of the TOML file that it names."""
    args = list(argv)
    for position, argument in enumerate(args):
        if argument == "--config" or argument.startswith("--config="):
            inline = argument.partition("=")[2]
            path = inline or next(iter(args[position + 1 : position + 2]), "")
            if not path:
                raise UserError("--config needs the name of a TOML file")
            return args[:position] + args[position + (1 if inline else 2) :], read_toml(path)
    return args, {}


def _description() -> str:
    blocks = [inspect.cleandoc(Config.__doc__ or "")]
    blocks += [f"{model}: " + ", ".join(f"{k} {v}" for k, v in recipe.items()) for model, recipe in RECIPES.items()]
    blocks.append("--config FILE.toml sets any of these as key = value; the command line prevails.")
    return "\n\n".join(blocks)


def read_toml(path: str) -> dict[str, Any]:
    """Return the settings of a TOML file, checked against Config. Raises UserError naming file and key."""
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError as error:
        raise UserError(f"--config {path!r} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--config {path}: not a TOML file: {error}") from None
    return from_plain(content, f"--config {path}")


def from_plain(content: dict[str, Any], source: str) -> dict[str, Any]:
    """Check ``content``, as TOML or JSON gives it, against the types of Config. Raises UserError naming the key."""
    arguments = []
    fields = {item.name for item in dataclasses.fields(Config)}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in fields or isinstance(value, dict | list):
            known = ", ".join(sorted(fields))
            raise UserError(f"{source}: {key!r} is not a setting; the settings are {known}")
        arguments.append(f"{flag(name)}={value}")
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):  # tyro explains flags
            parsed = tyro.cli(Config, args=arguments, console_outputs=False)
    except SystemExit:
        values = ", ".join(f"{key} = {value!r}" for key, value in content.items())
        raise UserError(f"{source}: a value is of the wrong kind among {values}; see --help for the choices") from None
    return {key.replace("-", "_"): getattr(parsed, key.replace("-", "_")) for key in content}


def to_plain(settings: Experiment | Execution) -> dict[str, Any]:
    """Return the settings that have a value, as TOML and JSON can hold them."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(settings).items()}
    return {key: value for key, value in plain.items() if value is not None and key != "resume"}


def to_toml(config: Config) -> str:
    """Return the configuration as a TOML file that --config accepts."""
    return tomli_w.dumps(to_plain(config))


def experiment(config: Config) -> Experiment:
    """Return the part of ``config`` that shapes the result: what a checkpoint keeps."""
    return Experiment(**{item.name: getattr(config, item.name) for item in dataclasses.fields(Experiment)})


def continued(config: Config, saved: Mapping[str, Any], path: Path) -> Config:
    """Return the configuration of a resumed run: what is computed is the checkpoint's, how is that of ``config``.

    ``saved`` holds the settings in the checkpoint at ``path``. Raises UserError that lists every setting of ``config``
    which contradicts it, but for ``data``: that is compared by its content.
    """
    old = resolve(Config(**from_plain(dict(saved), f"{path}: its configuration")))
    asked, done = vars(experiment(config)), vars(experiment(old))
    wrong = [
        f"{flag(name)} {value} (the run has {done[name]})"
        for name, value in asked.items()
        if value not in (None, done[name]) and name != "data"
    ]
    if wrong:
        raise UserError(
            f"--resume continues the run of {path}, which these contradict: {'; '.join(wrong)}. Leave them out, or "
            "start a new run with another --out"
        )
    return dataclasses.replace(config, **done | {"data": config.data or old.data})

"""What a run is: every setting, where it comes from (defaults, a TOML file, the command line) and what it shapes."""

import dataclasses
import inspect
import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w
import tyro

from cnnmpi.distributed import UserError


@dataclass(frozen=True)
class Config:
    """Train a convolutional network on one or more MPI ranks; the result does not depend on their number.

    A setting that is left out (None) takes the recipe of the model.
    """

    model: Literal["simplecnn", "smallresnet"] = "simplecnn"
    """Which network to train."""
    epochs: int | None = None
    """Passes over the training images, counted from the beginning of the run; they shape the learning rate."""
    max_steps: int | None = None
    """Stop after this many steps, counted from the beginning of the run, if that is earlier."""
    batch_size: int | None = None
    """Images in a global batch, over all ranks."""
    shards: int = 8
    """Pieces of a global batch, shared out to the ranks; at least as many as ranks. They shape the result."""
    optimizer: Literal["sgd", "adam", "adamw"] | None = None
    """Update rule; sgd is Nesterov momentum."""
    lr: float | None = None
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "step", "constant"] | None = None
    """Course of the learning rate: cosine or linear down to 0, a tenth after each third of the run, or level."""
    warmup: float | None = None
    """Part of all steps, 0..1, in which the learning rate rises to its peak (cosine and linear)."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float | None = None
    """L2 regularisation of weights; biases and BatchNorm are left alone."""
    label_smoothing: float | None = None
    """Probability, 0..1, that the loss's targets spread over all classes."""
    clip: float = 0.0
    """Largest global norm of the gradient; 0 does not clip."""
    flip: bool = True
    """Mirror half of the training images, in turn."""
    crop: int | None = None
    """Shift training images at random by up to this many pixels."""
    cutout: int | None = None
    """Blank a square of this many pixels a side, at random, in each training image."""
    seed: int = 0
    """Of every draw: weights, order, augmentation, dropout."""
    backend: Literal["numpy", "torch"] = "numpy"
    """Engine under the layers."""
    device: str = "cpu"
    """Where torch computes: cpu, cuda, cuda:N."""
    threads: int = 0
    """Threads of each rank, which do not shape the result; 0 shares the cores out to the ranks."""
    reduction: Literal["exact", "float32"] = "exact"
    """Sum of the gradients: the same bits for any number of ranks, or half the bytes."""
    data: str = "auto"
    """auto, cifar10, synthetic, an HDF5 file, or a CIFAR archive."""
    out: Path | None = None
    """Folder of the run; runs/<model>-<seed> by default."""
    resume: str | None = None
    """Continue a run: auto takes the newest checkpoint in the folder of the run; or name a file."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 writes one at the end of each epoch only."""
    agree_every: int = 50
    """Steps between checks that all ranks hold the same weights; 0 checks at checkpoints only."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What to do with a step whose gradient is not finite; weights stay finite either way."""
    hang_warning: float = 60.0
    """Seconds after which a rank that keeps the others waiting is named; 0 names none."""
    hang_limit: float = 600.0
    """Seconds after which a job that hangs shows where its ranks are and ends; 0 waits for ever."""


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

# what may differ when a run is resumed: it does not shape the result (data is compared by its content)
FREE = {
    "max_steps", "threads", "data", "out", "resume", "checkpoint_every", "agree_every", "hang_warning", "hang_limit",
}  # fmt: skip


def resolve(config: Config) -> Config:
    """Fill in the model's recipe and check every value. Raises UserError naming the flag."""
    recipe = dict(RECIPES[config.model])
    if config.optimizer in ("adam", "adamw"):
        recipe["lr"] = ADAM_LR
    filled = {key: value for key, value in recipe.items() if getattr(config, key) is None}
    config = dataclasses.replace(config, **filled, out=Path(config.out or f"runs/{config.model}-{config.seed}"))
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


def flag(name: str) -> str:
    """Return the command line's name of a field."""
    return "--" + name.replace("_", "-")


def parse(argv: Sequence[str]) -> tuple[Config, set[str]]:
    """Return the configuration that command line and TOML file give, and the fields that they name.

    Raises UserError for a bad TOML file; a bad command line ends in SystemExit(2) with an explanation.
    """
    args = list(argv)
    base: dict[str, Any] = {}
    for position, argument in enumerate(args):
        if argument == "--config" or argument.startswith("--config="):
            inline = argument.partition("=")[2]
            path = inline or next(iter(args[position + 1 : position + 2]), "")
            if not path:
                raise UserError("--config needs the name of a TOML file")
            del args[position : position + (1 if inline else 2)]
            base = read_toml(path)
            break
    for position, argument in enumerate(args):
        following = args[position + 1] if position + 1 < len(args) else "--"
        if argument == "--resume" and following.startswith("--"):
            args.insert(position + 1, "auto")
            break
    config = tyro.cli(
        Config,
        args=args,
        default=dataclasses.replace(Config(), **base),
        prog="cnnmpi.train",
        description=_description(),
    )
    fields = {item.name for item in dataclasses.fields(Config)}
    named = {argument.split("=")[0].lstrip("-").replace("-", "_") for argument in args if argument.startswith("--")}
    named = {name.removeprefix("no_") for name in named}
    return config, (named | set(base)) & fields


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
        if isinstance(value, bool):
            arguments.append(flag(name) if value else "--no-" + name)
        else:
            arguments.append(f"{flag(name)}={value}")
    try:
        parsed = tyro.cli(Config, args=arguments, console_outputs=False)
    except SystemExit:
        values = ", ".join(f"{key} = {value!r}" for key, value in content.items())
        raise UserError(f"{source}: a value is of the wrong kind among {values}; see --help for the choices") from None
    return {key.replace("-", "_"): getattr(parsed, key.replace("-", "_")) for key in content}


def to_plain(config: Config) -> dict[str, Any]:
    """Return the settings that have a value, as TOML and JSON can hold them."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()}
    return {key: value for key, value in plain.items() if value is not None and key != "resume"}


def to_toml(config: Config) -> str:
    """Return the configuration as a TOML file that --config accepts."""
    return tomli_w.dumps(to_plain(config))


def continued(config: Config, named: set[str], saved: str, path: Path) -> Config:
    """Return the configuration of a resumed run: the checkpoint's, but for what may differ.

    ``saved`` is the checkpoint's JSON. Raises UserError that lists every flag in ``named`` which contradicts it.
    """
    old = Config(**from_plain(json.loads(saved), f"{path}: its configuration"))
    shaping = [item.name for item in dataclasses.fields(Config) if item.name not in FREE]
    wrong = [
        f"{flag(name)} {getattr(config, name)} (the run has {getattr(old, name)})"
        for name in shaping
        if name in named and getattr(config, name) != getattr(old, name)
    ]
    if wrong:
        raise UserError(
            f"--resume continues the run of {path}, which these contradict: {'; '.join(wrong)}. Leave them out, or "
            "start a new run with another --out"
        )
    free = {name: getattr(config, name) for name in FREE if name in named or name in ("out", "resume")}
    free["data"] = config.data if "data" in named else old.data
    return dataclasses.replace(old, **{"max_steps": None, "threads": 0} | free)

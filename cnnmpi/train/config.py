"""Where settings come from (defaults, a recipe, a TOML file, the command line, a checkpoint), and their checks."""

import contextlib
import dataclasses
import inspect
import io
import itertools
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import tomli_w
import tyro

from cnnmpi.data.transforms import entries, text_of
from cnnmpi.distributed import UserError
from cnnmpi.models import MODELS
from cnnmpi.train.code import OURS, Code
from cnnmpi.train.earlier import BEFORE, NOW, check_flags, with_augment
from cnnmpi.train.settings import DEFAULTS as DEFAULTS
from cnnmpi.train.settings import Backend as Backend
from cnnmpi.train.settings import Config as Config
from cnnmpi.train.settings import Execution, Experiment
from cnnmpi.train.settings import Precision as Precision

PROGRAM = "cnnmpi.train"
ADAM_LR = 1e-3  # the peak where Adam is chosen without a rate: the recipes' rates are SGD's
CODE = tuple(OURS)  # the settings that may name a person's code


def recipe_of(config: Config, code: Code) -> dict[str, Any]:
    """Return the settings that suit the network of ``config``, without its metrics. Raises UserError for others."""
    name = config.model or DEFAULTS["model"]
    recipe = getattr(code.find("model", name), "recipe", {})
    if not isinstance(recipe, Mapping) or not isinstance(recipe.get("metrics", {}), Mapping):
        raise UserError(f"--model {name}: its recipe, and the metrics in it, must be dictionaries")
    recipe = {key: value for key, value in recipe.items() if key != "metrics"}
    fields = {item.name for item in dataclasses.fields(Experiment)} - {"model"}
    if unknown := sorted(recipe.keys() - fields):
        known = ", ".join(sorted({*fields, "metrics"}))
        hint = NOW if set(BEFORE) & set(unknown) else f"the settings are {known}"
        raise UserError(f"--model {name}: its recipe has {', '.join(unknown)}; {hint}")
    return recipe | {key: named(code, key, recipe[key]) for key in CODE if recipe.get(key) is not None}


def named(code: Code, setting: str, value: Any) -> str:
    """Return the text of a setting that may be a person's code: a name, a thing, or a list of both."""
    if isinstance(value, list | tuple):
        return ",".join(code.name(setting, each) for each in value) or "none"
    return code.name(setting, value)


def canonical(augment: str) -> str:
    """Return the text of the setting augment, always the same for the same. Raises UserError naming the entry."""
    try:
        return text_of(entries(augment))
    except ValueError as error:
        raise UserError(f"--augment {error}") from None


def with_defaults(config: Config, code: Code) -> Config:
    """Return ``config`` with every setting that was left out: the network's recipe, and what all networks share."""
    recipe = recipe_of(config, code)
    defaults = DEFAULTS | recipe
    optimizer = config.optimizer or defaults["optimizer"]
    if optimizer in ("adam", "adamw") and not ("lr" in recipe and recipe.get("optimizer") == optimizer):
        defaults["lr"] = ADAM_LR
    if config.loss not in (None, "cross_entropy"):  # the recipe's smoothing is for the recipe's loss
        defaults["label_smoothing"] = 0.0
    config = dataclasses.replace(config, **{k: v for k, v in defaults.items() if getattr(config, k) is None})
    name = (config.model or "").rpartition(":")[2]
    return dataclasses.replace(config, out=Path(config.out or f"runs/{name}-{config.seed}"))


def resolve(config: Config, code: Code) -> Config:
    """Fill in what was left out and check every value. Raises UserError naming the flag."""
    check_kinds(config)
    config = with_defaults(config, code)
    if config.loss not in (None, "cross_entropy") and config.label_smoothing:
        raise UserError(f"--label-smoothing belongs to the loss cross_entropy: leave it out with --loss {config.loss}")
    if config.model_options is not None:
        config = dataclasses.replace(config, model_options=_plain_options(config.model_options))
    check_kinds(config)  # also of what came from a recipe
    config = dataclasses.replace(config, augment=canonical(config.augment or ""))
    numpys = {name: value.item() for name, value in vars(config).items() if isinstance(value, np.generic)}
    config = dataclasses.replace(config, **numpys)  # with Python's numbers, which TOML and JSON know
    check_ranges(config)
    return config


def _plain_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of a network as JSON, and so a checkpoint, gives them back. Raises UserError for others."""
    if taken := sorted({"in_channels", "num_classes", "image_size", "seed"} & options.keys()):
        raise UserError(
            f"--model-options cannot set {', '.join(taken)}: the data give the first three, --seed the last"
        )
    try:
        plain: dict[str, Any] = json.loads(json.dumps(options, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"--model-options must be what JSON can hold, got {options!r:.100}: {error}") from None
    return plain


def check_kinds(config: Config) -> None:
    """Raise UserError, naming the flag, for a value of the wrong type, or none of the choices."""
    for name, kind in get_type_hints(Config).items():
        value, parts = getattr(config, name), (kind,) if get_origin(kind) is Literal else get_args(kind) or (kind,)
        choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        if value is not None and not (value in choices if choices else isinstance(value, _accepted(kind))):
            wanted = f"one of {', '.join(choices)}" if choices else str(kind).removesuffix(" | None")
            raise UserError(f"{flag(name)} must be {wanted}, got {value!r}")


def check_ranges(config: Config) -> None:
    """Raise UserError, naming the flag, for a number out of its range, and for settings that contradict each other."""
    lowest: dict[str, float] = {
        "epochs": 1, "max_steps": 0, "batch_size": 1, "shards": 1, "lr": 0, "momentum": 0, "weight_decay": 0,
        "warmup": 0, "label_smoothing": 0, "clip": 0, "validation": 0, "seed": 0, "threads": 0, "checkpoint_every": 0,
        "keep_every": 0, "keep_last": 0, "log_every": 0, "ledger_every": 0, "agree_every": 0,
        "hang_warning": 0, "hang_limit": 0,
    }  # fmt: skip
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is not None and not low <= value < math.inf:
            raise UserError(f"{flag(name)} must be a number of at least {low:g}, got {value}")
    for name in ("warmup", "label_smoothing", "momentum", "validation"):
        if not (getattr(config, name) or 0) < 1:
            raise UserError(f"{flag(name)} must be below 1, got {getattr(config, name)}")
    fingerprinted(config)
    if config.device not in (None, "cpu") and config.backend != "torch":
        raise UserError(f"--device {config.device} needs --backend torch")
    if config.precision not in (None, "float32") and config.backend != "torch":
        raise UserError(f"--precision {config.precision} needs --backend torch: NumPy computes in float32")


def fingerprinted(config: Config) -> tuple[int, int] | None:
    """Return the first and the last step, counted from 1, of which there is a fingerprint. Raises UserError."""
    if config.fingerprint is None:
        return None
    numbers = re.fullmatch(r"(\d{1,15}):(\d{1,15})", config.fingerprint)
    first, last = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"--fingerprint must be FROM:TO, steps from 1 on, as 31:40, got {config.fingerprint}")
    return first, last


def _accepted(kind: Any) -> tuple[type, ...]:
    """Return the types whose values a setting of this type takes: NumPy's numbers and paths as text, too."""
    also = {bool: (np.bool_,), int: (np.integer,), float: (int, np.integer, np.floating), Path: (str,)}
    kinds = [get_origin(part) or part for part in get_args(kind) or (kind,)]
    return (*kinds, *(more for known in kinds for more in also.get(known, ())))


def flag(name: str) -> str:
    """Return the command line's name of a field."""
    return "--" + name.replace("_", "-")


def parse(argv: Sequence[str], given: Config | None = None, code: Code | None = None, prog: str = PROGRAM) -> Config:
    """Return the configuration that command line and TOML file give; what neither names is as ``given``, or None.

    Raises UserError for a bad TOML file; a bad command line ends in SystemExit(2) with an explanation.
    """
    args, from_file = _without_file(argv)
    check_flags(args)
    switches = [flag(name) for name, kind in get_type_hints(Config).items() if kind in (bool, bool | None)]
    for position, argument in enumerate(args):  # what may stand alone
        following = args[position + 1] if position + 1 < len(args) else "--"
        if argument == "--resume" and following.startswith("--"):
            args[position] = "--resume=auto"
        elif argument in switches and following.startswith("--"):
            args[position] = f"{argument}=True"
        elif argument.replace("--no-", "--") in switches and argument.startswith("--no-"):
            args[position] = f"{argument.replace('--no-', '--')}=False"
    default = dataclasses.replace(given or Config(), **from_file)
    if {"-h", "--help"} & set(args):  # then the defaults that a run would get are shown, those of its network
        words = [part for argument in args for part in argument.split("=", 1)]
        named = dict(itertools.pairwise(words)).get("--model", default.model)
        default = with_defaults(dataclasses.replace(default, model=named), code or Code())
    return tyro.cli(Config, args=args, default=default, prog=prog, description=_description())


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
    for name, network in MODELS.items():
        blocks.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in network.recipe.items()))
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
    content, arguments = with_augment(content, source), []
    fields = {item.name for item in dataclasses.fields(Config)}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name == "model_options" and isinstance(value, dict):
            value = json.dumps(value)
        if name == "augment" and isinstance(value, list):
            value = ",".join(map(str, value)) or "none"
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
    try:
        entries(parsed.augment)
    except ValueError as error:
        raise UserError(f"{source}: augment: {error}") from None
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


def continued(config: Config, saved: Mapping[str, Any], path: Path, code: Code) -> Config:
    """Return the configuration of a resumed run: what is computed is the checkpoint's, how is that of ``config``.

    ``saved`` holds the settings in the checkpoint at ``path``. The code of a person's own is what ``config``, or the
    recipe of its network, names: never what a file names. Raises UserError that lists every setting of ``config`` which
    contradicts the checkpoint, but for ``data``: that is compared by its content.
    """
    kept = Config(**from_plain(dict(saved), f"{path}: its configuration"))
    old = dataclasses.replace(kept, **{k: v for k, v in DEFAULTS.items() if getattr(kept, k) is None})
    check_ranges(old)
    asked, done = vars(experiment(config)), vars(experiment(old))
    own = {name: done[name] for name in CODE if ":" in (done[name] or "")}
    contradicts = {
        name: value
        for name, value in asked.items()
        if not (value is None or name == "data" or _agree(name, value, done[name]))
    }
    if contradicts:
        wrong = "; ".join(f"{flag(name)} {value} (the run has {done[name]})" for name, value in contradicts.items())
        raise UserError(
            f"--resume continues the run of {path}, which these contradict: {wrong}. Leave them out, or "
            "start a new run with another --out"
        )
    if "model" in own and config.model is None:
        raise UserError(f"the run of {path} trains a network of your own: name it, as --model {own['model']}")
    recipe = recipe_of(dataclasses.replace(config, model=config.model or done["model"]), code)
    for name in own:
        done[name] = asked[name] or recipe.get(name)
        if done[name] is None or not _agree(name, done[name], own[name]):
            raise UserError(f"the run of {path} uses code of your own: name it, as {flag(name)} {own[name]}")
    return dataclasses.replace(config, **done | {"data": config.data or old.data})


def _agree(name: str, asked: Any, done: Any) -> bool:
    """Return whether a setting says what it said before, but for where a person's code comes from."""
    if name == "augment":
        asked, done = (
            [entry.text if entry.known else "own" for entry in entries(canonical(text))] for text in (asked, done)
        )
    return bool(asked == done or (name in CODE and ":" in asked and ":" in (done or "")))

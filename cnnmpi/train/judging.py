"""Evaluating a checkpoint on the data that a person names, or those that it was trained on: for commands."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnmpi.common.text import read_json
from cnnmpi.data import Dataset, Views
from cnnmpi.distributed import Ranks, UserError
from cnnmpi.models import Model
from cnnmpi.sizes import pair
from cnnmpi.train.code import Code
from cnnmpi.train.config import Config, check_ranges, from_plain
from cnnmpi.train.evaluation import Evaluation, evaluate
from cnnmpi.train.inputs import Part, Tell, open_data, parts_of
from cnnmpi.train.measures import find_losses, make_measures, with_loss
from cnnmpi.train.setup import load_trained, to_engine

CIFAR10 = Path("data/cifar10.h5")  # what auto and cifar10 mean, where it is there: nothing is downloaded to look back


@dataclass(frozen=True, eq=False)
class Judgement:
    """An evaluation: the model, the data (``sha256`` is their digest), the part of them, and the result."""

    model: Model
    dataset: Dataset
    sha256: str
    part: Part
    evaluation: Evaluation


def judge(
    checkpoint: Path,
    tell: Tell,
    *,
    data: str = "auto",
    split: str = "test",
    threads: int = 0,
    model: str | None = None,
    loss: str | None = None,
    engine: Config = Config(),  # noqa: B008 - frozen
    tta: Views = "none",
) -> Judgement:
    """Evaluate a checkpoint on the ``split`` ("test", "val" or "train") of what ``data`` means; see evaluate.py.

    ``engine`` says backend, device and precision. Raises UserError or CheckpointError for what cannot be evaluated.
    """
    trained, ranks = load_trained(checkpoint, model), Ranks()
    to_engine(trained, engine)
    trained.F.set_threads(threads or ranks.default_threads())
    found = open_data(data, ranks, tell)
    dataset, info = found.dataset, trained.info
    known = in_words(info.options["in_channels"], pair(info.options["image_size"]), info.classes)
    _, channels, *size = dataset.test_images.shape
    given = in_words(channels, size, dataset.classes)
    if known != given:
        raise UserError(f"{checkpoint} was trained on {known}; --data {data} has {given}")
    for number, (theirs, ours) in enumerate(zip(info.classes, dataset.classes, strict=True)):
        if theirs != ours:
            raise UserError(f"class {number} of {checkpoint} is {theirs}, that of --data {data} is {ours}")
    of_run = config_of(checkpoint, info.attributes)
    parts = parts_of(dataset, of_run.validation or 0.0, of_run.seed or 0)
    if split not in parts:
        raise UserError(f"--split val: the run of {checkpoint} held no images out (--validation)")
    if split != "test" and "val" in parts and found.sha256 != info.attributes.get("data_sha256"):
        raise UserError(f"--split {split}: {checkpoint} held images out of other data than --data {data}: name its own")
    part, its_loss = parts[split], of_run.loss or ""
    config = with_loss(Config(loss=loss or (None if ":" in its_loss else its_loss or None)), dataset)
    _, measured = find_losses(config, Code(), trained.F)
    metrics = make_measures(config, dataset, type(trained).recipe.get("metrics")).metrics
    try:
        scaling = {"mean": info.mean, "std": info.std}
        result = evaluate(
            trained,
            part.images,
            part.labels,
            classes=len(dataset.classes),
            loss=measured,
            metrics=metrics,
            tta=tta,
            **scaling,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    return Judgement(trained, dataset, found.sha256, part, result)


def data_of(setting: Any, flag: str = "--data") -> str:
    """Return the data of a run, if they are still where its settings say. Raises UserError; ``flag`` names others."""
    if setting == "synthetic":
        return "synthetic"
    path = CIFAR10 if setting in ("auto", "cifar10") else Path(str(setting))
    if not path.exists():
        raise UserError(f"its data ({setting}) are not here: name them by {flag}")
    return str(path)


def config_of(checkpoint: Path, attributes: dict[str, Any]) -> Config:
    """Return the settings that a checkpoint says it was trained with. Raises UserError for what cannot be one."""
    try:
        config = Config(**from_plain(read_json(attributes.get("config", "{}")), f"{checkpoint}: its configuration"))
        check_ranges(config)
    except ValueError as error:
        raise UserError(f"{checkpoint}: its configuration cannot be used: {error}") from None
    return config


def in_words(channels: int, size: Sequence[int], classes: Sequence[str]) -> str:
    """Return what images and classes a model or a data set has, in a few words however many there are."""
    first = ", ".join(classes[:10]) + (f", ... ({len(classes)} in all)" if len(classes) > 10 else "")
    return f"{size[0]}x{size[1]} pixels of {channels} channels and the classes {first}"

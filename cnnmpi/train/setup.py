"""What a run needs before its first step: the data, the model, the optimizer, the course of the learning rate."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cnnmpi
from cnnmpi import optim
from cnnmpi.checkpoint import CheckpointError
from cnnmpi.data import DataError, Dataset, find_data, read_hdf5, statistics, synthetic
from cnnmpi.distributed import Ranks, UserError
from cnnmpi.models import MODELS, Model
from cnnmpi.train.config import Config
from cnnmpi.train.state import version_of

Say = Callable[[str], None]


@contextlib.contextmanager
def as_user_errors() -> Iterator[None]:
    """Turn what data and checkpoints refuse into the one line that a user sees."""
    try:
        yield
    except (DataError, CheckpointError) as error:
        raise UserError(str(error)) from None


@dataclass(frozen=True)
class Data:
    """A data set, its identity, and the mean and standard deviation of its training pixels for each channel."""

    dataset: Dataset
    sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def open_data(spec: str, ranks: Ranks, say: Say, data_dir: str = "data") -> Data:
    """Return the data that ``--data`` means, found by rank 0, one copy for all ranks of a host.

    Raises UserError where there is none, or where hosts see different data.
    """

    def find() -> Path | None:
        with as_user_errors():
            return find_data(spec, data_dir, notify=say)

    path = ranks.on_rank0(find)
    with as_user_errors():
        part = (ranks.local_rank, ranks.local_size)
        dataset = read_hdf5(path, part=part, empty=ranks.shared_array) if path else synthetic()
    ranks.node_barrier()
    sha256 = ranks.on_node(dataset.digest)
    ranks.agree("the content of the data", sha256)
    return Data(dataset, sha256, *ranks.on_node(lambda: statistics(dataset.train_images)))


def program() -> str:
    """Return what identifies the program that this rank runs: its sources and the versions of what computes."""
    sources = hashlib.sha256()
    for path in sorted(Path(cnnmpi.__file__).parent.rglob("*.py")):
        sources.update(path.read_bytes())
    versions = [f"{name} {version_of(name)}" for name in ("cnnmpi", "numpy", "torch")]
    return f"{', '.join(versions)}, sources {sources.hexdigest()}"


def model_options(dataset: Dataset) -> dict[str, Any]:
    """Return the arguments that fit a model to the data."""
    _, channels, height, width = dataset.train_images.shape
    size = height if height == width else (height, width)
    return {"in_channels": channels, "num_classes": len(dataset.classes), "image_size": size}


def make_model(config: Config, options: dict[str, Any], local_rank: int) -> Model:
    """Return the model with its first weights, on the engine that ``config`` asks for. Raises UserError."""
    try:
        model = MODELS[config.model or ""](**options, seed=config.seed or 0)
        if config.backend == "torch":
            model.to_torch(config.device or "cpu", index=local_rank)
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from None
    model.skip_input_grad()
    return model


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

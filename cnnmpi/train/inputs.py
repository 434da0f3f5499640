"""What a run learns from: the data set, the part of it that is held out, and the batches of the rest."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnmpi.common.arrays import Array
from cnnmpi.data import (
    DataError,
    DataLoader,
    Dataset,
    NotInPlace,
    Selected,
    declared_size,
    find_data,
    held_out,
    read_hdf5,
    read_in_place,
    recorded_digest,
    statistics,
    synthetic,
)
from cnnmpi.data.transforms import check_sizes, entries
from cnnmpi.distributed import Ranks, UserError
from cnnmpi.machine import available_memory, free_mib, shared_folders
from cnnmpi.rng import generator
from cnnmpi.train.code import Code
from cnnmpi.train.config import Config
from cnnmpi.train.errors import as_user_errors

Tell = Callable[[str], None]  # prints a line

SHARE = 4  # images that take more than this part of a host's free memory stay in their file


@dataclass(frozen=True)
class Data:
    """A data set, its identity, and the mean and standard deviation of its training pixels for each channel."""

    dataset: Dataset
    sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """Images (N, C, H, W) and their labels (N,), or targets (N, K); the name is "train", "val" or "test"."""

    name: str
    images: Any
    labels: Array


def open_data(data: str | Dataset, ranks: Ranks, tell: Tell, data_dir: str = "data", data_in: str = "auto") -> Data:
    """Return ``data``, or what ``--data`` means, found by rank 0: one copy for each host, or left in its file.

    Raises UserError where there is none, where it is not what was written, or where ranks see different data.
    """
    with as_user_errors():
        path = None
        if data_in == "file" and (isinstance(data, Dataset) or data == "synthetic"):
            raise UserError("--data-in file needs a data file, and these images are in memory")
        if isinstance(data, Dataset):
            data.check("data")
            dataset = data
        else:
            path = ranks.on_rank0(as_user_errors()(lambda: find_data(data, data_dir, notify=tell)))
            dataset = synthetic() if path is None else _open_file(path, ranks, data_in)
        if dataset.recorded is not None:
            known = dataset.recorded
            sha256, mean, std = known.data_sha256, known.mean, known.std
        else:
            sha256 = dataset.digest() if isinstance(data, Dataset) else ranks.on_node(dataset.digest)
            if path is not None and (said := recorded_digest(path)) not in ("", sha256):
                raise DataError(f"{path}: its content gives {sha256}, not what was written ({said}): it was changed")
            mean, std = ranks.on_node(lambda: statistics(dataset.train_images))
    ranks.agree("the content of the data", sha256)
    return Data(dataset, sha256, mean, std)


def look_at_data(spec: str) -> tuple[Path | None, Dataset]:
    """Return what ``--data spec`` means, and its file if there is one, for who only looks: nothing is downloaded.

    Raises DataError.
    """
    path = find_data("data/cifar10.h5" if spec in ("auto", "cifar10") else spec)
    if path is None:
        return path, synthetic()
    try:
        return path, read_in_place(path)
    except NotInPlace:
        return path, read_hdf5(path)


def _open_file(path: Path, ranks: Ranks, data_in: str) -> Dataset:
    """Return the data set of a file: in memory, one copy for all ranks of this host, or with its images left there."""
    if data_in != "memory":
        try:
            dataset = read_in_place(path)
        except NotInPlace as error:
            if data_in == "file":
                raise
            if not ranks.gather_node(_fits(path, ranks.local_size))[0]:
                raise DataError(f"{error}; and they are too many for the memory of this host") from None
        else:
            if data_in == "file" or not ranks.gather_node(_fits(path, ranks.local_size))[0]:
                return dataset
    dataset = read_hdf5(path, part=(ranks.local_rank, ranks.local_size), empty=ranks.shared_array)
    ranks.node_barrier()
    return dataset


def _fits(path: Path, ranks: int) -> bool:
    """Return whether the images of a data file may be copied into memory, which so many ranks share."""
    size = declared_size(path)
    room = available_memory() // SHARE
    if ranks > 1:
        room = min(room, max((free_mib(folder) << 20 for folder in shared_folders()), default=0))
    return bool(size <= room)


def parts_of(dataset: Dataset, validation: float, seed: int) -> dict[str, Part]:
    """Return the parts "train" and "test" of a data set and, where some of "train" is held out of it, "val".

    Which images are held out is a function of the seed alone; of each class it is the same share.
    """
    train = Part("train", dataset.train_images, dataset.train_labels)
    test = Part("test", dataset.test_images, dataset.test_labels)
    if not validation:
        return {"train": train, "test": test}
    stay, out = held_out(train.labels, validation, generator(seed, "validation"))
    if not (len(stay) and len(out)):
        raise UserError(
            f"--validation {validation} of {len(train.labels)} images leaves none to train on, or to validate"
        )
    rest, val = (
        Part(name, Selected(train.images, rows), train.labels[rows]) for name, rows in (("train", stay), ("val", out))
    )
    return {"train": rest, "val": val, "test": test}


def input_options(dataset: Dataset) -> dict[str, Any]:
    """Return the arguments that fit a model to the data."""
    _, channels, height, width = dataset.train_images.shape
    size = height if height == width else (height, width)
    return {"in_channels": channels, "num_classes": len(dataset.classes), "image_size": size}


def make_loader(config: Config, data: Data, train: Part, code: Code) -> DataLoader:
    """Return the training batches that ``config`` asks for. Raises UserError."""
    try:
        listed = entries(config.augment, lambda name: code.find("augment", name))
        check_sizes(listed, *train.images.shape[2:])
    except ValueError as error:
        raise UserError(f"--augment {error}") from None
    return DataLoader(
        train.images,
        train.labels,
        config.batch_size or 1,
        seed=config.seed or 0,
        shards=config.shards or 1,
        augment=listed,
        sample=config.sample or "all",
        classes=len(data.dataset.classes),
        mean=data.mean,
        std=data.std,
    )


def smallest_shard(images: int, config: Config) -> int:
    """Return how many images the smallest shard of a run has: of a whole batch, or of an epoch's last one."""
    batch_size, shards = config.batch_size or 1, config.shards or 1
    batches = {min(images, batch_size), images % batch_size} - {0}
    return max(1, min(batch // shards for batch in batches))

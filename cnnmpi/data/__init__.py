"""Data: CIFAR archives -> HDF5 -> batches, with augmentation; and synthetic images where there are none."""

from cnnmpi.data.augment import (
    color_jitter,
    cutmix,
    cutout,
    mixup,
    normalize,
    random_crop,
    random_erasing,
    random_horizontal_flip,
    random_resized_crop,
)
from cnnmpi.data.dataset import DataError, Dataset, statistics
from cnnmpi.data.find import find_data, load_cifar10
from cnnmpi.data.hdf5 import NotInPlace, declared_size, read_hdf5, read_in_place, recorded_digest
from cnnmpi.data.loader import DataLoader
from cnnmpi.data.rows import Selected, held_out
from cnnmpi.data.sources.archive import read_archive
from cnnmpi.data.synthetic import synthetic
from cnnmpi.data.transforms import Draw
from cnnmpi.data.views import Views, views
from cnnmpi.data.writer import write_hdf5

__all__ = [
    "DataError",
    "DataLoader",
    "Dataset",
    "Draw",
    "NotInPlace",
    "Selected",
    "Views",
    "color_jitter",
    "cutmix",
    "cutout",
    "declared_size",
    "find_data",
    "held_out",
    "load_cifar10",
    "mixup",
    "normalize",
    "random_crop",
    "random_erasing",
    "random_horizontal_flip",
    "random_resized_crop",
    "read_archive",
    "read_hdf5",
    "read_in_place",
    "recorded_digest",
    "statistics",
    "synthetic",
    "views",
    "write_hdf5",
]

"""Data: CIFAR archives -> HDF5 -> batches, with augmentation; and synthetic images where there are none."""

from cnnmpi.data.augment import cutout, normalize, random_crop, random_horizontal_flip
from cnnmpi.data.dataset import DataError, Dataset, statistics
from cnnmpi.data.find import find_data, load_cifar10
from cnnmpi.data.hdf5 import read_hdf5
from cnnmpi.data.loader import DataLoader
from cnnmpi.data.sources.archive import read_archive
from cnnmpi.data.synthetic import synthetic
from cnnmpi.data.writer import write_hdf5

__all__ = [
    "DataError",
    "DataLoader",
    "Dataset",
    "cutout",
    "find_data",
    "load_cifar10",
    "normalize",
    "random_crop",
    "random_horizontal_flip",
    "read_archive",
    "read_hdf5",
    "statistics",
    "synthetic",
    "write_hdf5",
]

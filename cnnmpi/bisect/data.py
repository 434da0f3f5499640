"""How the data of two runs differ."""

from typing import Any

import numpy as np

from cnnmpi.common.arrays import Array
from cnnmpi.train.inputs import Data

CHUNK = 1000  # images that are compared at once


def other_data(a: Data, b: Data) -> str:
    """Return in words how the data of two runs differ."""
    for part in ("train", "test"):
        pairs = [(getattr(data.dataset, f"{part}_images"), getattr(data.dataset, f"{part}_labels")) for data in (a, b)]
        (images, labels), (others, other_labels) = pairs
        if images.shape != others.shape or labels.shape != other_labels.shape:
            return f"the {part} images of A are {images.shape}, those of B {others.shape}"
        where = [_differing(images, others), np.flatnonzero((labels != other_labels).reshape(len(labels), -1).any(1))]
        for what, rows in zip(("images", "labels"), where, strict=True):
            if len(rows):
                text = f"{part} {what}: {len(rows)} of {len(labels)} differ, the first is number {rows[0]}"
                text += _pixels(images[rows[0]], others[rows[0]]) if what == "images" else ""
                return text + ("; so do mean and std, and all that is made of them" if _scales(a) != _scales(b) else "")
    return "images and labels are the same, and how they are described is not: classes, mean or std"


def _scales(data: Data) -> list[float]:
    """Return mean and standard deviation as images are normalised by them, in float32."""
    return [float(np.float32(value)) for value in (*data.mean, *data.std)]


def _differing(images: Any, others: Any) -> Array:
    """Return the rows (n,) in which two sets of images (N, C, H, W) differ."""
    found = []
    for start in range(0, len(images), CHUNK):
        part, other = (np.asarray(each[start : start + CHUNK]) for each in (images, others))
        found.append(start + np.flatnonzero((part != other).reshape(len(part), -1).any(1)))
    return np.concatenate(found)


def _pixels(image: Array, other: Array) -> str:
    places = np.argwhere(np.asarray(image) != np.asarray(other))
    at = tuple(int(index) for index in places[0])
    count = "1 number" if len(places) == 1 else f"{len(places)} numbers"
    return f", in {count}: at channel {at[0]}, row {at[1]}, column {at[2]}, {image[at]} in A and {other[at]} in B"

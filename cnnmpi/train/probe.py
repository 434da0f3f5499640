"""A network and a loss are tried before the first step, on a few images, and what is wrong is told in one line."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from cnnmpi.common.arrays import Array
from cnnmpi.data import DataLoader
from cnnmpi.distributed import UserError
from cnnmpi.layers import Layer
from cnnmpi.models import Model
from cnnmpi.sizes import pair
from cnnmpi.train.code import explained
from cnnmpi.train.measures import Loss


def probe(model: Model, again: Callable[[], Model], name: str, options: Mapping[str, Any], smallest: int) -> None:
    """Raise UserError, in one line, for a network that could not learn, or not in the same way on all ranks.

    ``again`` builds ``model`` once more; ``options`` are its in_channels, num_classes and image_size, and ``smallest``
    is the number of images in the smallest shard.
    """
    for count in sorted({smallest, 2}):
        shape = (count, options["in_channels"], *pair(options["image_size"]))
        images = np.linspace(-1, 1, math.prod(shape), dtype=np.float32).reshape(shape)
        with explained(f"--model {name} fails on images {shape}"):
            if not model.parameters():
                raise UserError(f"--model {name} has no parameters that learn: assign its layers to attributes of self")
            _check_attributes(model, name)
            logits = _pass(copy.deepcopy(model), name, images, options["num_classes"])
    with explained(f"--model {name} cannot be built a second time"):
        other = again().forward(images)
    if other.tobytes() != logits.tobytes():
        raise UserError(
            f"--model {name}: two networks built with the same seed compute different things, as two ranks would: draw "
            "what it draws from numpy.random.default_rng(seed), with the seed that its constructor is given"
        )


def _pass(model: Model, name: str, images: Array, classes: int) -> Array:
    """Let images pass forward and backward through the model. Returns its outputs (N, classes)."""
    before = {place: array for place, array, _ in _arrays(model)}
    logits = model.forward(images)
    shape, expected = tuple(getattr(logits, "shape", ())), (len(images), classes)
    if shape != expected:
        given = shape or type(logits).__name__
        raise UserError(f"--model {name}: its forward gives {given} for images {images.shape}; expected {expected}")
    model.backward(np.ones(shape, logits.dtype))
    for place, array, layer in _arrays(model):
        if before.get(place) is not array:
            raise UserError(
                f"--model {name}: {layer!r} puts another array in the place of its {place[2]!r}, which the trainer "
                "then does not see: write into it, as in array[...] = value"
            )
    return logits  # type: ignore[no-any-return]


def _arrays(model: Model) -> Iterator[tuple[tuple[str, str, str], Array, Layer]]:
    """Yield ((name of the layer, kind, key), array, layer) for all arrays of a model."""
    for name, layer in model.walk():
        for kind in ("params", "grads", "buffers"):
            for key, array in getattr(layer, kind).items():
                yield (name, kind, key), array, layer


def _check_attributes(model: Model, name: str) -> None:
    """Raise UserError for a layer that keeps an array of its own at a second place, where it would not move along."""
    for _, layer in model.walk():
        for attribute, value in vars(layer).items():
            for kind in ("params", "buffers"):
                for key, array in getattr(layer, kind).items():
                    if isinstance(value, np.ndarray) and np.may_share_memory(value, array):
                        raise UserError(
                            f"--model {name}: {layer!r} keeps its {key!r} as self.{attribute} too, which stays behind "
                            f'when the trainer moves its arrays: use self.{kind}["{key}"] everywhere'
                        )


def probe_loss(loss: Loss, name: str, model: Model, loader: DataLoader) -> str:
    """Try the loss on a few images' targets. Returns what a person should be told of it, "" if nothing.

    Raises UserError for one that fails, also on the probabilities (N, K) that labels become where images are mixed.
    """
    targets, classes = loader.labels[:4], loader.classes
    if mixing := [entry.text for entry in loader.after if entry.mixes]:
        if targets.ndim == 1:
            targets = np.eye(classes, dtype=np.float32)[targets]
        name = f"{name} with the probabilities (N, {classes}) that --augment {mixing[0]} makes of labels"
    count = len(targets) // 2 * 2
    if not count:
        return ""
    logits = np.linspace(-1, 1, count * classes, dtype=np.float32).reshape(count, classes)

    def summed(part: slice) -> float:
        z, y = model.as_array(logits[part].copy()), model.as_array(targets[part].copy())
        return float(loss(z, y, reduction="sum")[0])

    with explained(f"--loss {name} fails on logits ({count}, {classes})"):
        whole, halves = summed(slice(None)), summed(slice(0, count // 2)) + summed(slice(count // 2, None))
    if abs(whole - halves) <= 1e-3 * max(abs(whole), abs(halves)):  # rounding of float32, and no more
        return ""
    return (
        f"warning: the loss {name} of {count} images ({whole:.6g}) is not the sum of those of its halves "
        f'({halves:.6g}): with reduction="sum" it should add up over images'
    )

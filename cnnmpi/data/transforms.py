"""What happens to a batch on its way to the network: ``flip,crop=4,own.py:function,cutout=8,mixup=0.2``.

The transformations are applied in the order in which they are listed. Images begin as the pixels of the data set, uint8
in most cases, and are normalised once: before the first transformation that works on normalised images (cutout,
erasing, mixup, cutmix: there 0 is the mean colour), or at the end of the list. jitter works on pixels and must stand
before; all others, and functions of one's own, take images at either place.

Each is a function ``(images, labels, draw) -> images``, or ``-> (images, labels)``, without any state: what it draws is
a function of the seed and of where the batch stands in the run. flip, crop, resized_crop, jitter, cutout and erasing
draw for a sample of an epoch, so batches and shards do not matter to them. mixup, cutmix and one's own draw for a shard
of a step: images are mixed with others of their shard.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cnnmpi.common.arrays import Array
from cnnmpi.data.augment import (
    color_jitter,
    cutmix,
    cutout,
    mixup,
    probabilities,
    random_crop,
    random_erasing,
    random_horizontal_flip,
    random_resized_crop,
)
from cnnmpi.data.dataset import DataError
from cnnmpi.rng import generator

NONE = "none"  # the text of an empty list
ASPECT = 3 / 4, 4 / 3  # the least and the largest width / height of a window that resized_crop enlarges
ERASED = 0.02, 1 / 3  # the least and the largest share of an image that erasing blanks
ERASED_ASPECT = 0.3, 1 / 0.3


class Tables:
    """Draws for all samples of an epoch, kept until another epoch is asked for. Threads may share one."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._kept: dict[str, tuple[int, Array]] = {}

    def of(self, purpose: str, epoch: int, make: Callable[[np.random.Generator], Array]) -> Array:
        """Return ``make(generator)`` for the generator of this purpose and epoch."""
        kept = self._kept.get(purpose)  # read once and replaced as a whole, so that threads do not see half of it
        if kept is None or kept[0] != epoch:
            kept = self._kept[purpose] = (epoch, make(generator(self.seed, purpose, epoch)))
        return kept[1]


@dataclass(frozen=True, eq=False)
class Draw:
    """Where a batch stands in a run, and so what is drawn for it."""

    tables: Tables
    epoch: int
    step: int
    part: int  # 0: the whole batch; 1 + shard otherwise
    places: Array  # (n,), the places of the batch's samples in an epoch's tables
    samples: int  # of an epoch
    classes: int

    def __call__(self, purpose: str) -> np.random.Generator:
        """Return the generator of this seed, step and shard for ``purpose``, a word; each time from its beginning."""
        return generator(self.tables.seed, f"augment/{purpose}", self.step, self.part)

    def of_samples(
        self, purpose: str, make: Callable[[np.random.Generator, int], Array], epoch: int | None = None
    ) -> Array:
        """Return the batch's part (..., n) of the table ``make(generator, N)``, (..., N), of this or a given epoch.

        ``purpose`` is a word that nothing else uses: neither a transformation's name nor "order".
        """
        epoch = self.epoch if epoch is None else epoch
        table = self.tables.of(purpose, epoch, lambda rng: make(rng, self.samples))
        return table[..., self.places]


Result = Array | tuple[Array, Array]
Augment = Callable[[Array, Array, Draw], Result]


# -- the transformations that have a name: a function of images, labels and draw, and of the number in the text -------


def _flip(images: Array, labels: Array, draw: Draw) -> Result:
    # at random at first, then by turns: two epochs show both sides of each image (Jordan, 2024)
    flip = draw.of_samples("flip", lambda rng, N: rng.random(N) < 0.5, epoch=0) ^ (draw.epoch % 2 == 1)
    return random_horizontal_flip(images, flip)


def _crop(images: Array, labels: Array, draw: Draw, padding: int) -> Result:
    top, left = draw.of_samples("crop", lambda rng, N: rng.integers(0, 2 * padding + 1, (2, N)))
    return random_crop(images, top, left, padding)


def _resized_crop(images: Array, labels: Array, draw: Draw, least: float) -> Result:
    boxes = draw.of_samples("resized_crop", lambda rng, N: _boxes(rng, N, images.shape, (least, 1.0), ASPECT))
    return random_resized_crop(images, *boxes)


def _jitter(images: Array, labels: Array, draw: Draw, strength: float) -> Result:
    factors = draw.of_samples("jitter", lambda rng, N: rng.uniform(1 - strength, 1 + strength, (3, N)))
    return color_jitter(images, *factors)


def _cutout(images: Array, labels: Array, draw: Draw, size: int) -> Result:
    highest = np.array([[side - size] for side in images.shape[2:]])
    top, left = draw.of_samples("cutout", lambda rng, N: rng.integers(0, highest, (2, N), endpoint=True))
    return cutout(images, top, left, size)


def _erasing(images: Array, labels: Array, draw: Draw, probability: float) -> Result:
    def make(rng: np.random.Generator, N: int) -> Array:
        boxes = _boxes(rng, N, images.shape, ERASED, ERASED_ASPECT)
        return np.where(rng.random(N) < probability, boxes, 0)

    return random_erasing(images, *draw.of_samples("erasing", make))


def _mixup(images: Array, labels: Array, draw: Draw, alpha: float) -> Result:
    rng, n = draw("mixup"), len(images)
    partner, share = rng.permutation(n), rng.beta(alpha, alpha, n)
    return mixup(images, probabilities(labels, draw.classes), partner, share)


def _cutmix(images: Array, labels: Array, draw: Draw, alpha: float) -> Result:
    (n, _, H, W), rng = images.shape, draw("cutmix")
    partner, share = rng.permutation(n), rng.beta(alpha, alpha, n)
    sides = np.sqrt(1 - share) * [[H], [W]]
    centre = rng.random((2, n)) * [[H], [W]]
    start, stop = (np.rint(np.clip(centre + end * sides / 2, 0, [[H], [W]])).astype(int) for end in (-1, 1))
    targets = probabilities(labels, draw.classes)
    return cutmix(images, targets, partner, *start, *(stop - start))


def _boxes(
    rng: np.random.Generator, N: int, shape: Sequence[int], share: tuple[float, float], aspect: tuple[float, float]
) -> Array:
    """Return top, left, height and width, (4, N), of a window in each image: its share of the area and width / height.

    The share is drawn evenly, the aspect's logarithm, too; then a side longer than the image's is cut off to it.
    """
    H, W = shape[2:]
    area = rng.uniform(*share, N) * (H * W)
    low, high = map(math.log, aspect)
    ratio = np.exp(rng.uniform(low, high, N))
    sides = np.rint([np.sqrt(area / ratio), np.sqrt(area * ratio)]).astype(np.int64)
    sides = np.clip(sides, 1, [[H], [W]])
    return np.concatenate([rng.integers(0, np.array([[H], [W]]) - sides, endpoint=True), sides])


@dataclass(frozen=True)
class Transformation:
    """A transformation that has a name, and what number it takes, ``least`` to ``most``: none if ``number`` is ""."""

    apply: Callable[..., Result]
    number: str = ""
    whole: bool = False
    least: float = 0.01
    most: float = 1
    takes: Literal["any", "pixels", "normalised"] = "any"
    mixes: bool = False  # gives probabilities (n, K) in place of labels


TRANSFORMATIONS = {
    "flip": Transformation(_flip),
    "crop": Transformation(_crop, "pixels", whole=True, least=1, most=math.inf),
    "resized_crop": Transformation(_resized_crop, "a share of the area"),
    "jitter": Transformation(_jitter, "a strength", takes="pixels"),
    "cutout": Transformation(_cutout, "pixels", whole=True, least=1, most=math.inf, takes="normalised"),
    "erasing": Transformation(_erasing, "a probability", takes="normalised"),
    "mixup": Transformation(_mixup, "an alpha", most=100, takes="normalised", mixes=True),
    "cutmix": Transformation(_cutmix, "an alpha", most=100, takes="normalised", mixes=True),
}


# -- lists of them, as texts and as functions --------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One of a list: a ``known`` transformation with its ``number``, or a person's own ``function``.

    ``text`` is how a setting names it.
    """

    text: str
    known: Transformation | None = None
    number: float | None = None
    function: Augment | None = None

    @property
    def normalised(self) -> bool:
        """Whether it works on normalised images only."""
        return self.known is not None and self.known.takes == "normalised"

    @property
    def mixes(self) -> bool:
        """Whether it gives probabilities of the classes (n, K) in place of labels (n,)."""
        return self.known is not None and self.known.mixes

    def __call__(self, images: Array, labels: Array, draw: Draw) -> tuple[Array, Array]:
        """Return the transformed images and labels. Raises DataError for what a person's function must not return."""
        if self.known is not None:
            numbers = [] if self.number is None else [self.number]
            result = self.known.apply(images, labels, draw, *numbers)
            return result if isinstance(result, tuple) else (result, labels)
        if self.function is None or not len(labels):  # an empty shard; or a list that is only read
            return images, labels
        return _checked(self.text, self.function(images, labels, draw), images, labels, draw.classes)


def entries(listed: Any, find: Callable[[str], Augment] | None = None) -> list[Entry]:
    """Return the entries of a text as above, of a function, or of a list of both; "none", "" and None have none.

    ``find`` gives the function that a text FILE.py:FUNCTION or MODULE:FUNCTION names; without it, such an entry has
    none. What is an entry already, stays. Raises ValueError, naming the entry, for what is no list of transformations.
    """
    items = listed if isinstance(listed, list | tuple) else [listed]
    found = []
    for item in items:
        if isinstance(item, Entry):
            found.append(item)
        elif callable(item):
            found.append(_own(getattr(item, "__qualname__", type(item).__name__), item))
        elif isinstance(item, str) or item is None:
            words = [word.strip() for word in (item or "").split(",")]
            found += [_entry(word, find) for word in words if word not in ("", NONE)]
        else:
            raise ValueError(f"expected a text, a function, or a list of both, got {item!r:.60}")
    _check_order(found)
    return found


def text_of(listed: Sequence[Entry]) -> str:
    """Return the text of which ``entries`` makes this list again."""
    return ",".join(entry.text for entry in listed) or NONE


def check_sizes(listed: Sequence[Entry], height: int, width: int) -> None:
    """Raise ValueError, naming the entry, for one of more pixels than images of ``height`` x ``width`` have a side."""
    for entry in listed:
        if entry.known and entry.known.whole and (entry.number or 0) > min(height, width):
            raise ValueError(f"{entry.text} does not fit into images of {height}x{width} pixels")


def _entry(text: str, find: Callable[[str], Augment] | None) -> Entry:
    name, equals, value = (part.strip() for part in text.partition("="))
    if name not in TRANSFORMATIONS:
        if ":" in text:
            return _own(text, find(text)) if find else Entry(text)
        known_names = ", ".join(name + "=NUMBER" * bool(known.number) for name, known in TRANSFORMATIONS.items())
        raise ValueError(f"{text!r} is none of {known_names}, and no FILE.py:FUNCTION")
    known = TRANSFORMATIONS[name]
    if not known.number:
        if equals:
            raise ValueError(f"{text}: {name} takes no number")
        return Entry(name, known)
    try:
        number: float = int(value) if known.whole else float(value)
    except ValueError:
        number = math.nan
    if not known.least <= number <= known.most:
        to = "up" if known.most == math.inf else f"to {known.most:g}"
        raise ValueError(f"{text}: {name} takes {'whole ' * known.whole}{known.number} from {known.least:g} {to}")
    return Entry(f"{name}={str(number).removesuffix('.0')}", known, number)


def _own(text: str, function: Augment) -> Entry:
    """Return the entry of a person's function. Raises ValueError for one that does not take what it will get."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # of some functions written in C it is not known
        return Entry(text, function=function)
    try:
        signature.bind(None, None, None)
    except TypeError:
        raise ValueError(f"{text} must take three arguments: images, labels, draw") from None
    return Entry(text, function=function)


def _check_order(listed: Sequence[Entry]) -> None:
    """Raise ValueError for a name that is listed twice, as both would draw the same, or that stands too late."""
    seen: set[str] = set()
    normalised = ""
    for entry in listed:
        if entry.known is None:
            continue
        name = entry.text.partition("=")[0]
        if name in seen:
            raise ValueError(f"{name} is listed twice")
        seen.add(name)
        if entry.known.takes == "normalised":
            normalised = normalised or name
        elif entry.known.takes == "pixels" and normalised:
            raise ValueError(f"{entry.text} works on pixels: list it before {normalised}, which normalises them")


def _checked(name: str, result: Any, images: Array, labels: Array, classes: int) -> tuple[Array, Array]:
    """Return what a person's function gave, if it can be trained on. Raises DataError."""
    x, y = result if isinstance(result, tuple) and len(result) == 2 else (result, labels)
    shape, dtype = getattr(x, "shape", ()), getattr(x, "dtype", type(x).__name__)
    if shape != images.shape or dtype not in (images.dtype, np.float32):
        kinds = "float32" if images.dtype == np.float32 else "uint8, or float32 in 0..1,"
        raise DataError(
            f"the augmentation {name} returned {dtype} {shape} for images {images.dtype} {images.shape}; expected "
            f"{kinds} of the same shape"
        )
    shape, dtype = getattr(y, "shape", ()), getattr(y, "dtype", type(y).__name__)
    kind = getattr(dtype, "kind", "")
    if not ((shape == labels.shape and kind in "iu") or (shape == (len(labels), classes) and kind == "f")):
        raise DataError(
            f"the augmentation {name} returned labels {dtype} {shape}; expected {labels.dtype} {labels.shape}, or "
            f"probabilities, floats {(len(labels), classes)}"
        )
    return x, y.astype(np.int64 if y.ndim == 1 else np.float32)

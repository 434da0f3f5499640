"""What each layer of a step costs: seconds, floating-point operations, bytes."""

import math
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cnnmpi.common.arrays import Array
from cnnmpi.functional import winograd
from cnnmpi.layers import Layer
from cnnmpi.models import Model
from cnnmpi.profile.flops import count_flops
from cnnmpi.profile.step import LOSS, OPTIMIZER, REST, Calls, Place, Step

FEWEST = 4  # steps that are timed at least
KINDS_OF_ARRAYS = ("params", "grads", "buffers")  # a layer's own, which it has all the time


@dataclass(frozen=True)
class LayerCost:
    """What a layer, without the layers inside it, costs in a step: seconds, floating-point operations, bytes.

    ``kept`` is what it keeps from forward to backward of a shard, beyond what layers before it keep already; ``peak``
    is the most that a shard takes while the layer computes. Both are None where that is not measured.
    """

    name: str  # dotted; "" is the model itself
    kind: str
    text: str  # how the layer shows itself
    is_leaf: bool
    forward: float
    backward: float
    forward_flops: float = 0.0
    backward_flops: float = 0.0
    kept: int | None = None
    peak: int | None = None

    @property
    def seconds(self) -> float:
        """Of both passes."""
        return self.forward + self.backward

    @property
    def flops(self) -> float:
        """Of both passes."""
        return self.forward_flops + self.backward_flops


@dataclass(frozen=True)
class Profile:
    """A step of ``images`` images in ``shards`` shards; the seconds of all parts add up to those of the step.

    ``layers`` are in the order of their definition, containers before what they hold. ``rest`` is what is done
    outside of layers, loss and optimizer: gradients set to zero, Python. ``kept`` and ``peak`` are the bytes that a
    shard keeps from forward to backward and takes at most, beyond weights, gradients and images; None where they are
    not measured.
    """

    layers: tuple[LayerCost, ...]
    loss: float
    optimizer: float
    rest: float
    images: int
    shards: int
    steps: int  # that were timed
    kept: int | None = None
    peak: int | None = None

    @property
    def forward(self) -> float:
        """Seconds of the layers' forward passes."""
        return math.fsum(layer.forward for layer in self.layers)

    @property
    def backward(self) -> float:
        """Seconds of the layers' backward passes."""
        return math.fsum(layer.backward for layer in self.layers)

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return math.fsum([self.forward, self.backward, self.loss, self.optimizer, self.rest])

    @property
    def flops(self) -> float:
        """Floating-point operations of the step's matrix products."""
        return math.fsum(layer.flops for layer in self.layers)


def measure(step: Step, seconds: float = 2.0, clock: Callable[[], float] = time.perf_counter) -> Profile:
    """Return what ``step`` costs: repeat it for so many seconds, after one that warms up; the faster half counts.

    What NumPy allocates is measured in a further pass of one shard; PyTorch does not report it.
    """
    flops = count_flops(step)
    times, steps = timed(step, seconds, clock)
    memory = _Memory() if step.model.use_torch else _measure_memory(step)
    layers = tuple(
        LayerCost(
            name=name,
            kind=_kind(layer),
            text=repr(layer) if not list(layer.children()) else type(layer).__name__,
            is_leaf=not list(layer.children()),
            forward=times.get((name, "forward"), 0.0),
            backward=times.get((name, "backward"), 0.0),
            forward_flops=flops.get((name, "forward"), 0.0),
            backward_flops=flops.get((name, "backward"), 0.0),
            kept=memory.kept_by.get(name),
            peak=max(
                (memory.peaks[name, d] for d in ("forward", "backward") if (name, d) in memory.peaks), default=None
            ),
        )
        for name, layer in step.model.walk()
    )
    return Profile(
        layers=layers,
        loss=times.get(LOSS, 0.0),
        optimizer=times.get(OPTIMIZER, 0.0),
        rest=times.get(REST, 0.0),
        images=len(step.targets),
        shards=len(step.shards),
        steps=steps,
        kept=memory.kept,
        peak=max(memory.peaks.values(), default=None),
    )


def _kind(layer: Layer) -> str:
    """Return the name of a layer's class; convolutions in groups are a kind of their own."""
    return type(layer).__name__ + (" in groups" if getattr(layer, "groups", 1) != 1 else "")


def timed(
    step: Step,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    watch_more: Callable[[Calls], None] = lambda calls: None,
) -> tuple[dict[Place, float], int]:
    """Return the mean seconds of each place over the faster half of the steps, and how many steps there were.

    A mean over whole steps adds up as they do; what disturbs a machine for a moment is in the slower half.
    ``watch_more`` may watch functions inside the layers, too.
    """
    steps: list[dict[Place, float]] = []
    spent: dict[Place, float] = {}
    last = whole = 0.0  # where the clock was looked at last; the seconds of all steps so far

    def charge(place: Place) -> None:
        nonlocal last
        now = clock()
        spent[place] = spent.get(place, 0.0) + now - last
        last = now

    with Calls(charge) as calls:
        calls.watch_step(step)
        watch_more(calls)
        while len(steps) < FEWEST or whole < seconds:
            spent = {}
            last = clock()
            step()
            charge(REST)
            steps.append(spent)
            whole += _sum(spent)
    half = sorted(steps, key=_sum)[: math.ceil(len(steps) / 2)]
    places = dict.fromkeys(place for each in half for place in each)
    return {place: math.fsum(each.get(place, 0.0) for each in half) / len(half) for place in places}, len(steps)


def _sum(spent: dict[Place, float]) -> float:
    return math.fsum(spent.values())


# -- memory ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Memory:
    """Bytes; nothing where they are not measured."""

    kept_by: dict[str, int] = field(default_factory=dict)
    kept: int | None = None  # of all layers, and of what is none's
    peaks: dict[Place, int] = field(default_factory=dict)


def _measure_memory(step: Step) -> _Memory:
    """Return the bytes that one shard keeps and takes. NumPy tells tracemalloc of each array that it makes."""
    peaks: dict[Place, int] = defaultdict(int)
    kept_by: dict[str, int] = {}
    kept = 0

    def charge(place: Place) -> None:
        peaks[place] = max(peaks[place], tracemalloc.get_traced_memory()[1] - before)
        tracemalloc.reset_peak()

    def seen(layer: Layer, direction: str, *_: Any) -> None:
        nonlocal kept
        if layer is step.model and direction == "forward":
            kept = tracemalloc.get_traced_memory()[0] - before
            kept_by.update(_kept_by_layers(step.model, step.images))

    tracing = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        with Calls(charge) as calls:
            calls.watch_step(step, seen)
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            step.first_shard()
            charge(REST)
    finally:
        if not tracing:
            tracemalloc.stop()
    return _Memory(kept_by, kept, dict(peaks))


def _kept_by_layers(model: Model, images: Array) -> dict[str, int]:
    """Return the bytes of the arrays that each layer holds besides its own; of several, the first layer has them."""
    layers = list(model.walk())
    own = [vars(layer)[kind] for _, layer in layers for kind in KINDS_OF_ARRAYS]
    counted = {id(_owner(array)) for array in _arrays_in([images, own])}
    kept = {}
    for name, layer in layers:
        held = [value for key, value in vars(layer).items() if key not in KINDS_OF_ARRAYS]
        new = {id(owner): owner.nbytes for owner in map(_owner, _arrays_in(held)) if id(owner) not in counted}
        counted |= new.keys()
        kept[name] = sum(new.values())
    return kept


def _arrays_in(value: Any) -> Iterator[Array]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _arrays_in(item)


def _owner(array: Array) -> Array:
    """Return the array whose memory ``array`` is a view of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


# -- what is done, and one way against another -------------------------------------------------------------------------


def uses_winograd(step: Step) -> bool:
    """Return whether any convolution of ``step`` is computed with fewer multiplications than are counted."""
    used = []
    with Calls(lambda place: None) as calls:
        calls.watch(winograd, "conv2d", REST, lambda x, y: used.append(x))
        step.first_shard()
    return bool(used)


def compare(step: Step, ways: dict[str, Callable[[], None]], seconds: float = 1.0) -> dict[str, float]:
    """Return the fewest seconds that ``step`` takes in each of ``ways``, which prepare it, untimed.

    They take turns, for so many seconds each, so that a busy machine slows all alike.
    """
    best = dict.fromkeys(ways, math.inf)
    turns, end = 0, time.perf_counter() + seconds * len(ways)
    while turns <= FEWEST or time.perf_counter() < end:
        for name, prepare in ways.items():
            prepare()
            started = time.perf_counter()
            step()
            if turns:  # the first one warms up
                best[name] = min(best[name], time.perf_counter() - started)
        turns += 1
    return best

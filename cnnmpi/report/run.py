"""What a report is made of: the folder of a run, as far as it can be read, and what its model says of test images."""

import json
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cnnmpi import checkpoint
from cnnmpi.checkpoint import CheckpointError
from cnnmpi.common.arrays import Array
from cnnmpi.common.files import open_regular
from cnnmpi.common.lines import Line, read_lines

CONFIG, METRICS, STEPS, STARTS = "config.toml", "metrics.jsonl", "steps.jsonl", "starts.jsonl"
CHECKPOINTS = ("last.h5", "previous.h5", "best.h5")  # the first that is good is what the run has learned
MOST_LINES = 20_000  # of a file: more are thinned out, as a curve has no more points
LARGEST_CONFIG = 1 << 20  # bytes of config.toml that are read


@dataclass(frozen=True, eq=False)
class Judged:
    """What a trained model said of the N images of a ``part`` of the data, each of one class.

    ``labels`` and ``guesses`` (N,) are in 0..K-1; ``confidence`` and ``of_label`` (N,) the probabilities that the model
    gave to its guess and to the label; ``pixels(i)`` returns an image (H, W, C) of uint8.
    """

    part: str
    labels: Array
    guesses: Array
    confidence: Array
    of_label: Array
    pixels: Callable[[int], Array]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False)
class Run:
    """What is known of a run: its lines, the attributes of its newest good checkpoint, what its model has learned.

    ``filters`` (O, C, kH, kW) are the weights of its first convolution. ``notes`` say what is missing, and why.
    """

    path: Path
    settings: Line = field(default_factory=dict)
    epochs: list[Line] = field(default_factory=list)  # metrics.jsonl
    steps: list[Line] = field(default_factory=list)  # steps.jsonl
    starts: list[Line] = field(default_factory=list)  # starts.jsonl
    attributes: Line = field(default_factory=dict)
    checkpoint: Path | None = None
    judged: Judged | None = None
    filters: Array | None = None
    notes: list[str] = field(default_factory=list)
    name: str = ""

    @property
    def classes(self) -> list[str]:
        """The names of the classes, as far as a checkpoint tells them."""
        classes = self.attributes.get("classes")
        return [str(name) for name in classes] if isinstance(classes, list) else []

    @property
    def per_epoch(self) -> float:
        """Steps of an epoch; 0 where that is not known: a run's only epoch may have ended early."""
        pairs = [(number(line, "step"), number(line, "epoch")) for line in self.epochs]
        if not any(epoch > 1 for _, epoch in pairs):
            return 0.0
        return max((step / epoch for step, epoch in pairs if epoch > 0 and step > 0), default=0.0)

    def curve(self, name: str, of: str = "epochs") -> list[tuple[float, float]]:
        """Return (step, value) of what the lines of ``of`` ("epochs" or "steps") say under ``name``."""
        points = [(number(line, "step"), number(line, name)) for line in getattr(self, of)]
        return [(step, value) for step, value in points if math.isfinite(step) and math.isfinite(value)]


def number(line: Line, name: str) -> float:
    """Return a number of a line; NaN where it is missing, or none."""
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 2**1000:
        return math.nan
    return float(value)


def read_run(path: Path) -> Run:
    """Return what the folder ``path`` tells; what is damaged or missing is noted. Raises OSError if there is none."""
    if not path.is_dir():
        raise NotADirectoryError(20, "not a folder", str(path))
    run = Run(path, name=path.name or str(path))
    for name, lines in ((METRICS, run.epochs), (STEPS, run.steps), (STARTS, run.starts)):
        try:
            found, damaged = read_lines(path / name, MOST_LINES)
        except OSError as error:
            run.notes.append(f"{name}: {error.strerror}")
            continue
        lines += found
        if damaged:
            run.notes.append(f"{name}: {damaged} damaged line{'s' * (damaged > 1)} left out")
    for name in CHECKPOINTS:
        if run.checkpoint is None and (path / name).exists():
            try:
                _, run.attributes = checkpoint.load(path / name)
                run.checkpoint = path / name
            except CheckpointError as error:
                run.notes.append(str(error))
    if run.checkpoint is None:
        run.notes.append("no checkpoint that can be read: what the run has learned is not known")
    try:
        with open_regular(path / CONFIG) as file:
            run.settings = tomllib.loads(file.read(LARGEST_CONFIG).decode(errors="surrogateescape"))
    except (OSError, ValueError, RecursionError) as error:
        run.notes.append(f"{CONFIG}: {getattr(error, 'strerror', None) or error}")
    try:
        shaping = json.loads(run.attributes.get("config", "{}"))
        run.settings |= shaping if isinstance(shaping, dict) else {}
    except (ValueError, TypeError, RecursionError):
        run.notes.append(f"{run.checkpoint}: its settings cannot be read")
    return run


@dataclass(frozen=True, eq=False)
class Counts:
    """What became of the images of each class: of how many there are, how many were taken for it, how many rightly.

    ``mistakes`` (M, 2) are the pairs (class, what it was taken for) that occur, and ``times`` (M,) how often, the
    commonest first. So the memory goes with the images, not with the square of the classes.
    """

    images: Array
    guessed: Array
    hits: Array
    mistakes: Array
    times: Array

    @classmethod
    def of(cls, judged: Judged, classes: int) -> "Counts":
        """Count what was ``judged``."""
        labels, guesses = judged.labels, judged.guesses
        wrong = labels != guesses
        pairs, times = np.unique(np.stack([labels[wrong], guesses[wrong]], axis=1), axis=0, return_counts=True)
        order = np.argsort(-times, kind="stable")
        images, guessed, hits = (np.bincount(values, minlength=classes) for values in (labels, guesses, labels[~wrong]))
        return cls(images, guessed, hits, pairs[order], times[order])

    @property
    def confusion(self) -> Array:
        """How many images of class [row] were taken for [column], (classes, classes)."""
        matrix = np.diag(self.hits)
        matrix[self.mistakes[:, 0], self.mistakes[:, 1]] = self.times
        return matrix

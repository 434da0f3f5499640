"""What a model thinks of many images, on one page for a browser: how many of each class, and the least sure of them.

Of each image some numbers are kept until the end. Then the page chooses which to show, and reads those files again.
"""

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cnnmpi.answers import Answer, Meaning, Output
from cnnmpi.common.arrays import Array
from cnnmpi.data import DataError
from cnnmpi.data.images import read_image
from cnnmpi.data.sources.folder import in_order
from cnnmpi.page import card, escape, page, table, tiles

SHOWN = 500  # images on a page: with pictures of up to 128 pixels a side, some 3 MB
NAMED = 5  # classes of an image, at most
SIDE = 128  # pixels of a picture's longer side
MOST_LISTED = 50  # unreadable files
MOST_LINKED = 50  # classes
MOST_ROWS = 1000  # classes in the table
LONGEST = 60  # characters of a name or a path
STYLE = ".wide { margin-top: 1rem }"


@dataclass(frozen=True)
class Group:
    """Images that belong together on the page: their numbers among all, in the order in which they are shown."""

    title: str
    label: int
    images: Array


class Gallery:
    """Takes note of answers and writes the page at the end, below the ``title`` and the pairs of ``facts()``."""

    def __init__(
        self, file: Output, meaning: Meaning, title: str, facts: Callable[[], Sequence[tuple[str, str]]]
    ) -> None:
        self.file, self.meaning, self.title, self.facts = file, meaning, title, facts
        self.paths: list[str] = []
        self.unreadable: list[tuple[str, str]] = []
        self.kept = len(meaning.listed(np.zeros(len(meaning.classes)))[:NAMED])
        self.best, self.values, self.sure = array("l"), array("f"), array("f")
        self.likely = np.zeros(len(meaning.classes), np.int64)  # images that have this label, rather than not

    def add(self, answer: Answer) -> None:
        """Take note of an answer."""
        if (values := answer.values) is None:
            self.unreadable.append((answer.path, answer.error))
            return
        best = self.meaning.listed(values)[: self.kept]
        self.paths.append(answer.path)
        self.best.extend(best)
        self.values.extend(values[best])
        self.sure.append(sureness(values, self.meaning))
        self.likely += values >= 0.5

    def end(self) -> None:
        """Write the page, and let it take its place."""
        self.file.write(page(self.title, self.body(), STYLE))
        self.file.close()

    def body(self) -> str:
        """Return what stands below the title, as HTML."""
        best = np.array(self.best, np.int64).reshape(-1, self.kept)
        values = np.array(self.values).reshape(-1, self.kept)
        groups = grouped(best[:, 0], np.array(self.sure), self.meaning)
        quotas = evenly([len(group.images) for group in groups], SHOWN)
        numbers = self.meaning.loss == "mse"
        parts = [tiles(self.facts())]
        if sum(quotas) < len(best):
            evenly_sure = f"the least sure of each {self.meaning.names[0]}, equally many where there are enough"
            which = "spread evenly" if numbers else evenly_sure
            parts.append(f"<p>Shown are {sum(quotas):,} of the {len(best):,} images: {which}.</p>")
        if not numbers:
            parts += self.table(groups, values[:, 0])
            linked = [group for group, quota in zip(groups, quotas, strict=True) if quota][:MOST_LINKED]
            links = (f'<a href="#c{group.label}">{escape(group.title)}</a>' for group in linked)
            parts.append(f"<nav>{' '.join(links)}</nav>")
        for group, quota in zip(groups, quotas, strict=True):
            if quota:
                parts += self.section(group, quota, best, values)
        if self.unreadable:
            parts.append("<h2>Unreadable</h2>")
            parts.append(table(("file", "why"), self.unreadable[:MOST_LISTED], words=True))
            if (more := len(self.unreadable) - MOST_LISTED) > 0:
                parts.append(f'<p class="pale">and {more:,} more</p>')
        return "\n".join(parts)

    def table(self, groups: Sequence[Group], values: Array) -> list[str]:
        """Return the table of classes, the most frequent first, as parts of HTML."""
        head = [self.meaning.names[0], "images", "share", "mean probability", "below 50%"]
        rows: list[list[object]] = []
        for group in groups[:MOST_ROWS]:
            count, its = len(group.images), values[group.images]
            share, mean = f"{count / len(values):.1%}", f"{its.mean():.1%}"
            rows.append([group.title, f"{count:,}", share, mean, f"{np.count_nonzero(its < 0.5):,}"])
        if self.meaning.several:
            head.append("images with 50% or more")
            for group, row in zip(groups, rows, strict=False):
                row.append(f"{self.likely[group.label]:,}")
        notes = ["An image counts for the most probable of its labels."] if self.meaning.several else []
        if groups[MOST_ROWS:]:
            notes.append(f"{len(groups) - MOST_ROWS:,} more are not in the table.")
        if never := len(self.meaning.classes) - len(groups):
            notes.append(f"{never:,} of the {self.meaning.names[1]} were guessed for no image.")
        return [table(head, rows), f'<p class="pale">{escape(" ".join(notes))}</p>']

    def section(self, group: Group, quota: int, best: Array, values: Array) -> list[str]:
        """Return the heading and the pictures of a group, as parts of HTML."""
        count, numbers = len(group.images), self.meaning.loss == "mse"
        if numbers:
            chosen = group.images[np.linspace(0, count - 1, quota).round().astype(int)]
        else:
            chosen = group.images[:quota]

        def show(number: int) -> str:
            said = [shortened(self.meaning.shown(k, v)) for k, v in zip(best[number], values[number], strict=True)]
            path = self.paths[number]
            try:
                return card(read_image(path, 3, SIDE), path, [*said, shortened(path, end=True)])
            except DataError:  # it could be read before, so it has gone since
                return ""

        order = f"by their {self.meaning.classes[0]}" if numbers else "the least sure first"
        which = f"all, {order}" if quota == count else f"{quota:,} of {count:,}, {'evenly ' if numbers else ''}{order}"
        heading = f'<h2 id="c{group.label}">{escape(group.title)}</h2>'
        return [
            heading,
            f'<p class="pale">{escape(which)}</p>',
            f'<div class="cards">{"".join(in_order(show, chosen))}</div>',
        ]


def sureness(values: Array, meaning: Meaning) -> float:
    """Return the number by which images are sorted, the least sure first, of one image's ``values`` (classes,).

    The probability of the best class; of several labels, how far from a half the most doubtful one is; of numbers, the
    first.
    """
    if meaning.loss == "mse":
        return float(values[0])
    sure = float(np.abs(values - 0.5).min() if meaning.several else values.max())
    return -1.0 if math.isnan(sure) else sure


def grouped(best: Array, sure: Array, meaning: Meaning) -> list[Group]:
    """Return the images of each class that is ``best`` (N,) for any, the most frequent first, in the order of ``sure``.

    Numbers make one group.
    """
    order = np.argsort(sure, kind="stable")
    if meaning.loss == "mse":
        return [Group("Images", 0, order)]
    order = order[np.argsort(best[order], kind="stable")]
    labels, starts = np.unique(best[order], return_index=True)
    members = np.split(order, starts)[1:]
    titles = [shortened(meaning.classes[label]) for label in labels]
    groups = [Group(*each) for each in zip(titles, labels.tolist(), members, strict=True)]
    return sorted(groups, key=lambda group: -len(group.images))


def evenly(counts: Sequence[int], most: int) -> list[int]:
    """Return how many of each to take, ``most`` in all: equally many, and more where others have not so many.

    Of what is left over at the end, each of the first gets one.
    """
    sizes = np.array(counts, np.int64)
    level = max(n for n in range(most + 1) if np.minimum(sizes, n).sum() <= most)
    quotas = np.minimum(sizes, level)
    quotas[np.flatnonzero(sizes > level)[: most - quotas.sum()]] += 1
    taken: list[int] = quotas.tolist()
    return taken


def shortened(text: str, end: bool = False) -> str:
    """Return at most 60 characters of ``text``: its beginning, or its ``end``."""
    if len(text) <= LONGEST:
        return text
    return "…" + text[-LONGEST + 1 :] if end else text[: LONGEST - 1] + "…"

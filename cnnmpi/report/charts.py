"""Curves, drawn by matplotlib as SVG that stands inside a page and takes its colours from there.

SVG, as it prints, needs no script and is small; legends are the page's own, whatever the names of runs contain.
"""

import functools
import hashlib
import io
import logging
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cnnmpi.page import escape

MOST_POINTS = 600  # of a curve: about one for each pixel
FONTS = "MPL_IGNORE_SYSTEM_FONTS"
COLORS = 8  # --c0 ... --c7 of the page; more curves begin again, with dashes
# drawn in these colours, which nothing else has, to be replaced by those that the page has in light and in dark
INK, LINE, SERIES = "#010203", "#040506", [f"#0a0b{index:02x}" for index in range(COLORS)]
DASHES = {"solid": "none", "dashed": "6 3", "dotted": "2 2", "dashdot": "6 2 2 2"}  # matplotlib's, and SVG's


@dataclass(frozen=True)
class Curve:
    """Points (x, y) under a name; ``color`` 0, 1, ...; ``faint`` stands behind the others."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    faint: bool = False
    dots: bool = field(default=False)


def chart(title: str, curves: Sequence[Curve], x: str, per_epoch: float = 0, log: bool = False) -> str:
    """Return a figure of HTML with these curves over ``x``; "" where none of them has a point.

    With ``per_epoch``, the steps of an epoch, the epochs stand at the top. Not finite points are left out. ``log``
    makes the vertical axis logarithmic.
    """
    matplotlib, style, Figure = _matplotlib()
    curves = [curve for curve in curves if any(math.isfinite(v) for _, v in curve.points)]
    if not curves:
        return ""
    settings: dict[str, Any] = {"svg.fonttype": "none", "font.size": 9, "axes.spines.right": False}
    settings |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    settings |= {"axes.edgecolor": LINE, "grid.color": LINE, "svg.hashsalt": "cnnmpi"}
    with matplotlib.rc_context(), style.context(["default", settings]):
        figure = Figure(figsize=(5.4, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for number, curve in enumerate(curves):
            points = np.array(thinned([p for p in curve.points if all(map(math.isfinite, p))]))
            dash = list(DASHES)[curve.color // COLORS % len(DASHES)]
            options: dict[str, Any] = {
                "color": SERIES[curve.color % COLORS],
                "linestyle": dash,
                "gid": f"curve_{number}",
            }
            options |= {"alpha": 0.35, "linewidth": 0.8} if curve.faint else {"linewidth": 1.6}
            lonely = curve.dots or len(points) == 1
            axes.plot(points[:, 0], points[:, 1], marker="o" if lonely else "", markersize=3, **options)
        axes.set_xlabel(x)
        axes.grid(linewidth=0.6, alpha=0.6)
        axes.spines["top"].set_visible(False)
        if log and all(v > 0 for curve in curves for _, v in curve.points if math.isfinite(v)):
            axes.set_yscale("log")
        if per_epoch:
            top = axes.secondary_xaxis(
                "top", functions=(lambda v: np.divide(v, per_epoch), lambda v: np.multiply(v, per_epoch))
            )
            top.set_xlabel("epoch")
            top.spines["top"].set_visible(False)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    caption = f"<figcaption><b>{escape(title)}</b> {legend(curves)}</figcaption>"
    return f"<figure>{_for_page(file.getvalue(), title)}{caption}</figure>"


@functools.cache
def _matplotlib() -> tuple[Any, Any, Any]:
    """Return matplotlib, its styles and Figure, imported so that it starts no program and logs nothing about fonts."""
    logger, before = logging.getLogger("matplotlib"), os.environ.get(FONTS)
    level = logger.level
    logger.setLevel(logging.ERROR)
    os.environ[FONTS] = "1"  # to look for the system's fonts it starts fc-list, which no rank may: MPI forbids to fork
    try:
        import matplotlib
        from matplotlib import font_manager, style
        from matplotlib.figure import Figure

        font_manager.fontManager.findfont("DejaVu Sans")
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ[FONTS]
    return matplotlib, style, Figure


def legend(curves: Sequence[Curve]) -> str:
    """Return the names of curves in their colours."""
    shown = sorted(curves, key=lambda curve: curve.faint)
    names = {curve.name: (curve.color, 0.4 if curve.faint else 1.0) for curve in reversed(shown)}
    dashes = list(DASHES.values())
    marks = []
    for name, (color, opacity) in reversed(names.items()):
        stroke = f"stroke: var(--c{color % COLORS}); stroke-dasharray: {dashes[color // COLORS % len(dashes)]}"
        stroke += f"; opacity: {opacity}"
        marks.append(f'<svg class="mark" viewBox="0 0 22 8"><path d="M0 4h22" style="{stroke}"/></svg> {escape(name)}')
    return " &ensp;".join(marks)


def thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Return at most about MOST_POINTS of ``points``: of each stretch its lowest and its highest."""
    if len(points) <= MOST_POINTS:
        return points
    kept: list[tuple[float, float]] = [points[0]]
    for part in np.array_split(np.arange(1, len(points) - 1), MOST_POINTS // 2):
        stretch = [points[i] for i in part]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return [*kept, points[-1]]


def smoothed(points: Sequence[tuple[float, float]], parts: int = 60) -> list[tuple[float, float]]:
    """Return means of ``points`` over about that many stretches."""
    finite = [p for p in points if all(map(math.isfinite, p))]
    stretches = np.array_split(np.arange(len(finite)), min(parts, max(1, len(finite))))
    means = [np.mean([finite[i] for i in part], axis=0) for part in stretches if len(part)]
    return [(float(x), float(y)) for x, y in means]


def _for_page(svg: str, title: str) -> str:
    """Return a picture for a page that holds several: sized by its frame, with names of its own, in its colours."""
    key = hashlib.sha256(title.encode(errors="backslashreplace")).hexdigest()[:12]
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{key}-", svg)
    for color, name in [(INK, "ink"), (LINE, "line"), *((c, f"c{i}") for i, c in enumerate(SERIES))]:
        svg = svg.replace(color, f"var(--{name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)

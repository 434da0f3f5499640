"""A profile as a page: its tables, and an icicle, whose boxes are as wide as the time of a layer and all inside it."""

import math
from collections.abc import Sequence

from cnnmpi.page import escape, page, table, tiles
from cnnmpi.profile.measure import LayerCost, Profile
from cnnmpi.profile.show import MIB, by_kind, cells, head, rows_of

COLOURS = 8  # of page.py; kinds beyond share the last
LEAST_NAMED = 0.02  # share of the step from which on a box has room for a name
NS = 1e9  # widths are in whole nanoseconds: CSS fills a row only if its numbers are 1 or more together
STYLE = """
.icicle { min-width: 42rem; font-size: .74rem; line-height: 1.5rem; print-color-adjust: exact;
  -webkit-print-color-adjust: exact }
.icicle div { min-width: 0; overflow: hidden; white-space: nowrap }
.icicle .row { display: flex }
.icicle b { display: block; overflow: hidden; height: 1.5rem; padding-left: .2rem; font-weight: 400;
  background: var(--soft); box-shadow: inset -1px -1px var(--paper) }
.icicle b.leaf { background: var(--kind); color: var(--paper) }
.legend span { margin-right: 1rem; white-space: nowrap }
.legend i { display: inline-block; width: .8rem; height: .8rem; background: var(--kind); margin-right: .3rem;
  print-color-adjust: exact; -webkit-print-color-adjust: exact }
@media print { .icicle { min-width: 0; font-size: 7px } table { font-size: 9px } }
"""


def profile_page(title: str, told: str, profile: Profile, peak: float, advice: Sequence[str]) -> str:
    """Return the page; ``told`` says what was measured and how, ``advice`` are lines."""
    values = [
        ("ms a step", f"{profile.seconds * 1e3:.1f}"),
        ("images/s", f"{profile.images / profile.seconds:.0f}"),
        ("GFLOP a step", f"{profile.flops / 1e9:.2f}"),
        (f"GFLOP/s; a matrix product {peak / 1e9:.0f}", f"{profile.flops / profile.seconds / 1e9:.0f}"),
    ]
    if profile.peak is not None:
        values.append(("MiB at most, of a shard", f"{profile.peak / MIB:.0f}"))
    kinds = by_kind(profile)
    coloured = {layer.kind for layer in profile.layers if layer.is_leaf}
    slowest_first = [cost.name for cost in kinds if cost.name in coloured]
    colours = {kind: min(index, COLOURS - 1) for index, kind in enumerate(slowest_first)}
    descriptions = [(layer.name, layer.text) for layer in profile.layers if layer.is_leaf]
    advised = "".join(f"<li>{escape(line)}</li>" for line in advice)
    return page(
        title,
        f"<p>{escape(told)}</p>{tiles(values)}"
        + (f"<h2>Advice</h2><ul>{advised}</ul>" if advice else "")
        + f"<h2>The step</h2>{_legend(colours, profile)}{icicle(profile, colours)}"
        + '<p class="pale">Wide is slow: a box is as wide as the time of a layer and all inside it, in the order of '
        "the calls. Point at one for its figures; they stand in the tables, too.</p>"
        + "<h2>By kind of layer</h2>"
        + table(head(profile, "kind", bar=False), cells(kinds, profile, peak, bar=False))
        + "<h2>By layer</h2>"
        + table(head(profile, "layer", bar=False), cells(rows_of(profile), profile, peak, bar=False))
        + "<h2>The layers</h2>"
        + table(("name", "layer"), descriptions, words=True),
        STYLE,
    )


def _legend(colours: dict[str, int], profile: Profile) -> str:
    shown = dict.fromkeys(layer.kind for layer in profile.layers if layer.is_leaf)
    texts = (f'<span><i style="--kind: var(--c{colours[kind]})"></i>{escape(kind)}</span>' for kind in shown)
    return f'<p class="legend">{"".join(texts)}</p>'


def icicle(profile: Profile, colours: dict[str, int]) -> str:
    """Return nested boxes: the step; below it forward, backward and the rest; below these the layers, as they nest.

    ``colours`` maps kinds of layers to the numbers of the page's colours.
    """
    children: dict[str, list[LayerCost]] = {}
    for layer in profile.layers:
        if layer.name:
            children.setdefault(layer.name.rpartition(".")[0], []).append(layer)

    def box(name: str, text: str, seconds: float, colour: int | None, inside: Sequence[str], rest: float) -> str:
        kind = "" if colour is None else f' class="leaf" style="--kind: var(--c{colour})"'
        told = escape(f"{text}: {seconds * 1e3:.3f} ms, {seconds / profile.seconds:.1%}")
        own = f'<div style="flex: {rest * NS:.0f} 1 0"></div>' if rest > 0 else ""
        below = f'<div class="row">{"".join(inside)}{own}</div>' if inside else ""
        shown = escape(name) if seconds >= LEAST_NAMED * profile.seconds else ""
        return f'<div style="flex: {seconds * NS:.0f} 1 0"><b{kind} title="{told}">{shown}</b>{below}</div>'

    def nest(layer: LayerCost, direction: str) -> tuple[float, str]:
        """Return the seconds of a layer and all inside it, and its box."""
        own: float = getattr(layer, direction)
        below = [nest(child, direction) for child in children.get(layer.name, ())]
        seconds = math.fsum([own, *(each for each, _ in below)])
        if direction == "backward":
            below.reverse()  # as the calls came
        name = layer.name.rpartition(".")[2]
        short = (layer.kind if layer.is_leaf else name) if layer.name else direction
        text = f"{layer.name} {layer.text} {direction}".strip()
        colour = colours[layer.kind] if layer.is_leaf else None
        return seconds, box(short, text, seconds, colour, [inner for _, inner in below], own)

    root = profile.layers[0]
    passes = [nest(root, "forward"), (profile.loss, box("loss", "loss", profile.loss, None, [], 0.0))]
    passes += [nest(root, "backward")]
    passes += [
        (seconds, box(name, name, seconds, None, [], 0.0))
        for name, seconds in (("optimizer", profile.optimizer), ("rest", profile.rest))
    ]
    whole = box(
        f"step: {profile.seconds * 1e3:.1f} ms", "step", profile.seconds, None, [inner for _, inner in passes], 0.0
    )
    return f'<div class="wide"><div class="icicle"><div class="row">{whole}</div></div></div>'

"""A profile in words and numbers: the rows of its tables, for a terminal and for a page alike."""

import math
from collections.abc import Sequence

from cnnmpi.profile.measure import LayerCost, Profile

MIB = 1 << 20
BAR = 12  # characters of a whole step
LEAST_OWN = 0.01  # share of the step from which on what a container does itself has a row


def headline(profile: Profile) -> str:
    """Return what the step's time is made of."""
    parts = {name: getattr(profile, name) for name in ("forward", "backward", "loss", "optimizer", "rest")}
    return ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in parts.items())


def rows_of(profile: Profile) -> list[LayerCost]:
    """Return the layers as a table shows them; what most containers do themselves, next to nothing, is one row."""
    small = [each for each in profile.layers if not each.is_leaf and each.seconds < LEAST_OWN * profile.seconds]
    rows = [each for each in profile.layers if each not in small]
    return [*rows, _together(small, "in containers")] if small else rows


def by_kind(profile: Profile) -> list[LayerCost]:
    """Return the sums over the layers of each class, the slowest first."""
    kinds = dict.fromkeys(layer.kind for layer in profile.layers)
    sums = [_together([layer for layer in profile.layers if layer.kind == kind], kind) for kind in kinds]
    return sorted(sums, key=lambda cost: -cost.seconds)


def _together(layers: Sequence[LayerCost], name: str) -> LayerCost:
    kept = [layer.kept for layer in layers if layer.kept is not None]
    peaks = [layer.peak for layer in layers if layer.peak is not None]
    return LayerCost(
        name=name,
        kind="",
        text="",
        is_leaf=False,
        forward=math.fsum(layer.forward for layer in layers),
        backward=math.fsum(layer.backward for layer in layers),
        forward_flops=math.fsum(layer.forward_flops for layer in layers),
        backward_flops=math.fsum(layer.backward_flops for layer in layers),
        kept=sum(kept) if kept else None,
        peak=max(peaks, default=None),
    )


def head(profile: Profile, first: str, bar: bool = True) -> list[str]:
    """Return the names of the columns."""
    memory = ["kept MiB", "peak MiB"] if profile.peak is not None else []
    bars = ["of the step".ljust(BAR)] if bar else []
    return [first, "forward", "backward", "ms", "share", *bars, "GFLOP", "GFLOP/s", "of peak", *memory]


def cells(costs: Sequence[LayerCost], profile: Profile, peak: float, bar: bool = True) -> list[list[str]]:
    """Return the rows of ``costs``, then of what is no layer's, and of the whole step."""
    memory = profile.peak is not None

    def line(name: str, cost: LayerCost | Profile | None, seconds: float) -> list[str]:
        passes = ["", ""] if cost is None else [f"{each * 1e3:.2f}" for each in (cost.forward, cost.backward)]
        part = seconds / profile.seconds
        bars = [("#" * round(part * BAR)).ljust(BAR)] if bar else []
        sizes = ["", ""] if cost is None else [_mib(cost.kept), _mib(cost.peak)]
        speed = _speed(cost.flops if cost else 0.0, seconds, peak)
        return [name, *passes, f"{seconds * 1e3:.2f}", f"{part:.1%}", *bars, *speed, *(sizes if memory else [])]

    return [
        *(line(" ".join(filter(None, (cost.name, cost.kind))), cost, cost.seconds) for cost in costs),
        *(line(name, None, getattr(profile, name)) for name in ("loss", "optimizer", "rest")),
        line("step", profile, profile.seconds),
    ]


def _speed(flops: float, seconds: float, peak: float) -> list[str]:
    if not flops:
        return ["", "", ""]
    speed = flops / seconds
    return [f"{flops / 1e9:.3f}", f"{speed / 1e9:.1f}", f"{speed / peak:.0%}"]


def _mib(size: int | None) -> str:
    return f"{size / MIB:.1f}" if size else ""

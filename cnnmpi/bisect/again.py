"""Computing two runs again, from where they last agreed, to the first numbers that are not the same."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cnnmpi import checkpoint
from cnnmpi.audit.ranks import together
from cnnmpi.audit.record import STATE, Record
from cnnmpi.audit.replay import Replay, State, differing, fits, same, unlike_here
from cnnmpi.common.arrays import Array
from cnnmpi.distributed import Ranks, UserError
from cnnmpi.train import Trainer
from cnnmpi.train.inputs import Data
from cnnmpi.train.state import Arrays, pack

MANY = 1000  # units in the last place; a larger difference is told as a number
SAID = ("loss", *STATE, "loss_scale")  # in an entry of a step


@dataclass(frozen=True)
class Side:
    """One of the two runs: its letter, what its folder says, its data, and settings such as the places of code."""

    letter: str
    record: Record
    data: Data
    given: dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A step, and the arrays that differ after it; ``text`` says how the first of them does."""

    step: int
    names: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        more = len(self.names) - 1
        others = f", and {more} other array{'s' * (more > 1)}" if more else ""
        return f"step {self.step}, {self.names[0]}: {self.text}{others}"


@dataclass
class Found:
    """What computing again has shown.

    ``first`` is where the two runs, as they are computed here, part; ``in_files`` where a checkpoint does not hold what
    is computed here. ``reproduced`` says of A and B whether the entry at which they part is what is computed here, and
    ``unlike`` what shaped them otherwise than here. ``goes_on`` says of one that is not what is computed here whether
    its later entries follow from its next checkpoint; None if that is not known.
    """

    begin: int
    first: Place | None = None
    in_files: dict[str, Place] = field(default_factory=dict)
    reproduced: dict[str, bool] = field(default_factory=dict)
    unlike: dict[str, list[str]] = field(default_factory=dict)
    goes_on: dict[str, bool | None] = field(default_factory=dict)


def parting(a: Record, b: Record) -> tuple[int | None, int | None, list[str]]:
    """Return the last step of which both ledgers say the same, the first of which they do not, and what differs there.

    None where there is no such step; steps of which only one has an entry are left out.
    """
    ours, theirs = a.said, b.said
    last = None
    for step in sorted(ours.keys() & theirs.keys()):
        if names := [name for name in SAID if ours[step].get(name) != theirs[step].get(name)]:
            return last, step, names
        last = step
    return last, None, []


class Again:
    """Computes both runs from the step ``last``, after which they agree, to the step ``first`` of which they do not."""

    def __init__(self, sides: tuple[Side, Side], last: int | None, first: int, ranks: Ranks, scratch: Path) -> None:
        self.sides, self.last, self.first, self.ranks, self.scratch = sides, last, first, ranks, scratch

    def find(self) -> Found:
        """Do it. Raises UserError where that is not possible here, and says why."""
        if self.last is None:
            return self._first_weights()
        begin, state = self._common_state(self.last)
        found = Found(begin)
        replays = {side.letter: self._replay(side, state) for side in self.sides}
        losses: dict[str, float] = {}
        for step in range(self.last + 1, self.first + 1):
            losses = {letter: replay.step() for letter, replay in replays.items()}
            a, b = (pack(replay.run.model, replay.run.optimizer) for replay in replays.values())
            found.first = found.first or compare(step, a, b)
            for side in self.sides:
                self._look_at_files(side, step, replays[side.letter].run, found)
        for side in self.sides:
            run = replays[side.letter].run
            found.reproduced[side.letter] = not differing(side.record.said[self.first], run.entry(losses[side.letter]))
            found.unlike[side.letter] = [*unlike_here(side.record, run, self.last, self.first)]
            if not found.reproduced[side.letter]:
                found.goes_on[side.letter] = self._goes_on(side)
        return found

    def _first_weights(self) -> Found:
        """Compare what both runs begin with: they agree nowhere."""
        begins = {side.record.opening["begins"] for side in self.sides}
        if begins != {self.first}:
            raise UserError("the ledgers do not begin at the same step, and agree at none")
        if self.first or any(side.record.opening.get("init") for side in self.sides):
            raise UserError("they differ where they begin, and not from a seed: compare what they began from")
        runs = [self._replay(side, None).run for side in self.sides]
        found = Found(0, compare(0, *(pack(run.model, run.optimizer) for run in runs)))
        for side, run in zip(self.sides, runs, strict=True):
            found.reproduced[side.letter] = not differing(side.record.said[0], run.entry())
            found.unlike[side.letter] = [*unlike_here(side.record, run, 0, 0)]
        return found

    def _common_state(self, step: int) -> tuple[int, State]:
        """Return the step from which was computed again, and the state of both runs after ``step``.

        It is computed once, from the newest checkpoint of either that leads there, or from the seed.
        """
        begins: list[tuple[int, Path | None, Side]] = []
        for side in self.sides:
            begins += [(saved.step, saved.path, side) for saved in side.record.files]
            if side.record.opening["begins"] == 0 and not side.record.opening.get("init"):
                begins.append((0, None, side))
        why = f"there is no checkpoint of step {step} or before, and neither run began from its seed"
        for begin, path, side in sorted(begins, key=lambda each: -each[0]):
            if begin > step:
                continue
            try:
                replay = self._replay(side, together(self.ranks, lambda path=path: path and State.load(path)))  # type: ignore[misc]
            except UserError as error:
                why = str(error)
                continue
            said = side.record.said
            wrong = differing(said[begin], replay.run.entry()) if begin in said else []
            while replay.run.step < step and not wrong:
                replay.step()
            wrong = wrong or differing(said[step], replay.run.entry())
            if not wrong:
                return begin, replay.state()
            why = f"step {replay.run.step}, up to which they agree, is computed here with other {', '.join(wrong)}"
            if here := unlike_here(side.record, replay.run, begin, step):
                raise UserError(f"{why}: other {', '.join(here)} than theirs")
        raise UserError(why)

    def _replay(self, side: Side, state: State | None) -> Replay:
        """Return the run as it goes on from ``state``, or from its seed."""
        replay = together(
            self.ranks, lambda: Replay(side.record, self.ranks, side.data, side.given, self.scratch, state)
        )
        if wrong := fits(side.record, replay.run):
            raise UserError(f"the ledger of {side.letter}: {wrong}")
        return replay

    def _look_at_files(self, side: Side, step: int, run: Trainer, found: Found) -> None:
        for saved in side.record.files:
            if saved.step == step and saved.path is not None and side.letter not in found.in_files:
                held, _ = checkpoint.load(saved.path)
                if place := compare(step, pack(run.model, run.optimizer), held):
                    found.in_files[side.letter] = place

    def _goes_on(self, side: Side) -> bool | None:
        """Return whether the entry after the next checkpoint of a run follows from it."""
        said = side.record.said
        for saved in sorted(side.record.files, key=lambda each: each.step):
            later = [step for step in said if step > saved.step]
            if saved.step >= self.first and saved.path is not None and later:
                try:
                    path = saved.path
                    replay = self._replay(side, together(self.ranks, lambda path=path: State.load(path)))  # type: ignore[misc]
                except UserError:  # of other shapes: it was not written by this run
                    continue
                loss = 0.0
                while replay.run.step < min(later):
                    loss = replay.step()
                return not differing(said[min(later)], replay.run.entry(loss))
        return None


def compare(step: int, a: Arrays, b: Arrays) -> Place | None:
    """Return how the arrays of two runs differ after ``step``; None if they do not."""
    names = [name for name in a.keys() | b.keys() if name not in a or name not in b or not same(a[name], b[name])]
    ordered = sorted(names, key=lambda name: [*a, *b].index(name))
    if not ordered:
        return None
    first = ordered[0]
    if first not in a or first not in b or a[first].shape != b[first].shape or a[first].dtype != b[first].dtype:
        shapes = [f"{arrays[first].dtype} {arrays[first].shape}" if first in arrays else "none" for arrays in (a, b)]
        return Place(step, tuple(map(_plain, ordered)), f"{shapes[0]} and {shapes[1]}")
    ours, theirs = (np.ascontiguousarray(arrays[first]).ravel() for arrays in (a, b))
    kind = np.int32 if ours.dtype.itemsize == 4 else np.int64
    wrong = np.flatnonzero(ours.view(kind) != theirs.view(kind))
    units = np.abs(_ordered(ours[wrong]) - _ordered(theirs[wrong]).astype(np.float64)).max()
    size = "one unit in the last place" if units == 1 else f"{units:,.0f} units in the last place"
    if units == 0:
        size = "the sign of a zero"
    if units > MANY:
        size = f"{np.abs(ours - theirs.astype(np.float64)).max():.2g}"
    count = (
        f"{len(wrong)} of {a[first].size} numbers by up to" if len(wrong) > 1 else f"1 of {a[first].size} numbers by"
    )
    text = f"{count} {size}, the first at {_index(a[first], int(wrong[0]))}"
    return Place(step, tuple(map(_plain, ordered)), text)


def _ordered(numbers: Array) -> Array:
    """Return floats (N,) as whole numbers that are one apart where they are neighbours; of both zeros 0."""
    size = numbers.dtype.itemsize
    bits = numbers.view(np.int32 if size == 4 else np.int64).astype(np.int64)
    return np.where(bits < 0, np.int64(-(1 << (8 * size - 1))) - bits, bits)


def _index(array: Array, flat: int) -> tuple[int, ...]:
    return tuple(int(index) for index in np.unravel_index(flat, array.shape))


def _plain(name: str) -> str:
    return name.removeprefix("model/")

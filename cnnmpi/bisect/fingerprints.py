"""Comparing two fingerprints: the first call that takes the same and gives something else."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from cnnmpi.audit.record import LARGEST
from cnnmpi.common.lines import LONGEST, Line, each_line
from cnnmpi.distributed import UserError
from cnnmpi.train.fingerprint import FINGERPRINT, VERSION

Calls = dict[int | None, list[bytes]]  # of a step: {shard: the lines of its calls in order}; None is of all shards
MOST = 1 << 28  # bytes of a step; a file with more is none of ours


@dataclass(frozen=True)
class Parting:
    """Where two fingerprints part: in ``step``, at ``place`` of these ``shards``, in what it takes or ``gives``.

    ``follows`` says that both have the step before, and that it is the same.
    """

    step: int
    place: str
    shards: tuple[int, ...]  # none for what is of all shards
    all_shards: bool
    gives: bool
    names: tuple[str, ...]
    follows: bool = False

    def __str__(self) -> str:
        names = ", ".join(self.names)
        where = "" if not self.shards else " of all shards" if self.all_shards else f" of {_listed(self.shards)}"
        if not self.names:
            return f"step {self.step}{where}: other calls, from {self.place} on"
        if self.gives:
            return f"step {self.step}, {self.place}{where}: takes the same, and gives other {names}"
        before = ", and all before it is the same" if self.follows or not self._of_weights else ""
        return f"step {self.step}, {self.place}{where}: takes other {names}{before}"

    @property
    def _of_weights(self) -> bool:
        """Whether weights or statistics differ, which a layer finds as the update before has left them."""
        passed = {"input", "dout", "logits", "targets", "gradient", "statistics", "sums", "lr"}
        return not self.gives and bool(self.names) and not set(self.names) & passed

    def points_to(self) -> str:
        """Return what that means, in words."""
        some = "" if self.all_shards or not self.shards else f", on the rank of {_listed(self.shards)}"
        if not self.names:
            return "another network, or another number of shards"
        if self.place == "batch":
            return f"the data, their augmentation, or how they were read{some}"
        if self.place == "update":
            return (
                "another learning rate" if not self.gives else "settings of the optimizer, what computes it, or memory"
            )
        if self.place == "reduce":
            return "the sum over the ranks: their network, or how they add"
        if self.gives:
            return f"what computes this: kernels, versions, code, or a failing host{some}"
        if not self._of_weights:
            return f"what is computed between two layers: code of a network's own, or memory that was overwritten{some}"
        if not self.follows:
            return f"a step before {self.step}: compare fingerprints of earlier ones"
        return f"weights that changed after the update of step {self.step - 1}: by other code, or failing memory{some}"


def first_parting(a: Path, b: Path) -> tuple[Parting | None, int]:
    """Return where two files part, None if they do not, and how many steps both have. Raises UserError."""
    compared, before = 0, 0
    for step, ours, theirs in _both(_steps(a), _steps(b)):
        compared += 1
        if (found := _parting(step, ours, theirs)) is not None:
            return replace(found, follows=before == step - 1), compared
        before = step
    return None, compared


def head(path: Path) -> Line:
    """Return the first line of a fingerprint: what shapes its run. Raises UserError for another file."""
    try:
        first = next(each_line(path), (b"", None))[1]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if first is None or first.get("fingerprint") != VERSION:
        raise UserError(f"{path}: not a fingerprint of version {VERSION}")
    return first


def path_in(folder: Path) -> Path | None:
    """Return the fingerprint in the folder of a run; None without."""
    return folder / FINGERPRINT if (folder / FINGERPRINT).exists() else None


def _steps(path: Path) -> Iterator[tuple[int, Calls]]:
    """Yield each step of a file, and its calls; of what a kill has cut off, only whole steps."""
    head(path)
    step, calls, size, done = 0, Calls(), 0, 0
    for number, (blob, line) in enumerate(each_line(path), 1):
        if number == 1:
            continue
        if line is None and not blob.endswith(b"\n") and len(blob) < LONGEST:
            return
        if line is None or not _is_call(line):
            raise UserError(f"{path}: line {number} is no call: the file is damaged")
        if line["step"] <= done or line["step"] < step:
            raise UserError(f"{path}: line {number} goes back to step {line['step']}")
        if line["step"] != step:
            step, calls, size = line["step"], Calls(), 0
        size += len(blob)
        if size > MOST:
            raise UserError(f"{path}: step {step} has more than {MOST >> 20} MiB of calls")
        calls.setdefault(line["shard"], []).append(blob)
        if line["place"] == "update":
            done = step
            yield step, calls


def _is_call(line: Line) -> bool:
    return (
        type(line.get("step")) is int
        and 0 < line["step"] < LARGEST
        and (line.get("shard") is None or type(line.get("shard")) is int)
        and isinstance(line.get("place"), str)
        and isinstance(line.get("takes"), dict)
        and isinstance(line.get("gives"), dict)
    )


def _both(a: Iterator[tuple[int, Calls]], b: Iterator[tuple[int, Calls]]) -> Iterator[tuple[int, Calls, Calls]]:
    """Yield the steps that are in both, which are in order."""
    ours, theirs = next(a, None), next(b, None)
    while ours and theirs:
        if ours[0] == theirs[0]:
            yield ours[0], ours[1], theirs[1]
            ours, theirs = next(a, None), next(b, None)
        elif ours[0] < theirs[0]:
            ours = next(a, None)
        else:
            theirs = next(b, None)


def _parting(step: int, ours: Calls, theirs: Calls) -> Parting | None:
    """Return the earliest difference of any shard, else of what follows all shards."""
    shards = sorted({shard for shard in (*ours, *theirs) if shard is not None})
    first = {shard: _difference(ours.get(shard, []), theirs.get(shard, [])) for shard in (*shards, None)}
    different = {shard: found for shard, found in first.items() if found is not None}
    of_shards = {shard: found for shard, found in different.items() if shard is not None}
    if not different:
        return None
    index, place, gives, names = min(of_shards.values()) if of_shards else different[None]
    alike = tuple(shard for shard, found in of_shards.items() if found == (index, place, gives, names))
    return Parting(step, place, alike, len(alike) == len(shards), gives, names)


def _difference(ours: list[bytes], theirs: list[bytes]) -> tuple[int, str, bool, tuple[str, ...]] | None:
    """Return (number of the call, place, whether it gives other values, their names) of the first difference."""
    for index, (blob, other_blob) in enumerate(zip_longest(ours, theirs)):
        if blob == other_blob:
            continue
        if not blob or not other_blob:
            return index, json.loads(blob or other_blob)["place"], False, ()
        call, other = json.loads(blob), json.loads(other_blob)
        if call["place"] != other["place"]:
            return index, call["place"], False, ()
        for gives, kind in ((False, "takes"), (True, "gives")):
            names = [*call[kind], *(other[kind].keys() - call[kind].keys())]
            if wrong := tuple(name for name in names if call[kind].get(name) != other[kind].get(name)):
                return index, call["place"], gives, wrong
    return None


def _listed(shards: tuple[int, ...]) -> str:
    return f"shard{'s' * (len(shards) > 1)} {', '.join(map(str, shards))}"

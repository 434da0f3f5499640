"""Find where two runs part that should agree: the step, the array, and what that points to. On any number of ranks.

python -m cnnmpi.bisect runs/a runs/b
python -m cnnmpi.bisect runs/a runs/b --data data/cifar10.h5 --other-data other/cifar10.h5

Where the folders hold fingerprints (cnnmpi.train --fingerprint FROM:TO), the first layer that computes otherwise.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from cnnmpi.audit.compute import data_of_run, scratch_folder
from cnnmpi.audit.record import Record, read
from cnnmpi.bisect import fingerprints
from cnnmpi.bisect.again import Again, Found, Side, parting
from cnnmpi.bisect.shaping import PLATFORM, changes, differences, other_data
from cnnmpi.console import command, complain, printable, table
from cnnmpi.distributed import Ranks, RemoteError, UserError, failing_together, start
from cnnmpi.train.inputs import Data
from cnnmpi.train.ledger import LEDGER

PROGRAM = "cnnmpi.bisect"
AGREE, PART, CANNOT = 0, 1, 2  # exit codes
FAULTS = {  # of a run that is not what it says: whether what comes later follows from its next checkpoint
    True: "a single fault, as of a host's memory: what comes after it is right again",
    False: "other code or settings than its ledger names, or a host that goes on failing",
    None: "a failing host, or other code or settings than its ledger names",
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Compare as ``argv`` says (the command line's if None), on all ranks. Returns 0, 1 or 2: see ``run``."""
    try:
        ranks = start()
    except UserError as error:
        complain(PROGRAM, error)
        return CANNOT
    code = CANNOT
    with failing_together(ranks):
        code = tyro.cli(functools.partial(run, ranks), args=argv, prog=f"python -m {PROGRAM}", description=__doc__)
    return code


def run(
    ranks: tyro.conf.Suppress[Ranks],
    a: Annotated[Path, tyro.conf.Positional],
    b: Annotated[Path, tyro.conf.Positional],
    /,
    data: str | None = None,
    other_data: str | None = None,
    model: str | None = None,
    other_model: str | None = None,
    loss: str | None = None,
    other_loss: str | None = None,
    augment: str | None = None,
    other_augment: str | None = None,
    threads: int = 0,
) -> int:
    """Compare two runs. Returns 0: they agree as far as both have come; 1: they part; 2: that cannot be told.

    Args:
        ranks: who takes part in computing again.
        a: folder of the first run; nothing is written there.
        b: folder of the second run.
        data: the data of the first run, if they are not where it had them.
        other_data: those of the second, if they are others.
        model: the network of runs of your own: FILE.py:CLASS or MODULE:CLASS.
        other_model: that of the second, if it is another.
        loss: their loss, if that is your own.
        other_loss: that of the second, if it is another.
        augment: their augmentation, if that has functions of your own.
        other_augment: that of the second, if it is another.
        threads: threads of each rank; 0 shares the cores out to the ranks.

    """
    comparison = Comparison(ranks, a, b)
    code = comparison.ledgers(
        {"data": data, "model": model, "loss": loss, "augment": augment},
        {"data": other_data, "model": other_model, "loss": other_loss, "augment": other_augment},
        threads,
    )
    return max(code, ranks.on_rank0(comparison.fingerprints), key=(AGREE, CANNOT, PART).index)


class Comparison:
    """Compares the runs in two folders, and prints what it finds on rank 0."""

    def __init__(self, ranks: Ranks, a: Path, b: Path) -> None:
        self.ranks, self.folders = ranks, (a, b)
        self.prints = ranks.on_rank0(lambda: [fingerprints.path_in(folder) for folder in self.folders])

    def say(self, text: str) -> None:
        """Print a line, or a table, on rank 0."""
        if self.ranks.rank == 0:
            print("\n".join(map(printable, text.split("\n"))), flush=True)

    def ledgers(self, given: dict[str, str | None], other: dict[str, str | None], threads: int) -> int:
        """Compare the ledgers, and compute what lies between where they agree and where not. Returns an exit code."""
        have = self.ranks.on_rank0(lambda: [(folder / LEDGER).exists() for folder in self.folders])
        if not all(have) and all(self.prints):
            return AGREE  # by fingerprints alone
        a, b = self.ranks.on_rank0(lambda: [_readable(folder) for folder in self.folders])
        last, first, names = parting(a, b)
        self._tell_shaping(a, b, first)
        if first is None:
            if last is None:
                self.say("the ledgers have no step in common: they cannot be compared")
                return CANNOT
            self.say(f"AGREE: the ledgers say the same up to step {last}, as far as both have come")
            return AGREE
        agree = f"they agree up to step {last} and" if last is not None else "they agree nowhere, and"
        self.say(f"{agree} part at step {first}: other {', '.join(names)}")
        own = {name: value for name, value in given.items() if value is not None}
        owns = (own, own | {name: value for name, value in other.items() if value is not None})
        try:
            sides = self._sides((a, b), owns, threads)
            with scratch_folder(self.ranks) as scratch:
                found = Again(sides, last, first, self.ranks, scratch).find()
        except (UserError, RemoteError) as error:  # of rank 0, or of all
            self.say(f"NOT COMPUTED AGAIN: {error}")
            self._advise(a, b, last, first)
            return PART
        self._tell(found, a, b, last, first)
        return PART

    def fingerprints(self) -> int:
        """Compare the fingerprints of both folders, where both have one. Returns an exit code."""
        a, b = self.prints
        if a is None or b is None:
            return AGREE
        shaped = [*differences(fingerprints.head(a), fingerprints.head(b))]
        if shaped and not all((folder / LEDGER).exists() for folder in self.folders):
            self.say(table(("what shapes them", "A", "B"), shaped))
        found, steps = fingerprints.first_parting(a, b)
        if not steps:
            self.say("fingerprints: they have no step in common")
            return CANNOT
        if found is None:
            self.say(f"fingerprints: the same, in {steps} steps")
            return AGREE
        self.say(f"fingerprints: {found}")
        self.say(f"which points to {found.points_to()}")
        return PART

    def _tell_shaping(self, a: Record, b: Record, first: int | None) -> None:
        rows = [*differences(a.opening, b.opening)]
        if rows:
            self.say(table(("what shapes them", "A", "B"), rows))
        elif first is not None:
            self.say("what shapes them is the same at their beginning")
        for letter, record in (("A", a), ("B", b)):
            for step, name, before, afterwards in changes(record, max(record.said)):
                self.say(f"{letter}: from step {step} on, {name} is {afterwards} and no longer {before}")

    def _sides(
        self, records: tuple[Record, Record], owns: tuple[dict[str, str], dict[str, str]], threads: int
    ) -> tuple[Side, Side]:
        """Return the two runs with their data. Raises UserError where those are not here."""
        datas: list[Data] = []
        for letter, record, own in zip("AB", records, owns, strict=True):
            if datas and record.opening["data_sha256"] == datas[0].sha256:
                datas.append(datas[0])
                continue
            flag = "--data" if letter == "A" else "--other-data"
            data = data_of_run(record, self.ranks, own.get("data"), flag)
            if data is None:
                raise UserError(f"data of {letter}: {record.rows[-1][2]}: name its own by {flag}")
            datas.append(data)
        if datas[0] is not datas[1]:
            self.say("data: " + self.ranks.on_rank0(lambda: other_data(datas[0], datas[1])))
        sides = [
            Side(letter, record, data, {k: v for k, v in own.items() if k != "data"} | {"threads": threads})
            for letter, record, data, own in zip("AB", records, datas, owns, strict=True)
        ]
        return sides[0], sides[1]

    def _tell(self, found: Found, a: Record, b: Record, last: int | None, first: int) -> None:
        """Say what computing again has shown, and what it points to."""
        begins = "from the seed" if not found.begin else f"from step {found.begin}"
        here = [
            f"{letter}'s entry is {'' if right else 'not '}what it gives" for letter, right in found.reproduced.items()
        ]
        self.say(f"computed again {begins}: {', '.join(here)}")
        shaped = [name for name, *_ in differences(a.at(last or 0), b.at(last or 0))]
        wrong = [letter for letter, right in found.reproduced.items() if not right]
        if not wrong:
            self.say(f"the first difference: {found.first}")
            own = [name for name in shaped if name.partition(" ")[0] not in PLATFORM] or shaped
            self.say(f"which points to {', '.join(own) or 'nothing that the ledgers name'}")
            return
        if found.first is not None:
            self.say(f"as they are computed here, the first difference: {found.first}")
        for letter in wrong:
            # what is otherwise here does not matter where it did not for the other run
            unlike = [
                name
                for name in found.unlike[letter]
                if len(wrong) == 2 or a.at(first).get(name) != b.at(first).get(name)
            ]
            if not unlike and letter in found.in_files:
                self.say(f"the first difference that {letter}'s files show: {found.in_files[letter]}")
            if alone := [name for name in shaped if name.partition(" ")[0] in unlike]:
                self.say(f"which points to {', '.join(alone)}: {letter} was computed by others than are here")
            elif unlike:
                self.say(f"{letter} cannot be judged here, where {', '.join(unlike)} are not what they were")
            else:
                self.say(f"which points to {letter}: {FAULTS[found.goes_on.get(letter)]}")
        self._advise(a, b, last, first)

    def _advise(self, a: Record, b: Record, last: int | None, first: int) -> None:
        """Say how to come closer, where no fingerprint tells more."""
        if not all(self.prints):
            low = (last or 0) + 1
            self.say(
                f"to see the step and the layer: on each machine, resume a copy of the run from before step {low}, or "
                f"start it, with --fingerprint {low}:{first} --max-steps {first}; and compare the two folders"
            )


def _readable(folder: Path) -> Record:
    """Return what the folder of a run says. Raises UserError where its ledger does not hold together."""
    record = read(folder)
    for what, verdict, words in record.rows:
        if what == "ledger" and verdict == "WRONG":
            raise UserError(f"{folder / LEDGER}: {words}: python -m cnnmpi.audit {folder} tells more")
    return record


if __name__ == "__main__":
    sys.exit(main())

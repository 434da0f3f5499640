"""Find where two runs part that should agree: the step, the array, and what that points to. On any number of ranks.

python -m cnnmpi.bisect runs/a runs/b
python -m cnnmpi.bisect runs/a runs/b --data data/cifar10.h5 --other-data other/cifar10.h5

Where the folders hold fingerprints (cnnmpi.train --fingerprint FROM:TO), the first layer that computes otherwise.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from cnnmpi.audit.ranks import CANNOT, on_all_ranks, together
from cnnmpi.audit.record import UNKNOWN, Record, read
from cnnmpi.audit.replay import data_of_run, scratch_folder
from cnnmpi.audit.shaping import changes, differences
from cnnmpi.bisect import fingerprints
from cnnmpi.bisect.again import Again, Found, Side, parting
from cnnmpi.bisect.data import other_data
from cnnmpi.console import command, printable, table
from cnnmpi.distributed import Ranks, UserError
from cnnmpi.train.inputs import Data
from cnnmpi.train.ledger import LEDGER

PROGRAM = "cnnmpi.bisect"
AGREE, PART = 0, 1  # exit codes, besides CANNOT
PLATFORM = ("kernels", "versions", "sources_sha256")  # where these differ, settings and data may be alike
FIRST = ("seed", "model", "model_options", "network", "frozen", "init", "code")  # what shapes the first weights
FAULTS = {  # of a run that is not what it says: whether what comes later follows from its next checkpoint
    True: "a single fault, as of a host's memory: what comes after it is right again",
    False: "other code or settings than its ledger names, or a host that goes on failing",
    None: "a failing host, or other code or settings than its ledger names",
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Compare as ``argv`` says (the command line's if None), on all ranks. Returns 0, 1 or 2: see ``run``."""
    return on_all_ranks(run, argv, PROGRAM, __doc__)


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
        owns = (
            own,
            {name: value for name, value in own.items() if name != "data"}
            | {name: value for name, value in other.items() if value is not None},
        )
        try:
            sides = together(self.ranks, lambda: self._sides((a, b), owns, threads))
            with scratch_folder(self.ranks) as scratch:
                found = Again(sides, last, first, self.ranks, scratch).find()
        except UserError as error:  # of all ranks: see together()
            self.say(f"NOT COMPUTED AGAIN: {error}")
            self._advise(last, first)
            return PART
        begins = "from the seed" if not found.begin else f"from step {found.begin}"
        here = [
            f"{letter}'s entry is {'' if right else 'not '}what it gives" for letter, right in found.reproduced.items()
        ]
        self.say(f"computed again {begins}: {', '.join(here)}")
        for line in judged(found, a, b, first):
            self.say(line)
        if not all(found.reproduced.values()):
            self._advise(last, first)
        return PART

    def fingerprints(self) -> int:
        """Compare the fingerprints of both folders, where both have one. Returns an exit code."""
        a, b = self.prints
        if a is None or b is None:
            return AGREE
        shaped = [*differences(fingerprints.head(a), fingerprints.head(b))]
        have = [(folder / LEDGER).exists() for folder in self.folders]
        if shaped and not all(have):
            self.say(table(("what shapes them", "A", "B"), shaped))
        found, steps = fingerprints.first_parting(a, b)
        if not steps:
            self.say("fingerprints: they have no step in common")
            return AGREE if all(have) else CANNOT
        if found is None:
            self.say(f"fingerprints: the same, in {steps} step{'s' * (steps > 1)}")
            return AGREE
        self.say(f"fingerprints: {found}")
        if shaped:
            self.say(f"what shapes them is not the same, {', '.join(name for name, *_ in shaped)}: look there first")
        self.say(f"which {'by itself ' * bool(shaped)}points to {found.points_to()}")
        return PART

    def _tell_shaping(self, a: Record, b: Record, first: int | None) -> None:
        rows = [*differences(a.opening, b.opening)]
        if rows:
            self.say(table(("what shapes them", "A", "B"), rows))
        elif first is not None:
            self.say("what shapes them is the same at their beginning")
        for letter, record in (("A", a), ("B", b)):
            for step, name, before, afterwards in changes(record):
                self.say(f"{letter}: from step {step} on, {name}: {afterwards} instead of {before}")
            for what, verdict, words in record.rows:
                if verdict == "WRONG" or (what == "its end" and verdict == UNKNOWN):
                    self.say(f"{letter}: {what}: {words}")

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

    def _advise(self, last: int | None, first: int) -> None:
        """Say how to come closer, where no fingerprint tells more."""
        if not all(self.prints):
            low = (last or 0) + 1
            self.say(
                f"to see the step and the layer: on each machine, resume a copy of the run from before step {low}, or "
                f"start it, with --fingerprint {low}:{first} --max-steps {first}; and compare the two folders"
            )


def judged(found: Found, a: Record, b: Record, first: int) -> list[str]:
    """Return in lines where two runs part, which have been computed again up to the step ``first``, and why."""
    parts = (found.first.step if found.first else first) - 1
    names = [name for name, *_ in differences(a.at(parts), b.at(parts))]
    platform = [name for name in names if name.partition(" ")[0] in PLATFORM]
    own = [name for name in names if name not in platform]
    if parts < 0:
        own = [name for name in own if name.partition(" ")[0] in FIRST] or own
    wrong = [letter for letter, right in found.reproduced.items() if not right]
    if not wrong:
        causes = own or platform or ["nothing that the ledgers name"]
        return [f"the first difference: {found.first}", f"which points to {', '.join(causes)}"]
    lines = []
    if found.first is not None:
        lines = [f"as they are computed here, the first difference: {found.first}"]
        lines += [f"which points to {', '.join(own)}"] if own else []
    for letter in wrong:
        # what is otherwise here does not matter where it did not for the other run
        alone = len(wrong) == 2
        unlike = [name for name in found.unlike[letter] if alone or name in ("reduction", *_heads(names))]
        if unlike and set(unlike) <= {*_heads(platform), "reduction"} and not alone:
            lines.append(f"which points to {', '.join(unlike)}: {letter} was computed otherwise than here")
        elif unlike:
            lines.append(f"{letter} cannot be judged here: other {', '.join(unlike)}")
        else:
            if letter in found.in_files:
                lines.append(f"the first difference that {letter}'s files show: {found.in_files[letter]}")
            lines.append(f"which points to {letter}: {FAULTS[found.goes_on.get(letter)]}")
    return lines


def _heads(names: Sequence[str]) -> list[str]:
    """Return of "versions numpy" the "versions"."""
    return [name.partition(" ")[0] for name in names]


def _readable(folder: Path) -> Record:
    """Return what the folder of a run says. Raises UserError where its ledger does not hold together."""
    record = read(folder)
    for what, verdict, words in record.rows:
        if what == "ledger" and verdict == "WRONG":
            raise UserError(f"{folder / LEDGER}: {words}: python -m cnnmpi.audit {folder} tells more")
    return record


if __name__ == "__main__":
    sys.exit(main())

"""Check a run by computing parts of it again, on any number of ranks: its ledger, its checkpoints and its data.

python -m cnnmpi.audit runs/simplecnn-0 --data data/cifar10.h5
mpirun -n 4 python -m cnnmpi.audit runs/simplecnn-0 --segments 3 --seed 7
"""

import functools
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from cnnmpi.audit.compute import check_state, compute
from cnnmpi.audit.ranks import CANNOT, on_all_ranks, together
from cnnmpi.audit.record import UNKNOWN, Record, read
from cnnmpi.audit.replay import Replay, State, data_of_run, fits, scratch_folder, unlike_here
from cnnmpi.audit.shaping import changes
from cnnmpi.console import command, printable, table
from cnnmpi.distributed import Ranks, UserError

PROGRAM = "cnnmpi.audit"
FOUND = 1  # exit code: something is not as the ledger says


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Audit as ``argv`` says (the command line's if None), on all ranks. Returns 0, 1 or 2: see ``run``."""
    return on_all_ranks(run, argv, PROGRAM, __doc__)


def run(
    ranks: tyro.conf.Suppress[Ranks],
    folder: Annotated[Path, tyro.conf.Positional],
    /,
    data: str | None = None,
    segments: int = 5,
    seed: int | None = None,
    init: Path | None = None,
    model: str | None = None,
    loss: str | None = None,
    augment: str | None = None,
    threads: int = 0,
) -> int:
    """Check a run. Returns 0: all is as its ledger says; 1: something is not; 2: that cannot be told here.

    Args:
        ranks: who takes part.
        folder: of the run; nothing is written there.
        data: the data, if they are not where the run had them.
        segments: how many parts of the run, drawn at random, are computed again; 0 computes none, -1 all.
        seed: of that draw; drawn itself, and told, unless given.
        init: the checkpoint that the run began from, if it did by --init.
        model: the network of a run of your own: FILE.py:CLASS or MODULE:CLASS.
        loss: its loss, if that is your own.
        augment: its augmentation, if that has functions of your own.
        threads: threads of each rank; 0 shares the cores out to the ranks.

    """
    begun = time.monotonic()
    if seed is not None and seed < 0:
        raise UserError(f"--seed must be a number of at least 0, got {seed}")
    seed = ranks.on_rank0(lambda: secrets.randbits(32)) if seed is None else seed
    record = ranks.on_rank0(lambda: read(folder, init))
    other: dict[str, str] = {}
    if "WRONG" not in record.verdicts():
        own = {"model": model, "loss": loss, "augment": augment, "init": init and str(init)}
        given = {name: value for name, value in own.items() if value is not None}
        other = _recompute(record, ranks, data, segments, seed, given | {"threads": threads})
    found = record.verdicts()
    if ranks.rank == 0:
        print(table(("checked", "", ""), [tuple(map(printable, row)) for row in record.rows]))
        for step, name, before, afterwards in changes(record) if record.chain else ():
            print(printable(f"note: from step {step} on, {name}: {afterwards} instead of {before}"))
        for name, words in other.items():
            print(printable(f"note: not as in the run: {name}: {words}"))
        if "WRONG" in found:
            verdict = "WRONG: the run is not what its ledger says"
        elif UNKNOWN in found:
            verdict = "NOT TOLD HERE: nothing was found to be wrong, but see above for what could not be checked"
        elif any(what.startswith("steps") for what, *_ in record.rows):
            verdict = "SOUND: all that was checked is as the ledger says"
        else:
            verdict = "SOUND as far as it was read: nothing was computed again"
        print(f"{verdict} (seed {seed}, {ranks.size} rank{'s' * (ranks.size > 1)}, {time.monotonic() - begun:.0f} s)")
    return FOUND if "WRONG" in found else CANNOT if UNKNOWN in found else 0


def _recompute(
    record: Record, ranks: Ranks, spec: str | None, segments: int, seed: int, given: dict[str, Any]
) -> dict[str, str]:
    """Check the data, then compute parts of the run again; return what shaped it otherwise than here."""
    data = data_of_run(record, ranks, spec)
    if data is None:
        return {}
    parts = record.segments()
    drawn = np.random.default_rng(seed).permutation(len(parts))[: segments if segments >= 0 else len(parts)].tolist()
    # and those that end in a checkpoint for which only this can vouch
    chosen = [part for index, part in enumerate(parts) if index in drawn or part[1].step not in record.said]
    with scratch_folder(ranks) as scratch:
        make = functools.partial(Replay, record, ranks, data, given, scratch)
        replay = together(ranks, make)
        other = unlike_here(record, replay.run, record.opening["begins"], record.opening["begins"] + 1)
        if wrong := fits(record, replay.run):
            record.note("ledger", wrong)
            return other
        if "network" in other:
            record.rows.append(("parts", UNKNOWN, "another network cannot compute them again"))
            return other
        for saved in record.files:
            assert saved.path is not None
            if wrong := check_state(replay, saved):
                record.note(str(saved.path.relative_to(record.folder)), wrong)
        if "WRONG" in record.verdicts():
            return other
        for first, last in chosen:
            what, path = f"steps {first.step}-{last.step}", first.path
            try:
                replay = together(ranks, lambda path=path: make(State.load(path) if path else None))  # type: ignore[misc]
            except UserError as error:
                record.rows.append((what, UNKNOWN, str(error)))
                continue
            found = compute(replay, last)
            unlike = unlike_here(record, replay.run, first.step, found.step or last.step)
            other |= unlike
            if found.difference and unlike:
                words = f"other bits from step {found.step} on; losses differ by {found.deviation:.2g} of them at most"
                record.rows.append((what, UNKNOWN, words))
            elif found.difference and found.step == 0 and record.init:
                raise UserError(f"--init {record.init}: the run did not begin from these weights")
            else:
                entries = "entry" if found.compared == 1 else "entries"
                record.note(what, found.difference, f"{found.compared} {entries} computed again")
                if not found.difference:
                    _vouch(record, last.step)
    if parts:
        record.rows.append(("parts", "ok", f"{len(chosen)} of {len(parts)} computed again"))
    else:
        record.rows.append(("parts", UNKNOWN, "there is none that could be computed again"))
    return other


def _vouch(record: Record, step: int) -> None:
    """Write down that the checkpoints of ``step``, of which there is no entry, are what was computed."""
    names = [str(saved.path.relative_to(record.folder)) for saved in record.files if saved.path and saved.step == step]
    for index, (what, verdict, _) in enumerate(record.rows):
        if what in names and verdict == UNKNOWN:
            record.rows[index] = (what, "ok", f"step {step}, as computed again")


if __name__ == "__main__":
    sys.exit(main())

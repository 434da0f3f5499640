"""Commands that compute on all ranks: how they begin and end, and how the ranks fail together on the way."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from cnnmpi.checkpoint import CheckpointError
from cnnmpi.console import complain
from cnnmpi.distributed import ARRIVE_S, Ranks, RemoteError, UserError, failing_together, start

CANNOT = 2  # exit code: it cannot be told here
Made = TypeVar("Made")


def on_all_ranks(run: Callable[..., int], argv: Sequence[str] | None, program: str, description: Any) -> int:
    """Call ``run(ranks, ...)`` as ``argv`` says (the command line's if None), on all ranks. Returns its exit code.

    An error ends in CANNOT, also one that nobody foresaw: it is no verdict.
    """
    try:
        ranks = start()
    except UserError as error:
        complain(program, error)
        return CANNOT
    with failing_together(ranks, crash=CANNOT):
        return tyro.cli(functools.partial(run, ranks), args=argv, prog=f"python -m {program}", description=description)
    raise AssertionError("failing_together() has ended the program")


def together(ranks: Ranks, make: Callable[[], Made]) -> Made:
    """Return what ``make`` returns; where it fails on any rank, raise UserError on all of them.

    A rank that fails alone, and leaves the others waiting, raises its error after ARRIVE_S, which ends all.
    """
    failed: Exception | None = None
    made: Made | None = None
    try:
        made = make()
    except (UserError, RemoteError, CheckpointError) as error:
        failed = error
    if not ranks.all_arrive(ARRIVE_S if failed else math.inf) and failed:
        raise failed
    told = ranks.gather((failed is not None, "" if isinstance(failed, RemoteError | None) else str(failed)))
    if any(wrong for wrong, _ in told):
        raise UserError(next((text for _, text in told if text), "another rank failed"))
    return made  # type: ignore[return-value]

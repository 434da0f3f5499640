"""Show what runs have learned, in one page for a browser.

python -m cnnmpi.report runs/simplecnn-0                          # writes runs/simplecnn-0/report.html
python -m cnnmpi.report runs/a runs/b runs/c --out compared.html
"""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from cnnmpi.checkpoint import CheckpointError, write_atomically
from cnnmpi.console import command, complain, printable
from cnnmpi.distributed import UserError
from cnnmpi.report import Run, one_run, read_run, several_runs
from cnnmpi.train.closing import PAGE, as_judged, first_filters
from cnnmpi.train.judging import data_of, judge
from cnnmpi.train.setup import load_trained

PROGRAM = "cnnmpi.report"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Report as ``argv`` says (the command line's if None). Returns the exit code."""
    try:
        tyro.cli(run, args=argv, prog=f"python -m {PROGRAM}")
    except (CheckpointError, UserError) as error:
        complain(PROGRAM, error)
        return 2
    return 0


def run(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    out: Path | None = None,
    data: str | None = None,
    model: str | None = None,
    threads: int = 0,
) -> None:
    """Write a page that shows a run, or compares several.

    Args:
        runs: folders of runs. A damaged or half-written one is shown as far as it can be read.
        out: the page; report.html in the folder of a single run, compared.html for several.
        data: the data, if they are not where the run had them: whatever cnnmpi.evaluate takes, or none.
        model: the network of a run of your own: FILE.py:CLASS or MODULE:CLASS.
        threads: threads to evaluate with; 0 uses all cores.

    """
    if not runs:
        raise UserError("name the folder of at least one run")
    found = []
    for path in runs:
        try:
            found.append(read_run(path))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: name the folder of a run") from None
    _tell_apart(found)
    if len(found) == 1:
        _judge(found[0], data, model, threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fonts and folders: nothing about the runs
        html = one_run(found[0]) if len(found) == 1 else several_runs(found)
    page = out or (runs[0] / PAGE if len(found) == 1 else Path("compared.html"))
    write_atomically(page, html.encode(errors="backslashreplace"))
    for each in found:
        for note in each.notes:
            print(printable(f"note: {each.path}: {note}"), file=sys.stderr)
    print(printable(f"{page}: {len(html) >> 10} KiB"))


def _tell_apart(runs: list[Run]) -> None:
    """Name runs by the last parts of their paths, as many as make the names different."""
    parts = [each.path.resolve().parts for each in runs]
    depth = next((n for n in range(1, 8) if len({part[-n:] for part in parts}) == len(parts)), 1)
    for each, part in zip(runs, parts, strict=True):
        each.name = "/".join(part[-depth:])


def _judge(run: Run, data: str | None, model: str | None, threads: int) -> None:
    """Add to ``run`` what its model says of the test images, if both are there, and otherwise a note."""
    if run.checkpoint is None:
        return
    try:
        network = load_trained(run.checkpoint, model)
        run.filters = first_filters(network)
        if data == "none":
            run.notes.append("the model was not asked about the test images (--data none)")
            return
        where = data if data is not None else data_of(run.settings.get("data"))
        judgement = judge(run.checkpoint, lambda text: None, data=where, model=model, threads=threads)
    except (CheckpointError, UserError) as error:
        run.notes.append(f"the model was not asked about the test images: {error}")
        return
    run.judged = as_judged(judgement.evaluation, judgement.part)
    if judgement.sha256 != run.attributes.get("data_sha256"):
        run.notes.append(f"the test images are of other data than the run's: {judgement.dataset.source}")


if __name__ == "__main__":
    sys.exit(main())

"""How a run ends: a table of where its time went, and report.html. On rank 0, from what all ranks tell."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cnnmpi.checkpoint import CheckpointError, write_atomically
from cnnmpi.common.arrays import Array
from cnnmpi.console import table
from cnnmpi.distributed import UserError
from cnnmpi.layers import Convolution
from cnnmpi.models import Model
from cnnmpi.report import Judged, one_run, read_run, to_uint8
from cnnmpi.train.evaluation import Evaluation
from cnnmpi.train.inputs import Part
from cnnmpi.train.phases import SHARED, shares

PAGE = "report.html"
WORDS = {
    "loading": "waiting for images",
    "computing": "forward and backward",
    "reducing": "sum over the ranks",
    "waiting": "waiting for slower ranks",
    "updating": "optimizer",
    "evaluating": "evaluation",
    "saving": "checkpoints",
    "other": "start, hooks and the rest",
}


def time_table(phases: Sequence[Mapping[str, float]], whole: float) -> str:
    """Return the table of the ``phases`` of all ranks, {name: seconds} each, in ``whole`` seconds of the run.

    For several ranks a line says how many of them were at the work that they share, and so where the rest of the ideal
    speed-up went.
    """
    parts = shares(phases, whole)
    if len(phases) == 1:  # nobody to wait for
        parts["reducing"] += parts.pop("waiting")
    rows = [(WORDS[name], f"{part * whole:.1f}", f"{part:.1%}") for name, part in parts.items()]
    text = table(("time by phase", "seconds", "share"), [*rows, ("whole", f"{whole:.1f}", "")])
    if len(phases) > 1:
        busy = sum(parts[name] for name in SHARED)
        lost = sorted(((part, name) for name, part in parts.items() if name not in SHARED), reverse=True)
        reasons = ", ".join(f"{part:.1%} {WORDS[name]}" for part, name in lost if part >= 0.001)
        text += (
            f"\n{len(phases)} ranks did the work of {busy * len(phases):.2f}: {busy:.1%} of their time went into what "
            f"they share{'; ' + reasons if reasons else ''}"
        )
    return text


def what_now(out: Path, saved: Mapping[str, int], resume: str, page: Path | None) -> list[str]:
    """Return lines that say what the run has written, and what a person can do with it."""
    checkpoints = ", ".join(f"{name} {times} time{'s' * (times > 1)}" for name, times in saved.items())
    own = next((f" --model {word}" for flag, word in itertools.pairwise(resume.split()) if flag == "--model"), "")
    return [
        f"checkpoints: {checkpoints or 'none anew'}, in {out}",
        f"to go on:    {resume}",
        f"to evaluate: python -m cnnmpi.evaluate {out / 'best.h5'}{own}",
        f"to look at:  {page}" if page else f"to look at:  python -m cnnmpi.report {out}{own}",
    ]


def as_judged(evaluation: Evaluation, part: Part) -> Judged | None:
    """Return what a report shows of an evaluation of this part of the data; None of images without one class each."""
    if not len(evaluation.labels):
        return None
    return Judged(
        part=part.name,
        labels=evaluation.labels,
        guesses=evaluation.guesses,
        confidence=evaluation.confidence,
        of_label=evaluation.of_label,
        pixels=lambda index: to_uint8(np.asarray(part.images[index : index + 1]))[0].transpose(1, 2, 0),
        metrics={"loss": evaluation.loss} | evaluation.metrics,
    )


def first_filters(model: Model) -> Array | None:
    """Return the weights (O, C, kH, kW) of the first convolution that learns, if the model has one."""
    for _, layer in model.walk():
        if isinstance(layer, Convolution) and "weight" in layer.params:
            return np.array(layer.F.to_numpy(layer.params["weight"]))
    return None


def write_report(out: Path, model: Model, evaluation: Evaluation, part: Part) -> Path:
    """Write the report of the run in the folder ``out``, and return where it is.

    ``evaluation`` of ``part`` is what its last weights do. Raises UserError for whatever hinders that.
    """
    try:
        run = read_run(out)
        run.judged, run.filters = as_judged(evaluation, part), first_filters(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fonts and folders: nothing about the run
            html = one_run(run)
        write_atomically(out / PAGE, html.encode(errors="backslashreplace"))
    except (OSError, CheckpointError, ImportError) as error:
        raise UserError(str(error)) from None
    return out / PAGE

"""How a run ends: a table of where its time went, and report.html. On rank 0, from what all ranks tell."""

import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from cnnmpi.checkpoint import write_atomically
from cnnmpi.common.arrays import Array
from cnnmpi.console import table
from cnnmpi.layers import Convolution
from cnnmpi.models import Model
from cnnmpi.report import Judged, one_run, read_run, to_uint8
from cnnmpi.train.evaluation import Evaluation
from cnnmpi.train.inputs import Part
from cnnmpi.train.phases import SHARED, shares, slowest

PAGE = "report.html"
NOTICED, SLOW = 0.001, 0.05  # shares from which on they are worth a word
WORDS = {
    "loading": "waiting for images",
    "computing": "forward and backward",
    "reducing": "sum over the ranks, and waiting for them",
    "updating": "optimizer",
    "evaluating": "evaluation",
    "saving": "checkpoints",
    "other": "start, hooks and the rest",
}


def time_table(phases: Sequence[Mapping[str, float]], whole: float) -> str:
    """Return the table of the ``phases`` of all ranks, {name: seconds} each, in ``whole`` seconds of the run.

    For several ranks lines say how many of them were at the work that they share, where the rest of the ideal speed-up
    went, and who was slow.
    """
    parts = shares(phases, whole)
    rows = [(WORDS[name], f"{part * whole:.1f}", f"{part:.1%}") for name, part in parts.items()]
    text = table(("time by phase", "seconds", "share"), [*rows, ("whole", f"{whole:.1f}", "")])
    if len(phases) > 1:
        busy = sum(parts[name] for name in SHARED)
        lost = sorted(((part, name) for name, part in parts.items() if name not in SHARED), reverse=True)
        reasons = "; ".join(f"{part:.1%} {WORDS[name]}" for part, name in lost if part >= NOTICED)
        text += f"\n{len(phases)} ranks did the work of {busy * len(phases):.2f}"
        text += f"; the rest of their time: {reasons}" if reasons else ""
        rank, longer = slowest(phases)
        if longer >= SLOW:
            text += f"\nrank {rank} computed {longer:.0%} longer than the mean of all: the others waited for it"
    return text


def what_now(out: Path, saved: Mapping[str, int], resume: str, own: str | None, page: Path | None) -> str:
    """Return lines that say what the run has written, and what a person can do with it.

    ``saved`` says how often each checkpoint was written, ``resume`` is the command that goes on, ``own`` the name of a
    network of a person's own, and ``page`` the report, if there is one.
    """
    checkpoints = ", ".join(f"{name} {times} time{'s' * (times > 1)}" for name, times in saved.items())
    best = next((out / name for name in ("best.h5", "last.h5") if (out / name).exists()), out)
    model = ["--model", own] if own else []
    evaluate = shlex.join(["python", "-m", "cnnmpi.evaluate", str(best), *model])
    report = shlex.join(["python", "-m", "cnnmpi.report", str(out), *model])
    return (
        f"checkpoints: {checkpoints or 'none anew'}, in {out}\n"
        f"to go on:    {resume}\nto evaluate: {evaluate}\nto look at:  {page or report}"
    )


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


def write_report(
    out: Path, model: Model, evaluation: Evaluation, part: Part, tell: Callable[[str], None]
) -> Path | None:
    """Write the report of the run in the folder ``out``, and return where it is.

    ``evaluation`` of ``part`` is what its last weights do. Whatever hinders that is told as a warning, for the run is
    done: None then.
    """
    try:
        run = read_run(out)
        run.judged, run.filters = as_judged(evaluation, part), first_filters(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fonts and folders: nothing about the run
            html = one_run(run)
        write_atomically(out / PAGE, html.encode(errors="backslashreplace"))
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        tell(f"warning: no report was written: {reason or type(error).__name__}")
        return None
    return out / PAGE

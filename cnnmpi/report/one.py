"""The page of one run."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cnnmpi.page import card, escape, page, picture, table, tiles
from cnnmpi.report.charts import Curve, chart, smoothed
from cnnmpi.report.pictures import confusion_pixels, filter_images, grid, to_uint8
from cnnmpi.report.run import Counts, Run, number

SMALL = 20  # classes up to which the confusion matrix is a table of numbers
LISTED = 40  # classes up to which all have a line in the table; of more, those that are recognised worst
DRAWN = 1000  # classes up to which there is a picture of the matrix
MISTAKES = 20  # of many classes, the commonest that are listed
METRICS = 12  # charts of metrics besides the loss and the accuracy
WRONG = 36  # images shown
FILTERS = 144
ENLARGED = 30  # pixels of a filter's side, at least

STYLE = """
table.matrix td { text-align: right; min-width: 2.2rem; border: 1px solid var(--line) }
.bar { display: flex; height: 1.4rem; border-radius: .3rem; overflow: hidden; margin: .4rem 0 }
.bar span { min-width: 1px; print-color-adjust: exact } td { print-color-adjust: exact }
.box { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem }
"""
TIMES = {  # a line's key: what it means
    "time_loading": "waiting for images",
    "time_computing": "forward and backward",
    "time_reducing": "sum over the ranks, and waiting for them",
    "time_updating": "optimizer",
    "time_evaluating": "evaluation",
    "time_saving": "checkpoints",
    "time_other": "the rest",
}


def one_run(run: Run) -> str:
    """Return the report of a run, as a page of HTML."""
    sections = {
        "Course": _course(run),
        "Classes": _classes(run),
        "Most wrong": _most_wrong(run),
        "First filters": _filters(run),
        "Time": _time(run),
        "Settings": _settings(run),
    }
    shown = {title: body for title, body in sections.items() if body}
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in shown)
    parts = [_head(run), f"<nav>{links}</nav>"]
    parts += [f'<h2 id="{_anchor(title)}">{title}</h2>\n{body}' for title, body in shown.items()]
    return page(f"{run.settings.get('model', 'run')}: {run.name}", "\n".join(parts), STYLE)


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def notes(run: Run) -> str:
    """Return what is missing, as HTML."""
    return "".join(f'<p class="pale">Note: {escape(note)}.</p>' for note in run.notes)


def percent(value: float) -> str:
    """Return a part of 1 as percent with two digits behind the point."""
    return f"{value:.2%}" if value == value else "-"


def seconds_of(run: Run) -> float:
    """Return how long the epochs of a run took together, with what belongs to them."""
    return sum(value for name in (*TIMES,) for _, value in run.curve(name)) or sum(v for _, v in run.curve("seconds"))


def minutes(seconds: float) -> str:
    """Return a time in seconds or minutes."""
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _head(run: Run) -> str:
    last = run.epochs[-1] if run.epochs else {}
    shown = []
    for key, name in (("test_acc", "test accuracy"), ("val_acc", "validation accuracy")):
        if key in last:
            shown.append((name, percent(number(last, key))))
            best = max((value for _, value in run.curve(key)), default=float("nan"))
            shown.append((f"best {name}", percent(best)))
    if "test_loss" in last:
        shown.append(("test loss", f"{number(last, 'test_loss'):.4f}"))
    if last:
        shown.append(("epochs", f"{last.get('epoch')}"))
        shown.append(("time", minutes(seconds_of(run))))
        speeds = [value for _, value in run.curve("images_per_s")]
        shown.append(("images/s", f"{np.median(speeds):,.0f}" if speeds else "-"))
        shown.append(("ranks", str(last.get("ranks", "-"))))
    text = [tiles(shown)] if shown else []
    words = [f"Data: {run.attributes.get('data_source', last.get('data', 'unknown'))}."]
    if run.judged:
        values = ", ".join(f"{name} {value:.4f}" for name, value in run.judged.metrics.items())
        where = run.checkpoint.name if run.checkpoint else "the model"
        words.append(f"{where} on the {len(run.judged.labels)} {run.judged.part} images: {values}.")
    text.append(f"<p>{escape(' '.join(words))}</p>")
    if digest := run.attributes.get("weights_sha256"):
        text.append(f"<p>Weights: <code>{escape(digest)}</code></p>")
    return "\n".join(text) + notes(run)


def _course(run: Run) -> str:
    colors = {"train": 0, "test": 1, "val": 2}

    def of_epochs(metric: str) -> list[Curve]:
        return [Curve(part, run.curve(f"{part}_{metric}"), color, dots=True) for part, color in colors.items()]

    raw = run.curve("loss", "steps")
    known = {name for line in run.epochs for name in line}
    named = sorted({name.partition("_")[2] for name in known if name.partition("_")[0] in colors} - {"loss", "acc"})
    left = (
        f'<p class="pale">{len(named) - METRICS} more metrics stand in metrics.jsonl.</p>'
        if len(named) > METRICS
        else ""
    )
    norms = run.curve("grad_norm", "steps")
    charts = [
        chart("Loss", [Curve("step", raw, faint=True), *of_epochs("loss")], "step", run.per_epoch),
        chart("Accuracy", of_epochs("acc"), "step", run.per_epoch),
        *(chart(name, of_epochs(name), "step", run.per_epoch) for name in named[:METRICS]),
        chart("Learning rate", [Curve("lr", run.curve("lr", "steps") or run.curve("lr"), 3)], "step", run.per_epoch),
        chart(
            "Norm of the gradient, before clipping",
            [Curve("step", norms, 4, faint=True), Curve("mean", smoothed(norms), 4)],
            "step",
            run.per_epoch,
            log=True,
        ),
        chart(
            "Images a second",
            [
                Curve("steps", run.curve("images_per_s", "steps"), 5, faint=True),
                Curve("of an epoch", run.curve("images_per_s"), 5, dots=True),
            ],
            "step",
            run.per_epoch,
        ),
    ]
    return f'<div class="charts">{"".join(charts)}</div>{left}' if any(charts) else ""


def _classes(run: Run) -> str:
    judged, classes = run.judged, run.classes
    if judged is None or not classes:
        return ""
    counts = Counts.of(judged, len(classes))
    recall = counts.hits / np.maximum(counts.images, 1)
    precision = counts.hits / np.maximum(counts.guessed, 1)
    order: Sequence[int] = range(len(classes))
    told = ""
    if len(classes) > LISTED:
        order = np.argsort(np.where(counts.images > 0, recall, np.inf), kind="stable")[:LISTED].tolist()
        told = f'<p class="pale">The {LISTED} of {len(classes)} classes that are recognised worst.</p>'
    rows = []
    for k in order:
        mine = np.flatnonzero(counts.mistakes[:, 0] == k)[:3]
        others = [f"{classes[counts.mistakes[i, 1]]} {counts.times[i]}" for i in mine]
        row = [f"{k} {classes[k]}", counts.images[k], percent(recall[k]), percent(precision[k]), ", ".join(others)]
        rows.append(row)
    by_class = table(("class", "images", "recall", "precision", "mistaken for"), rows)
    return f"{_matrix(counts, classes)}<h3>By class</h3>{told}{by_class}"


def _matrix(counts: Counts, classes: list[str]) -> str:
    """Return the confusion matrix: numbers for a few classes, a picture and the largest mistakes for many."""
    about = "Confusion matrix: a row holds the images of a class, a column those that were taken for the class"
    if len(classes) > SMALL:
        rows = [
            (classes[label], classes[guess], times, counts.images[label])
            for (label, guess), times in zip(counts.mistakes[:MISTAKES], counts.times[:MISTAKES], strict=True)
        ]
        worst = table(("class", "taken for", "images", "of"), rows) if rows else ""
        if len(classes) > DRAWN:
            return worst
        image = picture(confusion_pixels(counts.confusion), "confusion matrix", largest=DRAWN)
        return f"<figure>{image}<figcaption>{about}, in the order of their numbers.</figcaption></figure>{worst}"
    matrix = counts.confusion
    parts = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)

    def cell(row: int, column: int) -> str:
        color, shade = ("--c2" if row == column else "--c1"), round(75 * float(parts[row, column]) ** 0.5)
        back = f"background: color-mix(in srgb, var({color}) {shade}%, transparent)"
        return f'<td style="{back}">{matrix[row, column]}</td>'

    top = "".join(f"<th>{number}</th>" for number in range(len(classes)))
    lines = [
        f"<tr><td>{row} {escape(name)}</td>{''.join(cell(row, k) for k in range(len(classes)))}</tr>"
        for row, name in enumerate(classes)
    ]
    return (
        f'<figure><div class="wide"><table class="matrix"><thead><tr><th></th>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div><figcaption>{about} of its number.</figcaption></figure>"
    )


def _most_wrong(run: Run) -> str:
    judged, classes = run.judged, run.classes
    if judged is None or not classes:
        return ""
    wrong = np.flatnonzero(judged.labels != judged.guesses)
    if not len(wrong):
        return f"<p>None of the {len(judged.labels)} {judged.part} images was mistaken.</p>"
    order = wrong[np.argsort(-(judged.confidence - judged.of_label)[wrong], kind="stable")][:WRONG]
    cards = []
    for i in order:
        label, guess = (escape_lines(classes[int(k[i])]) for k in (judged.labels, judged.guesses))
        lines = [f"{guess} {judged.confidence[i]:.1%}", f"is {label} {judged.of_label[i]:.1%}"]
        cards.append(card(judged.pixels(int(i)), f"image {i}, {label}", [*lines, f"image {i}"]))
    return (
        f"<p>Of {len(judged.labels)} {judged.part} images {len(wrong)} were mistaken. Here the model was surest: what "
        f'it thought, and what it gave to the truth.</p><div class="cards">{"".join(cards)}</div>'
    )


def escape_lines(text: str, longest: int = 40) -> str:
    """Return a name that fits under a picture."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _filters(run: Run) -> str:
    if run.filters is None or not run.filters.size:
        return ""
    images = filter_images(run.filters)
    times = math.ceil(ENLARGED / images.shape[-1])
    shown = to_uint8(images[:FILTERS]).repeat(times, axis=2).repeat(times, axis=3)
    left = f", the first {FILTERS} of {len(images)}" if len(images) > FILTERS else ""
    out, channels, height, width = run.filters.shape
    about = (
        f"The first convolution: {out} filters of {height}x{width} over {channels} "
        f"channel{'s' * (channels != 1)}{left}; gray is 0, each has its own scale."
    )
    return f"<figure>{picture(grid(shown, gap=6), 'its filters', largest=800)}<figcaption>{about}</figcaption></figure>"


def _time(run: Run) -> str:
    spent = {text: sum(value for _, value in run.curve(key)) for key, text in TIMES.items()}
    whole = sum(spent.values())
    if not whole:
        return ""
    bar = "".join(
        f'<span style="flex: {value / whole:.5f}; background: var(--c{index})" title="{escape(text)}"></span>'
        for index, (text, value) in enumerate(spent.items())
    )
    rows = "".join(
        f'<tr><td><span class="box" style="background: var(--c{index})"></span> {escape(text)}</td>'
        f"<td>{value:.1f}</td><td>{value / whole:.1%}</td></tr>"
        for index, (text, value) in enumerate(spent.items())
    )
    return (
        f'<div class="bar">{bar}</div><div class="wide"><table><thead><tr><th>phase</th><th>seconds</th><th>share</th>'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
        '<p class="pale">Means over the ranks, from the line of one epoch to that of the next.</p>'
    )


def _settings(run: Run) -> str:
    values = [(name, plain(value)) for name, value in sorted(run.settings.items())]
    blocks = [table(("setting", "value"), values, words=True)] if values else []
    facts = {
        "checkpoint": run.checkpoint, "weights_sha256": run.attributes.get("weights_sha256"),
        "data": run.attributes.get("data_source"), "data_sha256": run.attributes.get("data_sha256"),
        "archive_sha256": run.attributes.get("data_archive_sha256"), "step": run.attributes.get("step"),
        "model_options": run.attributes.get("model_options"),
    }  # fmt: skip
    rows = [(name, plain(value)) for name, value in facts.items() if value not in (None, "")]
    if rows:
        blocks.append(f"<h3>Model and data</h3>{table(('', ''), rows, words=True)}")
    starts = []
    for start in run.starts:
        versions = start.get("versions")
        versions = versions if isinstance(versions, dict) else {}
        told = ", ".join(f"{name} {value}" for name, value in versions.items() if value != "unknown")
        where = [plain(start.get(name, "-")) for name in ("time", "step", "ranks", "threads", "processor", "blas")]
        starts.append([*where, told])
    if starts:
        head = ("started", "step", "ranks", "threads", "processor", "BLAS", "versions")
        blocks.append(f"<h3>Starts</h3>{table(head, starts, words=True)}")
    return "\n".join(blocks)


def plain(value: Any) -> str:
    """Return a setting as text."""
    try:
        return f"{value:g}" if isinstance(value, float) else str(value)
    except ValueError:  # an integer of thousands of digits
        return "a number too long to be shown"

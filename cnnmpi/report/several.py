"""The page that compares runs."""

from collections.abc import Sequence

from cnnmpi.page import escape, page, table
from cnnmpi.report.charts import Curve, chart, smoothed
from cnnmpi.report.one import minutes, notes, percent, plain, seconds_of
from cnnmpi.report.run import Run, number

IGNORED = {"out"}  # each run has its own
HIGHER = {"test_acc": "best test accuracy", "val_acc": "best validation accuracy", "test_top5": "best top-5 accuracy"}
LOWER = {"test_loss": "lowest test loss", "train_loss": "lowest training loss"}


def several_runs(runs: Sequence[Run]) -> str:
    """Return the report that compares ``runs``, as a page of HTML."""
    parts = [f"<h2>Best of each</h2>{_best(runs)}", f"<h2>What differs</h2>{_differences(runs)}"]
    parts.append(f'<h2>Course</h2><div class="charts">{_charts(runs)}</div>')
    for run in runs:
        if run.notes:
            parts.append(f"<h3>{escape(run.name)}</h3>{notes(run)}")
    return page("Runs compared: " + ", ".join(run.name for run in runs), "\n".join(parts))


def _best(runs: Sequence[Run]) -> str:
    known = {name for run in runs for line in run.epochs for name in line}
    columns = [(name, text, max) for name, text in HIGHER.items() if name in known]
    columns += [(name, text, min) for name, text in LOWER.items() if name in known]
    rows = []
    for run in runs:
        row = [run.name]
        for name, _, best in columns:
            value, step = best(((v, s) for s, v in run.curve(name)), default=(float("nan"), 0))
            epoch = next((line.get("epoch") for line in run.epochs if line.get("step") == step), "-")
            text = percent(value) if name in HIGHER else f"{value:.4f}"
            row.append(f"{text} (epoch {epoch})" if value == value else "-")
        last = run.epochs[-1] if run.epochs else {}
        row += [f"{number(last, 'epoch'):g}", minutes(seconds_of(run)), plain(last.get("ranks", "-"))]
        rows.append([*row, str(run.attributes.get("weights_sha256", "-"))[:12]])
    head = ["run", *(text for _, text, _ in columns), "epochs", "time", "ranks", "weights"]
    same: dict[str, list[str]] = {}
    for run in runs:
        if digest := run.attributes.get("weights_sha256"):
            same.setdefault(str(digest), []).append(run.name)
    equal = [f"<p>{escape(' and '.join(names))} ended with the same weights, to the bit.</p>"
             for names in same.values() if len(names) > 1]  # fmt: skip
    return table(head, rows) + "".join(equal)


def _differences(runs: Sequence[Run]) -> str:
    settings = [run.settings | {"data_sha256": run.attributes.get("data_sha256", "-")} for run in runs]
    names = sorted({name for each in settings for name in each} - IGNORED)
    rows = [(name, *(plain(each.get(name, "-")) for each in settings)) for name in names]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    if not differing:
        return "<p>Nothing in their settings and data.</p>"
    return table(("setting", *(run.name for run in runs)), differing, words=True)


def _charts(runs: Sequence[Run]) -> str:
    """Return curves over epochs, as batches may have different sizes; over steps, where a run has completed none."""
    whole = all(run.per_epoch for run in runs)

    def curves(name: str, of: str = "epochs", smooth: bool = False) -> list[Curve]:
        found = []
        for index, run in enumerate(runs):
            points = [(step / run.per_epoch if whole else step, value) for step, value in run.curve(name, of)]
            found.append(Curve(run.name, smoothed(points) if smooth else points, index))
        return found

    x = "epoch" if whole else "step"
    shown = {
        "Test accuracy": curves("test_acc"),
        "Validation accuracy": curves("val_acc"),
        "Test loss": curves("test_loss"),
        "Training loss": curves("loss", "steps", smooth=True),
        "Learning rate": curves("lr", "steps"),
        "Norm of the gradient": curves("grad_norm", "steps", smooth=True),
        "Images a second": curves("images_per_s"),
    }
    return "".join(chart(title, lines, x, log=title.startswith("Norm")) for title, lines in shown.items())

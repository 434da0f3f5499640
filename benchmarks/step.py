"""One training step - forward, loss, backward, optimizer - of cnnmpi and of PyTorch, on the same threads.

python -m benchmarks.step [--model smallresnet] [--threads 2] [--inside]
"""

import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rounds import Competitor, hardware, options, ratios, refuse_slow_blas, spread, table, take_turns
from benchmarks.worker import Ours
from cnnmpi import functional
from cnnmpi.functional import conv, winograd
from cnnmpi.layers import Convolution
from cnnmpi.profile import Calls, Step, count_flops, matrix_peak, measure, timed
from cnnmpi.profile.show import by_kind, cells, head, rows_of

ENGINE, LOW = "torch engine", "torch engine bfloat16"
EAGER, LAST, COMPILED, AUTOCAST = "torch eager", "torch channels_last", "torch compile", "torch autocast bfloat16"
KINDS = ["numpy", ENGINE, LOW, EAGER, LAST, COMPILED, AUTOCAST]
# sums in another order differ by some 1e-6; where that carries a value over the kink of a ReLU or to another maximum,
# single entries of a gradient jump, but not its norm. Types of fewer digits jump more: SmallResNet's gradient in
# bfloat16, ours as autocast's, is 15 % off that in float32; so there ours is compared with autocast's
TOLERANCE = {"float16": 0.2, "tf32": 0.2}
USUAL_TOLERANCE = 0.01


def numpy_step(model: str, batch: int) -> Step:
    """Return a step of ours on NumPy, of a whole batch at once."""
    side = Ours("numpy", model, batch, 1)
    return Step(side.model, side.x, side.y, functional.cross_entropy_loss, side.optimizer)


def check_equal(sides: dict[str, Competitor]) -> None:
    """Compare everybody's first logits and gradients with those of PyTorch in the same type; else it is an error."""
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for index, (name, side) in enumerate(sides.items()):
            file = Path(folder) / f"{index}.npz"
            side.ask(f"check {file}")
            if not side.failure:
                results[name] = dict(np.load(file))
    for name, result in results.items():
        reference = AUTOCAST if "bfloat16" in name else EAGER
        if reference not in results:
            raise SystemExit(f"{reference} failed, with which {name} is compared: {sides[reference].failure}")
        expected = results[reference]
        assert result.keys() == expected.keys(), name
        for what in ("logits", "gradient"):
            one, other = (_joined(arrays, what) for arrays in (result, expected))
            error = np.linalg.norm(one - other) / np.linalg.norm(other)
            if not error < TOLERANCE.get(name.split()[-1], USUAL_TOLERANCE):
                raise SystemExit(f"{name}: the {what} differs from {reference}'s by {error:.2g} of its norm")


def _joined(arrays: dict[str, Any], what: str) -> Any:
    """Return the logits, or all gradients as one: that of a single bias may differ by more, through ReLU's kinks."""
    return (
        arrays["logits"]
        if what == "logits"
        else np.concatenate([arrays[k].ravel() for k in sorted(arrays) if k != "logits"])
    )


def compare(model: str, batch: int, threads: int, rounds: int) -> str:
    """Return the table and the ratios for one model and number of threads."""
    sides = {kind: Competitor(kind, model, batch, threads) for kind in KINDS}
    check_equal(sides)
    take_turns(sides, rounds, seconds=0.5)
    count = sum(count_flops(numpy_step(model, 2)).values()) * batch / 2
    fastest = matrix_peak(threads=threads)
    rows = []
    for name, side in sides.items():
        if side.failure:
            rows.append([name, f"does not work here: {side.failure[:60]}", "", "", "", ""])
            continue
        middle, memory = statistics.median(side.seconds), side.ask("memory") or math.nan
        speed = count / middle
        cells = [spread(side.seconds), f"{batch / middle:.0f}", f"{speed / 1e9:.0f}", f"{speed / fastest:.0%}"]
        rows.append([name, *cells, f"{memory:.0f}"])
    for side in sides.values():
        side.close()
    header = ["step", "ms (quartiles)", "images/s", "GFLOP/s", "of matrix peak", "memory MiB"]
    compared = {"numpy": [EAGER, LAST, COMPILED, AUTOCAST], ENGINE: [LAST], LOW: [AUTOCAST]}
    words = [ratios(sides, of, against) for of, against in compared.items()]
    return (
        f"### {model}, batch {batch}, {threads} thread{'s' * (threads > 1)}\n\n{table(header, rows)}\n\n"
        f"{rounds} rounds; matrix product of 2048: {fastest / 1e9:.0f} GFLOP/s. {'. '.join(filter(None, words))}.\n"
    )


def profile(model: str, batch: int, seconds: float = 4.0) -> str:
    """Return where a NumPy step's time goes, on one thread: layer by layer, and op by op inside the convolutions."""
    peak, whole = matrix_peak(), measure(numpy_step(model, batch), seconds)
    return (
        f"### {model}, batch {batch}, 1 thread: profile of the NumPy step, {whole.seconds * 1e3:.0f} ms\n\n"
        f"{table(head(whole, 'layer', bar=False), cells(rows_of(whole), whole, peak, bar=False))}\n\n"
        f"{table(head(whole, 'kind', bar=False), cells(by_kind(whole), whole, peak, bar=False))}\n\n"
        f"{inside(model, batch, seconds)}"
    )


def inside(model: str, batch: int, seconds: float = 4.0) -> str:
    """Return what the time of the convolutions is made of, on one thread: the parts of Winograd's way, and im2col."""
    parts = [f"_transform_{what}{way}" for what in ("filters", "data", "output") for way in ("", "_backward")]
    watched = [*((winograd, name) for name in parts), (conv, "im2col")]

    def watch(calls: Calls) -> None:
        for module, name in watched:
            calls.watch(module, name, (name, "inside"))

    step = numpy_step(model, batch)
    times, _ = timed(step, seconds, watch_more=watch)
    convolutions = {name for name, layer in step.model.walk() if isinstance(layer, Convolution)}
    values = {name.lstrip("_"): times.get((name, "inside"), 0.0) for _, name in watched}
    values["the rest, mostly matrix products"] = sum(took for (name, _), took in times.items() if name in convolutions)
    total = sum(values.values())
    rows = [[name, f"{took * 1e3:.2f}", f"{took / total:.1%}"] for name, took in values.items()]
    return f"{table(['inside the convolutions', 'ms', 'share of them'], rows)}\n"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--inside", action="store_true", help="print what NumPy's convolutions do, on 1 thread")
    args = parser.parse_args()
    refuse_slow_blas()
    if args.inside:
        print(inside(args.model, args.batch))
        return
    print(hardware(), "\n")
    print(compare(args.model, args.batch, args.threads, args.rounds))


if __name__ == "__main__":
    main()

"""One training step - forward, loss, backward, optimizer - of cnnmpi and of PyTorch, on the same threads.

python -m benchmarks.step [--model smallresnet] [--threads 2] [--profile]
"""

import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl

from benchmarks.rounds import Competitor, hardware, options, ratios, refuse_slow_blas, spread, table, take_turns
from benchmarks.worker import Ours, inputs
from cnnmpi.functional import conv, winograd
from cnnmpi.layers import Conv2d, Layer, Linear, Whitening
from cnnmpi.models import MODELS

ENGINE, LOW = "torch engine", "torch engine bfloat16"
EAGER, LAST, COMPILED, AUTOCAST = "torch eager", "torch channels_last", "torch compile", "torch autocast bfloat16"
KINDS = ["numpy", ENGINE, LOW, EAGER, LAST, COMPILED, AUTOCAST]
# sums in another order differ by some 1e-6; where that carries a value over the kink of a ReLU or to another maximum,
# single entries of a gradient jump, but not its norm. Types of fewer digits jump more: SmallResNet's gradient in
# bfloat16, ours as autocast's, is 15 % off that in float32; so there ours is compared with autocast's
TOLERANCE = {"float16": 0.2, "tf32": 0.2}
USUAL_TOLERANCE = 0.01


def operations(model: str, batch: int) -> float:
    """Return the floating-point operations of the matrix products in a step, as direct convolution counts them."""
    net, total = MODELS[model](), 0.0
    first = next(layer for _, layer in net.walk() if isinstance(layer, Conv2d))

    def count(layer: Layer) -> None:
        forward = layer.forward

        def counting(x: Any) -> Any:
            nonlocal total
            y = forward(x)
            share = np.prod((layer.params | layer.buffers)["weight"].shape[1:]) * y.size * 2
            # whitening learns nothing, and before the first layer that learns no gradient is needed
            total += float(share) * (1 if isinstance(layer, Whitening) else 2 if layer is first else 3)
            return y

        layer.forward = counting

    for _, layer in net.walk():
        if isinstance(layer, Conv2d | Linear | Whitening):
            count(layer)
    net.forward(inputs(2)[0])
    return total * batch / 2


def peak(threads: int) -> float:
    """Return the most floating-point operations a second that a matrix product of this machine reaches."""
    a, b = np.ones((2048, 2048), np.float32), np.ones((2048, 2048), np.float32)
    best = 1e9
    with threadpoolctl.threadpool_limits(threads, user_api="blas"):
        for _ in range(8):
            started = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best


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
    count, fastest = operations(model, batch), peak(threads)
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


def profile(model: str, batch: int, steps: int = 10) -> str:
    """Return where a NumPy step's time goes, on one thread: layer by layer, and op by op inside the convolutions."""
    side = Ours("numpy", model, batch, 1)
    times: dict[str, float] = {}

    def timed(where: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **options)
            times[where] = times.get(where, 0) + (time.perf_counter() - started) / steps * 1e3
            return result

        return call

    kinds: dict[str, list[str]] = {}
    for name, layer in side.model.walk():
        if not list(layer.children()):
            forward, backward = f"{name} {layer!r} forward", f"{name} {layer!r} backward"
            layer.forward, layer.backward = timed(forward, layer.forward), timed(backward, layer.backward)
            kinds.setdefault(type(layer).__name__, []).extend([forward, backward])
    side.optimizer.step = timed("optimizer", side.optimizer.step)
    parts = [f"_transform_{what}{way}" for what in ("filters", "data", "output") for way in ("", "_backward")]
    original = {(m, n): getattr(m, n) for m, names in ((winograd, parts), (conv, ["im2col"])) for n in names}
    try:
        for (module, name), function in original.items():
            setattr(module, name, timed(f"of Conv2d: {name.lstrip('_')}", function))
        side.step()
        times.clear()
        started = time.perf_counter()
        for _ in range(steps):
            side.step()
        whole = (time.perf_counter() - started) / steps * 1e3
    finally:
        for (module, name), function in original.items():
            setattr(module, name, function)
    inside = {where: value for where, value in times.items() if where.startswith("of Conv2d")}
    layers = {where: value for where, value in times.items() if where not in inside}
    summary = {kind: sum(times.get(where, 0) for where in names) for kind, names in kinds.items()}
    summary |= inside | {"of Conv2d: the rest, mostly matrix products": summary["Conv2d"] - sum(inside.values())}
    summary["optimizer"] = times["optimizer"]
    summary["the rest: loss, residual sums, zero_grad"] = whole - sum(layers.values())

    def rows(values: dict[str, float]) -> list[list[str]]:
        return [[where, f"{value:.2f}", f"{value / whole:.1%}"] for where, value in values.items()]

    return (
        f"### {model}, batch {batch}, 1 thread: profile of the NumPy step, {whole:.0f} ms\n\n"
        f"{table(['layer', 'ms', 'share'], rows(layers))}\n\n{table(['kind', 'ms', 'share'], rows(summary))}\n"
    )


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="print where the NumPy step's time goes, on 1 thread")
    args = parser.parse_args()
    refuse_slow_blas()
    if args.profile:
        print(profile(args.model, args.batch))
        return
    print(hardware(), "\n")
    print(compare(args.model, args.batch, args.threads, args.rounds))


if __name__ == "__main__":
    main()

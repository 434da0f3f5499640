"""What is obviously wrong with how a network is computed here: told only where it is known, or was measured."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator

from cnnmpi.layers import Layer
from cnnmpi.machine import FORCING_BLAS, blas_kernels, usable_cores
from cnnmpi.profile.measure import LayerCost, Profile, compare
from cnnmpi.profile.step import Calls, Step

TIMES_LARGER = 4  # the shards with which the given ones are compared
# A difference counts from here on. On a busy machine two timings of the same differ by some percent.
FASTER = 1.25
HELPED = 1.1
# A layer dominates with this share of the step: one with matrix products that are slower than SLOW of the peak, or
# one without any.
DOMINANT, SLOW, DOMINANT_WITHOUT = 0.25, 0.1, 0.4
OURS = "cnnmpi."  # whose operations are known


def advice(step: Step, profile: Profile, threads: int, peak: float) -> list[str]:
    """Return a line for each thing that should be otherwise; none where all is well.

    ``peak`` is that of ``matrix_peak`` for these ``threads``. Measures what is needed to know, on ``step``.
    """
    found = [*_forced_blas(step), *_doubles(step), *_threads(step, threads), *_small_shards(step)]
    known = {name for name, layer in step.model.walk() if type(layer).__module__.startswith(OURS)}
    costs = [cost for cost in profile.layers if cost.name in known]
    return found + [line for cost in costs for line in _dominant(cost, profile.seconds, peak)]


def _forced_blas(step: Step) -> Iterator[str]:
    """Compare the kernels of matrix products with those of another process, whose BLAS is not forced."""
    forced = [f"{name}={os.environ[name]}" for name in FORCING_BLAS if name in os.environ]
    if not forced or step.model.use_torch:
        return
    code = "from cnnmpi.machine import blas_kernels; print(blas_kernels())"
    free = {name: value for name, value in os.environ.items() if name not in FORCING_BLAS}
    result = subprocess.run([sys.executable, "-c", code], env=free, capture_output=True, text=True)
    if result.returncode == 0 and result.stdout.strip() != blas_kernels():
        yield (
            f"{' '.join(forced)} lets matrix products run by the kernels {blas_kernels()}; this processor's own are "
            f"{result.stdout.strip()}: unset it"
        )


def _doubles(step: Step) -> Iterator[str]:
    """Look for float64, which takes twice the time and memory, in what layers make of float32."""
    guilty: dict[str, None] = {}

    def seen(layer: Layer, direction: str, x: object, y: object) -> None:
        given, returned = (str(getattr(each, "dtype", "")).removeprefix("torch.") for each in (x, y))
        if returned == "float64" != given and not list(layer.children()):
            guilty[f"{layer.name} {layer!r}".strip()] = None

    with Calls(lambda place: None) as calls:
        calls.watch_step(step, seen)
        step.first_shard()
    if guilty:
        yield f"{next(iter(guilty))} makes float64 of float32: NumPy's float64 numbers, such as np.sqrt(2.0), do so"


def _threads(step: Step, threads: int) -> Iterator[str]:
    """Compare the number of threads with the cores, and their time with that of one."""
    if threads == 1:
        return
    if threads > usable_cores():
        yield f"--threads {threads} are more than the {usable_cores()} cores that this process may use"
        return
    set_threads = step.model.F.set_threads
    seconds = compare(step, {"one": lambda: set_threads(1), "many": lambda: set_threads(threads)})
    if seconds["many"] > seconds["one"] / HELPED:
        yield (
            f"--threads {threads} do not help here: a step takes {seconds['many'] * 1e3:.1f} ms, with one thread "
            f"{seconds['one'] * 1e3:.1f} ms; in training, threads take whole shards"
        )


def _small_shards(step: Step) -> Iterator[str]:
    """Compare the shards with larger ones of the same images."""
    count, images = len(step.shards), len(step.targets)
    fewer = max(1, count // TIMES_LARGER)
    if fewer == count:
        return
    try:
        seconds = compare(step, {"larger": lambda: step.cut(fewer), "given": lambda: step.cut(count)})
    except MemoryError:
        step.cut(count)
        return
    if seconds["given"] > FASTER * seconds["larger"]:
        given, larger = (f"{images / each:.0f} images/s" for each in (seconds["given"], seconds["larger"]))
        yield (
            f"shards of {math.ceil(images / count)} images are slow: {given}, those of {math.ceil(images / fewer)} "
            f"{larger}: use a larger --batch-size or fewer --shards, which shape the result"
        )


def _dominant(layer: LayerCost, seconds: float, peak: float) -> Iterator[str]:
    """Look whether most of the step is one layer's, and not for the products that it computes."""
    share, name = layer.seconds / seconds, f"{layer.name} {layer.text}".strip()
    if layer.flops and share > DOMINANT and layer.flops / layer.seconds < SLOW * peak:
        yield (
            f"{name} takes {share:.0%} of the step at {layer.flops / layer.seconds / peak:.0%} of a matrix product's "
            "speed: few channels, or few in a group, are more to move than to compute"
        )
    if not layer.flops and share > DOMINANT_WITHOUT:
        yield f"{name} takes {share:.0%} of the step, and no matrix product is in it"

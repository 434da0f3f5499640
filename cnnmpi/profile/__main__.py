"""Where the time, the arithmetic and the memory of a training step go: layer by layer, of any network.

python -m cnnmpi.profile --model smallresnet                  # needs no data
python -m cnnmpi.profile --model dense.py:Dense --data data/cifar10.h5 --out profile.html
"""

import contextlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from cnnmpi.answers import Output
from cnnmpi.checkpoint import CheckpointError
from cnnmpi.common.arrays import nchw
from cnnmpi.console import command, complain, printable, table
from cnnmpi.data import DataError, Dataset
from cnnmpi.distributed import UserError
from cnnmpi.machine import available_memory
from cnnmpi.profile.advice import advice
from cnnmpi.profile.flops import matrix_peak
from cnnmpi.profile.measure import Profile, measure, uses_winograd
from cnnmpi.profile.pages import profile_page
from cnnmpi.profile.show import MIB, by_kind, cells, head, headline, rows_of
from cnnmpi.profile.step import Step
from cnnmpi.train.code import Code, explained, named_files
from cnnmpi.train.config import Backend, Config, Precision, resolve
from cnnmpi.train.inputs import input_options, look_at_data, smallest_shard
from cnnmpi.train.measures import find_losses, with_loss
from cnnmpi.train.settings import JSON_OBJECT
from cnnmpi.train.setup import make_model, make_optimizer, share_parameters

PROGRAM = "cnnmpi.profile"
DRAWN = 1000  # targets, where no data are named


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Profile as ``argv`` says (the command line's if None). Returns the exit code."""
    try:
        tyro.cli(run, args=argv, prog=PROGRAM)
    except (CheckpointError, DataError, UserError) as error:
        complain(PROGRAM, error)
        return 2
    return 0


def run(
    model: str | None = None,
    model_options: Annotated[dict[str, Any] | None, JSON_OBJECT] = None,
    data: str | None = None,
    shape: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
    batch_size: int | None = None,
    shards: int | None = None,
    threads: int = 1,
    backend: Backend = "numpy",
    precision: Precision = "float32",
    seconds: float = 2.0,
    out: Path | None = None,
) -> None:
    """Measure where the time of a training step goes: each layer forward and backward, the loss, the optimizer.

    A step is that of a rank which has all shards of a batch, one after another. Optimizer, loss and batch are those of
    the network's recipe. Floating-point operations are those of convolutions and matrix products, counted as direct
    convolution: Winograd's way, which multiplies less, may exceed the peak. Those inside a layer of your own are not
    counted.

    Args:
        model: simplecnn, smallresnet, resnet18, mobilenet, or your own, FILE.py:CLASS or MODULE:CLASS.
        model_options: more arguments for the network, as JSON such as '{"width": 2}'.
        data: data as cnnmpi.train takes them, for the images' shape and the targets; nothing is downloaded.
        shape: channels, height and width of the images where no data are named.
        classes: number of classes where no data are named.
        batch_size: images in a batch, over all ranks.
        shards: pieces of the batch, each of which is computed at once.
        threads: threads inside an operation; the threads of a rank take whole shards instead, while there are enough.
        backend: engine under the layers.
        precision: of torch's convolutions and matrix products.
        seconds: how long to measure.
        out: an HTML file to write, with the tables and a picture of the step.

    """
    if threads < 1 or not 0 < seconds < np.inf:
        raise UserError(f"--threads and --seconds must be larger than 0, got {threads} and {seconds}")
    code = Code()
    config = resolve(
        Config(model=model, model_options=model_options, batch_size=batch_size, shards=shards, threads=threads,
               backend=backend, precision=precision), code
    )  # fmt: skip
    path, dataset = look_at_data(data) if data else (None, None)
    if dataset is not None:
        (_, *shape), classes = dataset.train_images.shape, len(dataset.classes)
    check_room(config.batch_size or 1, shape, classes)
    if dataset is None:
        dataset = random_data(shape, classes, config.batch_size or 1, config.loss or "")
    with contextlib.ExitStack() as stack:
        page = (
            None
            if out is None
            else stack.enter_context(page_of(out, config, code, [each for each in (data, path) if each]))
        )
        step = make_step(config, code, dataset)
        with explained(f"--model {config.model} fails in a step"):
            profile = measure(step, seconds)
            peak = matrix_peak(step.model.F, step.dtype, threads)
            advised = advice(step, profile, threads, peak)
            winograd = uses_winograd(step)
        told = (
            f"{config.model}: a step of {profile.images} images of {'x'.join(map(str, shape))} in {profile.shards} "
            f"shard{'s' * (profile.shards > 1)}, {threads} thread{'s' * (threads > 1)}, {backend} {precision}; "
            f"times in ms, means over the faster half of {profile.steps} steps. "
            f"A matrix product reaches {peak / 1e9:.0f} GFLOP/s"
        )
        told += "; Winograd's convolutions exceed that, as GFLOP are counted without it." if winograd else "."
        show(told, profile, peak, advised)
        if page is not None:
            size = page.write(profile_page(f"A step of {config.model}", told, profile, peak, advised))
            page.close()
            print("\n" + printable(f"{out}: {size:,} characters"))


def check_room(count: int, shape: Sequence[int], classes: int) -> None:
    """Raise UserError where not even ``count`` images (C, H, W) of float32 and their outputs fit into memory."""
    needed, free = 4 * count * (math.prod(shape) + classes), available_memory()
    if needed > free:
        raise UserError(
            f"{count} images of {'x'.join(map(str, shape))} and {classes} outputs each take {needed // MIB:,} MiB, and "
            f"{free // MIB:,} MiB are free: choose fewer, or smaller ones"
        )


def page_of(out: Path, config: Config, code: Code, data: Sequence[str | Path]) -> Output:
    """Return the page to write. Raises UserError where it would replace what it is about."""
    page = Output("--out", str(out))
    if page.path is None:
        raise UserError("--out -: name a file, as standard output takes the tables")
    for source in named_files(config.model, code.find("model", config.model or "")):
        page.spare(source, "the network's source")
    for file in data:
        page.spare(file, "the data")
    return page


def random_data(shape: Sequence[int], classes: int, count: int, loss: str) -> Dataset:
    """Return so many black images of ``shape`` (C, H, W), with random targets that ``loss`` takes.

    Raises UserError for impossible sizes.
    """
    if min(*shape, classes) < 1:
        raise UserError(f"--shape and --classes must be whole numbers from 1 on, got {tuple(shape)} and {classes}")
    images, draw = np.broadcast_to(np.uint8(0), (count, *shape)), np.random.default_rng(0)
    numbers = loss in ("binary_cross_entropy", "mse")
    targets = draw.random((count, classes), np.float32) if numbers else draw.integers(0, classes, count)
    return Dataset(images, targets, images, targets, ("",) * classes, "nothing")


def make_step(config: Config, code: Code, dataset: Dataset) -> Step:
    """Return the step that ``config`` describes, for the targets of ``dataset`` and random pixels. Raises UserError."""
    count, shards = config.batch_size or 1, config.shards or 1
    if shards > count:
        raise UserError(f"--shards {shards} are more than the {count} images of --batch-size")
    config = with_loss(config, dataset)
    options = input_options(dataset) | (config.model_options or {}) | {"seed": config.seed or 0}
    network = code.find("model", config.model or "")
    model = make_model(network, config, options, 0, smallest_shard(count, config))
    model.F.set_threads(config.threads)
    share_parameters([model])
    loss, _ = find_losses(config, code, model.F)
    rows = np.sort(np.arange(count) % len(dataset.train_labels))  # as many as a batch has, some of them twice
    targets = dataset.train_labels[rows].astype(np.int64 if dataset.train_labels.ndim == 1 else np.float32)
    size = (count, *dataset.train_images.shape[2:], options["in_channels"])
    images = nchw(np.random.default_rng(0).standard_normal(size, np.float32))
    return Step(model, images, targets, loss, make_optimizer(config, model), shards)


def show(told: str, profile: Profile, peak: float, advised: Sequence[str]) -> None:
    """Print the tables, what they add up to, and the advice."""
    print(printable(told))
    print("\n" + table(head(profile, "layer"), cells(rows_of(profile), profile, peak)))
    print("\n" + table(head(profile, "kind"), cells(by_kind(profile), profile, peak)))
    print(
        f"\n{profile.seconds * 1e3:.2f} ms a step, {profile.images / profile.seconds:.0f} images/s: {headline(profile)}"
    )
    for line in advised:
        print(printable(f"note: {line}"))


if __name__ == "__main__":
    sys.exit(main())

"""What can be set: what shapes a run (Experiment), and how it is run (Execution); with the usual values."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cnnmpi.common.text import read_json

Backend = Literal["numpy", "torch"]
Precision = Literal["float32", "tf32", "bfloat16", "float16"]
JSON_OBJECT = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="JSON",
    instance_from_str=lambda texts: read_json(texts[0]),
    is_instance=lambda value: value is None or isinstance(value, dict),
    str_from_instance=lambda value: [json.dumps(value)],
)


@dataclass(frozen=True)
class Experiment:
    """What is computed: all that shapes the result. A resumed run has what its checkpoint says.

    A setting that is left out (None) takes the recipe of the model, or the DEFAULTS.
    """

    model: str | None = None
    """Which network: simplecnn, smallresnet, resnet18, mobilenet, or your own, FILE.py:CLASS or MODULE:CLASS."""
    model_options: Annotated[dict[str, Any] | None, JSON_OBJECT] = None
    """More arguments for the network, as JSON such as '{"width": 2}'; in a TOML file, a table."""
    init: str | None = None
    """Checkpoint whose weights the run starts from, where names and shapes fit."""
    loss: str | None = None
    """cross_entropy, binary_cross_entropy, mse, or your own, FILE.py:FUNCTION; by default what suits the data."""
    epochs: int | None = None
    """Passes over the training images, counted from the beginning of the run; they shape the learning rate."""
    batch_size: int | None = None
    """Images in a global batch, over all ranks."""
    shards: int | None = None
    """Pieces of a global batch, shared out to the ranks; at least as many as ranks."""
    optimizer: Literal["sgd", "adam", "adamw"] | None = None
    """Update rule; sgd is Nesterov momentum."""
    lr: float | None = None
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "step", "constant"] | None = None
    """Course of the learning rate: cosine or linear down to 0, a tenth after each third of the run, or level."""
    warmup: float | None = None
    """Part of all steps, 0..1, in which the learning rate rises to its peak (cosine and linear)."""
    momentum: float | None = None
    """Momentum of sgd."""
    weight_decay: float | None = None
    """L2 regularisation of weights; biases and BatchNorm are left alone."""
    label_smoothing: float | None = None
    """Probability, 0..1, that the targets of cross_entropy spread over all classes."""
    clip: float | None = None
    """Largest global norm of the gradient; 0 does not clip."""
    augment: str | None = None
    """What happens to training images, in this order, as flip,crop=4,cutout=8,mixup=0.2,FILE.py:FUNCTION; or none."""
    sample: Literal["all", "balanced"] | None = None
    """An epoch has each image once; or as many images again, equally many of each class."""
    balance: bool | None = None
    """Weigh the classes in cross_entropy, so that rare ones count as much as others."""
    seed: int | None = None
    """Of every draw: weights, order, augmentation, dropout."""
    backend: Backend | None = None
    """Engine under the layers."""
    device: str | None = None
    """Where torch computes: cpu, cuda, cuda:N."""
    precision: Precision | None = None
    """Of torch's convolutions and matrix products; weights, gradients and statistics are float32 all the same."""
    reduction: Literal["exact", "float32"] | None = None
    """Sum of the gradients: the same bits for any number of ranks, or half the bytes."""
    data: str | None = None
    """auto, cifar10, synthetic, an HDF5 file, or what becomes one: a CIFAR archive, an .npz file, MNIST's folder."""
    validation: float | None = None
    """Part of the training images, 0..1, that is held out: what best.h5 is chosen by, instead of the test images."""
    on_nan: Literal["stop", "skip"] | None = None
    """What to do with a step whose gradient is not finite; weights stay finite either way."""


@dataclass(frozen=True)
class Execution:
    """How it is computed: what does not shape the result. A resumed run has what the one says who resumes it."""

    max_steps: int | None = None
    """Stop after this many steps, counted from the beginning of the run, if that is earlier."""
    data_in: Literal["auto", "memory", "file"] = "auto"
    """Where images are read from: one copy in the memory of each host, or the file itself; auto goes by their size."""
    threads: int = 0
    """Threads of each rank; 0 shares the cores out to the ranks."""
    out: Path | None = None
    """Folder of the run; runs/<model>-<seed> by default."""
    resume: str | None = None
    """Continue a run: auto takes the newest checkpoint in the folder of the run; or name a file."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 writes one at the end of each epoch only."""
    keep_every: int = 0
    """Epochs between checkpoints that are kept, as kept/epoch-0005.h5; 0 keeps none but last, previous and best."""
    keep_last: int = 0
    """How many of those are kept, the newest; 0 keeps all."""
    log_every: int = 10
    """Steps between lines in steps.jsonl and points in TensorBoard; 0 writes of epochs only."""
    ledger_every: int = 10
    """Steps between entries in ledger.jsonl, by which others can check the run; 0 writes none."""
    fingerprint: str | None = None
    """Steps FROM:TO, counted from 1, of which fingerprint.jsonl gets digests of all that each layer takes and gives."""
    tensorboard: bool = False
    """Write curves, confusion matrices and sample images for TensorBoard, too, into the folder of the run."""
    report: bool = True
    """Write report.html, a page that shows the run, at its end."""
    quiet: bool = False
    """Print warnings and the result alone."""
    agree_every: int = 50
    """Steps between checks that all ranks hold the same weights; 0 checks at checkpoints only."""
    hang_warning: float = 60.0
    """Seconds after which a rank that keeps the others waiting is named; 0 names none."""
    hang_limit: float = 600.0
    """Seconds after which a job that hangs shows where its ranks are and ends; 0 waits for ever."""


@tyro.conf.configure(tyro.conf.FlagConversionOff)  # a file's key = value and a flag are read alike
@dataclass(frozen=True)
class Config(Execution, Experiment):
    """Train a convolutional network on one or more MPI ranks; the result does not depend on their number."""


# What is left out takes the recipe of the model, and else these.
DEFAULTS: dict[str, Any] = {
    "model": "simplecnn", "epochs": 12, "batch_size": 128, "shards": 8, "optimizer": "sgd", "lr": 0.05,
    "schedule": "linear", "warmup": 0.2, "momentum": 0.9, "weight_decay": 5e-4, "label_smoothing": 0.0, "clip": 0.0,
    "augment": "flip,crop=2", "sample": "all", "balance": False, "validation": 0.0, "seed": 0, "backend": "numpy",
    "device": "cpu", "precision": "float32", "reduction": "exact", "data": "auto", "on_nan": "stop",
}  # fmt: skip

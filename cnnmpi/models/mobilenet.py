"""A small MobileNet: convolutions cut into one for each channel and one across channels."""

from typing import Any, ClassVar

from cnnmpi.layers import BatchNorm, Conv2d, GlobalAvgPool2d, Linear, Sequential
from cnnmpi.models.base import Model
from cnnmpi.rng import generator
from cnnmpi.sizes import Size, pair


class MobileNet(Model):
    """Howard et al., "MobileNets" (2017), cut to images of 32x32 pixels: accuracy for few parameters.

    A 3x3 stem, then depthwise separable units: a 3x3 convolution of each channel on its own, and a 1x1 one across
    them; three of the six halve the resolution. For CIFAR-10: 274,250 parameters, 18.7 million multiply-adds. Takes
    images from 8x8 pixels on.
    """

    # usual settings for CIFAR-10, not a search of our own
    recipe: ClassVar[dict[str, Any]] = {
        "epochs": 30, "batch_size": 128, "lr": 0.1, "weight_decay": 1e-4, "augment": "flip,crop=4",
    }  # fmt: skip

    def __init__(
        self, in_channels: int = 3, num_classes: int = 10, image_size: Size = 32, seed: int = 0, width: int = 32
    ) -> None:
        super().__init__()
        if min(pair(image_size)) < 8:
            raise ValueError(f"MobileNet: images must have at least 8x8 pixels, got {image_size}")
        rng = generator(seed, "init")

        def separable(in_c: int, out_c: int, stride: int = 1) -> Sequential:
            return Sequential(
                Conv2d(in_c, in_c, 3, stride, 1, bias=False, groups=in_c, rng=rng),
                BatchNorm(in_c, relu=True),
                Conv2d(in_c, out_c, 1, bias=False, rng=rng),
                BatchNorm(out_c, relu=True),
            )

        self.stem = Sequential(
            Conv2d(in_channels, width, 3, padding=1, bias=False, rng=rng), BatchNorm(width, relu=True)
        )
        self.units = Sequential(
            separable(width, 2 * width),
            separable(2 * width, 4 * width, stride=2),
            separable(4 * width, 4 * width),
            separable(4 * width, 8 * width, stride=2),
            separable(8 * width, 8 * width),
            separable(8 * width, 16 * width, stride=2),
        )
        self.pool = GlobalAvgPool2d()
        self.classifier = Linear(16 * width, num_classes, rng=rng)

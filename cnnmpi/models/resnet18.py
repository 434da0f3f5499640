"""ResNet-18 for small images: the network that most others are compared with."""

from typing import Any, ClassVar

from cnnmpi.layers import BatchNorm, Conv2d, GlobalAvgPool2d, Linear, ReLU, Residual, Sequential
from cnnmpi.models.base import Model
from cnnmpi.rng import generator
from cnnmpi.sizes import Size, pair


class ResNet18(Model):
    """He et al., "Deep residual learning for image recognition" (2016), with a 3x3 stem for images of 32x32 pixels.

    Four stages of two residual blocks; each stage but the first halves the resolution and doubles the channels. For
    CIFAR-10: 11,173,962 parameters, 555 million multiply-adds. Takes images from 8x8 pixels on.
    """

    # usual settings for CIFAR-10, not a search of our own
    recipe: ClassVar[dict[str, Any]] = {"epochs": 30, "batch_size": 128, "lr": 0.1, "augment": "flip,crop=4"}

    def __init__(
        self, in_channels: int = 3, num_classes: int = 10, image_size: Size = 32, seed: int = 0, width: int = 64
    ) -> None:
        super().__init__()
        if min(pair(image_size)) < 8:
            raise ValueError(f"ResNet18: images must have at least 8x8 pixels, got {image_size}")
        rng = generator(seed, "init")

        def block(in_c: int, out_c: int, stride: int) -> Sequential:
            """relu(body(x) + x), where x goes through a 1x1 convolution if the shape changes."""
            body = Sequential(
                Conv2d(in_c, out_c, 3, stride, 1, bias=False, rng=rng),
                BatchNorm(out_c, relu=True),
                Conv2d(out_c, out_c, 3, 1, 1, bias=False, rng=rng),
                BatchNorm(out_c),
            )
            if stride == 1 and in_c == out_c:
                return Sequential(Residual(body), ReLU())
            shortcut = Sequential(Conv2d(in_c, out_c, 1, stride, bias=False, rng=rng), BatchNorm(out_c))
            return Sequential(Residual(body, shortcut), ReLU())

        def stage(in_c: int, out_c: int, stride: int) -> Sequential:
            return Sequential(block(in_c, out_c, stride), block(out_c, out_c, 1))

        self.stem = Sequential(
            Conv2d(in_channels, width, 3, padding=1, bias=False, rng=rng), BatchNorm(width, relu=True)
        )
        self.stage1 = stage(width, width, 1)
        self.stage2 = stage(width, 2 * width, 2)
        self.stage3 = stage(2 * width, 4 * width, 2)
        self.stage4 = stage(4 * width, 8 * width, 2)
        self.pool = GlobalAvgPool2d()
        self.classifier = Linear(8 * width, num_classes, rng=rng)

"""A network of your own: branches side by side as in DenseNet (Huang et al., 2017), with a loss of its own.

mpirun -n 4 python examples/own_network.py --epochs 20 --data data/cifar10.h5
mpirun -n 2 python -m cnnmpi.train --model examples/own_network.py:DenseNet       # the same weights
"""

import sys

import cnnmpi
from cnnmpi import AvgPool2d, BatchNorm, Concat, Conv2d, Dropout, GlobalAvgPool2d, Identity, Linear, Sequential


def confidence_penalty(logits, targets, reduction="sum"):
    """Cross-entropy that also keeps the logits small: 0.001 |z|^2 for each image."""
    loss, dlogits = cnnmpi.cross_entropy_loss(logits, targets, reduction=reduction)
    scale = 0.001 if reduction == "sum" else 0.001 / len(logits)
    return loss + scale * float((logits * logits).sum()), dlogits + 2 * scale * logits


def grow(channels: int, by: int) -> Concat:
    """x, and beside it ``by`` more channels that a convolution makes of x."""
    return Concat(Identity(), Sequential(BatchNorm(channels, relu=True), Conv2d(channels, by, 3, padding=1)))


class DenseNet(cnnmpi.Model):
    """Two blocks of three growing layers; a 1x1 convolution and a pool between them."""

    recipe = {
        "loss": confidence_penalty,
        "lr": 0.1,
        "epochs": 20,
        "augment": "flip,crop=4",
    }  # what the command line leaves out

    def __init__(self, in_channels: int = 3, num_classes: int = 10, width: int = 24, growth: int = 12) -> None:
        super().__init__()
        self.stem = Conv2d(in_channels, width, 3, padding=1)
        self.block1 = Sequential(*(grow(width + growth * i, growth) for i in range(3)))
        self.transition = Sequential(Conv2d(width + 3 * growth, width, 1), AvgPool2d(2))
        self.block2 = Sequential(*(grow(width + growth * i, growth) for i in range(3)))
        self.norm = BatchNorm(width + 3 * growth, relu=True)
        self.pool, self.drop = GlobalAvgPool2d(), Dropout(0.1)
        self.head = Linear(width + 3 * growth, num_classes)


if __name__ == "__main__":
    sys.exit(cnnmpi.fit(DenseNet))

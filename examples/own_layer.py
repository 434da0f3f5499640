"""A layer of your own, its gradient checked, in a network that trains.

python examples/own_layer.py                                          # checks the gradients, then trains
mpirun -n 4 python examples/own_layer.py --data data/cifar10.h5       # on four ranks: the same weights
"""

import sys

import numpy as np

import cnnmpi
from cnnmpi import BatchNorm, Conv2d, GlobalAvgPool2d, Layer, Linear, MaxPool2d, Sequential


class SoftPlus(Layer):
    """y = log(1 + exp(b x)) / b with a slope b for each channel that is learned: (N, C, H, W) -> the same shape.

    With s = sigmoid(b x): dx = s dy, and db = sum of (x s - y) / b dy over images and positions.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.add_parameter("slope", np.ones(channels))

    def forward(self, x):
        """Return y for ``x`` (N, C, H, W)."""
        slope = self.params["slope"][:, None, None]
        self.x, self.y = x, np.logaddexp(0, slope * x) / slope
        return self.y

    def backward(self, dout):
        """Return dx (N, C, H, W), and add to the gradient of the slope."""
        slope = self.params["slope"][:, None, None]
        sigmoid = np.exp(slope * (self.x - self.y))  # exp(b x) / (1 + exp(b x))
        self.add_grads(slope=((self.x * sigmoid - self.y) / slope * dout).sum(axis=(0, 2, 3)))
        return sigmoid * dout


class Net(cnnmpi.Model):
    """Three convolutions, each with the layer of our own behind it."""

    def __init__(self, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.stage1 = Sequential(Conv2d(in_channels, 16, 3, padding=1), BatchNorm(16), SoftPlus(16), MaxPool2d(2))
        self.stage2 = Sequential(Conv2d(16, 32, 3, padding=1), BatchNorm(32), SoftPlus(32), MaxPool2d(2))
        self.stage3 = Sequential(Conv2d(32, 64, 3, padding=1), BatchNorm(64), SoftPlus(64))
        self.pool, self.head = GlobalAvgPool2d(), Linear(64, num_classes)


if __name__ == "__main__":
    cnnmpi.check_gradients(SoftPlus(3), (2, 3, 5, 4))  # raises GradientError, and says which one is wrong
    sys.exit(cnnmpi.fit(Net, lr=0.05))

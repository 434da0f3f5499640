"""Every layer, with the shape of an input: what all of them promise is tried on each."""

from cnnmpi import layers as L
from cnnmpi.rng import first_draws


def every_layer() -> list[tuple[L.Layer, tuple[int, ...]]]:
    return [
        (L.Conv2d(2, 3, 3, padding=1), (2, 2, 6, 6)),
        (L.Conv2d(2, 3, (3, 2), stride=2, bias=False), (2, 2, 7, 7)),
        (L.Conv2d(16, 16, 3, padding=1), (2, 16, 6, 6)),  # Winograd's way
        (L.Linear(4, 3), (2, 4)),
        (L.Conv2d(4, 6, 3, dilation=2, groups=2), (2, 4, 7, 6)),
        (L.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 5, 6)),
        (L.ConvTranspose2d(3, 2, 3, 2, 1, 1), (2, 3, 4, 3)),
        (L.Upsample((2, 3)), (2, 3, 3, 2)),
        (L.Linear(4, 3, bias=False), (2, 4)),
        (L.BatchNorm(2), (3, 2, 4, 4)),
        (L.BatchNorm(2), (5, 2)),
        (L.BatchNorm(2, relu=True), (3, 2, 4, 4)),
        (L.GroupNorm(2, 6), (2, 6, 3, 4)),
        (L.GroupNorm(2, 6), (3, 6)),
        (L.MaxPool2d(3, stride=2, padding=1), (2, 2, 6, 6)),
        (L.AvgPool2d(3, stride=2, padding=1), (2, 2, 6, 6)),
        (L.GlobalAvgPool2d(), (2, 2, 6, 6)),
        (L.ReLU(), (2, 2, 6, 6)),
        (L.LeakyReLU(0.2), (2, 2, 6, 6)),
        (L.SiLU(), (2, 2, 6, 6)),
        (L.GELU(), (2, 2, 6, 6)),
        (L.GELU("tanh"), (2, 6)),
        (L.Sigmoid(), (2, 2, 6, 6)),
        (L.Tanh(), (2, 6)),
        (L.Dropout(0.5), (2, 6)),
        (L.Flatten(), (2, 2, 3, 3)),
        (L.Softmax(), (2, 5)),
        (L.Whitening(2, 6), (2, 2, 6, 6)),
        (L.Identity(), (2, 3)),
        (L.Concat(L.Identity(), L.Conv2d(2, 3, 3, padding=1)), (2, 2, 4, 5)),
        (L.Concat(L.Linear(3, 2), L.Identity(), L.Linear(3, 1)), (2, 3)),
        (L.Sequential(L.Linear(3, 4), L.ReLU(), L.Linear(4, 2)), (2, 3)),
        (L.Residual(L.Sequential(L.Conv2d(2, 2, 3, padding=1), L.ReLU())), (2, 2, 6, 6)),
        # unequal in height and width, and another eps
        (L.Conv2d(2, 3, (3, 2), (2, 1), (0, 2), dilation=(1, 2)), (2, 2, 7, 6)),
        (L.ConvTranspose2d(2, 3, (2, 3), (2, 1), (1, 0), (1, 0)), (2, 2, 4, 3)),
        (L.MaxPool2d((2, 3), stride=(2, 1), padding=(0, 1)), (2, 2, 6, 5)),
        (L.AvgPool2d((3, 2), stride=(1, 2), padding=(1, 0)), (2, 2, 5, 6)),
        (L.BatchNorm(2, eps=0.1), (3, 2, 4, 4)),
        (L.GroupNorm(3, 6, eps=0.1), (2, 6, 3, 4)),
    ]


with first_draws(0):  # the same weights in each run of the tests
    LAYERS = every_layer()

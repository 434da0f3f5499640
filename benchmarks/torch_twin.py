"""The torch.nn module that computes what a cnnmpi model computes: the reference of the tests and of the benchmarks."""

import torch
from torch import nn

from cnnmpi import layers as L
from cnnmpi.models import Model


class Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut(x) + self.body(x)


class BatchNormReLU(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(x))


def torch_twin(model: Model) -> nn.Module:
    """Build the module layer by layer, with the same dotted names and weights."""
    twin = nn.Sequential()
    for name, layer in model.children():
        twin.add_module(name, convert(layer))
    twin.load_state_dict({name: torch.from_numpy(array) for name, array in model.state_dict().items()}, strict=True)
    return twin


def convert(layer: L.Layer) -> nn.Module:
    if isinstance(layer, L.Conv2d):
        options = {"dilation": layer.dilation, "groups": layer.groups, "bias": "bias" in layer.params}
        return nn.Conv2d(layer.in_c, layer.out_c, layer.k, layer.stride, layer.padding, **options)
    if isinstance(layer, L.Whitening):
        whitening = nn.Conv2d(layer.in_c, layer.out_c, layer.k, padding=layer.padding, bias=False)
        whitening.weight.requires_grad_(False)
        return whitening
    if isinstance(layer, L.Linear):
        return nn.Linear(layer.in_features, layer.out_features, bias="bias" in layer.params)
    if isinstance(layer, L.BatchNorm):
        return (BatchNormReLU if layer.relu else nn.BatchNorm2d)(layer.num_features, layer.eps, layer.momentum)
    if isinstance(layer, L.Residual):
        return Residual(convert(layer.body), convert(layer.shortcut))
    if isinstance(layer, L.Sequential):
        return nn.Sequential(*map(convert, layer.layers))
    if isinstance(layer, L.MaxPool2d):
        return nn.MaxPool2d(layer.k, layer.stride, layer.padding)
    if isinstance(layer, L.GlobalAvgPool2d):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    simple: dict[type[L.Layer], type[nn.Module]] = {L.ReLU: nn.ReLU, L.Flatten: nn.Flatten, L.Identity: nn.Identity}
    return simple[type(layer)]()

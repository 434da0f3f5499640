"""Models: ``Model``, the base of every network, and the reference networks, which ``MODELS`` lists by their names."""

from cnnmpi.models.base import FlatArrays, Model
from cnnmpi.models.mobilenet import MobileNet
from cnnmpi.models.resnet18 import ResNet18
from cnnmpi.models.simplecnn import SimpleCNN
from cnnmpi.models.smallresnet import SmallResNet

MODELS: dict[str, type[Model]] = {
    "simplecnn": SimpleCNN,
    "smallresnet": SmallResNet,
    "resnet18": ResNet18,
    "mobilenet": MobileNet,
}

__all__ = ["MODELS", "FlatArrays", "MobileNet", "Model", "ResNet18", "SimpleCNN", "SmallResNet"]

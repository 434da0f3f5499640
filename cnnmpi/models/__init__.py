"""Models: ``Model``, the base of every network, and the reference networks, which ``MODELS`` lists by their names."""

from cnnmpi.models.base import FlatArrays, Model
from cnnmpi.models.simplecnn import SimpleCNN
from cnnmpi.models.smallresnet import SmallResNet

MODELS: dict[str, type[Model]] = {"simplecnn": SimpleCNN, "smallresnet": SmallResNet}

__all__ = ["MODELS", "FlatArrays", "Model", "SimpleCNN", "SmallResNet"]

"""Models: a model is its layers, in the order of their definition, over one flat array of parameters.

``SimpleCNN`` and ``SmallResNet`` are the reference models; ``MODELS`` maps their command-line names to their classes.
"""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from cnnmpi import functional
from cnnmpi.functional.conv import Size, pair
from cnnmpi.layers import (
    Array,
    BatchNorm,
    Conv2d,
    Dropout,
    Flatten,
    GlobalAvgPool2d,
    Layer,
    Linear,
    MaxPool2d,
    Pair,
    ReLU,
    Residual,
    Sequential,
    Whitening,
)
from cnnmpi.layers.containers import chain_backward, chain_skip_input_grad
from cnnmpi.rng import generator


class Model(Layer):
    """Layers as attributes, applied in the order of their definition; the base of every model.

    A subclass assigns its layers in ``__init__``, after ``super().__init__()``. That suffices for a chain. Any other
    wiring overrides ``forward`` and ``backward``, and calls each layer's backward in the reverse order.

    All parameters are views into ``flat_params``, all gradients into ``flat_grads`` and all buffers into
    ``flat_buffers``, in the order of definition: broadcast, reduction and digest touch one array each. The arrays
    are laid out at the first use of the model's parameters; assigning layers after that has no effect on them.
    """

    info: Any = None  # of a model that load_checkpoint returned: classes, mean, std, ...

    def __init__(self) -> None:
        super().__init__()
        self._flat: dict[str, Array] = {}  # "params", "grads" and "buffers", once laid out
        self._pairs: list[Pair] = []

    def forward(self, x: Array) -> Array:
        """Apply the layers first to last."""
        self._lay_out()
        for _, layer in self.children():
            x = layer.forward(x)
        return x

    def backward(self, dout: Array) -> Array:
        """Apply the chain rule last to first."""
        if type(self).forward is not Model.forward:
            raise TypeError(f"{type(self).__name__} overrides forward: it must define the backward that belongs to it")
        return chain_backward([layer for _, layer in self.children()], dout)

    def train(self) -> None:
        """Choose training: batch statistics and dropout."""
        self.train_mode(True)

    def eval(self) -> None:
        """Choose evaluation: running statistics and no dropout."""
        self.train_mode(False)

    def skip_input_grad(self) -> None:
        """Spare the gradient of the images, where the layers are a plain chain."""
        if type(self).backward is Model.backward:
            chain_skip_input_grad([layer for _, layer in self.children()])

    def reseed(self, seed: int, step: int, shard: int) -> None:
        """Key the masks of all Dropout layers by (seed, step, shard)."""
        for _, layer in self.walk():
            if isinstance(layer, Dropout):
                layer.reseed(seed, step, shard)

    # -- the flat arrays ---------------------------------------------------------------------------------------------

    @property
    def flat_params(self) -> Array:
        """All parameters, in one array."""
        self._lay_out()
        return self._flat["params"]

    @property
    def flat_grads(self) -> Array:
        """All gradients, in one array."""
        self._lay_out()
        return self._flat["grads"]

    @property
    def flat_buffers(self) -> Array:
        """All buffers, in one array."""
        self._lay_out()
        return self._flat["buffers"]

    def parameters(self) -> list[Pair]:
        """Return [(parameter, gradient), ...]; always the same list, which follows the model to another engine."""
        self._lay_out()
        return self._pairs

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        self.flat_grads[...] = 0

    def _lay_out(self) -> None:
        """Move all arrays into the flat ones, once."""
        if self._flat:
            return
        arrays = [param for param, _ in self.named_parameters().values()] + list(self.named_buffers().values())
        dtypes = {str(array.dtype) for array in arrays}
        if len(dtypes) > 1:
            raise ValueError(f"{type(self).__name__}: all layers must share one dtype, got {', '.join(sorted(dtypes))}")
        seen: dict[int, str] = {}
        for name, layer in self.walk():
            layer.name = name
            if id(layer) in seen:
                raise ValueError(f"{type(self).__name__}: one layer stands at {seen[id(layer)]!r} and {name!r}")
            seen[id(layer)] = name
            if isinstance(layer, Model) and layer is not self:
                raise ValueError(
                    f"{type(self).__name__}: {name} is a Model, which has arrays of its own: make it a Layer"
                )
            for key, value in vars(layer).items():
                if isinstance(value, list | tuple) and any(isinstance(v, Layer) for v in value) and key != "layers":
                    raise ValueError(f"{type(self).__name__}: {key} is a list of layers: make it a Sequential")
        for kind in ("params", "grads", "buffers"):
            arrays = [array for _, layer in self.walk() for array in getattr(layer, kind).values()]
            dtype = arrays[0].dtype if arrays else np.float32
            flat = np.empty(sum(array.size for array in arrays), dtype)
            self._rehome(kind, flat, copy=True)
        self._pairs[:] = self.named_parameters().values()

    def _rehome(self, kind: str, flat: Array, copy: bool = False) -> None:
        """Make every array of this ``kind`` a view into ``flat``."""
        self._flat[kind] = flat
        start = 0
        for _, layer in self.walk():
            arrays = getattr(layer, kind)
            for key, old in arrays.items():
                size = int(np.prod(old.shape))
                view = self.F.channels_last_view(flat[start : start + size], tuple(old.shape))
                if copy:
                    view[...] = old
                arrays[key] = view
                start += size

    def share_parameters(self, other: "Model") -> None:
        """Compute with the parameter arrays of ``other``, a model of the same shape; gradients and buffers stay own."""
        self._lay_out()
        self._rehome("params", other.flat_params)
        self._pairs[:] = self.named_parameters().values()

    # -- the engine --------------------------------------------------------------------------------------------------

    def to_torch(self, device: str = "cpu", index: int = 0) -> "Model":
        """Compute with PyTorch from now on, on ``device`` ("cpu", "cuda", "cuda:1"); weights keep their bits.

        "cuda" means the GPU number ``index``, counted round and round: ranks of one host pass their local rank.
        Returns the model itself. Raises RuntimeError where PyTorch is missing, ValueError for a device that is not
        there.
        """
        try:
            from cnnmpi import functional_torch
        except ImportError as error:
            raise RuntimeError(f"to_torch() needs PyTorch ({error}): pip install 'cnnmpi[torch]'") from None
        device = functional_torch.choose_device(device, index)
        self.to_numpy()
        old = [array for pair in self.parameters() for array in pair]
        self._switch(functional_torch, lambda flat: functional_torch.tensor(flat, device))
        if not device.startswith("cpu"):
            for array in old:  # an optimizer that still holds these fails plainly instead of training dead arrays
                array.flags.writeable = False
        return self

    def to_numpy(self) -> "Model":
        """Compute with NumPy from now on; weights keep their bits. Returns the model itself."""
        if self.use_torch:
            to_numpy = self.F.to_numpy
            self._switch(functional, to_numpy)
        return self

    def astype(self, dtype: Any) -> "Model":
        """Compute in ``dtype`` (np.float32 or np.float64) from now on, with NumPy. Returns the model itself."""
        self.to_numpy()
        self._switch(functional, lambda flat: flat.astype(dtype))
        return self

    def _switch(self, F: ModuleType, convert: Any) -> None:
        """Move every flat array by ``convert`` and compute with ``F``."""
        self._lay_out()
        for _, layer in self.walk():
            layer.F = F
            layer._cache = None
        for kind, flat in self._flat.items():
            self._rehome(kind, convert(flat))
        self._pairs[:] = self.named_parameters().values()

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return {dotted name: NumPy array} of all parameters and buffers, named and shaped as torch's state_dict."""
        self._lay_out()
        state = {name: param for name, (param, _) in self.named_parameters().items()} | self.named_buffers()
        return {name: np.array(self.F.to_numpy(array), order="C") for name, array in state.items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Copy ``state`` into the parameters and buffers, in place.

        Raises ValueError that lists every missing, unexpected or misshapen array; the model is then unchanged.
        """
        self._lay_out()
        own = {name: param for name, (param, _) in self.named_parameters().items()} | self.named_buffers()
        wrong = [f"missing {name} {tuple(own[name].shape)}" for name in own if name not in state]
        wrong += [f"unexpected {name} {tuple(state[name].shape)}" for name in state if name not in own]
        wrong += [
            f"{name} has shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
            for name in own
            if name in state and tuple(own[name].shape) != tuple(state[name].shape)
        ]
        if wrong:
            raise ValueError(f"the weights do not fit {type(self).__name__}: {'; '.join(wrong)}")
        for name, array in own.items():
            self.F.copy_into(array, np.asarray(state[name]))

    def _options(self) -> str:
        return "".join(f"\n  {name}: {layer!r}" for name, layer in self.children())


class SimpleCNN(Model):
    """conv - pool - conv - pool - fully connected: 60,362 parameters and 5.6 million multiply-adds for CIFAR-10."""

    def __init__(self, in_channels: int = 3, num_classes: int = 10, image_size: Size = 32, seed: int = 0) -> None:
        super().__init__()
        height, width = pair(image_size)
        if min(height, width) < 4:
            raise ValueError(f"SimpleCNN pools twice: images must have at least 4x4 pixels, got {height}x{width}")
        rng = generator(seed, "init")
        self.features = Sequential(
            Conv2d(in_channels, 32, 3, padding=1, rng=rng),
            MaxPool2d(2),  # before the ReLU, which commutes with it and then has a quarter of the work
            ReLU(),
            Conv2d(32, 64, 3, padding=1, rng=rng),
            MaxPool2d(2),
            ReLU(),
        )
        self.flatten = Flatten()
        self.classifier = Linear(64 * (height // 4) * (width // 4), num_classes, rng=rng)


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


MODELS: dict[str, Callable[..., Model]] = {"simplecnn": SimpleCNN, "smallresnet": SmallResNet}

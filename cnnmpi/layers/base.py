"""What every layer is: parameters, gradients, buffers, children, and the cache between forward and backward."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from cnnmpi import functional

Array = Any  # a NumPy array, or a torch tensor after to_torch()
Pair = tuple[Array, Array]


class Layer:
    """A differentiable function with parameters; the base of all layers, containers and models.

    ``forward(x)`` computes y and keeps what backward needs; ``backward(dout)`` takes that, adds to the gradients of
    the parameters and returns dx. Each backward needs a forward of its own: it raises RuntimeError without.
    """

    F: ModuleType = functional
    training: bool = True
    name: str = ""  # the dotted name inside a model, for messages

    def __init__(self) -> None:
        self.params: dict[str, Array] = {}  # learned: changed by the optimizer
        self.grads: dict[str, Array] = {}  # one gradient for each parameter
        self.buffers: dict[str, Array] = {}  # kept with the parameters, but not learned: statistics, fixed filters
        self._cache: Any = None

    def forward(self, x: Array) -> Array:
        """Return the layer's output for ``x``."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def backward(self, dout: Array) -> Array:
        """Add to the gradients, given the loss's gradient by the output, and return its gradient by the input."""
        raise TypeError(f"{type(self).__name__} does not define backward")

    # -- parameters and modes ----------------------------------------------------------------------------------------

    def children(self) -> Iterator[tuple[str, "Layer"]]:
        """Yield (name, layer) for the layers directly inside this one, in the order of their definition."""
        for name, value in vars(self).items():
            if isinstance(value, Layer):
                yield name, value

    def walk(self, prefix: str = "") -> Iterator[tuple[str, "Layer"]]:
        """Yield (dotted name, layer) for this layer and all inside it, in the order of their definition."""
        yield prefix, self
        for name, child in self.children():
            yield from child.walk(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> dict[str, Pair]:
        """Return {dotted name: (parameter, gradient)}, named as the equivalent torch module names them."""
        return {
            _join(at, key): (layer.params[key], layer.grads[key]) for at, layer in self.walk() for key in layer.params
        }

    def named_buffers(self) -> dict[str, Array]:
        """Return {dotted name: buffer}."""
        return {_join(at, key): buffer for at, layer in self.walk() for key, buffer in layer.buffers.items()}

    def parameters(self) -> list[Pair]:
        """Return [(parameter, gradient), ...]; both are updated in place, never replaced."""
        return list(self.named_parameters().values())

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for _, grad in self.parameters():
            grad[...] = 0

    def train_mode(self, training: bool = True) -> None:
        """Choose training (batch statistics, dropout) or evaluation for this layer and all inside it."""
        for _, layer in self.walk():
            layer.training = training

    @property
    def use_torch(self) -> bool:
        """Whether this layer computes with PyTorch (see ``Model.to_torch``)."""
        return self.F is not functional

    def skip_input_grad(self) -> None:
        """Let backward leave dx out (None): nothing before this layer learns. Layers may ignore it."""

    # -- for layers --------------------------------------------------------------------------------------------------

    def _add_parameter(self, key: str, value: np.ndarray[Any, Any], dtype: Any) -> None:
        """Define the parameter ``key`` and its gradient."""
        self._add_array(self.params, key, value, dtype)
        self._add_array(self.grads, key, np.zeros(value.shape), dtype)

    def _add_array(self, arrays: dict[str, Array], key: str, value: np.ndarray[Any, Any], dtype: Any) -> None:
        """Define ``arrays[key]``, with this value; 4-D arrays are channels-last in memory."""
        arrays[key] = functional.channels_last_view(np.empty(value.size, dtype), value.shape)
        arrays[key][...] = value

    def _add_grads(self, **grads: Array | None) -> None:
        for key, grad in grads.items():
            if grad is not None:
                self.grads[key] += grad

    def _keep(self, result: tuple[Array, Any]) -> Array:
        """Keep the cache of an op's (y, cache) and return y."""
        y, self._cache = result
        return y

    def _taken(self) -> Any:
        """Return the kept cache, once."""
        cache, self._cache = self._cache, None
        if cache is None:
            raise RuntimeError(f"{self._label()}: backward() needs a forward() of its own before it")
        return cache

    def _label(self) -> str:
        return f"{self.name} {self!r}".strip()

    def _expect(self, x: Array, *shape: int | str) -> None:
        """Raise ValueError unless ``x`` has this shape; a letter stands for any size. Checks the dtype, too."""
        fits = len(x.shape) == len(shape) and all(
            isinstance(want, str) or have == want for have, want in zip(x.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"{self._label()}: expected an input of shape ({wanted}), got {tuple(x.shape)}")
        for array in (self.params | self.buffers).values():
            if x.dtype != array.dtype:
                raise ValueError(f"{self._label()}: expected an input of dtype {array.dtype}, got {x.dtype}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._options()})"

    def _options(self) -> str:
        """The arguments to show in repr."""
        return ""


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key

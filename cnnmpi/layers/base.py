"""What every layer is: parameters, gradients, buffers, children, and the cache between forward and backward."""

import importlib
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from cnnmpi import functional

Array = Any  # a NumPy array, or a torch tensor after to_torch()
Pair = tuple[Array, Array]

ARRAYS = {"params", "grads", "buffers", "_cache"}  # attributes of every layer: containers without layers
CONTAINERS = (list, tuple, set, dict)


class Layer:
    """A differentiable function with parameters; the base of all layers, containers and models.

    ``forward(x)`` computes y and keeps what backward needs; ``backward(dout)``, for ``dout`` of the shape of y, takes
    that, adds to the gradients of the parameters and returns dx. Each backward needs a forward of its own: it raises
    RuntimeError without. Between the two, x must stay as it is; a y that backward needs cannot be changed in place.

    A layer owns its arrays. They are replaced only where the whole model moves (``Model.to_torch``, ``Model.astype``,
    ``FlatArrays``); an optimizer over arrays that were replaced raises at its next step. So a layer of your own defines
    them by ``add_parameter`` and ``add_buffer``, takes ``self.params["w"]`` wherever it needs one, writes into it but
    never puts another in its place, and adds to gradients by ``add_grads``. Copies (``copy.deepcopy``, ``pickle``) have
    arrays of their own, and begin without a forward.
    """

    F: ModuleType = functional
    training: bool = True
    caching: bool = True  # whether forward keeps what backward needs
    frozen: bool = False  # whether the arrays stay as they are, see ``freeze``
    input_grad: bool = True  # whether anybody needs dx, see ``skip_input_grad``
    name: str = ""  # the dotted name inside the outermost layer, for messages and for what Dropout draws
    output_shape: tuple[int, ...] = ()  # of the newest y

    def __init__(self) -> None:
        self.params: dict[str, Array] = {}  # learned: changed by the optimizer
        self.grads: dict[str, Array] = {}  # one gradient for each parameter
        self.buffers: dict[str, Array] = {}  # kept with the parameters, but not learned: statistics, fixed filters
        self._cache: Any = None  # what backward needs: the op's cache, and the seal on y

    def __setattr__(self, key: str, value: Any) -> None:
        if isinstance(value, Layer):
            if "params" not in vars(self):
                raise TypeError(f"{type(self).__name__}: call super().__init__() before {key} is assigned")
            value._rename(_join(self.name, key))
        super().__setattr__(key, value)

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
            elif (
                isinstance(value, CONTAINERS) and name not in ARRAYS and name not in self.lists and _holds_layers(value)
            ):
                kind = type(value).__name__
                where = f"{self.name} {type(self).__name__}".strip()
                raise ValueError(f"{where}: {name} is a {kind} of layers, which would not learn: make it a Sequential")

    def walk(self) -> Iterator[tuple[str, "Layer"]]:
        """Yield (dotted name, layer) for this layer and all inside it, in the order of their definition.

        Raises ValueError where one layer stands at two places, or layers are hidden in a list, a tuple, a set or a
        dictionary.
        """
        names: dict[int, str] = {}

        def visit(layer: Layer, at: str) -> Iterator[tuple[str, Layer]]:
            if id(layer) in names:
                raise ValueError(f"{type(self).__name__}: one layer stands at {names[id(layer)]!r} and {at!r}")
            names[id(layer)] = at
            yield at, layer
            for name, child in layer.children():
                yield from visit(child, _join(at, name))

        return visit(self, "")

    def named_parameters(self) -> dict[str, Pair]:
        """Return {dotted name: (parameter, gradient)} of all that learn, named as the equivalent torch module does."""
        learning = [(at, layer) for at, layer in self.walk() if not layer.frozen]
        for _, layer in learning:
            if missing := layer.params.keys() - layer.grads.keys():
                names = ", ".join(sorted(missing))
                raise ValueError(f"{layer._label()}: {names} has no gradient: define it by add_parameter()")
        return {_join(at, key): (layer.params[key], layer.grads[key]) for at, layer in learning for key in layer.params}

    def named_arrays(self) -> dict[str, Array]:
        """Return {dotted name: array} of all parameters, then all buffers; frozen ones, too."""
        layers = list(self.walk())
        params = {_join(at, key): param for at, layer in layers for key, param in layer.params.items()}
        return params | self.named_buffers()

    def named_buffers(self) -> dict[str, Array]:
        """Return {dotted name: buffer}."""
        return {_join(at, key): buffer for at, layer in self.walk() for key, buffer in layer.buffers.items()}

    def parameters(self) -> list[Pair]:
        """Return [(parameter, gradient), ...], as they are now; both are updated in place."""
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
        """Let backward leave dx out (None): nothing before this layer learns. Layers may compute it all the same."""
        self.input_grad = False

    def give_input_grad(self) -> None:
        """Let backward give dx again, of this layer and all inside it."""
        for _, layer in self.walk():
            layer.input_grad = True

    def freeze(self) -> None:
        """Let this layer and all inside it stay as they are: a fine-tuned model's body, for instance.

        What is frozen has no gradient, no optimizer state and no part in the ranks' sums. BatchNorm then takes its
        running statistics, also in training. An optimizer from before raises at its next step.
        """
        for _, layer in self.walk():
            for grad in layer.grads.values():
                layer.F.retire(grad)
            layer.grads = {}
            layer.frozen = True

    def unfreeze(self) -> None:
        """Let this layer and all inside it learn again, if they were frozen; make the optimizer after that."""
        for _, layer in self.walk():
            if layer.frozen and not type(layer).frozen:
                layer.frozen = False
                layer.grads = {key: 1 * param for key, param in layer.params.items()}  # of its engine and layout
                layer.zero_grad()
        self.give_input_grad()

    # -- moving and copying ------------------------------------------------------------------------------------------

    def _replace_arrays(self, F: ModuleType, convert: Callable[["Layer", Array], Array]) -> None:
        """Compute with ``F`` from now on, and put ``convert(layer, array)`` in the place of every array.

        What is left behind, unless it shares its memory with what came, is retired.
        """
        for _, layer in self.walk():
            layer._forget()
            for arrays in (layer.params, layer.grads, layer.buffers):
                for key, old in arrays.items():
                    arrays[key] = convert(layer, old)
                    if layer.F.address(old) != F.address(arrays[key]):
                        layer.F.retire(old)
            layer.F = F

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self) | {"_cache": None}
        if "F" in state:  # a module, which knows no copies
            state["F"] = self.F.__name__
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if "F" in state:
            self.F = importlib.import_module(state["F"])

    # -- for layers --------------------------------------------------------------------------------------------------

    lists: tuple[str, ...] = ()  # containers in which ``children`` looks for nothing more

    def _rename(self, name: str) -> None:
        """Be called ``name`` from now on, and the layers inside accordingly."""
        for at, layer in self.walk():
            vars(layer)["name"] = _join(name, at)

    def _forget(self) -> None:
        """Drop what was computed from the arrays that the layer has had."""
        self._cache = None

    def add_parameter(self, key: str, value: np.ndarray[Any, Any], dtype: Any = np.float32) -> None:
        """Define the parameter ``key``, which starts with this value, and its gradient."""
        self.params[key] = _array(value, dtype)
        self.grads[key] = _array(np.zeros(np.shape(value)), dtype)

    def add_buffer(self, key: str, value: np.ndarray[Any, Any], dtype: Any = np.float32) -> None:
        """Define the buffer ``key``, which starts with this value: kept with the parameters, but not learned."""
        self.buffers[key] = _array(value, dtype)

    def add_grads(self, **grads: Array | None) -> None:
        """Add to the gradients of these parameters, unless the layer is frozen; None adds nothing."""
        for key, grad in grads.items():
            if grad is not None and not self.frozen:
                self.grads[key] += grad

    def _keep(self, result: tuple[Array, Any]) -> Array:
        """Keep the cache of an op's (y, cache) and return y."""
        y, cache = result
        self.output_shape = tuple(y.shape)
        self._cache = (cache, self.F.seal(y, cache)) if self.caching else None
        return y

    def _taken(self, dout: Array) -> Any:
        """Return the kept cache, once, for a ``dout`` of the shape of y."""
        if self._cache is None:
            why = "" if self.caching else ": eval() keeps nothing for it, train_mode(False) does"
            raise RuntimeError(f"{self._label()}: backward() needs a forward() of its own before it{why}")
        cache, seal = self._cache
        if tuple(dout.shape) != self.output_shape:
            shapes = f"{self.output_shape}, as y has, got {tuple(dout.shape)}"
            raise ValueError(f"{self._label()}: expected a dout of shape {shapes}")
        if not self.F.is_intact(seal):
            raise RuntimeError(f"{self._label()}: its output was changed in place, but backward() needs it as it was")
        self._cache = None
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
            if not self.F.fits(x, array):
                raise ValueError(f"{self._label()}: expected an input of dtype {array.dtype}, got {x.dtype}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._options()})"

    def _options(self) -> str:
        """The arguments to show in repr."""
        return ""


def _array(value: np.ndarray[Any, Any], dtype: Any) -> Array:
    """Return an array of this value; 4-D arrays are channels-last in memory."""
    shape = np.shape(value)
    array = functional.channels_last_view(np.empty(math.prod(shape), dtype), shape)
    array[...] = value
    return array


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix and key else prefix or key


def _holds_layers(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, CONTAINERS) else ()
    return any(isinstance(item, Layer) or _holds_layers(item) for item in values)

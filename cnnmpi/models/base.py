"""What every model is: layers in the order of their definition, the engine under them, and its arrays laid out flat."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from cnnmpi import functional
from cnnmpi.layers import Array, Dropout, Layer
from cnnmpi.layers.containers import chain_backward, chain_skip_input_grad


class Model(Layer):
    """Layers as attributes, applied in the order of their definition; the base of every model.

    A subclass assigns its layers in ``__init__``, after ``super().__init__()``. That suffices for a chain. Any other
    wiring overrides ``forward`` and ``backward``, and calls each layer's backward in the reverse order. Assigning to an
    attribute again puts another layer in the place of the old one, such as a new head on a trained model.
    """

    recipe: ClassVar[Mapping[str, Any]] = {}  # settings of training that suit this network; the others have defaults
    info: Any = None  # of a model that load_checkpoint returned: classes, mean, std, ...

    def forward(self, x: Array) -> Array:
        """Apply the layers first to last."""
        for _, layer in self.children():
            x = layer.forward(x)
        return x

    def backward(self, dout: Array) -> Array:
        """Apply the chain rule last to first."""
        if type(self).forward is not Model.forward and type(self).backward is Model.backward:
            raise TypeError(f"{type(self).__name__} overrides forward: it must define the backward that belongs to it")
        return chain_backward([layer for _, layer in self.children()], dout)

    def train(self) -> None:
        """Choose training: batch statistics, dropout, and all that backward needs is kept."""
        self._set_mode(training=True, caching=True)

    def eval(self) -> None:
        """Choose evaluation: running statistics, no dropout, and nothing is kept for a backward pass.

        For a backward pass with running statistics, choose ``train_mode(False)`` instead.
        """
        self._set_mode(training=False, caching=False)

    def _set_mode(self, training: bool, caching: bool) -> None:
        for _, layer in self.walk():
            layer.training, layer.caching = training, caching
            if not caching:
                layer._cache = None

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Be in evaluation within the ``with``; then every layer is in its own mode again."""
        modes = [(layer, layer.training, layer.caching) for _, layer in self.walk()]
        self.eval()
        try:
            yield
        finally:
            for layer, training, caching in modes:
                layer.training, layer.caching = training, caching

    def skip_input_grad(self) -> None:
        """Spare the gradient of the images, where the layers are a plain chain."""
        if type(self).backward is Model.backward:
            chain_skip_input_grad([layer for _, layer in self.children()])

    def reseed(self, seed: int, step: int, shard: int) -> None:
        """Key the masks of all Dropout layers by (seed, step, shard)."""
        for _, layer in self.walk():
            if isinstance(layer, Dropout):
                layer.reseed(seed, step, shard)

    # -- the engine --------------------------------------------------------------------------------------------------

    def to_torch(self, device: str = "cpu", index: int = 0, precision: str = "float32") -> "Model":
        """Compute with PyTorch from now on, on ``device`` ("cpu", "cuda", "cuda:1"); weights keep their bits.

        "cuda" means the GPU number ``index``, counted round and round: ranks of one host pass their local rank.
        On the CPU the tensors share the memory of the arrays that were there, so an optimizer goes on working; for
        a GPU, make it after the move. With ``precision`` "bfloat16" or "float16", convolutions and matrix products are
        of that type, and so is what lies between them; parameters, gradients and statistics stay float32. "tf32", on a
        GPU, rounds only what is multiplied. Returns the model itself. Raises RuntimeError where PyTorch is missing,
        ValueError for a device that is not there and for a precision that it does not have.
        """
        try:
            from cnnmpi import functional_torch
        except ImportError as error:
            raise RuntimeError(f"to_torch() needs PyTorch ({error}): pip install 'cnnmpi[torch]'") from None
        device = functional_torch.choose_device(device, index)
        engine = functional_torch.engine(precision, device)
        self.to_numpy()
        doubles = any(array.dtype == np.float64 for array in self.named_arrays().values())
        if doubles and precision != "float32":
            raise ValueError(f"precision {precision} is for models of float32: call astype(np.float32) first")
        self._replace_arrays(engine, lambda _, array: engine.tensor(array, device))
        return self

    def to_numpy(self) -> "Model":
        """Compute with NumPy from now on; weights keep their bits. Returns the model itself."""
        self._replace_arrays(functional, lambda layer, array: layer.F.to_numpy(array))
        return self

    def astype(self, dtype: Any) -> "Model":
        """Compute in ``dtype`` (np.float32 or np.float64) from now on, with NumPy. Returns the model itself."""
        self.to_numpy()
        self._replace_arrays(functional, lambda _, array: array.astype(dtype, copy=False))
        return self

    def as_array(self, a: np.ndarray[Any, Any]) -> Array:
        """Return the NumPy array ``a`` as one of the engine and on the device that this model computes with.

        Where the model computes in float64, float32 becomes that.
        """
        arrays = [array for _, layer in self.walk() for array in (layer.params | layer.buffers).values()]
        if a.dtype == np.float32 and any(str(array.dtype).endswith("float64") for array in arrays):
            a = a.astype(np.float64)
        return self.F.as_array(a, like=next(iter(arrays), None))

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return {dotted name: NumPy array} of all parameters and buffers, named and shaped as torch's state_dict."""
        return {name: np.array(self.F.to_numpy(array), order="C") for name, array in self.named_arrays().items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Copy ``state`` into the parameters and buffers, in place.

        Raises ValueError that lists every missing, unexpected or misshapen array; the model is then unchanged.
        """
        own = self.named_arrays()
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


class FlatArrays:
    """The arrays of a model in four, each in the order of definition.

    ``params``, ``grads`` and ``buffers`` are of the layers that learn; ``frozen`` are all of the others. Making it
    moves the model's arrays there: each becomes a view, so that reduction, broadcast and comparison touch one array
    each. So it is made before anybody takes ``model.parameters()``, by who trains the model; an optimizer from before
    raises at its next step. With ``like``, that of another model, the model computes with the parameters and frozen
    arrays of that one: gradients and buffers stay its own.
    """

    def __init__(self, model: Model, like: "FlatArrays | None" = None) -> None:
        self.F: ModuleType = model.F
        layers = [layer for _, layer in model.walk()]
        dtypes = {str(a.dtype) for layer in layers for a in (layer.params | layer.buffers).values()}
        if len(dtypes) > 1:
            raise ValueError(
                f"{type(model).__name__}: all layers must share one dtype, got {', '.join(sorted(dtypes))}"
            )
        learning = [layer for layer in layers if not layer.frozen]
        still = [arrays for layer in layers if layer.frozen for arrays in (layer.params, layer.buffers)]
        self.params: Array = self._lay_out([layer.params for layer in learning], like and like.params)
        self.grads = self._lay_out([layer.grads for layer in learning])
        self.buffers = self._lay_out([layer.buffers for layer in learning])
        self.frozen: Array = self._lay_out(still, like and like.frozen)

    def _lay_out(self, kind: list[dict[str, Array]], shared: Array | None = None) -> Array:
        """Make all arrays views into ``shared``, whose values they take, or into a new array, which takes theirs."""
        F, arrays = self.F, [array for layer in kind for array in layer.values()]
        size = sum(math.prod(array.shape) for array in arrays)
        flat = F.empty(size, *arrays[:1]) if shared is None else shared
        start = 0
        for layer in kind:
            for key, old in layer.items():
                end = start + math.prod(old.shape)
                layer[key] = F.channels_last_view(flat[start:end], tuple(old.shape))
                if shared is None:
                    layer[key][...] = old
                F.retire(old)
                start = end
        return flat

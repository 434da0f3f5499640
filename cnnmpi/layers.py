"""The layers: each holds parameters and the cache of its last forward pass; the mathematics is in ``functional``.

A layer computes with the module ``F``: ``cnnmpi.functional`` (NumPy) or, after ``to_torch()``, its twin
``cnnmpi.functional_torch``. No layer writes into its input or its ``dout``. Options and shapes are those of torch.nn.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from cnnmpi import functional
from cnnmpi.functional.conv import Size, pair
from cnnmpi.rng import generator

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
        self.buffers: dict[str, Array] = {}  # kept with the parameters, but not learned (running statistics)
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
        """Let backward leave dx out (None), for a first layer whose input needs no gradient. Layers may ignore it."""

    # -- for layers --------------------------------------------------------------------------------------------------

    def _add_parameter(self, key: str, value: np.ndarray[Any, Any], dtype: Any) -> None:
        """Define the parameter ``key`` and its gradient; 4-D arrays are channels-last in memory."""
        for arrays, content in ((self.params, value), (self.grads, 0)):
            arrays[key] = functional.channels_last_view(np.empty(value.size, dtype), value.shape)
            arrays[key][...] = content

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
        for param in self.params.values():
            if x.dtype != param.dtype:
                raise ValueError(f"{self._label()}: expected an input of dtype {param.dtype}, got {x.dtype}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._options()})"

    def _options(self) -> str:
        """The arguments to show in repr."""
        return ""


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


class Conv2d(Layer):
    """2-D convolution: (N, in_c, H, W) -> (N, out_c, Ho, Wo). Weight (out_c, in_c, kH, kW), bias (out_c,).

    ``k``, ``stride`` and ``padding`` are one number or (height, width). Weights start by Kaiming's normal
    initialisation from ``rng`` (a fresh one if None), biases at 0.
    """

    def __init__(
        self,
        in_c: int,
        out_c: int,
        k: Size,
        stride: Size = 1,
        padding: Size = 0,
        bias: bool = True,
        *,
        rng: np.random.Generator | None = None,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__()
        self.in_c, self.out_c, self.k, self.stride, self.padding = in_c, out_c, k, stride, padding
        self.input_grad = True
        rng = rng or np.random.default_rng()
        self._add_parameter("weight", functional.kaiming_normal(rng, (out_c, in_c, *pair(k))), dtype)
        if bias:
            self._add_parameter("bias", np.zeros(out_c), dtype)

    def forward(self, x: Array) -> Array:
        """(N, in_c, H, W) -> (N, out_c, Ho, Wo)."""
        self._expect(x, "N", self.in_c, "H", "W")
        W, b = self.params["weight"], self.params.get("bias")
        try:
            return self._keep(self.F.conv2d(x, W, b, stride=self.stride, padding=self.padding))
        except ValueError as error:
            raise ValueError(f"{self._label()}: {error}") from None

    def backward(self, dout: Array) -> Array:
        """(N, out_c, Ho, Wo) -> (N, in_c, H, W), or None after ``skip_input_grad()``."""
        dx, dW, db = self.F.conv2d_backward(dout, self._taken(), input_grad=self.input_grad)
        self._add_grads(weight=dW, bias=db)
        return dx

    def skip_input_grad(self) -> None:
        """Spare the input's gradient, a third of the layer's work."""
        self.input_grad = False

    def _options(self) -> str:
        extra = "" if "bias" in self.params else ", bias=False"
        return f"{self.in_c}, {self.out_c}, {self.k}, stride={self.stride}, padding={self.padding}{extra}"


class Linear(Layer):
    """Affine map: (N, in_features) -> (N, out_features). Weight (out_features, in_features), bias (out_features,)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rng: np.random.Generator | None = None,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        rng = rng or np.random.default_rng()
        self._add_parameter("weight", functional.kaiming_normal(rng, (out_features, in_features)), dtype)
        if bias:
            self._add_parameter("bias", np.zeros(out_features), dtype)

    def forward(self, x: Array) -> Array:
        """(N, in_features) -> (N, out_features)."""
        self._expect(x, "N", self.in_features)
        return self._keep(self.F.linear(x, self.params["weight"], self.params.get("bias")))

    def backward(self, dout: Array) -> Array:
        """(N, out_features) -> (N, in_features)."""
        dx, dW, db = self.F.linear_backward(dout, self._taken())
        self._add_grads(weight=dW, bias=db)
        return dx

    def _options(self) -> str:
        return f"{self.in_features}, {self.out_features}" + ("" if "bias" in self.params else ", bias=False")


class BatchNorm(Layer):
    """Batch normalisation of (N, C) or (N, C, H, W) for each channel. Weight and bias (C,), running statistics (C,)."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, *, dtype: Any = np.float32) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self._add_parameter("weight", np.ones(num_features), dtype)
        self._add_parameter("bias", np.zeros(num_features), dtype)
        self.buffers = {"running_mean": np.zeros(num_features, dtype), "running_var": np.ones(num_features, dtype)}

    def forward(self, x: Array) -> Array:
        """Shape kept. In training the running statistics move towards the batch's."""
        self._expect(x, "N", self.num_features, *("HW" if len(x.shape) == 4 else ""))
        try:
            result = self.F.batch_norm(
                x,
                self.params["weight"],
                self.params["bias"],
                running_mean=self.buffers["running_mean"],
                running_var=self.buffers["running_var"],
                training=self.training,
                momentum=self.momentum,
                eps=self.eps,
            )
        except ValueError as error:
            raise ValueError(f"{self._label()}: {error}") from None
        return self._keep(result)

    def backward(self, dout: Array) -> Array:
        """Shape kept."""
        dx, dW, db = self.F.batch_norm_backward(dout, self._taken())
        self._add_grads(weight=dW, bias=db)
        return dx

    def _options(self) -> str:
        return f"{self.num_features}"


class ReLU(Layer):
    """max(x, 0), element by element."""

    def forward(self, x: Array) -> Array:
        """Shape kept."""
        return self._keep(self.F.relu(x))

    def backward(self, dout: Array) -> Array:
        """Shape kept."""
        return self.F.relu_backward(dout, self._taken())


class Dropout(Layer):
    """In training, zero each element with probability ``p`` and scale the others by 1 / (1 - p).

    The n-th mask after ``reseed(seed, ...)`` is a function of the arguments and n; without, of ``seed`` and n.
    """

    def __init__(self, p: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"Dropout: the probability p must lie in 0..1, got {p}")
        self.p = p
        self.reseed(seed)

    def reseed(self, seed: int, *where: int) -> None:
        """Say what the next masks are for: a seed and up to two indices (such as step and shard)."""
        self._seed, self._where, self._calls = seed, where, 0

    def forward(self, x: Array) -> Array:
        """Shape kept."""
        if not self.training or self.p == 0:
            self._cache = ()  # nothing to keep, but backward may be called
            return x
        rng = generator(self._seed, f"dropout {self.name}", *self._where, self._calls)
        self._calls += 1
        keep = self.F.as_array(rng.random(tuple(x.shape), dtype=np.float32) >= self.p, like=x)
        return self._keep(self.F.dropout(x, keep, p=self.p))

    def backward(self, dout: Array) -> Array:
        """Shape kept."""
        cache = self._taken()
        return dout if isinstance(cache, tuple) else self.F.dropout_backward(dout, cache)

    def _options(self) -> str:
        return f"{self.p}"


class _Pool(Layer):
    """What both pools share: windows of ``k``, ``stride`` (``k`` unless given) apart."""

    def __init__(self, k: Size, stride: Size | None = None, padding: Size = 0) -> None:
        super().__init__()
        self.k, self.stride, self.padding = k, k if stride is None else stride, padding

    def _pool(self, op: Any, x: Array) -> Array:
        self._expect(x, "N", "C", "H", "W")
        try:
            return self._keep(op(x, self.k, stride=self.stride, padding=self.padding))
        except ValueError as error:
            raise ValueError(f"{self._label()}: {error}") from None

    def _options(self) -> str:
        return f"{self.k}, stride={self.stride}, padding={self.padding}"


class MaxPool2d(_Pool):
    """The maximum of each window: (N, C, H, W) -> (N, C, Ho, Wo)."""

    def forward(self, x: Array) -> Array:
        """(N, C, H, W) -> (N, C, Ho, Wo)."""
        return self._pool(self.F.max_pool2d, x)

    def backward(self, dout: Array) -> Array:
        """(N, C, Ho, Wo) -> (N, C, H, W)."""
        return self.F.max_pool2d_backward(dout, self._taken())


class AvgPool2d(_Pool):
    """The mean of each window, padding counted as zeros: (N, C, H, W) -> (N, C, Ho, Wo)."""

    def forward(self, x: Array) -> Array:
        """(N, C, H, W) -> (N, C, Ho, Wo)."""
        return self._pool(self.F.avg_pool2d, x)

    def backward(self, dout: Array) -> Array:
        """(N, C, Ho, Wo) -> (N, C, H, W)."""
        return self.F.avg_pool2d_backward(dout, self._taken())


class GlobalAvgPool2d(Layer):
    """The mean over all positions: (N, C, H, W) -> (N, C)."""

    def forward(self, x: Array) -> Array:
        """(N, C, H, W) -> (N, C)."""
        self._expect(x, "N", "C", "H", "W")
        return self._keep(self.F.global_avg_pool2d(x))

    def backward(self, dout: Array) -> Array:
        """(N, C) -> (N, C, H, W)."""
        return self.F.global_avg_pool2d_backward(dout, self._taken())


class Flatten(Layer):
    """(N, ...) -> (N, features), features ordered (C, H, W)."""

    def forward(self, x: Array) -> Array:
        """(N, C, H, W) -> (N, C*H*W)."""
        return self._keep(self.F.flatten(x))

    def backward(self, dout: Array) -> Array:
        """(N, C*H*W) -> (N, C, H, W)."""
        return self.F.flatten_backward(dout, self._taken())


class Softmax(Layer):
    """Probabilities along the last axis. For training, cross_entropy_loss on the logits is exact and faster."""

    def forward(self, x: Array) -> Array:
        """Shape kept."""
        self._cache = self.F.softmax(x)
        return self._cache

    def backward(self, dout: Array) -> Array:
        """Shape kept."""
        return self.F.softmax_backward(dout, self._taken())


class Identity(Layer):
    """y = x."""

    def forward(self, x: Array) -> Array:
        """Return x itself."""
        return x

    def backward(self, dout: Array) -> Array:
        """Return dout itself."""
        return dout


class Sequential(Layer):
    """y = last(... second(first(x))); its layers are named "0", "1", ... as in torch."""

    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        self.layers = list(layers)

    def children(self) -> Iterator[tuple[str, Layer]]:
        """Yield ("0", first), ("1", second), ..."""
        for index, layer in enumerate(self.layers):
            yield str(index), layer

    def forward(self, x: Array) -> Array:
        """Apply the layers first to last."""
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dout: Array) -> Array:
        """Apply the chain rule last to first."""
        for layer in reversed(self.layers):
            dout = layer.backward(dout)
        return dout

    def skip_input_grad(self) -> None:
        """Spare what the first layer can spare."""
        if self.layers:
            self.layers[0].skip_input_grad()

    def _options(self) -> str:
        return ", ".join(map(repr, self.layers))


class Residual(Layer):
    """y = body(x) + shortcut(x), hence dx = body'(dout) + shortcut'(dout)."""

    def __init__(self, body: Layer, shortcut: Layer | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut or Identity()

    def forward(self, x: Array) -> Array:
        """Shape as the body gives it; the shortcut must give the same."""
        y, skip = self.body.forward(x), self.shortcut.forward(x)
        if y.shape != skip.shape:
            shapes = f"{tuple(y.shape)}, its shortcut {tuple(skip.shape)}"
            raise ValueError(f"{self.name} Residual: the body gives {shapes}: they must be equal".strip())
        return y + skip

    def backward(self, dout: Array) -> Array:
        """Both paths receive dout; their gradients add up."""
        return self.body.backward(dout) + self.shortcut.backward(dout)

    def _options(self) -> str:
        return f"{self.body!r}, {self.shortcut!r}"

"""The layers without parameters: activations, dropout, pools, flattening, softmax."""

from typing import Any

import numpy as np

from cnnmpi.common.arguments import check_choice
from cnnmpi.layers.base import Array, Layer
from cnnmpi.rng import generator
from cnnmpi.sizes import Size, check_windows, number, upsampling


class _Activation(Layer):
    """A function of each element on its own: y = op(x), of the shape of x, whatever that is."""

    op: str  # its name among the operations

    def __init__(self) -> None:
        super().__init__()
        self.options: dict[str, Any] = {}

    def forward(self, x: Array) -> Array:
        """Return y, the function of each element of ``x``: of the shape of x."""
        return self._keep(getattr(self.F, self.op)(x, **self.options))

    def backward(self, dout: Array) -> Array:
        """Return dx, the gradient by the input, for that by the output: of the same shape."""
        return getattr(self.F, f"{self.op}_backward")(dout, self._taken(dout))

    def _options(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.options.items())


class ReLU(_Activation):
    """max(x, 0), element by element."""

    op = "relu"


class LeakyReLU(_Activation):
    """x where it is positive, else ``negative_slope`` x (Maas et al., 2013)."""

    op = "leaky_relu"

    def __init__(self, negative_slope: float = 0.01) -> None:
        super().__init__()
        self.options["negative_slope"] = number("LeakyReLU: negative_slope", negative_slope)


class SiLU(_Activation):
    """x sigmoid(x), also known as swish (Elfwing et al., 2017)."""

    op = "silu"


class GELU(_Activation):
    """x Phi(x), with Phi the standard normal distribution (Hendrycks and Gimpel, 2016).

    With ``approximate`` "tanh", Phi(x) is replaced by (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.
    """

    op = "gelu"

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        check_choice("GELU", "approximate", approximate, "none", "tanh")
        self.options["approximate"] = approximate


class Sigmoid(_Activation):
    """1 / (1 + exp(-x)). For training, binary_cross_entropy_loss on the logits is exact and faster."""

    op = "sigmoid"


class Tanh(_Activation):
    """The hyperbolic tangent, (exp(x) - exp(-x)) / (exp(x) + exp(-x))."""

    op = "tanh"


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
        """Return ``x`` (N, ...) with a new mask in training, else x itself."""
        if not self.training or self.p == 0:
            return self._keep((x, ()))
        rng = generator(self._seed, f"dropout {self.name}", *self._where, self._calls)
        self._calls += 1
        keep = self.F.as_array(rng.random(tuple(x.shape), dtype=np.float32) >= self.p, like=x)
        return self._keep(self.F.dropout(x, keep, p=self.p))

    def backward(self, dout: Array) -> Array:
        """Return dx, the gradient by the input (N, ...): ``dout``, masked and scaled as x was."""
        cache = self._taken(dout)
        return dout if isinstance(cache, tuple) else self.F.dropout_backward(dout, cache)

    def _options(self) -> str:
        return f"{self.p}"


class _Pool(Layer):
    """What both pools share: windows of ``k``, ``stride`` (``k`` unless given) apart."""

    def __init__(self, k: Size, stride: Size | None = None, padding: Size = 0) -> None:
        super().__init__()
        self.k, self.stride, self.padding = k, k if stride is None else stride, padding
        try:
            check_windows(self.k, self.stride, padding)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from None

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
        """Return the maximum of each window of ``x`` (N, C, H, W): y (N, C, Ho, Wo)."""
        return self._pool(self.F.max_pool2d, x)

    def backward(self, dout: Array) -> Array:
        """Return dx, the gradient by the input (N, C, H, W): each maximum has its window's, the first of equal ones."""
        return self.F.max_pool2d_backward(dout, self._taken(dout))


class AvgPool2d(_Pool):
    """The mean of each window, padding counted as zeros: (N, C, H, W) -> (N, C, Ho, Wo)."""

    def forward(self, x: Array) -> Array:
        """Return the mean of each window of ``x`` (N, C, H, W): y (N, C, Ho, Wo)."""
        return self._pool(self.F.avg_pool2d, x)

    def backward(self, dout: Array) -> Array:
        """Return dx, the gradient by the input (N, C, H, W): all of a window share its gradient equally."""
        return self.F.avg_pool2d_backward(dout, self._taken(dout))


class GlobalAvgPool2d(Layer):
    """The mean over all positions: (N, C, H, W) -> (N, C)."""

    def forward(self, x: Array) -> Array:
        """Return the mean over all positions of ``x`` (N, C, H, W): y (N, C)."""
        self._expect(x, "N", "C", "H", "W")
        return self._keep(self.F.global_avg_pool2d(x))

    def backward(self, dout: Array) -> Array:
        """Return dx, the gradient by the input (N, C, H, W): all positions share their channel's equally."""
        return self.F.global_avg_pool2d_backward(dout, self._taken(dout))


class Upsample(Layer):
    """Each pixel repeated, the nearest neighbour's value: (N, C, H, W) -> (N, C, scale H, scale W).

    ``scale_factor`` is one whole number or (height, width). Raises ValueError for less than 1.
    """

    def __init__(self, scale_factor: Size) -> None:
        super().__init__()
        try:
            upsampling(scale_factor)
        except ValueError as error:
            raise ValueError(f"Upsample: {error}") from None
        self.scale_factor = scale_factor

    def forward(self, x: Array) -> Array:
        """Return y (N, C, scale H, scale W) for ``x`` (N, C, H, W)."""
        self._expect(x, "N", "C", "H", "W")
        return self._keep(self.F.upsample_nearest2d(x, self.scale_factor))

    def backward(self, dout: Array) -> Array:
        """Return dx (N, C, H, W), for each pixel the sum over its copies in ``dout``."""
        return self.F.upsample_nearest2d_backward(dout, self._taken(dout))

    def _options(self) -> str:
        return f"{self.scale_factor}"


class Flatten(Layer):
    """(N, ...) -> (N, features), features ordered (C, H, W)."""

    def forward(self, x: Array) -> Array:
        """Return ``x`` (N, C, H, W) as rows of features: y (N, C*H*W)."""
        return self._keep(self.F.flatten(x))

    def backward(self, dout: Array) -> Array:
        """Return dx, the gradient by the input: ``dout`` in the shape (N, C, H, W)."""
        return self.F.flatten_backward(dout, self._taken(dout))


class Softmax(Layer):
    """Probabilities along the last axis. For training, cross_entropy_loss on the logits is exact and faster."""

    def forward(self, x: Array) -> Array:
        """Return the probabilities exp(x) / sum exp(x) along the last axis: of the shape of ``x`` (N, ..., K)."""
        y = self.F.softmax(x)
        return self._keep((y, y))

    def backward(self, dout: Array) -> Array:
        """Return dx, the gradient by the input (N, ..., K): y (dout - sum dout y)."""
        return self.F.softmax_backward(dout, self._taken(dout))

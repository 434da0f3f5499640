"""The layers without parameters: ReLU, dropout, pools, flattening, softmax."""

from typing import Any

import numpy as np

from cnnmpi.layers.base import Array, Layer
from cnnmpi.rng import generator
from cnnmpi.sizes import Size, pair


class ReLU(Layer):
    """max(x, 0), element by element."""

    def forward(self, x: Array) -> Array:
        """Shape kept."""
        return self._keep(self.F.relu(x))

    def backward(self, dout: Array) -> Array:
        """Shape kept."""
        return self.F.relu_backward(dout, self._taken(dout))


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
            return self._keep((x, ()))
        rng = generator(self._seed, f"dropout {self.name}", *self._where, self._calls)
        self._calls += 1
        keep = self.F.as_array(rng.random(tuple(x.shape), dtype=np.float32) >= self.p, like=x)
        return self._keep(self.F.dropout(x, keep, p=self.p))

    def backward(self, dout: Array) -> Array:
        """Shape kept."""
        cache = self._taken(dout)
        return dout if isinstance(cache, tuple) else self.F.dropout_backward(dout, cache)

    def _options(self) -> str:
        return f"{self.p}"


class _Pool(Layer):
    """What both pools share: windows of ``k``, ``stride`` (``k`` unless given) apart."""

    def __init__(self, k: Size, stride: Size | None = None, padding: Size = 0) -> None:
        super().__init__()
        self.k, self.stride, self.padding = k, k if stride is None else stride, padding
        for size in (self.k, self.stride, padding):
            pair(size)  # raises ValueError for what is none

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
        return self.F.max_pool2d_backward(dout, self._taken(dout))


class AvgPool2d(_Pool):
    """The mean of each window, padding counted as zeros: (N, C, H, W) -> (N, C, Ho, Wo)."""

    def forward(self, x: Array) -> Array:
        """(N, C, H, W) -> (N, C, Ho, Wo)."""
        return self._pool(self.F.avg_pool2d, x)

    def backward(self, dout: Array) -> Array:
        """(N, C, Ho, Wo) -> (N, C, H, W)."""
        return self.F.avg_pool2d_backward(dout, self._taken(dout))


class GlobalAvgPool2d(Layer):
    """The mean over all positions: (N, C, H, W) -> (N, C)."""

    def forward(self, x: Array) -> Array:
        """(N, C, H, W) -> (N, C)."""
        self._expect(x, "N", "C", "H", "W")
        return self._keep(self.F.global_avg_pool2d(x))

    def backward(self, dout: Array) -> Array:
        """(N, C) -> (N, C, H, W)."""
        return self.F.global_avg_pool2d_backward(dout, self._taken(dout))


class Flatten(Layer):
    """(N, ...) -> (N, features), features ordered (C, H, W)."""

    def forward(self, x: Array) -> Array:
        """(N, C, H, W) -> (N, C*H*W)."""
        return self._keep(self.F.flatten(x))

    def backward(self, dout: Array) -> Array:
        """(N, C*H*W) -> (N, C, H, W)."""
        return self.F.flatten_backward(dout, self._taken(dout))


class Softmax(Layer):
    """Probabilities along the last axis. For training, cross_entropy_loss on the logits is exact and faster."""

    def forward(self, x: Array) -> Array:
        """Shape kept."""
        y = self.F.softmax(x)
        return self._keep((y, y))

    def backward(self, dout: Array) -> Array:
        """Shape kept."""
        return self.F.softmax_backward(dout, self._taken(dout))

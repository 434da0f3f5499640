"""The convolutions: one that learns, and one that whitens images."""

from typing import Any

import numpy as np

from cnnmpi import functional
from cnnmpi.layers.base import Array, Layer
from cnnmpi.rng import for_first_draws
from cnnmpi.sizes import Size, pair, whole


class Convolution(Layer):
    """What the convolutions share: how they spare work.

    Whoever knows that the weights keep their values for a while assigns a dictionary to ``filters``, and takes it away
    (None) before they change: all that is derived from them is then derived once, also for layers of other models that
    have the same weights and share the dictionary. Copies of the layer, and what it becomes with another engine or
    dtype, begin without.
    """

    filters: dict[str, Array] | None = None

    def _forget(self) -> None:
        super()._forget()
        self.filters = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"filters": None}


class Conv2d(Convolution):
    """2-D convolution: (N, in_c, H, W) -> (N, out_c, Ho, Wo). Weight (out_c, in_c, kH, kW), bias (out_c,).

    ``k``, ``stride`` and ``padding`` are one number or (height, width). Weights start by Kaiming's normal
    initialisation from ``rng`` (see ``rng.first_draws`` if None), biases at 0.
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
        self.in_c = in_c = whole("Conv2d: in_c", in_c)
        self.out_c = out_c = whole("Conv2d: out_c", out_c)
        self.k, self.stride, self.padding = k, stride, padding
        for size in (k, stride, padding):
            pair(size)  # raises ValueError for what is none
        rng = rng or for_first_draws()
        self._add_parameter("weight", functional.kaiming_normal(rng, (out_c, in_c, *pair(k))), dtype)
        if bias:
            self._add_parameter("bias", np.zeros(out_c), dtype)

    def forward(self, x: Array) -> Array:
        """(N, in_c, H, W) -> (N, out_c, Ho, Wo)."""
        self._expect(x, "N", self.in_c, "H", "W")
        W, b = self.params["weight"], self.params.get("bias")
        try:
            return self._keep(self.F.conv2d(x, W, b, stride=self.stride, padding=self.padding, filters=self.filters))
        except ValueError as error:
            raise ValueError(f"{self._label()}: {error}") from None

    def backward(self, dout: Array) -> Array:
        """(N, out_c, Ho, Wo) -> (N, in_c, H, W), or None after ``skip_input_grad()``."""
        dx, dW, db = self.F.conv2d_backward(dout, self._taken(dout), input_grad=self.input_grad)
        self._add_grads(weight=dW, bias=db)
        return dx

    def _options(self) -> str:
        extra = "" if "bias" in self.params else ", bias=False"
        return f"{self.in_c}, {self.out_c}, {self.k}, stride={self.stride}, padding={self.padding}{extra}"


class Whitening(Convolution):
    """A convolution that learns nothing: it decorrelates the pixels of images (see ``functional.whitening``).

    (N, in_c, H, W) -> (N, out_c, H, W). ``k``, odd, is one number or (height, width). The filters are the buffer
    "weight" (out_c, in_c, kH, kW), so that a torch.nn.Conv2d without bias can take them from a checkpoint.
    """

    frozen = True

    def __init__(self, in_c: int, out_c: int, k: Size = 3, *, dtype: Any = np.float32) -> None:
        super().__init__()
        self.in_c = in_c = whole("Whitening: in_c", in_c)
        self.out_c = out_c = whole("Whitening: out_c", out_c)
        self.k = k
        kH, kW = pair(k)
        if not (kH % 2 and kW % 2):
            raise ValueError(f"Whitening: the kernel size must be odd, got {k}")
        self.padding = (kH // 2, kW // 2)
        self._add_array(self.buffers, "weight", functional.whitening((out_c, in_c, kH, kW)), dtype)

    def forward(self, x: Array) -> Array:
        """(N, in_c, H, W) -> (N, out_c, H, W)."""
        self._expect(x, "N", self.in_c, "H", "W")
        return self._keep(self.F.conv2d(x, self.buffers["weight"], padding=self.padding, filters=self.filters))

    def backward(self, dout: Array) -> Array:
        """(N, out_c, H, W) -> (N, in_c, H, W), or None after ``skip_input_grad()``."""
        cache = self._taken(dout)
        return self.F.conv2d_backward(dout, cache)[0] if self.input_grad else None

    def _options(self) -> str:
        return f"{self.in_c}, {self.out_c}, {self.k}"

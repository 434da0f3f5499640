"""The convolutions: those that learn, and one that whitens images."""

import math
from typing import Any

import numpy as np

from cnnmpi import functional
from cnnmpi.layers.base import Array, Layer
from cnnmpi.rng import for_first_draws
from cnnmpi.sizes import Size, check_groups, check_windows, pair, whole


class Convolution(Layer):
    """What the convolutions share: how they spare work.

    Whoever knows that the weights keep their values for a while assigns a dictionary to ``filters``, and takes it away
    (None) before they change: all that is derived from them is then derived once, also for layers of other models that
    have the same weights and share the dictionary. Copies of the layer, and what it becomes with another engine or
    dtype, begin without.
    """

    filters: dict[str, Array] | None = None
    lists = ("filters",)

    def _forget(self) -> None:
        super()._forget()
        self.filters = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"filters": None}


class _Learned(Convolution):
    """What the convolutions that learn share."""

    def __init__(
        self, in_c: int, out_c: int, k: Size, stride: Size, padding: Size, groups: int, dilation: Size
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.in_c, self.out_c = whole(f"{name}: in_c", in_c), whole(f"{name}: out_c", out_c)
        self.k, self.stride, self.padding, self.dilation = k, stride, padding, dilation
        self.groups = whole(f"{name}: groups", groups)
        pair(k)  # raises ValueError for what is no size; the weights' initialisation does for one below 1
        if self.groups != 1:
            check_groups(name, self.groups, self.in_c, self.out_c)
        try:
            check_windows(1, stride, padding, dilation)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _add_weights(self, weight: Array, bias: bool, dtype: Any) -> None:
        self.add_parameter("weight", weight, dtype)
        if bias:
            self.add_parameter("bias", np.zeros(self.out_c), dtype)

    def _convolve(self, op: Any, x: Array, **options: Any) -> Array:
        self._expect(x, "N", self.in_c, "H", "W")
        options |= {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        try:
            return self._keep(op(x, self.params["weight"], self.params.get("bias"), **options))
        except ValueError as error:
            raise ValueError(f"{self._label()}: {error}") from None

    def _convolve_backward(self, op: Any, dout: Array) -> Array:
        dx, dW, db = op(dout, self._taken(dout), input_grad=self.input_grad, weight_grad=not self.frozen)
        self.add_grads(weight=dW, bias=db)
        return dx

    def _options(self) -> str:
        shown = f"{self.in_c}, {self.out_c}, {self.k}, stride={self.stride}, padding={self.padding}"
        if pair(self.dilation) != (1, 1):
            shown += f", dilation={self.dilation}"
        if self.groups != 1:
            shown += f", groups={self.groups}"
        return shown + ("" if "bias" in self.params else ", bias=False")


class Conv2d(_Learned):
    """2-D convolution: (N, in_c, H, W) -> (N, out_c, Ho, Wo). Weight (out_c, in_c / groups, kH, kW), bias (out_c,).

    ``k``, ``stride``, ``padding`` and ``dilation`` are one number or (height, width). With ``groups``, which divide
    ``in_c`` and ``out_c``, each group of output channels sees only its own group of input channels; ``groups=in_c``
    is a depthwise convolution. Weights start by Kaiming's normal initialisation from ``rng`` (see ``rng.first_draws``
    if None), biases at 0. Raises ValueError for sizes and counts that are none or do not fit.
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
        groups: int = 1,
        dilation: Size = 1,
        rng: np.random.Generator | None = None,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__(in_c, out_c, k, stride, padding, groups, dilation)
        shape = (self.out_c, self.in_c // self.groups, *pair(k))
        self._add_weights(functional.kaiming_normal(rng or for_first_draws(), shape), bias, dtype)

    def forward(self, x: Array) -> Array:
        """Return y (N, out_c, Ho, Wo) for ``x`` (N, in_c, H, W)."""
        return self._convolve(self.F.conv2d, x, filters=self.filters)

    def backward(self, dout: Array) -> Array:
        """Return dx (N, in_c, H, W) for ``dout`` (N, out_c, Ho, Wo), or None after ``skip_input_grad()``."""
        return self._convolve_backward(self.F.conv2d_backward, dout)


class ConvTranspose2d(_Learned):
    """The transpose of a Conv2d from out_c to in_c channels: (N, in_c, H, W) -> (N, out_c, Ho, Wo).

    With a stride it enlarges: Ho = (H - 1) stride - 2 padding + dilation (kH - 1) + output_padding + 1. Weight (in_c,
    out_c / groups, kH, kW), bias (out_c,); options as Conv2d has them. ``output_padding``, below stride or dilation,
    chooses among the sizes that Conv2d would bring down to H. Weights start by Kaiming's normal initialisation for the
    number of products that an output sums up: in_c / groups kH kW / stride^2 on average.
    """

    def __init__(
        self,
        in_c: int,
        out_c: int,
        k: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        bias: bool = True,
        *,
        groups: int = 1,
        dilation: Size = 1,
        rng: np.random.Generator | None = None,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__(in_c, out_c, k, stride, padding, groups, dilation)
        self.output_padding = output_padding
        pair(output_padding)
        shape = (self.out_c, self.in_c // self.groups, *pair(k))
        weight = functional.kaiming_normal(rng or for_first_draws(), shape)
        weight *= math.sqrt(math.prod(pair(stride)))
        self._add_weights(weight.reshape(self.in_c, self.out_c // self.groups, *pair(k)), bias, dtype)

    def forward(self, x: Array) -> Array:
        """Return y (N, out_c, Ho, Wo) for ``x`` (N, in_c, H, W)."""
        return self._convolve(self.F.conv_transpose2d, x, output_padding=self.output_padding)

    def backward(self, dout: Array) -> Array:
        """Return dx (N, in_c, H, W) for ``dout`` (N, out_c, Ho, Wo), or None after ``skip_input_grad()``."""
        return self._convolve_backward(self.F.conv_transpose2d_backward, dout)

    def _options(self) -> str:
        more = "" if pair(self.output_padding) == (0, 0) else f", output_padding={self.output_padding}"
        return super()._options() + more


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
        self.add_buffer("weight", functional.whitening((out_c, in_c, kH, kW)), dtype)

    def forward(self, x: Array) -> Array:
        """Return y (N, out_c, H, W) for ``x`` (N, in_c, H, W)."""
        self._expect(x, "N", self.in_c, "H", "W")
        return self._keep(self.F.conv2d(x, self.buffers["weight"], padding=self.padding, filters=self.filters))

    def backward(self, dout: Array) -> Array:
        """Return dx (N, in_c, H, W) for ``dout`` (N, out_c, H, W), or None after ``skip_input_grad()``."""
        cache = self._taken(dout)
        return self.F.conv2d_backward(dout, cache, weight_grad=False)[0] if self.input_grad else None

    def _options(self) -> str:
        return f"{self.in_c}, {self.out_c}, {self.k}"

"""The layers that learn, besides convolutions: affine map, normalisation."""

from typing import Any

import numpy as np

from cnnmpi import functional
from cnnmpi.layers.base import Array, Layer
from cnnmpi.rng import for_first_draws
from cnnmpi.sizes import check_groups, whole


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
        self.in_features = in_features = whole("Linear: in_features", in_features)
        self.out_features = out_features = whole("Linear: out_features", out_features)
        rng = rng or for_first_draws()
        self.add_parameter("weight", functional.kaiming_normal(rng, (out_features, in_features)), dtype)
        if bias:
            self.add_parameter("bias", np.zeros(out_features), dtype)

    def forward(self, x: Array) -> Array:
        """(N, in_features) -> (N, out_features)."""
        self._expect(x, "N", self.in_features)
        return self._keep(self.F.linear(x, self.params["weight"], self.params.get("bias")))

    def backward(self, dout: Array) -> Array:
        """(N, out_features) -> (N, in_features), or None after ``skip_input_grad()``."""
        wanted = {"input_grad": self.input_grad, "weight_grad": not self.frozen}
        dx, dW, db = self.F.linear_backward(dout, self._taken(dout), **wanted)
        self.add_grads(weight=dW, bias=db)
        return dx

    def _options(self) -> str:
        return f"{self.in_features}, {self.out_features}" + ("" if "bias" in self.params else ", bias=False")


class BatchNorm(Layer):
    """Batch normalisation of (N, C) or (N, C, H, W) for each channel. Weight and bias (C,), running statistics (C,).

    With ``relu``, the positive part of that: as a ReLU layer behind it gives, in fewer passes over memory.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        relu: bool = False,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__()
        self.num_features = num_features = whole("BatchNorm: num_features", num_features)
        self.eps, self.momentum, self.relu = eps, momentum, relu
        self.add_parameter("weight", np.ones(num_features), dtype)
        self.add_parameter("bias", np.zeros(num_features), dtype)
        self.add_buffer("running_mean", np.zeros(num_features), dtype)
        self.add_buffer("running_var", np.ones(num_features), dtype)

    def forward(self, x: Array) -> Array:
        """Return y, normalised, scaled and shifted: of the shape of ``x``.

        In training by the batch's statistics, towards which the running ones move; in evaluation by the running ones.
        """
        self._expect(x, "N", self.num_features, *("HW" if len(x.shape) == 4 else ""))
        try:
            result = self.F.batch_norm(
                x,
                self.params["weight"],
                self.params["bias"],
                running_mean=self.buffers["running_mean"],
                running_var=self.buffers["running_var"],
                training=self.training and not self.frozen,
                momentum=self.momentum,
                eps=self.eps,
                relu=self.relu,
            )
        except ValueError as error:
            raise ValueError(f"{self._label()}: {error}") from None
        return self._keep(result)

    def backward(self, dout: Array) -> Array:
        """Return dx, the gradient by the input, of its shape; add those by weight and bias to their gradients."""
        dx, dW, db = self.F.batch_norm_backward(dout, self._taken(dout))
        self.add_grads(weight=dW, bias=db)
        return dx

    def _options(self) -> str:
        return f"{self.num_features}" + (", relu=True" if self.relu else "")


class GroupNorm(Layer):
    """Normalisation of (N, C) or (N, C, H, W) by ``num_groups`` groups of channels (Wu and He, 2018).

    The statistics are each image's own, so that nothing depends on the batch, neither in training nor in evaluation.
    Weight and bias (C,), for C = ``num_channels``, a multiple of ``num_groups``.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, *, dtype: Any = np.float32) -> None:
        super().__init__()
        self.num_groups = num_groups = whole("GroupNorm: num_groups", num_groups)
        self.num_channels = num_channels = whole("GroupNorm: num_channels", num_channels)
        check_groups("GroupNorm", num_groups, num_channels)
        self.eps = eps
        self.add_parameter("weight", np.ones(num_channels), dtype)
        self.add_parameter("bias", np.zeros(num_channels), dtype)

    def forward(self, x: Array) -> Array:
        """Return y, normalised, scaled and shifted: of the shape of ``x``."""
        self._expect(x, "N", self.num_channels, *("HW" if len(x.shape) == 4 else ""))
        W, b = self.params["weight"], self.params["bias"]
        return self._keep(self.F.group_norm(x, W, b, num_groups=self.num_groups, eps=self.eps))

    def backward(self, dout: Array) -> Array:
        """Return dx, the gradient by the input, of its shape; add those by weight and bias to their gradients."""
        dx, dW, db = self.F.group_norm_backward(dout, self._taken(dout))
        self.add_grads(weight=dW, bias=db)
        return dx

    def _options(self) -> str:
        return f"{self.num_groups}, {self.num_channels}"

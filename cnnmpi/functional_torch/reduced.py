"""Convolutions and matrix products in a type of fewer bits, for the engines of a precision (Micikevicius et al., 2018).

What goes into a convolution or a matrix product is rounded to the type. A convolution's output stays in it, and so do
activations, pools and normalised values after it. Linear layers, global means and losses give float32. Wherever the two
meet, the result is float32; what goes back through an operation comes in the type in which x went in.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnnmpi.functional_torch import activation, conv, loss, norm, pool

SAME = {  # operations whose kernels want dy in the type of x or y, which their cache holds
    activation: ("relu", "leaky_relu", "sigmoid", "tanh", "silu", "gelu", "dropout", "softmax"),
    norm: ("batch_norm",),
    pool: ("max_pool2d", "avg_pool2d"),
}
LOSSES = (loss.cross_entropy_loss, loss.binary_cross_entropy_loss, loss.mse_loss)


def operations(dtype: torch.dtype) -> dict[str, Any]:
    """Return the operations, {name: function}, that compute otherwise where products are of ``dtype``."""

    def rounded(W: Tensor, b: Tensor | None, filters: dict[str, Tensor] | None) -> tuple[Tensor, Tensor | None]:
        """Return the weights in ``dtype``; from ``filters``, as long as the caller keeps it, rounded once."""
        kept = {} if filters is None else filters
        for name, array in (("weight", W), ("bias", b)):
            if array is not None and name not in kept:
                kept[name] = array.to(dtype)
        return kept["weight"], kept.get("bias")

    def conv2d(
        x: Tensor, W: Tensor, b: Tensor | None = None, *, filters: dict[str, Tensor] | None = None, **options: Any
    ) -> tuple[Tensor, Any]:
        y, cache = conv.conv2d(x.to(dtype), *rounded(W, b, filters), **options)
        return y, (cache, x.dtype)

    def conv_transpose2d(x: Tensor, W: Tensor, b: Tensor | None = None, **options: Any) -> tuple[Tensor, Any]:
        y, cache = conv.conv_transpose2d(x.to(dtype), *rounded(W, b, None), **options)
        return y, (cache, x.dtype)

    def conv2d_backward(dy: Tensor, cache: Any, **wanted: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        products, x_dtype = cache
        dx, dW, db = conv.conv2d_backward(dy.to(dtype), products, **wanted)
        return None if dx is None else dx.to(x_dtype), dW, db  # the caller adds dW and db to float32

    def linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> tuple[Tensor, Any]:
        y, cache = conv.linear(x.to(dtype), *rounded(W, b, None))
        return y.float(), (cache, x.dtype)

    def linear_backward(dy: Tensor, cache: Any, **wanted: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        products, x_dtype = cache
        dx, dW, db = conv.linear_backward(dy.to(dtype), products, **wanted)
        return None if dx is None else dx.to(x_dtype), dW, None if db is None else dy.sum(0)

    def group_norm(x: Tensor, gamma: Tensor, beta: Tensor, **options: Any) -> tuple[Tensor, Any]:
        y, cache = norm.group_norm(x.float(), gamma, beta, **options)  # a GPU's kernel wants one type for all
        return y.to(x.dtype), (cache, x.dtype)

    def group_norm_backward(dy: Tensor, cache: Any) -> tuple[Tensor, Tensor, Tensor]:
        saved, x_dtype = cache
        dx, dgamma, dbeta = norm.group_norm_backward(dy.float(), saved)
        return dx.to(x_dtype), dgamma, dbeta

    def global_avg_pool2d(x: Tensor) -> tuple[Tensor, Any]:
        y, shape = pool.global_avg_pool2d(x.float())
        return y, (shape, x.dtype)

    def global_avg_pool2d_backward(dy: Tensor, cache: Any) -> Tensor:
        shape, x_dtype = cache
        return pool.global_avg_pool2d_backward(dy, shape).to(x_dtype)

    pairs = [conv2d, conv2d_backward, conv_transpose2d, linear, linear_backward, group_norm, group_norm_backward]
    ours: dict[str, Any] = {each.__name__: each for each in (*pairs, global_avg_pool2d, global_avg_pool2d_backward)}
    ours["conv_transpose2d_backward"] = conv2d_backward
    names = [(module, f"{name}_backward") for module, names in SAME.items() for name in names]
    ours |= {name: _of_one_type(getattr(module, name)) for module, name in names}
    return ours | {each.__name__: _in_float32(each) for each in LOSSES}


def fits(x: Tensor, array: Tensor) -> bool:
    """Return whether a layer with parameters as ``array`` takes ``x``: of its dtype, or of fewer bits."""
    return x.dtype in (array.dtype, torch.bfloat16, torch.float16)


def _of_one_type(backward: Callable[[Tensor, Any], Any]) -> Callable[[Tensor, Any], Any]:
    """Return ``backward`` for a dy of any type: it is given in that of the first tensor of the cache."""

    def call(dy: Tensor, cache: Any) -> Any:
        return backward(dy.to(_first(cache).dtype), cache)

    return call


def _first(cache: Any) -> Tensor:
    """Return the first tensor of a cache: x or y of its operation."""
    while isinstance(cache, tuple):
        cache = next(part for part in cache if part is not None)
    tensor: Tensor = cache
    return tensor


def _in_float32(loss: Callable[..., tuple[float, Tensor]]) -> Callable[..., tuple[float, Tensor]]:
    """Return ``loss`` for logits of fewer bits, too: it and its gradient are float32."""

    def call(logits: Tensor, targets: Any, **options: Any) -> tuple[float, Tensor]:
        return loss(for_loss(logits), targets, **options)

    return call


def for_loss(logits: Tensor) -> Tensor:
    """Return the outputs of a model in the type that a loss computes in: at least float32."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits

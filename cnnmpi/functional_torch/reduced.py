"""Convolutions and matrix products in a type of fewer bits, for the engines of a precision (Micikevicius et al., 2018).

What goes into a convolution or a matrix product is rounded to the type. A convolution's output stays in it, and so do
the activations, until something sums over many numbers: pooled means, the outputs of a linear layer, statistics,
gradients of parameters and losses are float32, as the parameters are.
"""

from typing import Any

import torch
from torch import Tensor

from cnnmpi.functional_torch import conv, pool


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
        return conv.conv2d(x.to(dtype), *rounded(W, b, filters), **options)

    def conv_transpose2d(x: Tensor, W: Tensor, b: Tensor | None = None, **options: Any) -> tuple[Tensor, Any]:
        return conv.conv_transpose2d(x.to(dtype), *rounded(W, b, None), **options)

    def conv2d_backward(dy: Tensor, cache: Any, **wanted: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return conv.conv2d_backward(dy.to(dtype), cache, **wanted)  # the caller adds dW and db to float32

    def linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> tuple[Tensor, Any]:
        y, cache = conv.linear(x.to(dtype), *rounded(W, b, None))
        return y.float(), (cache, x.dtype)

    def linear_backward(dy: Tensor, cache: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        products, x_dtype = cache
        dx, dW, _ = conv.linear_backward(dy.to(dtype), products)
        return dx.to(x_dtype), dW, dy.sum(0) if products[2] else None

    def global_avg_pool2d(x: Tensor) -> tuple[Tensor, Any]:
        y, shape = pool.global_avg_pool2d(x.float())
        return y, (shape, x.dtype)

    def global_avg_pool2d_backward(dy: Tensor, cache: Any) -> Tensor:
        shape, x_dtype = cache
        return pool.global_avg_pool2d_backward(dy, shape).to(x_dtype)

    images = [conv2d, conv2d_backward, conv_transpose2d, global_avg_pool2d, global_avg_pool2d_backward]
    ours = {function.__name__: function for function in (*images, linear, linear_backward)}
    return ours | {"conv_transpose2d_backward": conv2d_backward}


def fits(x: Tensor, array: Tensor) -> bool:
    """Return whether a layer with parameters as ``array`` takes ``x``: of its dtype, or of fewer bits."""
    return x.dtype in (array.dtype, torch.bfloat16, torch.float16)

"""Sums, joins, activations, dropout, softmax and flattening, forward and backward."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

from cnnmpi.common.arguments import check_choice, check_split, joined_shape
from cnnmpi.functional.blocks import Array, for_each_block, nchw, nhwc


def add(x: Array, y: Array) -> Array:
    """Return x + y, where two paths meet; the sum's gradient is that of both. Raises ValueError for unequal shapes."""
    if x.shape != y.shape:
        raise ValueError(f"add: expected two arrays of one shape, got {x.shape} and {y.shape}")
    total = np.empty_like(x, dtype=np.result_type(x, y))
    for_each_block(lambda block: np.add(x[block], y[block], out=total[block]), len(x), 3 * x[:1].nbytes)
    return total


def concat(arrays: Sequence[Array]) -> Array:
    """Return ``arrays`` (N, C_i, ...) side by side along the channels: (N, sum of C_i, ...), copied once.

    Raises ValueError where they differ in more than their channels, and for none.
    """
    N, C, *HW = joined_shape("concat", [a.shape for a in arrays])
    joined = np.empty((N, *HW, C), np.result_type(*arrays))  # channels-last
    parts = np.split(joined, np.cumsum([a.shape[1] for a in arrays])[:-1], axis=-1)

    def copy(block: slice) -> None:
        for part, a in zip(parts, arrays, strict=True):
            part[block] = np.moveaxis(a[block], 1, -1)

    for_each_block(copy, N, 2 * joined[:1].nbytes)
    return np.moveaxis(joined, -1, 1)


def split(x: Array, sizes: Sequence[int]) -> list[Array]:
    """Cut ``x`` (N, C, ...) along the channels into arrays of their own (N, size, ...), one for each of ``sizes``.

    The gradients of what ``concat`` joined. Raises ValueError unless the sizes add up to C.
    """
    check_split("split", x.shape[1], sizes)
    N, _, *HW = x.shape
    parts = [np.empty((N, *HW, size), x.dtype) for size in sizes]

    def copy(block: slice) -> None:
        whole = np.moveaxis(x[block], 1, -1)
        for part, view in zip(parts, np.split(whole, np.cumsum(sizes)[:-1], axis=-1), strict=True):
            part[block] = view

    for_each_block(copy, N, 2 * x[:1].nbytes)
    return [np.moveaxis(part, -1, 1) for part in parts]


def relu(x: Array) -> tuple[Array, Any]:
    """Return max(x, 0), element by element."""
    x = nhwc(x) if x.ndim == 4 else x
    y = np.empty_like(x)
    zero = np.zeros(x.shape[1:], x.dtype)  # a whole image: NumPy's maximum with one number takes 3 times as long
    for_each_block(lambda block: np.maximum(x[block], zero, out=y[block]), len(x), 2 * x[:1].nbytes)
    y = nchw(y) if y.ndim == 4 else y
    return y, y


def relu_backward(dy: Array, cache: Any) -> Array:
    """Return dy where the output was positive, else 0 (also at the kink, as torch does)."""
    y: Array = cache
    dx = np.empty_like(y)
    for_each_block(lambda block: np.multiply(dy[block], y[block] > 0, out=dx[block]), len(y), 3 * y[:1].nbytes)
    return dx


def leaky_relu(x: Array, *, negative_slope: float = 0.01) -> tuple[Array, Any]:
    """Return x where it is positive, else ``negative_slope`` x, element by element (Maas et al., 2013)."""

    def body(x: Array, y: Array) -> None:
        zero = np.zeros(x.shape[1:], x.dtype)
        with np.errstate(invalid="ignore"):  # 0 times inf
            np.minimum(x, zero, out=y)
            y *= negative_slope
            y += np.maximum(x, zero)

    x = _contiguous(x)
    (y,) = _filled(body, x, outputs=1, temporaries=2)
    return y, (_nchw(x), negative_slope)


def leaky_relu_backward(dy: Array, cache: Any) -> Array:
    """Return dy where x was positive, else ``negative_slope`` dy (also at the kink, as torch does)."""
    x: Array
    x, negative_slope = cache
    dx = np.empty_like(x)

    def body(block: slice) -> None:
        slope, positive = dx[block], x[block] > 0
        np.multiply(~positive, slope.dtype.type(negative_slope), out=slope)
        slope += positive
        slope *= dy[block]

    for_each_block(body, len(x), 4 * x[:1].nbytes)
    return dx


def sigmoid(x: Array) -> tuple[Array, Any]:
    """Return 1 / (1 + exp(-x)), element by element."""

    def body(x: Array, y: Array) -> None:
        with np.errstate(over="ignore"):  # exp(-x) = inf far below 0, whose sigmoid is 0
            np.exp(-x, out=y)
        y += 1
        np.divide(1, y, out=y)

    (y,) = _filled(body, _contiguous(x), outputs=1, temporaries=1)
    return y, y


def sigmoid_backward(dy: Array, cache: Any) -> Array:
    """Return dx = dy y (1 - y)."""
    y: Array = cache
    return _times(dy, lambda block: y[block] * (1 - y[block]), y)


def tanh(x: Array) -> tuple[Array, Any]:
    """Return (exp(x) - exp(-x)) / (exp(x) + exp(-x)), element by element."""
    (y,) = _filled(lambda x, y: np.tanh(x, out=y), _contiguous(x), outputs=1)
    return y, y


def tanh_backward(dy: Array, cache: Any) -> Array:
    """Return dx = dy (1 - y^2)."""
    y: Array = cache
    return _times(dy, lambda block: 1 - y[block] * y[block], y)


def silu(x: Array) -> tuple[Array, Any]:
    """Return x sigmoid(x), element by element (Elfwing et al., 2017; also known as swish)."""

    def body(x: Array, y: Array, slope: Array) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # as in sigmoid; 0 times inf
            s = 1 / (1 + np.exp(-x))
            np.multiply(x, s, out=y)
            np.subtract(1, s, out=slope)  # s (1 + x (1 - s))
            slope *= x
            slope += 1
            slope *= s

    y, slope = _filled(body, _contiguous(x), outputs=2, temporaries=3)
    return y, slope


def silu_backward(dy: Array, cache: Any) -> Array:
    """Return dx = dy s (1 + x (1 - s)) with s = sigmoid(x)."""
    slope: Array = cache
    return _times(dy, lambda block: slope[block], slope)


def gelu(x: Array, *, approximate: str = "none") -> tuple[Array, Any]:
    """Return x Phi(x), element by element, with Phi the standard normal distribution (Hendrycks and Gimpel, 2016).

    With ``approximate`` "tanh", Phi(x) is replaced by (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.
    """
    check_choice("gelu", "approximate", approximate, "none", "tanh")
    tail = _normal_tail if approximate == "none" else _tanh_tail

    def body(x: Array, y: Array, slope: Array) -> None:
        # by a = |x|: y = max(x, 0) - a Phi(-a) loses nothing where x is large or infinite
        a = np.minimum(np.abs(x), x.dtype.type(TAIL_END))
        q, density = tail(a)
        np.maximum(x, 0, out=y)
        y -= a * q
        density *= a
        density -= q  # of x > 0, the slope is 1 plus that, of x < 0, minus that
        positive = x > 0
        np.multiply(positive, x.dtype.type(2), out=slope)
        slope -= 1
        slope *= density
        slope += positive

    y, slope = _filled(body, _contiguous(x), outputs=2, temporaries=6)
    return y, slope


def gelu_backward(dy: Array, cache: Any) -> Array:
    """Return dx = dy (Phi(x) + x phi(x)), where phi is the derivative of Phi."""
    slope: Array = cache
    return _times(dy, lambda block: slope[block], slope)


TAIL_END = 12  # where Phi(-a) is 1e-33, and not yet so small that it is slow to compute with


def _normal_tail(a: Array) -> tuple[Array, Array]:
    """Return Phi(-a) = erfc(a / sqrt(2)) / 2 and phi(a) = exp(-a^2 / 2) / sqrt(2 pi), for 0 <= a <= TAIL_END."""
    e = np.exp(a * a / -2)
    tail = _scaled_tail(10 if a.dtype == np.float32 else 20)
    offset, scale = tail.mapparms()
    u = 1 / (a + 4)
    u *= a.dtype.type(scale)
    u += a.dtype.type(offset)  # in -1..1
    *rest, last = tail.coef.astype(a.dtype)
    q = np.full_like(u, last)
    for coefficient in reversed(rest):
        q *= u
        q += coefficient
    q *= e
    e *= 1 / math.sqrt(2 * math.pi)
    return q, e


@functools.cache
def _scaled_tail(degree: int) -> Polynomial:
    """Return the polynomial in 1 / (a + 4) that is Phi(-a) exp(a^2 / 2) for 0 <= a <= TAIL_END.

    Interpolated at Chebyshev's points (as Schonfelder, "Chebyshev expansions for the error and related functions",
    1978, in (a - c) / (a + c), which is the same): the error is 4e-10 of degree 10 and 2e-15 of degree 20.
    """

    def scaled(points: Array) -> Array:
        a = 1 / points - 4
        return np.array([math.erfc(each / math.sqrt(2)) * math.exp(each * each / 2) / 2 for each in a.tolist()])

    domain = [1 / (TAIL_END + 4), 1 / 4]
    return Chebyshev.interpolate(scaled, degree, domain).convert(domain=domain, kind=Polynomial, window=[-1, 1])


def _tanh_tail(a: Array) -> tuple[Array, Array]:
    """Return (1 - tanh(u)) / 2 for u = sqrt(2 / pi) (a + 0.044715 a^3), and its derivative by -a."""
    scale, square = math.sqrt(2 / math.pi), a * a
    t = np.tanh(scale * (a + 0.044715 * a * square))
    return (1 - t) / 2, (1 - t * t) * (scale / 2 * (1 + 3 * 0.044715 * square))


def _contiguous(x: Array) -> Array:
    return nhwc(x) if x.ndim == 4 else np.ascontiguousarray(x)


def _nchw(x: Array) -> Array:
    return nchw(x) if x.ndim == 4 else x


def _filled(body: Callable[..., Any], x: Array, outputs: int, temporaries: int = 0) -> list[Array]:
    """Return so many arrays of the shape of the _contiguous ``x``, as ``body(x, *outputs)`` fills them, in blocks."""
    filled = [np.empty_like(x) for _ in range(outputs)]
    bytes_each = (1 + outputs + temporaries) * x[:1].nbytes
    for_each_block(lambda block: body(x[block], *(y[block] for y in filled)), len(x), bytes_each)
    return [_nchw(y) for y in filled]


def _times(dy: Array, slope: Callable[[slice], Array], like: Array) -> Array:
    """Return dy slope, where ``slope`` gives its block, in the memory layout of ``like``."""
    dx = np.empty_like(like)
    for_each_block(lambda block: np.multiply(dy[block], slope(block), out=dx[block]), len(dx), 4 * dx[:1].nbytes)
    return dx


def dropout(x: Array, keep: Array, *, p: float) -> tuple[Array, Any]:
    """Return x where ``keep`` is true, scaled by 1 / (1 - p) so that its expectation stays, and 0 elsewhere.

    (Srivastava et al., "Dropout", 2014.) ``keep`` is bool, of the shape of ``x``.
    """
    mask = keep * x.dtype.type(1 / (1 - p) if p < 1 else 0)
    return x * mask, mask


def dropout_backward(dy: Array, cache: Any) -> Array:
    """Return dy, masked and scaled as the forward pass was."""
    dx: Array = dy * cache
    return dx


def flatten(x: Array) -> tuple[Array, Any]:
    """Return (N, ...) as (N, features); features in the order (C, H, W), as torch.nn.Flatten gives them."""
    return x.reshape(len(x), -1), x.shape


def flatten_backward(dy: Array, cache: Any) -> Array:
    """Return dy in the shape that went in."""
    dx = dy.reshape(cache)
    return nchw(nhwc(dx)) if dx.ndim == 4 else dx


def softmax(x: Array) -> Array:
    """Return exp(x) / sum exp(x) along the last axis; each row is shifted by its own maximum, so none overflows.

    -inf has the probability 0. A row of nothing else, or with inf or NaN, has none: NaN, as in torch.
    """
    with np.errstate(invalid="ignore"):  # inf - inf
        e = np.exp(x - x.max(axis=-1, keepdims=True))
    probabilities: Array = e / e.sum(axis=-1, keepdims=True)
    return probabilities


def softmax_backward(dy: Array, y: Array) -> Array:
    """Return dx = y (dy - sum dy y) for y = softmax(x)."""
    dx: Array = y * (dy - (dy * y).sum(axis=-1, keepdims=True))
    return dx

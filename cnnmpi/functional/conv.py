"""Convolution as matrix products over columns of patches (im2col), forward and backward; and the linear layer.

With patches as rows of ``cols`` (N*Ho*Wo, kH*kW*C) and the filters as ``Wrows`` (O, kH*kW*C):

    y = cols Wrows' + b     dWrows = dy' cols     dcols = dy Wrows     db = sum of dy over images and positions

(Chellapilla, Puri and Simard, "High performance convolutional neural networks for document processing", 2006). In
groups, each group's channels have columns and filters of their own, and all these products are one call. The
commonest shapes go another way: see winograd.py, with fewer multiplications, and depthwise.py.
"""

import math
from typing import Any, TypedDict

import numpy as np
from numpy.lib.stride_tricks import as_strided

from cnnmpi.functional import depthwise, winograd
from cnnmpi.functional.blocks import Array, add_bias, column_sums, for_each_block, nchw, nhwc, pad, sum_over_blocks
from cnnmpi.machine import one_blas_thread
from cnnmpi.sizes import Size as Size
from cnnmpi.sizes import conv_size, conv_transpose_size, out_size, whole
from cnnmpi.sizes import pair as pair

FEW_CHANNELS = 8  # below that im2col copies along the rows of the image rather than along the channels


def im2col(x: Array, kH: int, kW: int, stride: Size, padding: Size, dilation: Size = 1) -> Array:
    """Return the patches under a kernel as rows: (N, C, H, W) -> (N*Ho*Wo, kH*kW*C).

    Rows are ordered by image, then by output position; a row is ordered (kH, kW, C), as channels-last memory is. What
    lies contiguous in memory are these rows or, for few channels, the columns: whichever is copied in longer runs.
    A 1x1 kernel with stride 1 needs no copy. Raises ValueError for a kernel that does not fit.
    """
    (sH, sW), (dH, dW) = pair(stride), pair(dilation)
    N, C, H, W = x.shape
    Ho, Wo = out_size((H, W), (kH, kW), stride, padding, dilation)
    padded = pad(nhwc(x), pair(padding))
    if (kH, kW, sH, sW) == (1, 1, 1, 1):
        return padded.reshape(N * Ho * Wo, C)
    if C >= FEW_CHANNELS:
        n, h, w, c = padded.strides
        strides = (n, sH * h, sW * w, dH * h, dW * w, c)
        windows = as_strided(padded, (N, Ho, Wo, kH, kW, C), strides, writeable=False)
        cols = np.empty(windows.shape, x.dtype)
        np.copyto(cols, windows)
        return cols.reshape(N * Ho * Wo, kH * kW * C)
    planes = np.ascontiguousarray(padded.transpose(3, 0, 1, 2))
    turned = np.empty((kH, kW, C, N, Ho, Wo), x.dtype)
    for i in range(kH):
        for j in range(kW):
            turned[i, j] = planes[:, :, i * dH : i * dH + sH * Ho : sH, j * dW : j * dW + sW * Wo : sW]
    return turned.reshape(kH * kW * C, N * Ho * Wo).T


def col2im(
    cols: Array, x_shape: tuple[int, ...], kH: int, kW: int, stride: Size, padding: Size, dilation: Size = 1
) -> Array:
    """Add rows of patches back to where im2col took them from: (N*Ho*Wo, kH*kW*C) -> (N, C, H, W).

    This is the transpose of the linear map im2col: pixels under several patches receive the sum.
    """
    (sH, sW), (pH, pW), (dH, dW) = pair(stride), pair(padding), pair(dilation)
    N, C, H, W = x_shape
    Ho, Wo = out_size((H, W), (kH, kW), stride, padding, dilation)
    patches = cols.reshape(N, Ho, Wo, kH, kW, C)
    padded = np.zeros((N, H + 2 * pH, W + 2 * pW, C), cols.dtype)
    for i in range(kH):
        for j in range(kW):
            where = padded[:, i * dH : i * dH + sH * Ho : sH, j * dW : j * dW + sW * Wo : sW]
            where += patches[:, :, :, i, j]
    return nchw(padded[:, pH : pH + H, pW : pW + W])


class Windows(TypedDict):
    """How windows lie on an image, each along height and width."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


@one_blas_thread()
def conv2d(
    x: Array,
    W: Array,
    b: Array | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    filters: dict[str, Array] | None = None,
) -> tuple[Array, Any]:
    """Cross-correlate ``x`` (N, C, H, W) with the filters ``W`` (O, C / groups, kH, kW), add ``b`` (O,).

    Returns y (N, O, Ho, Wo), in whose g-th group of channels the g-th group of x's channels comes out.

    What forward and backward derive from ``W`` they keep in ``filters``, a dictionary of the caller's, empty at first.
    It serves, on any number of threads, as long as W keeps its values; with None they derive it anew each time.
    Raises ValueError for channels or sizes that do not fit.
    """
    windows = Windows(stride=pair(stride), padding=pair(padding), dilation=pair(dilation))
    groups = whole("groups", groups)
    Ho, Wo = conv_size(x.shape, W.shape, **windows, groups=groups)
    filters = {} if filters is None else filters
    x = nchw(nhwc(x))
    patches = None
    if groups == 1 and winograd.suits(x, W, **windows):
        y, patches = winograd.conv2d(x, W, b, filters)
    elif depthwise.suits(W, groups):
        y = depthwise.conv2d(x, W, b, (Ho, Wo), **windows)
    else:
        O, C, kH, kW = W.shape
        Wrows = nhwc(W).reshape(groups, O // groups, kH * kW * C)  # a view: the filters are channels-last, too
        rows = np.empty((len(x), Ho, Wo, O), x.dtype)

        def convolve(block: slice) -> None:
            cols = _columns(x[block], W.shape, windows, groups)
            np.matmul(cols, Wrows.transpose(0, 2, 1), out=_rows(rows[block], groups))
            if b is not None:
                add_bias(rows[block], b)

        for_each_block(convolve, len(x), _bytes_each(W, Ho * Wo, groups))
        y = nchw(rows)
    return y, (x, W, patches, b is not None, windows, groups, filters)


@one_blas_thread()
def conv2d_backward(
    dy: Array, cache: Any, *, input_grad: bool = True, weight_grad: bool = True
) -> tuple[Array | None, Array | None, Array | None]:
    """Return (dx, dW, db) for ``dy`` (N, O, Ho, Wo).

    dx is None unless ``input_grad``, dW and db unless ``weight_grad``; db without a bias, too.
    """
    x, W, patches, has_bias, windows, groups, filters = cache
    dy = nchw(nhwc(dy))
    db = _bias_gradient(dy) if has_bias and weight_grad else None
    if patches is not None:
        return *winograd.conv2d_backward(dy, x, W, patches, filters, input_grad, weight_grad), db
    dx = _input_gradient(dy, W, x.shape, windows, groups) if input_grad else None
    return dx, _filter_gradient(dy, x, W, windows, groups) if weight_grad else None, db


def _filter_gradient(dy: Array, x: Array, W: Array, windows: Windows, groups: int) -> Array:
    """Return dW (O, C / groups, kH, kW) for channels-last ``dy`` (N, O, Ho, Wo)."""
    if depthwise.suits(W, groups):
        return depthwise.filter_gradient(dy, x, W.shape[2:], **windows)
    O, C, kH, kW = W.shape

    def filter_gradient(block: slice) -> Array:
        drows = _rows(nhwc(dy[block]), groups)
        part: Array = np.matmul(drows.transpose(0, 2, 1), _columns(x[block], W.shape, windows, groups))
        return part.reshape(O, kH * kW * C)

    bytes_each = _bytes_each(W, math.prod(dy.shape[2:]), groups)
    return nchw(sum_over_blocks(filter_gradient, len(x), bytes_each).reshape(O, kH, kW, C))


def _input_gradient(dy: Array, W: Array, x_shape: tuple[int, ...], windows: Windows, groups: int) -> Array:
    """Return dx (N, C, H, W) for ``dy`` (N, O, Ho, Wo), channels-last in memory as dy is."""
    (pH, pW), (dH, dW) = windows["padding"], windows["dilation"]
    N, C, H, width = x_shape
    O, _, kH, kW = W.shape
    rest = dH * (kH - 1) - pH, dW * (kW - 1) - pW
    if windows["stride"] == (1, 1) and min(rest) >= 0:
        # with stride 1 the transpose is itself a convolution: of dy, with the filters turned by 180 degrees,
        # their in- and out-channels swapped, and the complementary padding
        turned = W[:, :, ::-1, ::-1].reshape(groups, O // groups, C // groups, kH, kW).transpose(0, 2, 1, 3, 4)
        turned = turned.reshape(C, O // groups, kH, kW)
        return conv2d(dy, turned, padding=rest, dilation=(dH, dW), groups=groups)[0]

    each_alone = depthwise.suits(W, groups)
    parts = 1 if each_alone else groups
    Wrows = nhwc(W).reshape(groups, O // groups, -1)
    dx = np.empty((N, H, width, C), dy.dtype)

    def input_gradient(block: slice) -> None:
        drows = nhwc(dy[block])
        dcols = depthwise.spread(drows, W) if each_alone else np.matmul(_rows(drows, groups), Wrows)
        dparts = col2im(dcols, (parts * len(drows), C // parts, H, width), kH, kW, **windows)
        dx[block] = _together(nhwc(dparts), parts)

    for_each_block(input_gradient, N, _bytes_each(W, math.prod(dy.shape[2:]), groups))
    return nchw(dx)


def _bias_gradient(dy: Array) -> Array:
    """Sum ``dy`` (N, O, H, W) over images and positions: (O,)."""
    rows = nhwc(dy).reshape(-1, dy.shape[1])
    return sum_over_blocks(lambda block: column_sums(rows[block]), len(rows), dy.shape[1] * dy.itemsize)


def _bytes_each(W: Array, positions: int, groups: int) -> int:
    """Return the memory that the columns of one image take."""
    return positions * groups * int(W[0].nbytes)


def _apart(x: Array, groups: int) -> Array:
    """Make each group's channels images of their own: (n, H, W, C) -> (groups * n, H, W, C / groups)."""
    n, H, W, C = x.shape
    parts = x.reshape(n, H, W, groups, C // groups).transpose(3, 0, 1, 2, 4)
    return parts.reshape(groups * n, H, W, C // groups)


def _together(parts: Array, groups: int) -> Array:
    """Undo _apart: (groups * n, H, W, C / groups) -> (n, H, W, C)."""
    many, H, W, C = parts.shape
    whole = parts.reshape(groups, many // groups, H, W, C).transpose(1, 2, 3, 0, 4)
    return whole.reshape(many // groups, H, W, groups * C)


def _columns(x: Array, W_shape: tuple[int, ...], windows: Windows, groups: int) -> Array:
    """Return the patches of each group: (n, C, H, W) -> (groups, n*Ho*Wo, kH*kW*C/groups)."""
    cols = im2col(nchw(_apart(nhwc(x), groups)), *W_shape[2:], **windows)
    return cols.reshape(groups, -1, cols.shape[1])


def _rows(y: Array, groups: int) -> Array:
    """View contiguous ``y`` (n, H, W, O) group by group: (groups, n*H*W, O / groups)."""
    return y.reshape(-1, groups, y.shape[-1] // groups).transpose(1, 0, 2)


@one_blas_thread()
def conv_transpose2d(
    x: Array,
    W: Array,
    b: Array | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> tuple[Array, Any]:
    """Spread ``x`` (N, C, H, W) by the filters ``W`` (C, O / groups, kH, kW), add ``b`` (O,): y (N, O, Ho, Wo).

    As a linear map of x, this is the transpose of conv2d from (Ho, Wo) to (H, W) with the same filters and options: its
    forward pass is the other's gradient by the input, its backward pass the other's forward. ``output_padding`` more
    rows and columns come out at the end. Raises ValueError for channels or sizes that do not fit.
    """
    windows = Windows(stride=pair(stride), padding=pair(padding), dilation=pair(dilation))
    groups = whole("groups", groups)
    size = conv_transpose_size(x.shape, W.shape, **windows, output_padding=output_padding, groups=groups)
    x = nchw(nhwc(x))
    N, _, H, width = x.shape
    # dilation allows an output_padding from the stride on: then conv2d has more windows there than x has rows
    Ho, Wo = out_size(size, (W.shape[2], W.shape[3]), **windows)
    if (Ho, Wo) != (H, width):
        x = nchw(np.pad(nhwc(x), ((0, 0), (0, Ho - H), (0, Wo - width), (0, 0))))
    y = _input_gradient(x, W, (N, W.shape[1] * groups, *size), windows, groups)
    if b is not None:
        add_bias(nhwc(y), b)
    return y, (x, W, (H, width), b is not None, windows, groups)


@one_blas_thread()
def conv_transpose2d_backward(
    dy: Array, cache: Any, *, input_grad: bool = True, weight_grad: bool = True
) -> tuple[Array | None, Array | None, Array | None]:
    """Return (dx, dW, db) for ``dy`` (N, O, Ho, Wo), as conv2d_backward does."""
    x, W, (H, width), has_bias, windows, groups = cache
    dx, inner = conv2d(dy, W, **windows, groups=groups)
    _, dW, _ = conv2d_backward(x, inner, input_grad=False, weight_grad=weight_grad)
    db = _bias_gradient(dy) if has_bias and weight_grad else None
    return dx[:, :, :H, :width] if input_grad else None, dW, db


@one_blas_thread()
def linear(x: Array, W: Array, b: Array | None = None) -> tuple[Array, Any]:
    """Return y = x W' + b for ``x`` (N, in), ``W`` (out, in), ``b`` (out,)."""
    y = x @ W.T
    if b is not None:
        y += b
    return y, (x, W, b is not None)


@one_blas_thread()
def linear_backward(
    dy: Array, cache: Any, *, input_grad: bool = True, weight_grad: bool = True
) -> tuple[Array | None, Array | None, Array | None]:
    """Return (dx, dW, db) = (dy W, dy' x, sum of dy over the batch); None for what is not wanted."""
    x, W, has_bias = cache
    dx = dy @ W if input_grad else None
    dW = dy.T @ x if weight_grad else None
    return dx, dW, column_sums(dy) if has_bias and weight_grad else None

"""Convolution as matrix products over columns of patches (im2col), forward and backward; and the linear layer.

With patches as rows of ``cols`` (N*Ho*Wo, kH*kW*C) and the filters as ``Wrows`` (O, kH*kW*C):

    y = cols Wrows' + b     dWrows = dy' cols     dcols = dy Wrows     db = sum of dy over images and positions

(Chellapilla, Puri and Simard, "High performance convolutional neural networks for document processing", 2006). The
commonest shapes go another way, with fewer multiplications: see winograd.py.
"""

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from cnnmpi.functional import winograd
from cnnmpi.functional.blocks import Array, add_bias, column_sums, for_each_block, nchw, nhwc, sum_over_blocks
from cnnmpi.machine import one_blas_thread
from cnnmpi.sizes import Size as Size
from cnnmpi.sizes import pair as pair

FEW_CHANNELS = 8  # below that im2col copies along the rows of the image rather than along the channels


def out_size(in_size: int, k: int, stride: int, padding: int) -> int:
    """Return how many windows of ``k`` fit along one axis, rounded down as torch.nn does.

    Raises ValueError where not one fits, or where the sizes make no sense.
    """
    if k < 1 or stride < 1 or padding < 0:
        raise ValueError(f"kernel size {k} and stride {stride} must be at least 1, padding {padding} at least 0")
    if in_size + 2 * padding < k:
        raise ValueError(f"a kernel of size {k} does not fit into an input of size {in_size} with padding {padding}")
    return (in_size + 2 * padding - k) // stride + 1


def pad(x: Array, padding: tuple[int, int], value: float = 0.0) -> Array:
    """Return channels-last ``x`` (n, H, W, C) with a border of ``value``; ``x`` itself where there is none."""
    pH, pW = padding
    if not (pH or pW):
        return x
    n, H, W, C = x.shape
    padded = np.empty((n, H + 2 * pH, W + 2 * pW, C), x.dtype)
    padded[:, :pH], padded[:, pH + H :] = value, value
    padded[:, :, :pW], padded[:, :, pW + W :] = value, value
    padded[:, pH : pH + H, pW : pW + W] = x
    return padded


def im2col(x: Array, kH: int, kW: int, stride: Size, padding: Size) -> Array:
    """Return the patches under a kernel as rows: (N, C, H, W) -> (N*Ho*Wo, kH*kW*C).

    Rows are ordered by image, then by output position; a row is ordered (kH, kW, C), as channels-last memory is. What
    lies contiguous in memory are these rows or, for few channels, the columns: whichever is copied in longer runs.
    A 1x1 kernel with stride 1 needs no copy. Raises ValueError for a kernel that does not fit.
    """
    (sH, sW), (pH, pW) = pair(stride), pair(padding)
    N, C, H, W = x.shape
    Ho, Wo = out_size(H, kH, sH, pH), out_size(W, kW, sW, pW)
    padded = pad(nhwc(x), (pH, pW))
    n, h, w, _ = padded.strides  # the last one means nothing where C is 1
    # a row of a patch, kW pixels of C channels, is one contiguous run
    windows = as_strided(padded, (N, Ho, Wo, kH, kW * C), (n, sH * h, sW * w, h, x.itemsize), writeable=False)
    if (kH, kW, sH, sW) == (1, 1, 1, 1):
        return windows.reshape(N * Ho * Wo, C)
    if C >= FEW_CHANNELS:
        cols = np.empty(windows.shape, x.dtype)
        np.copyto(cols, windows)
        return cols.reshape(N * Ho * Wo, kH * kW * C)
    planes = np.ascontiguousarray(padded.transpose(3, 0, 1, 2))
    turned = np.empty((kH, kW, C, N, Ho, Wo), x.dtype)
    for i in range(kH):
        for j in range(kW):
            turned[i, j] = planes[:, :, i : i + sH * Ho : sH, j : j + sW * Wo : sW]
    return turned.reshape(kH * kW * C, N * Ho * Wo).T


def col2im(cols: Array, x_shape: tuple[int, ...], kH: int, kW: int, stride: Size, padding: Size) -> Array:
    """Add rows of patches back to where im2col took them from: (N*Ho*Wo, kH*kW*C) -> (N, C, H, W).

    This is the transpose of the linear map im2col: pixels under several patches receive the sum.
    """
    (sH, sW), (pH, pW) = pair(stride), pair(padding)
    N, C, H, W = x_shape
    Ho, Wo = out_size(H, kH, sH, pH), out_size(W, kW, sW, pW)
    patches = cols.reshape(N, Ho, Wo, kH, kW, C)
    padded = np.zeros((N, H + 2 * pH, W + 2 * pW, C), cols.dtype)
    for i in range(kH):
        for j in range(kW):
            padded[:, i : i + sH * Ho : sH, j : j + sW * Wo : sW] += patches[:, :, :, i, j]
    return nchw(padded[:, pH : pH + H, pW : pW + W])


@one_blas_thread()
def conv2d(
    x: Array,
    W: Array,
    b: Array | None = None,
    *,
    stride: Size = 1,
    padding: Size = 0,
    filters: dict[str, Array] | None = None,
) -> tuple[Array, Any]:
    """Cross-correlate ``x`` (N, C, H, W) with the filters ``W`` (O, C, kH, kW), add ``b`` (O,): y (N, O, Ho, Wo).

    What forward and backward derive from ``W`` they keep in ``filters``, a dictionary of the caller's, empty at first.
    It serves, on any number of threads, as long as W keeps its values; with None they derive it anew each time.
    """
    (sH, sW), (pH, pW) = pair(stride), pair(padding)
    filters = {} if filters is None else filters
    x = nchw(nhwc(x))
    N, C, H, width = x.shape
    O, _, kH, kW = W.shape
    Ho, Wo = out_size(H, kH, sH, pH), out_size(width, kW, sW, pW)
    if winograd.suits(x, W, (sH, sW), (pH, pW)):
        y, patches = winograd.conv2d(x, W, b, filters)
        return y, (x, W, patches, b is not None, stride, padding, filters)
    Wrows = nhwc(W).reshape(O, kH * kW * C)  # a view: the filters are channels-last, too
    y = np.empty((N, Ho, Wo, O), x.dtype)

    def convolve(block: slice) -> None:
        rows = y[block].reshape(-1, O)
        np.matmul(im2col(x[block], kH, kW, stride, padding), Wrows.T, out=rows)
        if b is not None:
            add_bias(y[block], b)

    for_each_block(convolve, N, Ho * Wo * kH * kW * C * x.itemsize)
    return nchw(y), (x, W, None, b is not None, stride, padding, filters)


@one_blas_thread()
def conv2d_backward(dy: Array, cache: Any, *, input_grad: bool = True) -> tuple[Array | None, Array, Array | None]:
    """Return (dx, dW, db) for ``dy`` (N, O, Ho, Wo); dx is None unless ``input_grad``, db None without a bias."""
    x, W, patches, has_bias, stride, padding, filters = cache
    N, C, H, width = x.shape
    O, _, kH, kW = W.shape
    dy = nchw(nhwc(dy))
    rows = nhwc(dy).reshape(-1, O)
    db = sum_over_blocks(lambda block: column_sums(rows[block]), len(rows), O * x.itemsize) if has_bias else None
    if patches is not None:
        return *winograd.conv2d_backward(dy, x, W, patches, filters, input_grad), db

    bytes_each = dy.shape[2] * dy.shape[3] * kH * kW * C * x.itemsize

    def filter_gradient(block: slice) -> Array:
        return nhwc(dy[block]).reshape(-1, O).T @ im2col(x[block], kH, kW, stride, padding)

    dW = nchw(sum_over_blocks(filter_gradient, N, bytes_each).reshape(O, kH, kW, C))
    if not input_grad:
        return None, dW, db

    pH, pW = pair(padding)
    if pair(stride) == (1, 1) and pH < kH and pW < kW:
        # with stride 1 the transpose is itself a convolution: of dy, with the filters turned by 180 degrees,
        # their in- and out-channels swapped, and the complementary padding
        turned = W[:, :, ::-1, ::-1].transpose(1, 0, 2, 3)
        dx, _ = conv2d(dy, turned, padding=(kH - 1 - pH, kW - 1 - pW))
        return dx, dW, db

    Wrows = nhwc(W).reshape(O, kH * kW * C)
    dx = np.empty((N, H, width, C), x.dtype)

    def input_gradient(block: slice) -> None:
        dcols = nhwc(dy[block]).reshape(-1, O) @ Wrows
        dx[block] = nhwc(col2im(dcols, x[block].shape, kH, kW, stride, padding))

    for_each_block(input_gradient, N, bytes_each)
    return nchw(dx), dW, db


@one_blas_thread()
def linear(x: Array, W: Array, b: Array | None = None) -> tuple[Array, Any]:
    """Return y = x W' + b for ``x`` (N, in), ``W`` (out, in), ``b`` (out,)."""
    y = x @ W.T
    if b is not None:
        y += b
    return y, (x, W, b is not None)


@one_blas_thread()
def linear_backward(dy: Array, cache: Any) -> tuple[Array, Array, Array | None]:
    """Return (dx, dW, db) = (dy W, dy' x, sum of dy over the batch)."""
    x, W, has_bias = cache
    return dy @ W, dy.T @ x, column_sums(dy) if has_bias else None

"""Depthwise convolution: each channel by a filter of its own, so that there are no sums over channels.

Nor are there matrix products, then. With ``x_ij`` the input as place (i, j) of all windows sees it, and ``*`` element
by element,

    y = sum over i, j of W_ij * x_ij        dW_ij = sum over images and positions of dy * x_ij

Each of the sums is one einsum over a view of the windows, which multiplies and adds in one pass and stores no products.
It is fast on long rows: where windows are neighbours in memory, a row of them is treated as one of that many channels.
"""

import numpy as np
from numpy.lib.stride_tricks import as_strided

from cnnmpi.functional.blocks import Array, add_bias, for_each_block, nchw, nhwc, pad, sum_over_blocks
from cnnmpi.sizes import out_size

Pair = tuple[int, int]


def suits(W: Array, groups: int) -> bool:
    """Say whether filters ``W`` (O, C / groups, kH, kW) are one a channel."""
    return groups > 1 and len(W) == groups and W.shape[1] == 1


def conv2d(x: Array, W: Array, b: Array | None, out: Pair, **windows: Pair) -> Array:
    """Cross-correlate ``x`` (N, C, H, W) with ``W`` (C, 1, kH, kW), add ``b`` (C,): y (N, C, *out)."""
    N, C = x.shape[:2]
    y = np.empty((N, *out, C), x.dtype)
    run = _run(out[1], windows["stride"])
    taps = np.tile(W[:, 0].transpose(1, 2, 0), run)  # (kH, kW, run * C)

    def convolve(block: slice) -> None:
        seen = _windows(nhwc(x[block]), W.shape[2:], run, **windows)
        np.einsum("nhijwc,ijc->nhwc", seen, taps, out=_in_runs(y[block], run))
        if b is not None:
            add_bias(y[block], b)

    for_each_block(convolve, N, 2 * x[:1].nbytes)
    return nchw(y)


def filter_gradient(dy: Array, x: Array, k: Pair, **windows: Pair) -> Array:
    """Return dW (C, 1, kH, kW) for ``dy`` (N, C, Ho, Wo)."""
    N, C = x.shape[:2]
    run = _run(dy.shape[3], windows["stride"])

    def gradient(block: slice) -> Array:
        seen = _windows(nhwc(x[block]), k, run, **windows)
        taps = np.einsum("nhijwc,nhwc->ijc", seen, _in_runs(nhwc(dy[block]), run))
        total: Array = taps.reshape(*k, run, C).sum(axis=2)
        return total

    dtaps = sum_over_blocks(gradient, N, 2 * x[:1].nbytes)
    return np.ascontiguousarray(dtaps.transpose(2, 0, 1))[:, None]


def spread(dy: Array, W: Array) -> Array:
    """Return the gradient by the columns of im2col, (n*Ho*Wo, kH*kW*C), for channels-last ``dy`` (n, Ho, Wo, C)."""
    dcols: Array = dy.reshape(-1, 1, dy.shape[-1]) * W.reshape(len(W), -1).T
    return dcols.reshape(len(dcols), -1)


def _run(Wo: int, stride: Pair) -> int:
    """Return how many neighbouring windows are one run of memory: a whole row of them, or just one."""
    return Wo if stride[1] == 1 else 1


def _in_runs(y: Array, run: int) -> Array:
    """View contiguous ``y`` (n, H, W, C) as (n, H, W / run, run * C)."""
    n, H, W, C = y.shape
    return y.reshape(n, H, W // run, run * C)


def _windows(x: Array, k: Pair, run: int, *, stride: Pair, padding: Pair, dilation: Pair) -> Array:
    """View all windows of ``x`` (n, H, W, C), once it is padded: (n, Ho, kH, kW, Wo / run, run * C)."""
    Ho, Wo = out_size(x.shape[1:3], k, stride, padding, dilation)
    padded = pad(x, padding)
    n, h, w, c = padded.strides
    strides = (n, stride[0] * h, dilation[0] * h, dilation[1] * w, run * stride[1] * w, c)
    return as_strided(padded, (len(x), Ho, *k, Wo // run, run * x.shape[3]), strides, writeable=False)

"""Convolution by 3x3 filters with 2.25 times fewer multiplications: Winograd's minimal filtering F(2x2, 3x3).

Four output pixels, a 2x2 tile, come from a 4x4 patch ``d`` of the input and the filter ``g`` as

    y = A' [ (G g G') * (B' d B) ] A

(Lavin and Gray, "Fast algorithms for convolutional neural networks", 2016), with ``*`` element by element: 16 products
instead of 36. Summed over the input channels, each of the 16 is a matrix product over all tiles, M = V U'. The backward
pass is the transpose of each of these linear maps, in reverse order, and of the product dU = dM' V, dV = dM U.

The patches of neighbouring tiles overlap by two pixels. Tiles are ordered (image, tile row, tile column), and even and
odd columns are kept apart, so that the sums below run over long contiguous stretches of memory.
"""

import numpy as np

from cnnmpi.functional.blocks import Array, for_each_block, nchw, nhwc, sum_over_blocks

# B' = [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]]    A' = [[1, 1, 1, 0], [0, 1, -1, 1]]
# (the paper's, with the sign of the last product turned in both)
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
G2 = np.kron(G, G)  # (16, 9): g -> G g G' for g as a row of 9


LEAST_CHANNELS = 24  # in and out: with fewer, the transforms take more time than the multiplications they save
BLOCK_FACTOR = 2  # blocks are larger than usual: BLAS packs the filters again for every block


def suits(x: Array, W: Array, stride: tuple[int, int], padding: tuple[int, int]) -> bool:
    """Say whether this way is the faster one: by shapes only, so that the bits of a result do not depend on timing."""
    O, C, kH, kW = W.shape
    even = x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0
    return (kH, kW, *stride) == (3, 3, 1, 1) and padding == (1, 1) and even and min(C, O) >= LEAST_CHANNELS


def conv2d(x: Array, W: Array, b: Array | None) -> tuple[Array, Array]:
    """Cross-correlate ``x`` (N, C, H, W), H and W even, with ``W`` (O, C, 3, 3), padding 1: y (N, O, H, W).

    Also returns the transformed filters (16, O, C), for the backward pass.
    """
    N, _, H, width = x.shape
    O = len(W)
    filters = _transform_filters(W)
    transposed = np.ascontiguousarray(filters.transpose(0, 2, 1))
    y = np.empty((N, H, width, O), x.dtype)

    def convolve(block: slice) -> None:
        products = np.matmul(_transform_data(nhwc(x[block])), transposed)  # (16, tiles, C) @ (16, C, O)
        _gather_output(products, y[block])
        if b is not None:
            y[block] += b

    for_each_block(convolve, N, _bytes_each(x, O) / BLOCK_FACTOR)
    return nchw(y), filters


def conv2d_backward(dy: Array, x: Array, filters: Array, input_grad: bool) -> tuple[Array | None, Array]:
    """Return (dx, dW) for ``dy`` (N, O, H, W) and the transformed ``filters`` (16, O, C); dx if ``input_grad``."""
    N, C, H, width = x.shape
    O = filters.shape[1]
    dx = np.empty((N, H, width, C), x.dtype) if input_grad else None

    def gradients(block: slice) -> Array:
        dproducts = _spread_output(nhwc(dy[block]))
        if dx is not None:
            _scatter_data(np.matmul(dproducts, filters), dx[block])
        dfilters: Array = np.matmul(dproducts.transpose(0, 2, 1), _transform_data(nhwc(x[block])))
        return dfilters

    dfilters = sum_over_blocks(gradients, N, _bytes_each(x, O) / BLOCK_FACTOR)
    dW = (G2.T.astype(x.dtype) @ dfilters.reshape(16, O * C)).reshape(3, 3, O, C).transpose(2, 3, 0, 1)
    return None if dx is None else nchw(dx), dW


def _bytes_each(x: Array, O: int) -> float:
    """Return the memory that one image, with ``O`` output channels, takes after both transforms."""
    _, C, H, width = x.shape
    return float(4 * H * width * (O + C) * x.itemsize)


def _transform_filters(W: Array) -> Array:
    """G g G' of each filter: (O, C, 3, 3) -> (16, O, C)."""
    O, C = W.shape[:2]
    taps = W.transpose(2, 3, 0, 1).reshape(9, O * C)
    return (G2.astype(W.dtype) @ taps).reshape(16, O, C)


def _transform_data(x: Array) -> Array:
    """B' d B of each 4x4 patch: (n, H, W, C) -> (16, n * H/2 * W/2, C)."""
    n, H, W, C = x.shape
    padded = np.empty((n, H + 2, 2, W // 2 + 1, C), x.dtype)  # column w of the image is column w + 1 here
    padded[:, 0], padded[:, -1], padded[:, :, 0, 0], padded[:, :, 1, -1] = 0, 0, 0, 0
    padded[:, 1:-1, 1, :-1], padded[:, 1:-1, 0, 1:] = x[:, :, 0::2], x[:, :, 1::2]

    rows = np.empty((4, n, H // 2, 2, W // 2 + 1, C), x.dtype)
    r0, r1, r2, r3 = (padded[:, i : i + H : 2] for i in range(4))
    _combine_data(r0, r1, r2, r3, rows)

    even, odd = rows[:, :, :, 0], rows[:, :, :, 1]
    data = np.empty((4, 4, n, H // 2, W // 2, C), x.dtype)
    _combine_data(even[:, :, :, :-1], odd[:, :, :, :-1], even[:, :, :, 1:], odd[:, :, :, 1:], data.swapaxes(0, 1))
    return data.reshape(16, -1, C)


def _combine_data(d0: Array, d1: Array, d2: Array, d3: Array, out: Array) -> None:
    """B' along one axis."""
    np.subtract(d0, d2, out=out[0])
    np.add(d1, d2, out=out[1])
    np.subtract(d2, d1, out=out[2])
    np.subtract(d3, d1, out=out[3])


def _scatter_data(ddata: Array, dx: Array) -> None:
    """Transpose of _transform_data: add (16, n * H/2 * W/2, C) up to where it came from, in ``dx`` (n, H, W, C)."""
    n, H, W, C = dx.shape
    d = ddata.reshape(4, 4, n, H // 2, W // 2, C)
    rows = np.empty((4, n, H, W // 2, C), dx.dtype)
    _overlap_data(d, rows[:, :, 0::2], rows[:, :, 1::2])
    _overlap_data(rows, dx[:, :, 0::2], dx[:, :, 1::2])


def _overlap_data(d: Array, first: Array, second: Array) -> None:
    """B along one axis: the fourth of ``d``, the third of ``first`` and ``second``.

    Patch t covers the pixels 2t - 1 to 2t + 2, so pixel 2t (``first``) is its second and the last of patch t - 1; pixel
    2t + 1 (``second``) is its third and the first of patch t + 1. What falls into the padding is dropped.
    """
    d0, d1, d2, d3 = d
    total = d1 - d2
    total -= d3
    total[:, :, 1:] += d3[:, :, :-1]
    first[...] = total
    np.add(d1, d2, out=total)
    total -= d0
    total[:, :, :-1] += d0[:, :, 1:]
    second[...] = total


def _gather_output(products: Array, y: Array) -> None:
    """A' m A of each 4x4 array of products: (16, n * H/2 * W/2, O) -> ``y`` (n, H, W, O)."""
    n, H, W, O = y.shape
    m = products.reshape(4, 4, n, H // 2, W // 2, O)
    upper = m[1] + m[2]
    upper += m[0]
    lower = m[1] - m[2]
    lower += m[3]
    for row, (m0, m1, m2, m3) in enumerate((upper, lower)):
        total = m1 + m2
        np.add(total, m0, out=y[:, row::2, 0::2])
        np.subtract(m1, m2, out=total)
        np.add(total, m3, out=y[:, row::2, 1::2])


def _spread_output(dy: Array) -> Array:
    """Transpose of _gather_output: A dy A' of each 2x2 tile: (n, H, W, O) -> (16, n * H/2 * W/2, O)."""
    n, H, W, O = dy.shape
    columns = np.empty((4, n, H, W // 2, O), dy.dtype)
    _spread(dy[:, :, 0::2], dy[:, :, 1::2], columns)
    dproducts = np.empty((4, 4, n, H // 2, W // 2, O), dy.dtype)
    _spread(columns[:, :, 0::2], columns[:, :, 1::2], dproducts)
    return dproducts.reshape(16, -1, O)


def _spread(first: Array, second: Array, out: Array) -> None:
    """A along one axis."""
    out[0], out[3] = first, second
    np.add(first, second, out=out[1])
    np.subtract(first, second, out=out[2])

"""Convolution by 3x3 filters with 4 times fewer multiplications: Winograd's minimal filtering F(4x4, 3x3).

A tile ``y`` of 4x4 output pixels comes from the 6x6 patch ``d`` of the input around it and the filter ``g`` as

    y = A' [ (G g G') * (B' d B) ] A

with ``*`` element by element: 36 products instead of 144 (Lavin and Gray, "Fast algorithms for convolutional neural
networks", 2016). Summed over the input channels, each of the 36 is a matrix product over all tiles, M = V U. The
backward pass is the transpose of each of these linear maps in reverse order, and of the product: dU = V' dM and
dV = dM U'. A, B and G act along the height and the width of all tiles at once, so they are matrix products, too.
"""

from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import as_strided

from cnnmpi.functional.blocks import Array, add_bias, for_each_block, nchw, nhwc, sum_over_blocks

TILE, FILTER = 4, 3
PATCH = TILE + FILTER - 1
# Where the polynomials behind the method are evaluated, besides infinity. The choice decides how much rounding hurts:
# half as much as with the usual 0, 1, -1, 2, -2 (docs/numerics.md; Alam et al., "Winograd convolution for deep neural
# networks: efficient point selection", 2022, search for such points).
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
PIECE = 1 << 14  # places that the maps treat at a time: what lies between height and width then stays in the cache
LEAST_FILLED = 0.6  # of the whole tiles that an image is extended to: below that im2col is at times the faster way
LEAST_CHANNELS = 4  # in and out: with 3, as in images, im2col is as fast, and its forward pass faster


def _cook_toom(points: tuple[float, ...]) -> tuple[Array, Array, Array]:
    """Return A' (4, 6), B' (6, 6) and G (6, 3) for five points and infinity.

    The product of two polynomials, of 3 and of 4 coefficients g and y, has 6. It is found by its values at five points
    and its leading coefficient (the "value at infinity"): G g and A y are the values of the factors, whose products B
    turns back into coefficients by Lagrange's interpolation; its denominators are put into G. So the coefficients are
    B [(G g) * (A y)]. As a function of y this is linear, and its transpose is the convolution of 6 pixels d by the
    filter g: A' [(G g) * (B' d)] (Winograd, "Arithmetic complexity of computations", 1980).
    """
    AT, BT, G = np.zeros((TILE, PATCH)), np.zeros((PATCH, PATCH)), np.zeros((PATCH, FILTER))
    for j, point in enumerate(points):
        others = [other for other in points if other != point]
        AT[:, j] = point ** np.arange(TILE)
        BT[j, :-1] = np.poly(others)[::-1]  # the coefficients of the product of all (x - other)
        G[j] = point ** np.arange(FILTER) / np.prod(point - np.array(others))
    AT[-1, -1], G[-1, -1], BT[-1] = 1, 1, np.poly(points)[::-1]
    return AT, BT, G


AT, BT, G = _cook_toom(POINTS)


def suits(x: Array, W: Array, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]) -> bool:
    """Say whether this way is the faster one: by shapes only, so that the bits of a result do not depend on timing."""
    O, C, kH, kW = W.shape
    H, width = x.shape[2:]
    filled = H * width >= LEAST_FILLED * _whole(H) * _whole(width)
    usual = (kH, kW, *stride) == (3, 3, 1, 1) and padding == dilation == (1, 1)
    return usual and filled and min(C, O) >= LEAST_CHANNELS


def _whole(size: int) -> int:
    """Return ``size``, rounded up to whole tiles."""
    return -(-size // TILE) * TILE


def conv2d(x: Array, W: Array, b: Array | None, filters: dict[str, Array]) -> tuple[Array, dict[int, Array]]:
    """Cross-correlate ``x`` (N, C, H, W) with ``W`` (O, C, 3, 3), padding 1; W's transform is kept in ``filters``.

    Returns y (N, O, H, W) and {first image of a block: its transformed patches V}, which the backward pass needs again.
    """
    N, _, H, width = x.shape
    O = len(W)
    transformed = _kept(filters, "forward", lambda: _transform_filters(W.transpose(2, 3, 1, 0)))
    y = np.empty((N, H, width, O), x.dtype)

    def convolve(block: slice) -> tuple[int, Array]:
        data = _transform_data(nhwc(x[block]))
        _transform_output(np.matmul(data, transformed), y[block])  # (36, tiles, C) @ (36, C, O)
        if b is not None:
            add_bias(y[block], b)
        return block.start, data

    patches = dict(for_each_block(convolve, N, _bytes_each(x, O)))
    return nchw(y), patches


def conv2d_backward(
    dy: Array,
    x: Array,
    W: Array,
    patches: dict[int, Array],
    filters: dict[str, Array],
    input_grad: bool,
    weight_grad: bool,
) -> tuple[Array | None, Array | None]:
    """Return (dx, dW) for ``dy`` (N, O, H, W) and what the forward pass kept, each None unless it is wanted."""
    N, C, H, width = x.shape
    O = len(W)
    if input_grad:
        transformed = _kept(filters, "backward", lambda: _transform_filters(W.transpose(2, 3, 0, 1)))
        dx = np.empty((N, H, width, C), x.dtype)

    def gradients(block: slice) -> Array:
        dproducts = _transform_output_backward(nhwc(dy[block]))
        if input_grad:
            _transform_data_backward(np.matmul(dproducts, transformed), dx[block])  # (36, tiles, O) @ (36, O, C)
        if not weight_grad:
            return np.empty(0, x.dtype)
        dfilters: Array = np.matmul(dproducts.transpose(0, 2, 1), patches[block.start])
        return dfilters

    dfilters = sum_over_blocks(gradients, N, _bytes_each(x, O))
    return nchw(dx) if input_grad else None, _transform_filters_backward(dfilters) if weight_grad else None


def _kept(filters: dict[str, Array], key: str, derive: Callable[[], Array]) -> Array:
    """Return ``filters[key]``, derived now unless it was before; threads that come at once each derive the same."""
    kept = filters.get(key)
    if kept is None:
        kept = filters[key] = derive()
    return kept


def _bytes_each(x: Array, O: int) -> float:
    """Return the memory that one image, with ``O`` output channels, takes after both transforms."""
    _, C, H, width = x.shape
    return float(PATCH * PATCH * _whole(H) * _whole(width) * (O + C) * x.itemsize / (TILE * TILE))


def _along_both(matrix: Array, planes: Array, out: Array | None = None) -> Array:
    """Apply ``matrix`` (m, k) along the first and along the second axis of ``planes`` (k, k, n): (m, m, n)."""
    matrix = matrix.astype(planes.dtype)
    m, n = len(matrix), planes.shape[2]
    both = np.empty((m, m, n), planes.dtype) if out is None else out
    for start in range(0, n, PIECE):
        piece = slice(start, start + PIECE)
        rows = np.matmul(matrix, planes[:, :, piece].transpose(1, 0, 2))  # for each column: (m, k) @ (k, piece)
        np.matmul(matrix, rows.transpose(1, 0, 2), out=both[:, :, piece])
    return both


def _grid(x: Array) -> tuple[int, int, int, int]:
    """Return how the tiles of ``x`` (n, H, W, C) lie: (n, H / 4, W / 4, C), rounded up."""
    n, H, W, C = x.shape
    return n, _whole(H) // TILE, _whole(W) // TILE, C


def _by_tiles(x: Array) -> Array:
    """View ``x`` (n, H, W, C), of whole tiles, by the places in a tile: (4, 4, n, H / 4, W / 4, C)."""
    n, rows, columns, C = _grid(x)
    return x.reshape(n, rows, TILE, columns, TILE, C).transpose(2, 4, 0, 1, 3, 5)


def _transform_filters(taps: Array) -> Array:
    """G g G' of each filter: (3, 3, a, b) -> (36, a, b)."""
    a, b = taps.shape[2:]
    filters = np.empty((PATCH, PATCH, a, b), taps.dtype)

    def transform(rows: slice) -> None:
        some = np.ascontiguousarray(taps[:, :, rows]).reshape(FILTER, FILTER, -1)
        _along_both(G, some, out=filters[:, :, rows].reshape(PATCH, PATCH, -1))

    for_each_block(transform, a, filters[:, :, 0].nbytes)
    return filters.reshape(PATCH * PATCH, a, b)


def _transform_filters_backward(dfilters: Array) -> Array:
    """Return dW (O, C, 3, 3), by the transpose of _transform_filters, from (36, O, C)."""
    O, C = dfilters.shape[1:]
    dW = np.empty((O, FILTER, FILTER, C), dfilters.dtype)

    def transform(rows: slice) -> None:
        taps = _along_both(G.T, dfilters[:, rows].reshape(PATCH, PATCH, -1))
        dW[rows] = taps.reshape(FILTER, FILTER, -1, C).transpose(2, 0, 1, 3)

    for_each_block(transform, O, dfilters[:, :1].nbytes)
    return nchw(dW)


def _transform_data(x: Array) -> Array:
    """B' d B of the 6x6 patch around each tile: (n, H, W, C) -> (36, tiles, C)."""
    n, H, W, C = x.shape
    padded = np.zeros((n, _whole(H) + 2, _whole(W) + 2, C), x.dtype)
    padded[:, 1 : H + 1, 1 : W + 1] = x
    image, row, column, channel = padded.strides
    strides = (row, column, image, TILE * row, TILE * column, channel)
    patches = as_strided(padded, (PATCH, PATCH, *_grid(x)), strides, writeable=False)
    return _along_both(BT, np.ascontiguousarray(patches).reshape(PATCH, PATCH, -1)).reshape(PATCH * PATCH, -1, C)


def _transform_output(products: Array, y: Array) -> None:
    """A' m A of each 6x6 array of products: (36, tiles, O) -> ``y`` (n, H, W, O)."""
    tiles = _along_both(AT, products.reshape(PATCH, PATCH, -1)).reshape(TILE, TILE, *_grid(y))
    _put_tiles(tiles, y)


def _put_tiles(tiles: Array, image: Array) -> None:
    """Copy (4, 4, n, H / 4, W / 4, C) to their places in ``image`` (n, H, W, C); drop what lies beyond its edges."""
    n, H, W, C = image.shape
    whole = image if (_whole(H), _whole(W)) == (H, W) else np.empty((n, _whole(H), _whole(W), C), image.dtype)
    _by_tiles(whole)[...] = tiles
    if whole is not image:
        image[...] = whole[:, :H, :W]


def _transform_output_backward(dy: Array) -> Array:
    """Transpose of _transform_output: (n, H, W, O) -> (36, tiles, O)."""
    _, H, W, O = dy.shape
    rest = _whole(H) - H, _whole(W) - W
    whole = np.pad(dy, ((0, 0), (0, rest[0]), (0, rest[1]), (0, 0))) if any(rest) else dy
    tiles = np.ascontiguousarray(_by_tiles(whole)).reshape(TILE, TILE, -1)
    return _along_both(AT.T, tiles).reshape(PATCH * PATCH, -1, O)


def _transform_data_backward(ddata: Array, dx: Array) -> None:
    """Transpose of _transform_data: add (36, tiles, C) up where it came from, in ``dx`` (n, H, W, C).

    Pixel p of a tile is place p + 1 of its own patch, and the first and the last pixel also belong to the patch before
    and the one after it. What falls into the padding is dropped. Rows first, then columns.
    """
    patches = _along_both(BT.T, ddata.reshape(PATCH, PATCH, -1)).reshape(PATCH, PATCH, *_grid(dx))
    inner = slice(1, 1 + TILE)
    rows = patches[inner]
    rows[0, :, :, 1:] += patches[-1, :, :, :-1]
    rows[-1, :, :, :-1] += patches[0, :, :, 1:]
    both = rows[:, inner]
    both[:, 0, :, :, 1:] += rows[:, -1, :, :, :-1]
    both[:, -1, :, :, :-1] += rows[:, 0, :, :, 1:]
    _put_tiles(both, dx)

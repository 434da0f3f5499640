"""Sizes, counts and numbers as people give them, of Python's or of NumPy's kinds; and what sizes amount to.

Both engines ask here which sizes come out of windows and convolutions, and so refuse the same with the same words.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

Size = int | tuple[int, int]


def whole(name: str, value: Any) -> int:
    """Return ``value`` as an int, which never overflows as NumPy's do. Raises ValueError for no whole number."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None


def number(name: str, value: Any) -> float:
    """Return ``value`` as a float. Raises ValueError for what is no finite number."""
    try:
        if not isinstance(value, bool | str) and math.isfinite(value):
            return float(value)
    except TypeError:
        pass
    raise ValueError(f"{name} must be a finite number, got {value!r}")


def pair(size: Any) -> tuple[int, int]:
    """Return (height, width) of a size given as one whole number or two, of Python's or of NumPy's kinds.

    Raises ValueError for anything else, such as 3.0, True or three numbers.
    """
    if type(size) is int:  # at once: every operation asks several times
        return size, size
    try:
        one = not hasattr(size, "__len__") or getattr(size, "ndim", None) == 0  # an array of no dimensions is one
        height, width = (size, size) if one else size
        if isinstance(height, bool) or isinstance(width, bool):
            raise TypeError
        return operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        raise ValueError(f"a size must be one whole number, or two for height and width, got {size!r}") from None


def check_windows(k: Size, stride: Size, padding: Size, dilation: Size = 1) -> None:
    """Raise ValueError for windows that make no sense, on images of any size."""
    for name, size, least in (
        ("kernel size", k, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if min(pair(size)) < least:
            raise ValueError(f"{name} {size} must be at least {least}")


def out_size(in_size: Sequence[int], k: Size, stride: Size, padding: Size, dilation: Size = 1) -> tuple[int, int]:
    """Return how many windows of ``k`` fit into (height, width), rounded down as torch.nn does.

    Raises ValueError where not one fits, or where the sizes make no sense.
    """

    def along(size: int, k: int, stride: int, padding: int, dilation: int) -> int:
        beyond = size + 2 * padding - dilation * (k - 1) - 1
        if beyond < 0:
            spread = f" and dilation {dilation}" if dilation > 1 else ""
            raise ValueError(
                f"a kernel of size {k}{spread} does not fit into an input of size {size} with padding {padding}"
            )
        return beyond // stride + 1

    check_windows(k, stride, padding, dilation)
    height, width = map(along, in_size, pair(k), pair(stride), pair(padding), pair(dilation))
    return height, width


def upsampling(scale: Size) -> tuple[int, int]:
    """Return how often pixels are repeated along height and width. Raises ValueError for less than once."""
    if min(pair(scale)) < 1:
        raise ValueError(f"scale_factor {scale} must be at least 1")
    return pair(scale)


def pool_size(in_size: Sequence[int], k: Size, stride: Size, padding: Size) -> tuple[int, int]:
    """Return what ``out_size`` does. Raises ValueError also for windows that would lie in the padding alone."""
    if any(2 * border > size for border, size in zip(pair(padding), pair(k), strict=True)):
        raise ValueError(f"a pool's padding {padding} must be at most half of its kernel size {k}")
    return out_size(in_size, k, stride, padding)


def conv_size(
    x_shape: Sequence[int], W_shape: Sequence[int], stride: Size, padding: Size, dilation: Size, groups: int
) -> tuple[int, int]:
    """Return (Ho, Wo) of a convolution of ``x_shape`` (N, C, H, W) by filters ``W_shape`` (O, C / groups, kH, kW).

    Raises ValueError for channels that do not fit, and as ``out_size`` does.
    """
    O, C = W_shape[:2]
    check_groups("conv2d", groups, O)
    if x_shape[1] != C * groups:
        raise ValueError(f"filters {tuple(W_shape)} in {groups} groups need {C * groups} channels, got {x_shape[1]}")
    return out_size(x_shape[2:], (W_shape[2], W_shape[3]), stride, padding, dilation)


def conv_transpose_size(
    x_shape: Sequence[int],
    W_shape: Sequence[int],
    stride: Size,
    padding: Size,
    output_padding: Size,
    dilation: Size,
    groups: int,
) -> tuple[int, int]:
    """Return (Ho, Wo) of a transposed convolution of ``x_shape`` (N, C, H, W) by ``W_shape`` (C, O / groups, kH, kW).

    It is the size that a convolution brings down to (H, W): of several the smallest, and ``output_padding`` more.
    Raises ValueError for channels or sizes that do not fit.
    """
    check_groups("conv_transpose2d", groups, W_shape[0])
    if x_shape[1] != W_shape[0]:
        raise ValueError(f"transposed filters {tuple(W_shape)} need {W_shape[0]} channels, got {x_shape[1]}")

    def along(size: int, k: int, stride: int, padding: int, more: int, dilation: int) -> int:
        if not 0 <= more < max(stride, dilation):
            raise ValueError(
                f"output_padding {more} must be at least 0 and below stride {stride} or dilation {dilation}"
            )
        out = (size - 1) * stride + dilation * (k - 1) + 1 + more - 2 * padding
        if out < 1:
            raise ValueError(f"padding {padding} leaves nothing of the output for an input of size {size}")
        return out

    k = (W_shape[2], W_shape[3])
    check_windows(k, stride, padding, dilation)
    sizes = (x_shape[2:], k, pair(stride), pair(padding), pair(output_padding), pair(dilation))
    height, width = map(along, *sizes)
    return height, width


def check_groups(op: str, groups: int, *channels: int) -> None:
    """Raise ValueError, naming ``op``, unless each of ``channels`` can be shared out to ``groups`` equally."""
    for count in channels:
        if groups < 1 or count < 1 or count % groups:
            raise ValueError(f"{op}: {count} channels cannot be shared out to {groups} groups, equally many each")

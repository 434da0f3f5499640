"""What arrays are to all rooms: their type, and how images lie in them."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def nhwc(x: Array) -> Array:
    """View (N, C, H, W) as a contiguous (N, H, W, C) array; copies only what is not channels-last in memory yet."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def nchw(x: Array) -> Array:
    """View (N, H, W, C) as (N, C, H, W), the shape that callers see."""
    return x.transpose(0, 3, 1, 2)

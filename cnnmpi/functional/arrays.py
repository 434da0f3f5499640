"""What arrays need besides mathematics. Both engines have these, so that layers and models need no ``if``."""

from typing import Any

import numpy as np

from cnnmpi.functional.blocks import Array, nchw
from cnnmpi.machine import blas_kernels


def as_array(a: Array, like: Any = None) -> Array:
    """Return the NumPy array ``a`` as an array of this engine, on the device of ``like``; its dtype is kept."""
    return np.asarray(a)


def kernels(device: str) -> str:
    """Return what computes on ``device``, here the CPU, on which the last bits depend: BLAS and its kernels."""
    return blas_kernels()


def to_numpy(a: Array) -> Array:
    """Return this engine's array ``a`` as a NumPy array; here, ``a`` itself."""
    return a


def copy_into(target: Array, source: Array) -> None:
    """Copy the NumPy array ``source`` into this engine's array ``target``, converted to the target's dtype."""
    target[...] = source


def fits(x: Array, array: Array) -> bool:
    """Return whether a layer with parameters as ``array`` takes ``x``: of the same dtype."""
    return x.dtype == array.dtype


def for_loss(logits: Array) -> Array:
    """Return the outputs of a model in the type that a loss computes in: here, as they are."""
    return logits


def empty(size: int, like: Any = None) -> Array:
    """Return a 1-D array of ``size`` numbers, not set yet, of the dtype and on the device of ``like``; else float32."""
    return np.empty(size, np.float32 if like is None else like.dtype)


def address(a: Array) -> int:
    """Return where in memory the array begins: the same for two that share it."""
    return int(a.ctypes.data)


def retire(a: Array) -> None:
    """Make an array read-only that was replaced by another: an optimizer that still holds it raises."""
    a.flags.writeable = False


def seal(y: Array, cache: Any) -> Any:
    """Refuse changes of ``y`` in place, where ``cache`` needs it: it becomes read-only."""
    parts = cache if isinstance(cache, tuple) else (cache,)
    if any(isinstance(part, np.ndarray) and np.may_share_memory(part, y) for part in parts):
        y.flags.writeable = False


def is_intact(seal: Any) -> bool:
    """Return whether what was sealed is as it was; here nobody could change it."""
    return True


def channels_last_view(flat: Array, shape: tuple[int, ...]) -> Array:
    """View the 1-D ``flat`` as ``shape``; a 4-D shape (O, C, kH, kW) lies in memory as (O, kH, kW, C).

    Raises ValueError for an array that is not 1-D or not of this size.
    """
    if flat.ndim != 1:
        raise ValueError(f"channels_last_view: expected a 1-D array, got shape {flat.shape}")
    if len(shape) != 4:
        return flat.reshape(shape)  # splitting the only axis never copies
    O, C, kH, kW = shape
    return nchw(flat.reshape(O, kH, kW, C))

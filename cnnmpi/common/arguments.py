"""What operations ask of their arguments, whichever engine computes them. Arrays are NumPy's or tensors."""

import math
from collections.abc import Sequence
from typing import Any


def check_choice(op: str, what: str, value: Any, *choices: str) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{op}: {what} must be {' or '.join(map(repr, choices))}, got {value!r}")


def joined_shape(op: str, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of arrays (N, C, ...) of these ``shapes`` side by side along the channels.

    Raises ValueError where they differ in more than their channels, and for none.
    """
    first, *others = shapes or [()]
    if len(first) < 2 or any(len(s) < 2 or (s[0], *s[2:]) != (first[0], *first[2:]) for s in others):
        raise ValueError(f"{op}: arrays to join may differ in their channels (N, C, ...) only, got {list(shapes)}")
    return (first[0], sum(shape[1] for shape in shapes), *first[2:])


def check_split(op: str, channels: int, sizes: Sequence[int]) -> None:
    """Raise ValueError unless ``sizes`` add up to ``channels``."""
    if sum(sizes) != channels or min(sizes, default=-1) < 0:
        raise ValueError(f"{op}: {channels} channels cannot be cut into {list(sizes)}")


def check_loss(op: str, logits: Any, targets: Any, reduction: str, *, classes: bool = False) -> bool:
    """Raise ValueError unless a loss can be computed of these shapes and dtypes; return whether targets are classes.

    ``logits`` are float32 or float64 (N, K), ``targets`` floats (N, K) or, with ``classes``, integers (N,) as well.
    """
    shape, kind = tuple(targets.shape), _dtype(targets)
    is_classes = classes and len(shape) == 1 and kind.startswith(("int", "uint"))
    is_values = len(shape) == 2 and kind.startswith(("float", "bfloat"))
    fits = shape == tuple(logits.shape)[:1] if is_classes else is_values and shape == tuple(logits.shape)
    if logits.ndim != 2 or not fits:
        wanted = "integer targets (N,)" if classes else "float targets (N, K)"
        hint = "; probabilities are floats (N, K)" if classes else ""
        raise ValueError(
            f"{op}: expected logits (N, K) and {wanted}, got {tuple(logits.shape)} and {kind} {shape}{hint}"
        )
    if _dtype(logits) not in ("float32", "float64"):
        raise ValueError(f"{op}: expected logits of float32 or float64, got {_dtype(logits)}")
    if 0 in logits.shape:
        raise ValueError(f"{op}: an empty batch has no loss, got logits {tuple(logits.shape)}")
    check_choice(op, "reduction", reduction, "mean", "sum")
    return is_classes


def check_range(op: str, what: str, values: Any, least: float = -math.inf, most: float = math.inf) -> None:
    """Raise ValueError unless all ``values`` are finite and lie in ``least``..``most``."""
    lowest, highest = values.min().item(), values.max().item()  # both NaN if any is
    if math.isfinite(lowest) and math.isfinite(highest) and least <= lowest and highest <= most:
        return
    if math.isfinite(most):
        wanted = f"lie in {least}..{most}"
    else:
        wanted = "be finite" + (f" and at least {least}" if math.isfinite(least) else "")
    raise ValueError(f"{op}: {what} must {wanted}, got {lowest}..{highest}")


def check_weights(op: str, what: str, weights: Any, classes: int) -> None:
    """Raise ValueError unless ``weights`` are one number for each class, finite and not negative."""
    if tuple(weights.shape) != (classes,):
        raise ValueError(
            f"{op}: {what} must have the shape ({classes},), one for each class, got {tuple(weights.shape)}"
        )
    check_range(op, what, weights, least=0)


def check_smoothing(op: str, label_smoothing: float) -> None:
    """Raise ValueError unless ``label_smoothing`` is a share."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must lie in 0..1, got {label_smoothing}")


def mean_divisor(op: str, weight_sum: float) -> float:
    """Return ``weight_sum``, by which a weighted mean divides. Raises ValueError for 0."""
    if weight_sum == 0:
        raise ValueError(f"{op}: the classes of all targets have the weight 0: there is no mean, only a 'sum'")
    return weight_sum


def _dtype(a: Any) -> str:
    """Return the name of an array's dtype, as NumPy has it."""
    return str(getattr(a.dtype, "name", a.dtype)).removeprefix("torch.")

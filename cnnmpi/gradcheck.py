"""Whether a backward written by hand is the derivative of its forward, by central differences.

    cnnmpi.check_gradients(MyLayer(3, 8), (2, 3, 6, 6))
    cnnmpi.check_gradients(my_loss, (4, 10), targets=np.array([3, 1, 4, 1]))

For a random direction v and a random weighting dout of the outputs, the derivative along v of f = sum dout y must be
sum v df/dx. One number checks all elements at once, so three directions suffice however large the arrays are.
"""

import copy
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cnnmpi import functional
from cnnmpi.common.arrays import Array
from cnnmpi.layers import Dropout, Layer
from cnnmpi.rng import generator

TOLERANCE = 1e-7  # relative: the differences are off by some 1e-10, see _differences
STEPS = 1e-5, 1e-6, 1e-7  # in units of the variable's size: a shorter one crosses fewer kinks, but is less exact
DIRECTIONS = 3  # for each variable
DRAWS = 15  # at most, until so many cross no kink


class GradientError(AssertionError):
    """A backward does not fit its forward; the message says which gradient, where, and by how much."""


def check_gradients(
    layer_or_loss: Layer | Callable[..., Any],
    shape: Sequence[int] | None = None,
    *,
    x: Any = None,
    targets: Any = None,
    seed: int = 0,
) -> dict[str, float]:
    """Compare the gradients of a layer, a model or a loss with central differences in float64.

    Of a layer, the gradients by its input of this ``shape`` (N, ...), standard normal from ``seed`` unless given as
    ``x``, and by every parameter; of a loss ``loss(logits, targets, reduction=)``, with ``targets`` for these logits,
    the gradient by the logits for both reductions. What is given stays as it is: a layer is copied and the copy
    converted to float64 and NumPy, in the mode (training or not) that it has; Dropout repeats its mask.

    Returns {name: largest relative error}, of names such as "x" and "features.0.weight", or "sum" and "mean". Where the
    random directions cross kinks (of ReLU at 0, of a maximum that several share), differences say nothing: other
    directions are drawn, and a warning says so. Raises GradientError, an AssertionError, where a gradient is wrong;
    where backward overwrites gradients instead of adding to them, or returns another shape than x has; where input,
    dout or parameters are written to; where forward gives another result the second time.
    """
    rng = generator(seed, "check_gradients")
    if x is None:
        if shape is None:
            raise ValueError("check_gradients: say the shape of the input, such as (2, 3, 8, 8), or give x")
        x = rng.standard_normal(tuple(shape))
    x = np.array(x, np.float64)
    if shape is not None and x.shape != tuple(shape):
        raise ValueError(f"check_gradients: x has the shape {x.shape}, not {tuple(shape)}")
    if x.ndim < 2 or x.size == 0:
        raise ValueError(f"check_gradients: the input must be (N, ...), at least one sample, got {x.shape}")
    if isinstance(layer_or_loss, Layer):
        if targets is not None:
            raise ValueError("check_gradients: a layer has no targets, only a loss has")
        return _check_layer(layer_or_loss, x, rng)
    if not callable(layer_or_loss):
        raise TypeError(f"check_gradients: expected a layer or a loss, got a {type(layer_or_loss).__name__}")
    if targets is None:
        raise ValueError("check_gradients: a loss needs targets for its logits")
    return _check_loss(layer_or_loss, x, targets, rng)


def _check_layer(original: Layer, x: Array, rng: np.random.Generator) -> dict[str, float]:
    """Check a copy of ``original`` at the input ``x``."""
    label = repr(original)
    if len(label) > 80 or "\n" in label:
        label = type(original).__name__
    layer = copy.deepcopy(original)
    for at, each in layer.walk():
        each.caching = True
        if not each.frozen and (lacking := each.params.keys() - each.grads.keys()):
            name = f"{at}.{min(lacking)}".strip(".")
            raise GradientError(f"{label}: the parameter {name} has no gradient: define it with add_parameter")
    layer._replace_arrays(functional, lambda each, array: np.array(each.F.to_numpy(array), np.float64))
    buffers = [(buffer, buffer.copy()) for buffer in layer.named_buffers().values()]
    variables = {"x": x} | {name: param for name, (param, _) in layer.named_parameters().items()}

    def forward() -> Array:
        for buffer, value in buffers:  # running statistics move in training
            buffer[...] = value
        for _, each in layer.walk():
            if isinstance(each, Dropout):
                each.reseed(0)
        y = _unchanged(f"{label}: forward", variables, lambda: layer.forward(x))
        return _float64(f"{label}: forward", y).copy()  # Identity's y is x itself, which will move

    y = forward()
    if not np.isfinite(y).all():
        raise GradientError(
            f"{label}: forward gives NaN or infinite numbers, which have no differences: give another x"
        )
    if not np.array_equal(y, forward()):
        raise GradientError(f"{label}: forward gives another y for the same x the second time: it has no derivative")
    dout = _normal(rng, y)

    def backward() -> tuple[Any, dict[str, Array]]:
        """Return dx, and each parameter's gradient as it is after one more backward."""
        forward()
        dx = _unchanged(f"{label}: backward", variables | {"dout": dout}, lambda: layer.backward(dout))
        return dx, {name: np.array(grad) for name, (_, grad) in layer.named_parameters().items()}

    layer.zero_grad()
    dx, gradients = backward()
    if dx is not None:
        dx = _float64(f"{label}: backward", dx).copy()
        if dx.shape != x.shape:
            raise GradientError(f"{label}: backward returns a dx of shape {dx.shape}, but x has {x.shape}")
    elif all(getattr(each, "input_grad", True) for _, each in layer.walk()):
        raise GradientError(f"{label}: backward returns no dx (None), but nobody asked it to skip_input_grad()")
    for name, twice in backward()[1].items():
        once = gradients[name]
        if not np.allclose(twice, 2 * once, rtol=1e-9, atol=1e-12):
            told = "the same" if np.allclose(twice, once) else "not twice as large"
            raise GradientError(
                f"{label}: backward must add to the gradient of {name}, but after two calls it is {told} as after one"
            )
    if dx is not None:
        gradients = {"x": dx} | gradients
    subject = f"{label}: backward's gradient of"
    return _compare(subject, forward, {name: variables[name] for name in gradients}, gradients, dout, rng)


def _check_loss(loss: Callable[..., Any], logits: Array, targets: Any, rng: np.random.Generator) -> dict[str, float]:
    """Check ``loss`` at ``logits`` (N, ...) for both reductions, and that both are of one loss."""
    function = loss.func if isinstance(loss, functools.partial) else loss
    label = getattr(function, "__name__", type(function).__name__)

    def compute(reduction: str, part: slice = slice(None)) -> tuple[Array, Array]:
        """Return the loss of a part of the batch, as a 0-D array, and a copy of its gradient."""
        who, z, y = f"{label}(reduction={reduction!r})", logits[part], targets[part]
        result = _unchanged(who, {"logits": z, "targets": y}, lambda: loss(z, y, reduction=reduction))
        if not isinstance(result, tuple) or len(result) != 2:
            raise GradientError(f"{who} must return (loss, dlogits), got a {type(result).__name__}")
        value, dlogits = result[0], _float64(who, result[1]).copy()
        if np.ndim(value) or not np.isfinite(value):
            raise GradientError(f"{who} must give one finite number, got {value!r}")
        if dlogits.shape != z.shape:
            raise GradientError(f"{who} gives a gradient of shape {dlogits.shape}, but the logits have {z.shape}")
        return np.array(value, np.float64), dlogits

    errors: dict[str, float] = {}
    gradients: dict[str, Array] = {}
    for reduction in ("sum", "mean"):
        value, gradients[reduction] = compute(reduction)
        if compute(reduction)[0] != value:
            raise GradientError(f"{label} gives another loss for the same logits the second time")
        subject, gradient = f"{label}(reduction={reduction!r}): the gradient of", {"logits": gradients[reduction]}

        def current(reduction: str = reduction) -> Array:
            return compute(reduction)[0]

        errors[reduction] = _compare(subject, current, {"logits": logits}, gradient, np.array(1.0), rng)["logits"]
    total, mean = gradients["sum"], gradients["mean"]
    cuts = [slice(0, len(logits) // 2), slice(len(logits) // 2, None)] if len(logits) > 1 else [slice(None)]
    if not np.allclose(np.concatenate([compute("sum", cut)[1] for cut in cuts]), total, rtol=1e-9, atol=1e-12):
        raise GradientError(f"{label}: two halves of a batch have other gradients than the whole, for reduction='sum'")
    if not np.allclose(total * np.vdot(mean, mean), mean * np.vdot(total, mean), rtol=1e-9, atol=1e-12):
        raise GradientError(f"{label}: reduction='mean' must be the 'sum' over a number, that of samples or weights")
    return errors


def _normal(rng: np.random.Generator, like: Array) -> Array:
    return np.array(rng.standard_normal(like.shape))


def _unchanged(who: str, arrays: dict[str, Any], call: Callable[[], Any]) -> Any:
    """Return what ``call`` returns. Raises GradientError if it writes into one of ``arrays``."""
    before = {name: np.array(array) for name, array in arrays.items()}
    result = call()
    for name, array in arrays.items():
        if np.asarray(array).tobytes() != before[name].tobytes():  # bytes: targets may hold NaN
            raise GradientError(f"{who} writes into {name}, which must stay as it was")
    return result


def _float64(who: str, result: Any) -> Array:
    """Return ``result``. Raises GradientError unless it is a NumPy array of float64."""
    if not isinstance(result, np.ndarray) or result.dtype != np.float64:
        kind = f"an array of {result.dtype}" if isinstance(result, np.ndarray) else f"a {type(result).__name__}"
        raise GradientError(f"{who} gives {kind} where x is a NumPy array of float64: the dtype must be kept")
    return result


def _compare(
    subject: str,
    value: Callable[[], Array],
    variables: dict[str, Array],
    gradients: dict[str, Array],
    dout: Array,
    rng: np.random.Generator,
) -> dict[str, float]:
    """Compare ``gradients`` with the differences of sum dout value() when ``variables`` move, and return the errors."""
    errors: dict[str, float] = {}
    wrong: dict[str, str] = {}
    kinks = 0
    for name in reversed(variables):  # a wrong layer of a model makes wrong what lies before it: it is named first
        errors[name], left, crossed = math.nan, DIRECTIONS, 0
        for _ in range(DRAWS):
            step = STEPS[min(crossed, len(STEPS) - 1)]
            along = functools.partial(_differences, value, variables[name], dout, step)
            direction = _normal(rng, variables[name])
            products = gradients[name] * direction
            difference, bend, size = along(direction)
            off = abs(difference - float(products.sum()))
            error = off / (float(np.abs(products).sum()) + size / 10 or 1.0)
            right = error <= TOLERANCE
            if not right and bend > off / 10:
                crossed += 1
                continue
            errors[name] = error if math.isnan(errors[name]) else max(errors[name], error)
            if not right:
                wrong[name] = _explain(along, direction, gradients[name])
            left -= 1
            if not right or not left:
                break
        kinks += crossed
    if wrong:
        (first, message), *others = wrong.items()
        right_ones = [name for name in errors if name not in wrong]
        message += f"; also wrong: {', '.join(name for name, _ in others)}" if others else ""
        raise GradientError(
            f"{subject} {first} {message}" + (f"; right: {', '.join(right_ones)}" if right_ones else "")
        )
    if kinks:
        unchecked = ", ".join(name for name in errors if math.isnan(errors[name]))
        warnings.warn(
            f"{subject.rpartition(':')[0]}: {kinks} random directions crossed a kink, where differences say nothing"
            + (f"; not checked at all: {unchecked}: give another x" if unchecked else "; others were drawn"),
            stacklevel=4,
        )
    return {name: errors[name] for name in variables}


def _explain(along: Callable[[Array], tuple[float, float, float]], direction: Array, gradient: Array) -> str:
    """Say by how much ``gradient`` is wrong along ``direction``, and which element is most.

    Halves what moves and goes on with the half that is more wrong, until few elements are left, to be tried alone.
    """

    def restricted(elements: Any) -> tuple[float, float]:
        """Return the derivative along the direction's part in ``elements``, by differences and by ``gradient``."""
        part = np.zeros(gradient.shape)
        part.flat[elements] = direction.flat[elements]
        return along(part)[0], float((gradient * part).sum())

    def off(elements: Any) -> float:
        difference, slope = restricted(elements)
        return abs(difference - slope)

    elements = np.arange(gradient.size)
    difference, slope = restricted(elements)
    while len(elements) > 20:
        elements = max(np.array_split(elements, 2), key=off)
    worst = int(max(elements, key=off))
    index = [int(i) for i in np.unravel_index(worst, gradient.shape)]
    alone, own = (derivative / float(direction.flat[worst]) for derivative in restricted(worst))
    ratio = f" (ratio {slope / difference:.3g})" if difference else ""
    return (
        f"is {'wrong' if gradient.any() else '0 everywhere'}: along a random direction {difference:.5g} by central "
        f"differences, {slope:.5g} by backward{ratio}; worst element {index}: {alone:.5g} against {own:.5g}"
    )


def _differences(
    value: Callable[[], Array], variable: Array, dout: Array, step: float, direction: Array
) -> tuple[float, float, float]:
    """Return the derivative of f = sum dout value() along ``direction``, how much f bends here, and f's size.

    Central differences of the steps h and h / 2, extrapolated (Richardson): the error is of the order of h^4 and of
    the rounding of f, 1e-16, over h. Where f is smooth, its second difference over h is as good as proportional to h
    and both central differences are equal; a kink between -h and h breaks one or the other, by the change of the slope.
    """
    at = variable.copy()
    h = step * (max(float(np.sqrt(np.mean(at * at))), 1e-2) if at.any() else 1.0)

    def move(t: float) -> Array:
        variable[...] = at + t * direction
        return np.array(value())

    middle = move(0)
    slopes, bends = [], []
    for t in (h, h / 2):
        up, down = move(t), move(-t)
        slopes.append(float((dout * (up - down)).sum() / (2 * t)))
        bends.append(float((dout * ((up - middle) - (middle - down))).sum() / t))
    variable[...] = at
    bend = max(abs(bends[0] - 2 * bends[1]), abs(slopes[0] - slopes[1]))
    return (4 * slopes[1] - slopes[0]) / 3, bend, float(np.linalg.norm(dout * middle))

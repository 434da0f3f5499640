"""Optimizers over (parameter, gradient) pairs, learning-rate schedules as pure functions of the step, and clipping.

The pairs may be NumPy arrays or torch tensors: only in-place arithmetic is used, which both have.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any  # a NumPy array or a torch tensor
Pair = tuple[Array, Array]


class Optimizer:
    """The loop that all optimizers share; a subclass adds its ``update`` rule and the names of its ``slots``.

    Args:
        parameters: the list of (parameter, gradient) pairs, as ``model.parameters()`` or any layer returns it.
        lr: the learning rate, a plain attribute that a loop may change at any time.
        weight_decay: applied to arrays of two dimensions or more, not to biases and BatchNorm's parameters, unless
            ``decay_all``.

    ``state`` maps each slot to a list of arrays, one for each parameter; ``steps`` counts the updates. The defaults are
    those of torch.optim. Raises ValueError for parameters that are not float32 or float64: squares of gradients
    and Adam's eps are 0 in shorter ones.

    """

    slots: tuple[str, ...] = ()

    def __init__(self, parameters: list[Pair], lr: float, weight_decay: float = 0.0, decay_all: bool = False) -> None:
        for param, _ in parameters:
            if str(param.dtype).removeprefix("torch.") not in ("float32", "float64"):
                raise ValueError(f"{type(self).__name__}: expected float32 or float64 parameters, got {param.dtype}")
        self.parameters = parameters
        self.lr = lr
        self.weight_decay = weight_decay
        self.decay_all = decay_all
        self.steps = 0
        self.state: dict[str, list[Array]] = {slot: [zeros_like(p) for p, _ in parameters] for slot in self.slots}

    def step(self) -> None:
        """Update every parameter in place from its gradient. Raises RuntimeError for arrays that were replaced."""
        if any(_is_retired(array) for pair in self.parameters for array in pair):
            raise RuntimeError(
                "the optimizer's arrays are no longer the model's: it was frozen, or moved to another device, dtype or "
                "trainer. Make the optimizer after that"
            )
        self.steps += 1
        for index, (param, grad) in enumerate(self.parameters):
            decay = self.weight_decay if self.decay_all or param.ndim > 1 else 0.0
            self.update(param, grad, decay, *(self.state[slot][index] for slot in self.slots))

    def update(self, param: Array, grad: Array, decay: float, *state: Array) -> None:
        """Change ``param`` and ``state`` in place; ``grad`` is left alone."""
        raise TypeError(f"{type(self).__name__} does not define update")

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for _, grad in self.parameters:
            grad[...] = 0


class SGD(Optimizer):
    """Stochastic gradient descent: v = momentum v + g, p -= lr v (Nesterov: p -= lr (g + momentum v)), as torch's."""

    slots = ("momentum",)

    def __init__(
        self,
        parameters: list[Pair],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        decay_all: bool = False,
    ) -> None:
        super().__init__(parameters, lr, weight_decay, decay_all)
        self.momentum = momentum
        self.nesterov = nesterov

    def update(self, param: Array, grad: Array, decay: float, *state: Array) -> None:
        """See the class."""
        (velocity,) = state
        if decay:
            grad = grad + decay * param
        velocity *= self.momentum
        velocity += grad
        param -= self.lr * (grad + self.momentum * velocity if self.nesterov else velocity)


class Adam(Optimizer):
    """Adam with bias correction (Kingma and Ba, 2015); weight decay is added to the gradient, as L2 regularisation."""

    slots = ("exp_avg", "exp_avg_sq")
    decoupled = False

    def __init__(
        self,
        parameters: list[Pair],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay_all: bool = False,
    ) -> None:
        super().__init__(parameters, lr, weight_decay, decay_all)
        self.betas = betas
        self.eps = eps

    def update(self, param: Array, grad: Array, decay: float, *state: Array) -> None:
        """Update m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, p -= lr m^ / (sqrt(v^) + eps); ^ corrects the bias."""
        mean, square = state
        beta1, beta2 = self.betas
        if self.decoupled:
            param *= 1 - self.lr * decay
        elif decay:
            grad = grad + decay * param
        mean *= beta1
        mean += (1 - beta1) * grad
        square *= beta2
        square += (1 - beta2) * grad * grad
        correct1, correct2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        param -= (self.lr / correct1) * mean / ((square / correct2) ** 0.5 + self.eps)


class AdamW(Adam):
    """Adam whose weight decay shrinks the weights directly: p *= 1 - lr decay (Loshchilov and Hutter, 2019)."""

    decoupled = True

    def __init__(
        self,
        parameters: list[Pair],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        decay_all: bool = False,
    ) -> None:
        super().__init__(parameters, lr, betas, eps, weight_decay, decay_all)


def zeros_like(array: Array) -> Array:
    """Return zeros of the shape, dtype and layout in memory of ``array``, of either engine."""
    if isinstance(array, np.ndarray):
        return np.zeros_like(array)
    zeros = 1 * array
    zeros[...] = 0
    return zeros


def _is_retired(array: Array) -> bool:
    """Return whether the array was replaced by another, or given up, as the engines' ``retire`` marks it."""
    return not array.flags.writeable if isinstance(array, np.ndarray) else tuple(array.shape) == (0,)


def clip_grad_norm(parameters: Sequence[Pair], max_norm: float) -> float:
    """Scale all gradients in place so that their global L2 norm is at most ``max_norm``; return the norm before."""
    norm = math.sqrt(math.fsum(float((grad * grad).sum()) for _, grad in parameters))
    if norm > max_norm:
        for _, grad in parameters:
            grad *= max_norm / norm
    return norm


def warmup_cosine(step: int, *, peak: float, total: int, warmup: int = 0) -> float:
    """Return the rate at ``step``: up in a line to ``peak`` over ``warmup`` steps, then down a half cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def warmup_linear(step: int, *, peak: float, total: int, warmup: int = 0) -> float:
    """Return the rate at ``step``: up in a line to ``peak`` over ``warmup`` steps, then down in a line to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * max(0.0, (total - step) / max(total - warmup, 1))


def step_decay(step: int, *, initial: float, every: int, factor: float = 0.1) -> float:
    """Return the rate at ``step``: ``initial``, times ``factor`` after each ``every`` steps."""
    return float(initial * factor ** (step // every))

"""Losses and their gradients; formulas are those of ``cnnmpi.functional``."""

from typing import Any

import torch
from torch import Tensor

from cnnmpi.common.arguments import (
    check_loss,
    check_range,
    check_smoothing,
    check_weights,
    mean_divisor,
)


def cross_entropy_loss(
    logits: Tensor, targets: Tensor, *, weight: Any = None, label_smoothing: float = 0.0, reduction: str = "mean"
) -> tuple[float, Tensor]:
    """Return the cross-entropy of ``logits`` (N, K) against ``targets`` and its gradient (N, K).

    ``targets`` are classes (N,) or probabilities (N, K). Options, formula and errors are those of
    ``cnnmpi.functional.cross_entropy_loss``. Waits for the device.
    """
    op = "cross_entropy_loss"
    targets = torch.as_tensor(targets, device=logits.device)
    is_classes = check_loss(op, logits, targets, reduction, classes=True)
    check_smoothing(op, label_smoothing)
    N, K = logits.shape
    mass: Any = 1  # sum_k w_k q'_k
    divisor: float = N
    if is_classes:
        targets = targets.long()
        check_range(op, "targets", targets, 0, K - 1)
        q = torch.full_like(logits, label_smoothing / K)
        q.scatter_(1, targets[:, None], 1 - label_smoothing + label_smoothing / K)
    else:
        check_range(op, "target probabilities", targets, least=0)
        q = targets.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / K
    if weight is not None:
        weight = torch.as_tensor(weight, dtype=logits.dtype, device=logits.device)
        check_weights(op, "weight", weight, K)
        q *= weight
        if is_classes and reduction == "mean":
            divisor = mean_divisor(op, weight[targets].sum(dtype=torch.float64).item())
    if weight is not None or not is_classes:
        mass = q.sum(1, keepdim=True)
    log_p = torch.log_softmax(logits, 1)
    return _reduced(-_times(q, log_p).sum(1), mass * log_p.exp() - q, divisor, reduction)


def binary_cross_entropy_loss(
    logits: Tensor, targets: Tensor, *, pos_weight: Any = None, reduction: str = "mean"
) -> tuple[float, Tensor]:
    """Return the binary cross-entropy of ``logits`` (N, K), for K labels that an image may have, and its gradient.

    ``targets`` are floats (N, K) in 0..1. Options, formula and errors are those of
    ``cnnmpi.functional.binary_cross_entropy_loss``. Waits for the device.
    """
    op = "binary_cross_entropy_loss"
    targets = torch.as_tensor(targets, device=logits.device)
    check_loss(op, logits, targets, reduction)
    check_range(op, "targets", targets, 0, 1)
    N, K = logits.shape
    positive = targets.to(logits.dtype)
    negative = 1 - positive
    if pos_weight is not None:
        pos_weight = torch.as_tensor(pos_weight, dtype=logits.dtype, device=logits.device)
        check_weights(op, "pos_weight", pos_weight, K)
        positive = positive * pos_weight
    log_sigmoid = torch.nn.functional.logsigmoid  # softplus(z) = -log_sigmoid(-z), but torch's is linear from 20 on
    losses = -_times(positive, log_sigmoid(logits)) - _times(negative, log_sigmoid(-logits))
    dlogits = ((positive + negative) * torch.sigmoid(logits) - positive) / K
    return _reduced(losses.mean(1, dtype=torch.float64), dlogits, N, reduction)


def mse_loss(outputs: Tensor, targets: Tensor, *, reduction: str = "mean") -> tuple[float, Tensor]:
    """Return the squared error of ``outputs`` (N, K) against ``targets`` (N, K) and its gradient (N, K).

    Formula and errors are those of ``cnnmpi.functional.mse_loss``. Waits for the device.
    """
    op = "mse_loss"
    targets = torch.as_tensor(targets, device=outputs.device)
    check_loss(op, outputs, targets, reduction)
    check_range(op, "targets", targets)
    N, K = outputs.shape
    difference = outputs - targets.to(outputs.dtype)
    return _reduced(difference.square().mean(1, dtype=torch.float64), difference * (2 / K), N, reduction)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Return a b, and 0 where a is, even if b is infinite."""
    return torch.where(a != 0, a * b, 0)


def _reduced(losses: Tensor, dlogits: Tensor, divisor: float, reduction: str) -> tuple[float, Tensor]:
    """Return the sum of the samples' ``losses`` with its gradient, both divided by ``divisor`` for "mean"."""
    loss = losses.sum(dtype=torch.float64).item()
    return (loss / divisor, dlogits / divisor) if reduction == "mean" else (loss, dlogits)

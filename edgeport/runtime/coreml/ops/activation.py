"""Activations (coremltools `activation.py`)."""

from __future__ import annotations

import torch
from torch.nn import functional

from edgeport.runtime.coreml.ops.arguments import Operators, Tensor, along, integer
from edgeport.runtime.coreml.ops.elementwise import unary


def clamped_relu(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """min(beta, x) where x >= 0, min(beta, alpha * x) elsewhere."""
    return torch.minimum(torch.where(x >= 0, x, alpha * x), beta)


def elu(x: Tensor, alpha: Tensor) -> Tensor:
    """x where x > 0, alpha * (exp(x) - 1) elsewhere."""
    return torch.where(x > 0, x, alpha * torch.expm1(x))


def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    """Gaussian error linear unit: EXACT (erf), TANH_APPROXIMATION or SIGMOID_APPROXIMATION."""
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return functional.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


def leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    """x where x >= 0, alpha * x elsewhere."""
    return torch.where(x >= 0, x, alpha * x)


def linear_activation(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """alpha * x + beta."""
    return alpha * x + beta


def prelu(x: Tensor, alpha: Tensor) -> Tensor:
    """x where x > 0, alpha[c] * x elsewhere, for channel c of axis 1."""
    return torch.where(x > 0, x, along(alpha, 1, x.ndim) * x)


def scaled_tanh(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """alpha * tanh(beta * x)."""
    return alpha * torch.tanh(beta * x)


def sigmoid_hard(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """min(max(alpha * x + beta, 0), 1)."""
    return torch.clamp(alpha * x + beta, 0, 1)


def softmax(x: Tensor, axis: Tensor | int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along an axis."""
    return torch.softmax(x, dim=integer(axis))


def softplus_parametric(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """alpha[c] * log(1 + exp(beta[c] * x)), for channel c of axis 1."""
    return along(alpha, 1, x.ndim) * functional.softplus(along(beta, 1, x.ndim) * x)


def thresholded_relu(x: Tensor, alpha: Tensor) -> Tensor:
    """x where x >= alpha, 0 elsewhere."""
    return torch.where(x >= alpha, x, 0.0)


OPERATORS: Operators = {
    "clamped_relu": clamped_relu,
    "elu": elu,
    "gelu": gelu,
    "leaky_relu": leaky_relu,
    "linear_activation": linear_activation,
    "prelu": prelu,
    "relu": unary(torch.relu),
    "relu6": unary(functional.relu6),
    "scaled_tanh": scaled_tanh,
    "sigmoid": unary(torch.sigmoid),
    "sigmoid_hard": sigmoid_hard,
    "silu": unary(functional.silu),
    "softmax": softmax,
    "softplus": unary(functional.softplus),
    "softplus_parametric": softplus_parametric,
    "softsign": unary(functional.softsign),
    "thresholded_relu": thresholded_relu,
}

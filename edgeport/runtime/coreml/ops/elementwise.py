"""Elementwise operators: arithmetic, comparison, logic, casts (coremltools `elementwise_unary/binary.py`)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgeport.runtime.coreml.ops.arguments import Operator, Operators, Tensor, along, integer


def unary(function: Callable[[Tensor], Tensor]) -> Operator:
    """An operator of one tensor `x` from a torch function."""
    return lambda x: function(x)


def binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """A broadcasting operator of `x` and `y` from a torch function."""
    return lambda x, y: function(x, y)


def cast(x: Tensor, dtype: str) -> Tensor:
    """Convert to `dtype`; floats to integers drop the fraction. Narrow types are applied by the interpreter."""
    if dtype == "bool":
        return x != 0
    if dtype in ("fp16", "fp32"):
        return x.to(torch.float32)
    return x.to(torch.int64)


def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """min(max(x, alpha), beta)."""
    # Bounds as numbers: with tensors torch takes a path for broadcasting, seven times as slow.
    return torch.clamp(x, alpha.to(x.dtype).item(), beta.to(x.dtype).item())


def threshold(x: Tensor, alpha: Tensor) -> Tensor:
    """max(x, alpha)."""
    return torch.clamp(x, min=alpha.item())


def inverse(x: Tensor, epsilon: Tensor | float = 1e-4) -> Tensor:
    """1 / (x + epsilon)."""
    return torch.reciprocal(x + epsilon)


def log(x: Tensor, epsilon: Tensor | float = 1e-45) -> Tensor:
    """Natural logarithm of x + epsilon."""
    return torch.log(x + epsilon)


def rsqrt(x: Tensor, epsilon: Tensor | float = 1e-12) -> Tensor:
    """1 / sqrt(x + epsilon)."""
    return torch.rsqrt(x + epsilon)


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where cond, b elsewhere."""
    return torch.where(cond, a, b)


def quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: Tensor | None = None,
) -> Tensor:
    """clip(round(input / scale) + zero_point) to int8 or uint8; per tensor, or per channel of `axis`."""
    low, high = (-128, 127) if output_dtype == "int8" else (0, 255)
    codes = torch.round(input / _per_axis(scale, axis, input.ndim))
    if zero_point is not None:
        codes = codes + _per_axis(zero_point, axis, input.ndim)
    return torch.clamp(codes, low, high)


def dequantize(input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: Tensor | None = None) -> Tensor:
    """scale * (input - zero_point)."""
    codes = input.to(torch.float32)
    if zero_point is not None:
        codes = codes - _per_axis(zero_point, axis, input.ndim)
    return codes * _per_axis(scale, axis, input.ndim)


def _per_axis(values: Tensor, axis: Tensor | None, rank: int) -> Tensor:
    values = values.to(torch.float32)
    return values if axis is None or values.ndim == 0 else along(values, integer(axis), rank)


OPERATORS: Operators = {
    "abs": unary(torch.abs),
    "acos": unary(torch.acos),
    "add": binary(torch.add),
    "asin": unary(torch.asin),
    "atan": unary(torch.atan),
    "atanh": unary(torch.atanh),
    "cast": cast,
    "ceil": unary(torch.ceil),
    "clip": clip,
    "cos": unary(torch.cos),
    "cosh": unary(torch.cosh),
    "dequantize": dequantize,
    "equal": binary(torch.eq),
    "erf": unary(torch.erf),
    "exp": unary(torch.exp),
    "exp2": unary(torch.exp2),
    "floor": unary(torch.floor),
    "floor_div": binary(torch.floor_divide),
    "greater": binary(torch.gt),
    "greater_equal": binary(torch.ge),
    "inverse": inverse,
    "less": binary(torch.lt),
    "less_equal": binary(torch.le),
    "log": log,
    "logical_and": binary(torch.logical_and),
    "logical_not": unary(torch.logical_not),
    "logical_or": binary(torch.logical_or),
    "logical_xor": binary(torch.logical_xor),
    "maximum": binary(torch.maximum),
    "minimum": binary(torch.minimum),
    "mod": binary(torch.remainder),
    "mul": binary(torch.mul),
    "not_equal": binary(torch.ne),
    "pow": binary(torch.pow),
    "quantize": quantize,
    "real_div": binary(torch.true_divide),
    "round": unary(torch.round),
    "rsqrt": rsqrt,
    "select": select,
    "sign": unary(torch.sign),
    "sin": unary(torch.sin),
    "sinh": unary(torch.sinh),
    "sqrt": unary(torch.sqrt),
    "square": unary(torch.square),
    "sub": binary(torch.sub),
    "tan": unary(torch.tan),
    "tanh": unary(torch.tanh),
    "threshold": threshold,
}

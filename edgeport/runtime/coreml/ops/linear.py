"""Matrix products and attention (coremltools iOS15 `linear.py`, iOS18 `transformers.py`)."""

from __future__ import annotations

import torch
from torch.nn import functional

from edgeport.runtime.coreml.ops.arguments import Operators, Tensor, flag


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: (..., in), (out, in), (out) -> (..., out)."""
    return functional.linear(x, weight, bias)


def matmul(x: Tensor, y: Tensor, transpose_x: Tensor | bool = False, transpose_y: Tensor | bool = False) -> Tensor:
    """Batched matrix product, broadcasting as numpy does; vectors are not transposed."""
    if flag(transpose_x) and x.ndim > 1:
        x = x.transpose(-1, -2)
    if flag(transpose_y) and y.ndim > 1:
        y = y.transpose(-1, -2)
    return torch.matmul(x, y)


def einsum(values: tuple[Tensor, Tensor], equation: str) -> Tensor:
    """Einstein summation of two tensors; axes of size 1 broadcast."""
    return torch.einsum(equation, *values)


def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(Q K^T / sqrt(E) + mask) V; (B, ..., L, E), (B, ..., S, E), (B, ..., S, EV) -> (B, ..., L, EV).

    The mask broadcasts to (B, ..., L, S); a boolean one is true where attention may look.
    """
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)


OPERATORS: Operators = {
    "einsum": einsum,
    "linear": linear,
    "matmul": matmul,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}

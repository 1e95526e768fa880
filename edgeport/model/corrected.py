"""A Linear layer with a low-rank side branch, which makes up for some of what compression took from its weight.

y = x W^T + b + (x A^T) B^T, with A (r, K) and B (N, r). The branch is two Linear layers without biases, so that every
stage that knows Linear layers knows it. W and b keep their names; A and B are `correction_down` and `correction_up`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

DOWN, UP = "correction_down", "correction_up"


class CorrectedLinear(torch.nn.Linear):
    """A Linear layer beside its correction."""

    def __init__(self, layer: torch.nn.Linear, rank: int) -> None:
        """Take over the weight and bias of `layer`; the branch begins as zeros."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.correction_down = _zeros(rank, layer.in_features)
        self.correction_up = _zeros(layer.out_features, rank)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # torch's name
        """(..., in_features) to (..., out_features)."""
        branch: torch.Tensor = self.correction_up(self.correction_down(input))
        return F.linear(input, self.weight, self.bias) + branch


def _zeros(rows: int, columns: int) -> torch.nn.Linear:
    layer = torch.nn.Linear(columns, rows, bias=False, device="meta").to_empty(device="cpu").requires_grad_(False)
    torch.nn.init.zeros_(layer.weight)
    return layer


def factor_names(weight: str) -> tuple[str, str]:
    """The parameters A and B of the layer with this weight."""
    layer = weight.removesuffix(".weight")
    return f"{layer}.{DOWN}.weight", f"{layer}.{UP}.weight"


def corrected_layer(factor: str) -> str | None:
    """The name of the layer that a parameter corrects; None for any other parameter."""
    layer, _, leaf = factor.removesuffix(".weight").rpartition(".")
    return layer if leaf in (DOWN, UP) and factor.endswith(".weight") else None


def add_corrections(module: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give a module the side branches that matrices of these names and shapes belong to, in place; others are left.

    Raises:
        TypeError, AttributeError: see `add_correction`.
    """
    for name, shape in shapes.items():
        layer = corrected_layer(name)
        if layer is not None and name == factor_names(layer)[0]:
            add_correction(module, layer, shape[0])


def add_correction(module: torch.nn.Module, layer: str, rank: int) -> CorrectedLinear:
    """Put a corrected layer in the place of a Linear one, in place. One that is corrected already stays.

    Raises:
        TypeError: the layer is not Linear.
        AttributeError: there is no such layer.
    """
    found = module.get_submodule(layer)
    if isinstance(found, CorrectedLinear):
        return found
    if not isinstance(found, torch.nn.Linear):
        raise TypeError(f"{layer} is {type(found).__name__}, not Linear")
    corrected = CorrectedLinear(found, rank)
    parent, _, leaf = layer.rpartition(".")
    setattr(module.get_submodule(parent), leaf, corrected)
    return corrected

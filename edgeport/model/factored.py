"""A Linear layer as the product of two thin ones: y = (x A^T) B^T + b, with A (r, K) and B (N, r).

Both are Linear layers, so that every stage that knows Linear layers knows them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

DOWN, UP = "factor_down", "factor_up"


class FactoredLinear(torch.nn.Module):
    """Two Linear layers in the place of one.

    Attributes:
        in_features, out_features: K and N, as of the layer that it stands for.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool) -> None:
        """Both matrices begin as zeros."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.factor_down = _zeros(in_features, rank, bias=False)
        self.factor_up = _zeros(rank, out_features, bias=bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # torch's name
        """(..., in_features) to (..., out_features)."""
        result: torch.Tensor = self.factor_up(self.factor_down(input))
        return result


def _zeros(columns: int, rows: int, *, bias: bool) -> torch.nn.Linear:
    layer = torch.nn.Linear(columns, rows, bias=bias, device="meta").to_empty(device="cpu").requires_grad_(False)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    return layer


def factored_layer(parameter: str) -> str | None:
    """The name of the layer that a parameter is the first factor of; None for any other parameter."""
    layer, _, leaf = parameter.removesuffix(".weight").rpartition(".")
    return layer if leaf == DOWN and parameter.endswith(".weight") else None


def add_factors(module: torch.nn.Module, ranks: Mapping[str, int]) -> None:
    """Put factored layers of these ranks in the place of Linear ones, in place; one that is factored already stays.

    Raises:
        TypeError: a layer is not Linear.
        AttributeError: there is no such layer.
    """
    for name, rank in ranks.items():
        layer = module.get_submodule(name)
        if isinstance(layer, FactoredLinear):
            continue
        if not isinstance(layer, torch.nn.Linear):
            raise TypeError(f"{name} is {type(layer).__name__}, not Linear")
        parent, _, leaf = name.rpartition(".")
        made = FactoredLinear(layer.in_features, layer.out_features, rank, bias=layer.bias is not None)
        setattr(module.get_submodule(parent), leaf, made)


def factor_ranks(module: torch.nn.Module) -> dict[str, int]:
    """The rank of every factored layer, by name."""
    found = ((name, layer) for name, layer in module.named_modules() if isinstance(layer, FactoredLinear))
    return {name: layer.factor_down.out_features for name, layer in found}

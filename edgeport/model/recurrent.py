"""An LSTM cell (Hochreiter & Schmidhuber 1997) as two linear layers, so that it is compressed and lowered like them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class Cell(nn.Module):
    """One step: gates = W x + U h + b, in torch.nn.LSTM's order input, forget, cell, output."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(features, 4 * width)
        self.hidden = nn.Linear(width, 4 * width, bias=False)

    def step(self, gates: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The next hidden state and cell, each (batch, width).

        Args:
            gates: `self.input(x)`, (batch, 4 * width): many steps' can be computed at once.
        """
        take, keep, value, give = (gates + self.hidden(hidden)).chunk(4, dim=-1)
        cell = keep.sigmoid() * cell + take.sigmoid() * value.tanh()
        return give.sigmoid() * cell.tanh(), cell

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        """All hidden states (batch, steps, width) of (batch, steps, features), from an empty state."""
        gates = self.input(steps)
        hidden = cell = gates.new_zeros(gates.shape[0], self.hidden.in_features)
        found = []
        for index in range(gates.shape[1]):
            hidden, cell = self.step(gates[:, index], hidden, cell)
            found.append(hidden)
        return torch.stack(found, dim=1)


def cell_state(state: Mapping[str, torch.Tensor], prefix: str, suffix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a Cell out of those of torch.nn.LSTM or LSTMCell, whose two biases are added.

    Raises:
        KeyError: a tensor is missing.
    """
    return {
        "input.weight": state[f"{prefix}weight_ih{suffix}"],
        "input.bias": state[f"{prefix}bias_ih{suffix}"] + state[f"{prefix}bias_hh{suffix}"],
        "hidden.weight": state[f"{prefix}weight_hh{suffix}"],
    }

"""XNNPACK knows the exact GELU only: the one by a tanh is written out before it gets there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgeport.export.executorch.repairs import written_gelu


class Gelu(nn.Module):
    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate=self.approximate)


@pytest.mark.parametrize(("approximate", "left"), [("tanh", 0), ("none", 1)])
def test_only_the_tanh_form_is_written_out(approximate: str, left: int) -> None:
    x = torch.linspace(-6, 6, 401)
    program = torch.export.export(Gelu(approximate), (x,))
    written_gelu(program)
    assert sum(node.target is torch.ops.aten.gelu.default for node in program.graph.nodes) == left
    torch.testing.assert_close(program.module()(x), F.gelu(x, approximate=approximate), atol=1e-6, rtol=0)
    # The two forms differ by more than that: the comparison can fail.
    assert (F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max() > 1e-4

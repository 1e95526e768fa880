"""Constants beyond float16, and which operations keep float32."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from edgeport.export.coreml.float16 import LEAST_NORMAL, MASK, takes_float16, tame_constants

LEAST = torch.finfo(torch.float32).min


class Masked(nn.Module):
    """Scores with masks of three kinds, and a guarded division."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, LEAST, 1.0]))

    def forward(self, x, keep):
        scores = torch.where(keep, x, torch.full_like(x, LEAST)) + self.mask
        scores = scores.masked_fill(~keep, float("-inf"))
        return scores, x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12), x.clamp(min=-1.0, max=0.5)


def test_constants_are_brought_into_float16():
    module = Masked()
    inputs = (torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[True, True, False]]))
    program = torch.export.export(module, inputs)
    expected = module(*inputs)
    assert tame_constants(program) == 3  # full_like, the buffer, the guard; not -inf, nor an ordinary clamp
    scores, quotient, clamped = program.module()(*inputs)
    assert torch.equal(scores, torch.tensor([[1.0, 2.0 - MASK, float("-inf")]]))
    assert torch.equal(quotient, expected[1])
    assert torch.equal(clamped, expected[2])
    guard = program.module()(torch.zeros(1, 3), inputs[1])[1]
    assert torch.equal(guard, torch.zeros(1, 3))
    literals = [a for node in program.graph.nodes for a in node.args if isinstance(a, float)]
    assert LEAST_NORMAL in literals
    assert 1e-12 not in literals
    assert LEAST not in literals
    # The module that it came from keeps its own.
    assert float(module.mask[1]) == LEAST


def chain(*types: str) -> SimpleNamespace:
    """Operations that feed each other in this order; the first is returned."""
    readers: list[SimpleNamespace] = []
    for kind in reversed(types):
        name, _, dtype = kind.partition(":")
        output = SimpleNamespace(child_ops=readers)
        readers = [SimpleNamespace(op_type=name, outputs=[output], dtype=SimpleNamespace(val=dtype))]
    return readers[0]


@pytest.mark.parametrize(
    ("types", "half"),
    [
        (("matmul", "transpose", "concat", "cos", "mul"), False),
        (("log", "real_div", "mul", "cast:int32", "gather"), False),
        (("sin", "mul"), False),
        (("floor",), False),
        (("mul", "cast:bool"), True),
        (("mul", "linear", "cos"), True),
        (("linear", "cos"), True),
        (("cos_like", "add"), True),
    ],
)
def test_positions_and_angles_keep_float32(types, half):
    assert takes_float16(chain(*types)) is half

"""RMSNorm in a form that float16 survives: the same numbers as the module's own, found by behaviour."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from edgeport.export.coreml.norms import rms_norm, safe_form, safe_norms

SIZE = 24


def with_random_weight(norm: nn.Module) -> nn.Module:
    with torch.no_grad():
        norm.weight.copy_(torch.randn(SIZE, generator=torch.Generator().manual_seed(3)))
    return norm


class Centred(nn.Module):
    """Called as an RMSNorm is, but subtracts the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(SIZE)), 1e-6

    def forward(self, x):
        return nn.functional.layer_norm(x, (SIZE,), self.weight, None, self.variance_epsilon)


class OtherEpsilon(LlamaRMSNorm):
    """An RMSNorm in name, whose epsilon is ten times what it says."""

    def forward(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + 10 * self.variance_epsilon)


class Gated(LlamaRMSNorm):
    """Takes a second tensor: no plain RMSNorm."""

    def forward(self, hidden_states, gate=None):
        out = super().forward(hidden_states)
        return out if gate is None else out * gate


NORMS = [
    LlamaRMSNorm(SIZE, eps=1e-5),
    Qwen3RMSNorm(SIZE, eps=1e-6),
    GemmaRMSNorm(SIZE, eps=1e-6),
    T5LayerNorm(SIZE, eps=1e-6),
    nn.RMSNorm(SIZE),
    nn.RMSNorm(SIZE, eps=1e-5),
]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
def test_same_numbers_as_the_module(norm, magnitude):
    norm = with_random_weight(norm)
    form = safe_form(norm)
    assert form is not None
    x = magnitude * torch.randn(2, 5, SIZE, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(form(x), norm(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "module", [Centred(), OtherEpsilon(SIZE, eps=1e-3), Gated(SIZE), nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE)]
)
def test_what_behaves_otherwise_is_left_alone(module):
    assert safe_form(module) is None


def test_no_value_on_the_way_leaves_float16():
    # The formula of the paper in float16: the mean of squares is infinite from 256 on.
    x = torch.full((1, SIZE), 500.0, dtype=torch.float16)
    assert torch.isinf((x * x).mean())
    torch.testing.assert_close(rms_norm(x, None, 1e-5), torch.ones(1, SIZE, dtype=torch.float16), rtol=1e-3, atol=0)


def test_replaced_only_for_a_while():
    model = nn.Sequential(nn.Linear(SIZE, SIZE), with_random_weight(LlamaRMSNorm(SIZE)))
    x = torch.randn(3, SIZE)
    before = model(x)
    with safe_norms(model) as names:
        assert names == ["1"]
        assert "forward" in vars(model[1])
        torch.testing.assert_close(model(x), before)
    assert "forward" not in vars(model[1])
    assert torch.equal(model(x), before)

"""A decoder's parts in forms that XNNPACK takes whole: the same numbers as the forms they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgeport.export.executorch.fewer_delegates import (
    averaging_row,
    half_turn,
    means_as_products,
    rotate,
    turns_halves,
)
from edgeport.model.types import AttentionLayer


@pytest.mark.parametrize(("width", "head"), [(16, 16), (8, 16), (64, 64)])
def test_rotation_is_llamas(width: int, head: int) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, heads, 5, head, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(1, 5, width // 2, generator=generator).repeat(1, 1, 2) for _ in range(2))
    expected = apply_rotary_pos_emb(query[..., :width], key[..., :width], cos, sin)
    for x, turned in zip((query, key), expected, strict=True):
        got = rotate(x, cos.unsqueeze(2), sin.unsqueeze(2), half_turn(width))
        torch.testing.assert_close(got[..., :width], turned, atol=1e-6, rtol=1e-6)
        assert torch.equal(got[..., width:], x[..., width:])


def test_other_rotations_are_told_apart() -> None:
    """Cohere rotates neighbours, not halves."""
    from transformers import CohereConfig, CohereForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    layer = AttentionLayer(heads=2, kv_heads=1, head_dim=16, scale=0.25)
    assert turns_halves(LlamaForCausalLM(LlamaConfig(**sizes)), layer, 16)
    assert not turns_halves(CohereForCausalLM(CohereConfig(**sizes, pad_token_id=0)), layer, 16)


def test_means_become_products_of_known_widths_only() -> None:
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(2))
    asked = nn.functional.linear

    class Seen(torch.overrides.TorchFunctionMode):
        products = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            Seen.products += func is asked
            return func(*args, **(kwargs or {}))

    expected = [x.mean(-1, keepdim=True), x.mean(1, keepdim=True), x.mean(-1), x.mean()]
    with means_as_products({24: averaging_row(24)}), Seen():
        got = [x.mean(-1, keepdim=True), x.mean(1, keepdim=True), x.mean(-1), x.mean()]
    assert Seen.products == 1
    for value, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(value, reference, atol=1e-6, rtol=1e-6)
    assert torch.equal(x.mean(-1, keepdim=True), expected[0])

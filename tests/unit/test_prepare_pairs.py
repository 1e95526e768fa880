"""Pairs are found in every family and fold without a change of the function; what can't be folded is not found."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    ViTConfig,
    ViTForImageClassification,
)

from edgeport.compress.prepare.fold import mix_heads, scale_pair
from edgeport.compress.prepare.graph import read_graph
from edgeport.compress.prepare.hadamard import randomised
from edgeport.errors import BadInputError

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER = {
    **SHAPE,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {"norm": 5, "linear": 2, "heads": 2}  # with a head of its own: 2 norms a layer and the final one
TIED = {**GATED, "norm": 4}
DECODERS = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}, GATED),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}, TIED),
    "mistral": (MistralConfig, {"tie_word_embeddings": False}, GATED),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": False}, GATED),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True}, TIED),
    "gemma": (GemmaConfig, {}, TIED),
    "gemma2": (Gemma2Config, {}, TIED),
    "phi": (PhiConfig, {}, {"norm": 3, "linear": 0, "heads": 2}),
    "phi3": (Phi3Config, {"tie_word_embeddings": False}, GATED),
    "gpt-neox": (GPTNeoXConfig, {"tie_word_embeddings": False}, {"norm": 5, "linear": 0, "heads": 0}),
    "opt": (OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": 32}, TIED),
    "gpt2": (GPT2Config, {"n_positions": 64}, {"norm": 0, "linear": 0, "heads": 0}),
}


def with_random_norms(module: nn.Module) -> nn.Module:
    """Hugging Face initialises norms to 1 and biases to 0, which would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def tokens() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {"input_ids": torch.randint(3, 64, (2, 12), generator=generator)}


def decoder(name: str) -> nn.Module:
    torch.manual_seed(0)
    config, extra, _ = DECODERS[name]
    return with_random_norms(AutoModelForCausalLM.from_config(config(**DECODER, **extra)))


def family(name: str) -> tuple[nn.Module, dict[str, torch.Tensor], dict[str, int]]:
    torch.manual_seed(0)
    if name == "bert":
        return with_random_norms(BertModel(BertConfig(**SHAPE))), tokens(), {"norm": 0, "linear": 0, "heads": 2}
    if name == "vit":
        vit = ViTForImageClassification(ViTConfig(**SHAPE, image_size=16, patch_size=8))
        return with_random_norms(vit), {"pixel_values": torch.randn(2, 3, 16, 16)}, {**GATED, "linear": 0}
    return decoder(name), tokens(), DECODERS[name][2]


def first_output(module: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return module(**inputs)[0]


def change(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max())


FAMILIES = [*DECODERS, "bert", "vit"]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_has_the_pairs_it_should(name):
    module, inputs, expected = family(name)
    kinds = [pair.kind for pair in read_graph(module, inputs).pairs]
    assert {kind: kinds.count(kind) for kind in ("norm", "linear", "heads")} == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_random_factors_across_all_pairs_keeps_the_function(name):
    module, inputs, expected = family(name)
    before = first_output(module, inputs)
    pairs = read_graph(module, inputs).pairs
    folded = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(3)
    for pair in pairs:
        scale_pair(folded, pair, torch.exp(torch.empty(pair.channels).uniform_(-2, 2, generator=generator)))
        if pair.kind == "heads":
            mix_heads(folded, pair, randomised(pair.head_dim, seed=5))
    assert change(before, first_output(folded, inputs)) < 5e-6
    # Other tokens than those that the pairs were proven on.
    other = {name: value.flip(-1) for name, value in inputs.items()}
    assert change(first_output(module, other), first_output(folded, other)) < 5e-6
    changed = {n for n, p in module.named_parameters() if not torch.equal(p, folded.get_parameter(n))}
    named = {name for pair in pairs for name in (pair.weight, pair.bias, *pair.consumers) if name is not None}
    assert changed == named
    assert bool(changed) == any(expected.values())


@pytest.mark.parametrize("name", ["llama", "gemma", "phi3", "vit"])
def test_half_a_fold_changes_the_function(name):
    """The invariant above could not fail if the pairs did not matter for the output."""
    module, inputs, _ = family(name)
    before = first_output(module, inputs)
    for pair in read_graph(module, inputs).pairs:
        broken = copy.deepcopy(module)
        scale_pair(broken, pair, torch.linspace(0.5, 2, pair.channels))
        for consumer in pair.consumers:
            broken.get_parameter(consumer).data = module.get_parameter(consumer).data
        assert change(before, first_output(broken, inputs)) > 1e-4, pair


def test_grouped_queries_share_the_channels_of_their_values():
    module, inputs, _ = family("llama")
    pair = next(pair for pair in read_graph(module, inputs).pairs if pair.kind == "heads")
    assert (pair.channels, pair.repeats, pair.head_dim) == (16, 2, 8)
    # Query heads 0 and 1 read value head 0 (channels 0-7), heads 2 and 3 read value head 1.
    assert pair.columns.tolist() == [*range(8), *range(8), *range(8, 16), *range(8, 16)]


def test_fused_projections_give_only_their_linear_part():
    module, inputs, _ = family("phi3")
    pairs = {pair.weight: pair for pair in read_graph(module, inputs).pairs if pair.kind != "norm"}
    assert pairs["model.layers.0.self_attn.qkv_proj.weight"].rows == (48, 64)  # q 32, k 16, then v 16
    assert pairs["model.layers.0.mlp.gate_up_proj.weight"].rows == (48, 96)  # gate, then up


def test_one_added_to_a_norms_weight_is_seen():
    module, inputs, _ = family("gemma")
    assert {pair.offset for pair in read_graph(module, inputs).pairs if pair.kind == "norm"} == {1.0}


class Odd(nn.Module):
    """No attribute has a usual name; the norm's output is also returned."""

    def __init__(self, returns_norm: bool) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(6, 10)
        self.returns_norm = returns_norm

    def forward(self, x):
        h = self.a(x)
        y = self.c(self.b(h) * torch.sigmoid(self.d(h)))
        return {"y": y, "h": h} if self.returns_norm else {"y": y}


def test_an_unknown_architecture_is_read_by_what_it_computes():
    inputs = {"x": torch.randn(3, 6, generator=torch.Generator().manual_seed(0))}
    torch.manual_seed(0)
    pairs = read_graph(Odd(returns_norm=False), inputs).pairs
    assert [(pair.kind, pair.weight, pair.consumers) for pair in pairs] == [
        ("norm", "a.weight", ("b.weight", "d.weight")),
        ("linear", "b.weight", ("c.weight",)),
    ]
    torch.manual_seed(0)
    assert [pair.weight for pair in read_graph(Odd(returns_norm=True), inputs).pairs] == ["b.weight"]
    torch.manual_seed(0)
    kept = read_graph(Odd(returns_norm=True), inputs, ("y",)).pairs
    assert [pair.weight for pair in kept] == ["a.weight", "b.weight"]


def test_an_output_that_is_not_there_is_refused():
    inputs = {"x": torch.zeros(3, 6)}
    with pytest.raises(BadInputError, match="no such output") as caught:
        read_graph(Odd(returns_norm=False), inputs, ("logits",))
    assert "logits" in str(caught.value)


def test_reading_changes_nothing():
    module, inputs, _ = family("llama")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    read_graph(module, inputs)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(value.dtype == before[name].dtype for name, value in module.state_dict().items())


@pytest.mark.parametrize("scale", [torch.ones(3), torch.zeros(32), torch.full((32,), float("nan"))])
def test_a_scale_that_can_not_be_folded_is_refused(scale):
    module, inputs, _ = family("llama")
    pair = next(pair for pair in read_graph(module, inputs).pairs if pair.channels == 32)
    with pytest.raises(BadInputError, match="can't be folded") as caught:
        scale_pair(module, pair, scale)
    assert "32 finite factors" in str(caught.value)

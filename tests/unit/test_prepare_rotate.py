"""Rotation keeps the function, leaves norms with weight 1, spreads outliers, and refuses what it can't do."""

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
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    ViTConfig,
    ViTForImageClassification,
)

from edgeport.compress.prepare.graph import read_graph
from edgeport.compress.prepare.hadamard import flat_orthogonal, mean_preserving, randomised
from edgeport.compress.prepare.rotate import residual_stream, rotate, rotate_heads, tied_heads
from edgeport.compress.quantize.grid import Grid
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.errors import BadInputError
from edgeport.quantized import dequantize

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 48,  # 16 * 3: no power of two
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER = {
    **SHAPE,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROTATED = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True}),
    "gemma": (GemmaConfig, {}),
    "phi": (PhiConfig, {"tie_word_embeddings": False}),
    "phi3": (Phi3Config, {"tie_word_embeddings": False}),
    "opt": (OPTConfig, {"ffn_dim": 40, "word_embed_proj_dim": 48}),
}


def with_random_norms(module: nn.Module) -> nn.Module:
    """Hugging Face initialises norms to 1 and biases to 0, which would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(2))}


def family(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    if name == "vit":
        vit = ViTForImageClassification(ViTConfig(**SHAPE, image_size=16, patch_size=8))
        for parameter in (vit.vit.embeddings.cls_token, vit.vit.embeddings.position_embeddings):
            parameter.data.normal_()
        return with_random_norms(vit), {"pixel_values": torch.randn(2, 3, 16, 16)}
    config, extra = ROTATED[name]
    return with_random_norms(AutoModelForCausalLM.from_config(config(**DECODER, **extra))), tokens()


def first_output(module: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return module(**inputs)[0]


def change(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).detach().abs().max() / before.detach().abs().max())


def kurtosis(weight: torch.Tensor) -> float:
    """Mean over the rows; 3 for a normal distribution; the greater, the heavier the tails."""
    centred = weight - weight.mean(1, keepdim=True)
    return float((centred.pow(4).mean(1) / centred.pow(2).mean(1).square()).mean())


@pytest.mark.parametrize("name", [*ROTATED, "vit"])
def test_rotation_keeps_the_function(name):
    module, inputs = family(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    rotated = rotate(module, inputs, untie=True)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    other = {key: value.flip(-1) for key, value in inputs.items()}
    for batch in (inputs, other):
        assert change(first_output(module, batch), first_output(rotated, batch)) < 5e-6
    embedding = next(p for p in module.parameters() if p.dim() >= 2)
    assert (
        change(embedding, rotated.get_parameter(next(n for n, p in module.named_parameters() if p is embedding))) > 0.1
    )


@pytest.mark.parametrize("name", [*ROTATED, "vit"])
def test_norms_on_the_stream_multiply_by_one_afterwards(name):
    module, inputs = family(name)
    rotated = rotate(module, inputs, untie=True)
    graph = read_graph(rotated, inputs)
    stream = residual_stream(rotated, graph)
    assert len(stream.norms) == (3 if name == "phi" else 5)  # two a layer (Phi: one) and the final one
    for pair in stream.norms:
        gain = rotated.get_parameter(pair.weight) + pair.offset
        assert torch.equal(gain, torch.ones_like(gain))
        if pair.bias is not None:
            assert not rotated.get_parameter(pair.bias).any()


def test_norms_of_queries_and_keys_stay():
    module, inputs = family("qwen3")
    rotated = rotate(module, inputs, untie=True)
    names = [name for name, _ in module.named_parameters() if "q_norm" in name or "k_norm" in name]
    assert len(names) == 4
    assert all(torch.equal(module.get_parameter(name), rotated.get_parameter(name)) for name in names)


def test_a_tied_head_is_refused_unless_it_may_be_untied(tmp_path):
    module, inputs = family("llama-tied")
    with pytest.raises(BadInputError, match=r"shares the embedding's weight.* 3,072 more weights") as caught:
        rotate(module, inputs)
    assert "untie" in str(caught.value)
    rotated = rotate(module, inputs, untie=True)
    assert list(tied_heads(module)) == ["lm_head"]
    assert not tied_heads(rotated)
    assert module.config.tie_word_embeddings is True
    rotated.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(first_output(loaded, inputs), first_output(rotated, inputs))


def test_the_seed_decides():
    module, inputs = family("llama")
    first, again, other = (rotate(module, inputs, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in first.named_parameters())
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_planted_outlier_channels_are_spread_and_round_better(name):
    module, inputs = family(name)
    with torch.no_grad():
        for layer in module.model.layers:
            layer.self_attn.q_proj.weight[:, [5, 17]] *= 20
    rotated = rotate(module, inputs)
    for layer in range(2):
        weight = f"model.layers.{layer}.self_attn.q_proj.weight"
        planted, spread = module.get_parameter(weight).detach(), rotated.get_parameter(weight).detach()
        assert kurtosis(planted) > 10
        assert kurtosis(spread) < 4
        errors = [float((dequantize(quantize_rtn(w, Grid(4))) - w).norm() / w.norm()) for w in (planted, spread)]
        assert errors[1] < 0.9 * errors[0]


REFUSED = {
    "gpt2": (lambda: AutoModelForCausalLM.from_config(GPT2Config(**DECODER)), "a Conv1D writes"),
    "gemma2": (lambda: AutoModelForCausalLM.from_config(Gemma2Config(**DECODER)), "a normalisation writes"),
    "bert": (lambda: BertModel(BertConfig(**SHAPE)), "feeds more than Linears"),
    "llama without a head": (lambda: LlamaModel(LlamaConfig(**DECODER)), "feeds more than Linears"),
    "no norm": (lambda: NoNorm(), "no normalisation"),
}


class NoNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(64, 8), nn.Linear(8, 8)

    def forward(self, input_ids):
        return self.linear(self.embedding(input_ids))


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_rotated_is_refused_with_the_reason(name):
    make, reason = REFUSED[name]
    torch.manual_seed(0)
    with pytest.raises(BadInputError, match=f"can't be rotated: .*{reason}"):
        rotate(with_random_norms(make()), tokens(), untie=True)


class Gated(nn.Module):
    """What is added to the stream is not linear in the layer that seems to write it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(64, 8), nn.LayerNorm(8)
        self.up, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        return self.head(self.norm(x + torch.tanh(self.up(x))))


def test_a_stream_that_does_not_rotate_is_refused_by_the_proof():
    torch.manual_seed(0)
    with pytest.raises(BadInputError, match="its outputs would change by"):
        rotate(Gated().eval(), tokens())


def test_heads_of_a_post_norm_network_rotate():
    torch.manual_seed(0)
    module = with_random_norms(BertModel(BertConfig(**SHAPE)))
    rotated = copy.deepcopy(module)
    rotate_heads(rotated, read_graph(module, tokens()).pairs)
    assert change(first_output(module, tokens()), first_output(rotated, tokens())) < 5e-6
    value = "encoder.layer.1.attention.self.value.weight"
    assert change(module.get_parameter(value), rotated.get_parameter(value)) > 0.1


@pytest.mark.parametrize("size", [1, 2, 3, 8, 12, 48, 64, 576, 770])
def test_matrices_are_orthogonal_flat_and_keep_the_mean(size):
    identity = torch.eye(size, dtype=torch.float64)
    for matrix in (flat_orthogonal(size), randomised(size, 1), mean_preserving(size, 1)):
        torch.testing.assert_close(matrix @ matrix.T, identity, atol=1e-12, rtol=0)
    for matrix in (flat_orthogonal(size), randomised(size, 1)):
        assert float(matrix.abs().max()) <= (2 / size) ** 0.5 + 1e-12
    ones = torch.ones(size, dtype=torch.float64)
    torch.testing.assert_close(mean_preserving(size, 1) @ ones, ones, atol=1e-9, rtol=0)


def test_a_power_of_two_gives_the_hadamard_matrix():
    expected = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64) / 2
    torch.testing.assert_close(flat_orthogonal(4), expected)

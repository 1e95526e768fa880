"""Predicted cost of a changed weight, against the divergence that the changed model really has."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig

from edgeport.compress.chain import call
from edgeport.compress.sensitivity import measure_sensitivity


def samples(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, 48, (1, 12), generator=generator)} for _ in range(count)]


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def changed(module: nn.Module, name: str, change: torch.Tensor) -> nn.Module:
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.get_submodule(name).weight += change
    return other


def divergence(module: nn.Module, other: nn.Module, inputs: list[dict[str, torch.Tensor]]) -> float:
    """Mean KL(module || other) over tokens, nats."""
    total = 0.0
    with torch.no_grad():
        for sample in inputs:
            one, two = (call(m, sample).logits.double().log_softmax(-1) for m in (module, other))
            total += float((one.exp() * (one - two)).sum(-1).mean())
    return total / len(inputs)


NAMES = [
    "model.layers.0.self_attn.v_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.self_attn.o_proj",
    "model.layers.1.mlp.up_proj",
    "lm_head",
    "model.embed_tokens",
]


@pytest.mark.parametrize("name", NAMES)
def test_predicts_the_divergence_of_a_language_model(name):
    module, inputs = llama(), samples(96)
    layers = {name: module.get_submodule(name) for name in NAMES}
    # The labels are drawn: many draws, so that the test is about the formula.
    found = measure_sensitivity(module, layers, inputs * 4, ("logits",))[name]
    generator = torch.Generator().manual_seed(7)
    change = 0.004 * torch.randn(layers[name].weight.shape, generator=generator)
    measured = divergence(module, changed(module, name, change), inputs)
    # Inputs and gradients are not quite independent, nor channels uncorrelated: the order of magnitude counts.
    assert found.cost(change) == pytest.approx(measured, rel=0.5)


def test_orders_layers_as_the_divergence_does():
    module, inputs = llama(), samples(32)
    layers = {name: module.get_submodule(name) for name in NAMES}
    sensitivity = measure_sensitivity(module, layers, inputs * 4, ("logits",))
    generator = torch.Generator().manual_seed(8)
    pairs = []
    for name, layer in layers.items():
        change = 0.01 * torch.randn(layer.weight.shape, generator=generator)
        pairs.append((sensitivity[name].cost(change), divergence(module, changed(module, name, change), inputs)))
    predicted, measured = (torch.tensor(values).log() for values in zip(*pairs, strict=True))
    assert float(torch.corrcoef(torch.stack([predicted, measured]))[0, 1]) > 0.8


def test_predicts_the_relative_error_of_an_encoder():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    module, inputs = AutoModel.from_config(config, add_pooling_layer=False).eval(), samples(32)
    name = "encoder.layer.0.output.dense"
    layers = {name: module.get_submodule(name)}
    found = measure_sensitivity(module, layers, inputs * 8, ("last_hidden_state",))[name]
    change = 0.01 * torch.randn(layers[name].weight.shape, generator=torch.Generator().manual_seed(9))
    other, measured = changed(module, name, change), 0.0
    with torch.no_grad():
        for sample in inputs:
            one, two = call(module, sample).last_hidden_state, call(other, sample).last_hidden_state
            measured += float((two - one).square().sum() / one.square().sum()) / len(inputs)
    assert found.cost(change) == pytest.approx(measured / 2, rel=0.5)


def test_the_module_is_left_as_it_was():
    module = llama()
    module.lm_head.weight.requires_grad_(False)
    before = [(parameter.requires_grad, parameter.clone()) for parameter in module.parameters()]
    layers = {"lm_head": module.lm_head}
    measure_sensitivity(module, layers, samples(2), ("logits",))
    assert not module.lm_head._forward_hooks
    assert not module.lm_head._forward_pre_hooks
    for (needed, value), parameter in zip(before, module.parameters(), strict=True):
        assert parameter.requires_grad == needed
        assert torch.equal(parameter, value)
        assert parameter.grad is None

"""Predicted cost of a changed weight, against the divergence that the changed model really has."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig

from edgeport.compress.chain import call
from edgeport.compress.sensitivity import measure_sensitivity, weight_gradient
from edgeport.errors import BadInputError


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
            one, two = (call(m, sample)["logits"].double().log_softmax(-1) for m in (module, other))
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
CHANGES = 6


def changes(layer: nn.Module, size: float) -> list[torch.Tensor]:
    """Several, because the cost is an expectation over rounding errors."""
    generator = torch.Generator().manual_seed(7)
    return [size * torch.randn(layer.weight.shape, generator=generator) for _ in range(CHANGES)]


@pytest.mark.parametrize("name", NAMES)
def test_predicts_the_divergence_of_a_language_model(name):
    module, inputs = llama(), samples(48)
    layers = {name: module.get_submodule(name)}
    # The labels are drawn: many draws, so that the test is about the formula.
    found = measure_sensitivity(module, layers, inputs * 4, ("logits",))[name]
    tried = changes(layers[name], 0.004)
    measured = sum(divergence(module, changed(module, name, change), inputs) for change in tried)
    assert sum(map(found.cost, tried)) == pytest.approx(measured, rel=0.3)


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


def relative_error(module: nn.Module, other: nn.Module, inputs: list[dict[str, torch.Tensor]]) -> float:
    """Mean squared error of the hidden states over their energy, halved."""
    total = 0.0
    with torch.no_grad():
        for sample in inputs:
            one, two = call(module, sample).last_hidden_state, call(other, sample).last_hidden_state
            total += float((two - one).square().sum() / one.square().sum())
    return total / len(inputs) / 2


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    return AutoModel.from_config(config, add_pooling_layer=False).eval()


@pytest.mark.parametrize(
    "name",
    [
        "encoder.layer.0.attention.self.value",
        "encoder.layer.0.intermediate.dense",
        "encoder.layer.0.output.dense",
        "encoder.layer.1.output.dense",
    ],
)
def test_predicts_the_relative_error_of_an_encoder(name):
    module, inputs = bert(), samples(32)
    layers = {name: module.get_submodule(name)}
    found = measure_sensitivity(module, layers, inputs * 8, ("last_hidden_state",))[name]
    tried = changes(layers[name], 0.01)
    measured = sum(relative_error(module, changed(module, name, change), inputs) for change in tried)
    assert sum(map(found.cost, tried)) == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Conv1d(6, 4, 3, padding=1),
        nn.Conv1d(6, 4, 3, padding="same", padding_mode="reflect"),
        nn.Conv2d(6, 4, (3, 2), stride=2, dilation=(1, 2)),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.Conv2d(6, 4, 3, padding="same", groups=2),
    ],
    ids=str,
)
def test_the_gradient_of_a_weight_is_autograds(layer):
    torch.manual_seed(1)
    value = {nn.Linear: torch.randn(1, 5, 6), nn.Conv1d: torch.randn(1, 6, 9), nn.Conv2d: torch.randn(1, 6, 9, 8)}
    output = layer(value[type(layer)])
    gradient = torch.randn(output.shape)
    (wanted,) = torch.autograd.grad(output, layer.weight, gradient)
    torch.testing.assert_close(weight_gradient(layer, value[type(layer)], gradient), wanted.flatten(1))


class Sink(nn.Module):
    """A layer whose input is a thousand times larger at the first position, which the output hardly reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(48, 16)
        self.middle = nn.Linear(16, 16)
        self.head = nn.Linear(16, 48)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        size = torch.ones(input_ids.shape[1], 1)
        size[0] = 1000.0
        return {"logits": self.head(self.middle(self.table(input_ids) * size) / size.square())}


def test_a_massive_activation_counts_for_what_depends_on_it():
    module, inputs = Sink().eval(), samples(64)
    found = measure_sensitivity(module, {"middle": module.middle}, inputs * 4, ("logits",))["middle"]
    change = 0.01 * torch.randn(16, 16, generator=torch.Generator().manual_seed(7))
    measured = divergence(module, changed(module, "middle", change), inputs)
    assert found.cost(change) == pytest.approx(measured, rel=0.25)


class Marked(nn.Module):
    """A model that answers some times over where the first token is the mark, as `factor` says, and once elsewhere."""

    def __init__(self, inner: nn.Module, factor: float, elsewhere: float) -> None:
        super().__init__()
        self.inner, self.factor, self.elsewhere = inner, factor, elsewhere

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        factor = self.factor if int(input_ids[0, 0]) == 0 else self.elsewhere
        return {"logits": factor * self.inner(input_ids)["logits"]}


def marked(inputs: list[dict[str, torch.Tensor]], count: int) -> list[dict[str, torch.Tensor]]:
    """The inputs, of which so many begin with the mark."""
    rows = [sample["input_ids"].clone().clamp_min(1) for sample in inputs]
    for row in rows[:count]:
        row[0, 0] = 0
    return [{"input_ids": row} for row in rows]


def test_one_sample_of_exploding_gradients_does_not_decide():
    """Its divergence would saturate, as no sample's does much: what it promises is capped."""
    module, inputs = Sink().eval(), marked(samples(16), 1)
    layers = {"inner.middle": module.middle}
    plain, skewed = (
        measure_sensitivity(Marked(module, factor, 1.0), layers, inputs, ("logits",))["inner.middle"].fisher.sum()
        for factor in (1.0, 30.0)
    )
    assert float(plain) < float(skewed) < 1.5 * float(plain)


def test_a_layer_that_most_samples_do_not_reach_counts_for_those_that_do():
    module, inputs = Sink().eval(), marked(samples(8), 2)
    layers = {"inner.middle": module.middle}
    whole = measure_sensitivity(Marked(module, 1.0, 1.0), layers, inputs[:2], ("logits",))["inner.middle"]
    some = measure_sensitivity(Marked(module, 1.0, 0.0), layers, inputs, ("logits",))["inner.middle"]
    torch.testing.assert_close(some.fisher, whole.fisher / 4)


def test_activations_that_are_not_finite_are_refused_by_the_layers_name():
    module = llama()
    with torch.no_grad():
        module.model.layers[0].mlp.up_proj.weight.fill_(float("inf"))
    layers = {name: module.get_submodule(name) for name in NAMES}
    with pytest.raises(BadInputError, match="not finite") as caught:
        measure_sensitivity(module, layers, samples(1), ("logits",))
    assert "model.layers.0.mlp.down_proj" in str(caught.value.where)


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

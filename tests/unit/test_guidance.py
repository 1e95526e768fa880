"""Weights of positions: against gradients taken one by one, and for what they are there to do."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from edgeport.compress.assign import Assignment
from edgeport.compress.guidance import POSITIONS, SAMPLES, STRENGTH, Guidance, measure_guidance, strength_for
from edgeport.compress.journal import Note
from edgeport.compress.quantize.gptq import quantize_gptq
from edgeport.compress.sequential import quantize_in_sequence
from edgeport.formats import WeightFormat
from edgeport.quantized import dequantize


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def samples(count: int, length: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, 48, (1, length), generator=generator)} for _ in range(count)]


def test_a_position_counts_by_the_squared_gradient_of_the_layers_output():
    module, inputs = llama(), samples(SAMPLES + 1, length=4)
    name = "model.layers.0.mlp.down_proj"
    layer = module.get_submodule(name)
    guidance = measure_guidance(module, {name: layer}, inputs, ("logits",), seed=5)
    generator = torch.Generator().manual_seed(5)
    strength = guidance.strength[name]
    assert 0 < strength < STRENGTH
    weights = []
    for index, sample in enumerate(inputs):
        kept: list[torch.Tensor] = []
        handle = layer.register_forward_hook(lambda _layer, _inputs, output, kept=kept: kept.append(output))
        logs = module(**sample).logits[0].log_softmax(-1)
        handle.remove()
        labels = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        (gradient,) = torch.autograd.grad(logs.gather(1, labels).sum(), kept[0])
        energy = gradient[0].square().sum(-1)
        found = guidance.of(name, index, 4)
        assert found is not None
        torch.testing.assert_close(found, 1 - strength + strength * energy / energy.mean())
        assert float(found.mean()) == pytest.approx(1, abs=1e-5)
        weights.append(found)
    # Kish's effective size: what the second moment of 64 columns is learned from.
    whole = torch.cat(weights)
    assert float(whole.sum() ** 2 / whole.square().sum()) == pytest.approx(POSITIONS * 64, rel=1e-3)


def test_few_samples_are_not_weighted():
    module = llama()
    layers = {"lm_head": module.lm_head}
    few = measure_guidance(module, layers, samples(SAMPLES - 1), ("logits",))
    assert few == Guidance({}, {})
    assert few.of("lm_head", 0, 12) is None


def test_short_data_is_not_weighted():
    even, one = torch.ones(40), torch.zeros(40)
    one[3] = 40
    assert strength_for([even], 8) == STRENGTH
    assert strength_for([even], 20) == 0
    assert strength_for([one], 8) == pytest.approx((1.5 / 39) ** 0.5)


def test_a_convolutions_positions_are_in_the_order_of_its_patches():
    class Picture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 2)

        def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            mask = torch.zeros(3, 4)
            mask[2, 1] = 1  # nothing else is read
            return {"features": self.conv(pixels) * mask}

    module = Picture().eval()
    inputs = [{"pixels": torch.rand(1, 1, 4, 5)}] * SAMPLES
    guidance = measure_guidance(module, {"conv": module.conv}, inputs, ("features",))
    found = guidance.of("conv", 0, 12)
    assert found is not None
    assert int(found.argmax()) == 2 * 4 + 1
    assert float(found.min()) == pytest.approx(1 - STRENGTH)


def test_what_changes_an_output_in_place_does_not_disturb():
    class Model(nn.Module):
        def __init__(self, *, inplace: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.act, self.last = nn.Conv2d(1, 8, 3), nn.ReLU(inplace=inplace), nn.Conv2d(8, 2, 1)

        def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"features": self.last(self.act(self.first(pixels)))}

    inputs = [{"pixels": torch.rand(1, 1, 8, 8)}] * SAMPLES
    found = []
    for inplace in (False, True):
        module = Model(inplace=inplace).eval()
        guidance = measure_guidance(module, {"first": module.first, "last": module.last}, inputs, ("features",))
        found.append(guidance.of("first", 1, 36))
    assert found[0] is not None
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_what_runs_twice_or_gets_other_positions_is_not_weighted():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.shared, self.head = nn.Embedding(48, 8), nn.Linear(8, 8), nn.Linear(8, 48)

        def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.head(self.shared(self.shared(self.table(input_ids)).tanh()))}

    module = Twice().eval()
    layers = {"shared": module.shared, "head": module.head}
    guidance = measure_guidance(module, layers, samples(SAMPLES), ("logits",))
    assert guidance.of("shared", 0, 12) is None
    assert guidance.of("head", 0, 12) is not None
    assert guidance.of("head", 0, 11) is None
    assert guidance.of("head", SAMPLES, 12) is None
    assert guidance.of("other", 0, 12) is None


class Sink(nn.Module):
    """A layer whose inputs are large and of another kind at the first position, which the output hardly reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(48, 16)
        self.first = nn.Embedding(48, 16)
        self.middle = nn.Linear(16, 16)
        self.head = nn.Linear(16, 48)
        with torch.no_grad():  # of few directions each, so that rounding errors can go where nothing is read
            for table in (self.table, self.first):
                table.weight.copy_(torch.randn(48, 6) @ torch.randn(6, 16))

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.cat([30 * self.first(input_ids[:, :1]), self.table(input_ids[:, 1:])], 1)
        size = torch.ones(input_ids.shape[1], 1)
        size[0] = 0.001
        return {"logits": self.head(self.middle(hidden) * size)}


def divergence(module: nn.Module, other: nn.Module, inputs: list[dict[str, torch.Tensor]]) -> float:
    total = 0.0
    with torch.no_grad():
        for sample in inputs:
            one, two = (m(**sample)["logits"].double().log_softmax(-1) for m in (module, other))
            total += float((one.exp() * (one - two)).sum(-1).mean())
    return total / len(inputs)


def test_gptq_spends_nothing_on_positions_that_the_model_does_not_read():
    module, inputs = Sink().eval(), samples(96)
    weight = WeightFormat.parse("int4")
    item = Assignment("middle.weight", ("linear",), (16, 16), weight, "float", "float32", (), "test")

    def method(item, weight, moments):
        return quantize_gptq(weight, moments.second / moments.count, item.grid), Note("gptq", None)

    found = {}
    layers = {"middle": module.middle}
    for name, guidance in {
        "plain": None,
        "guided": measure_guidance(module, layers, inputs[:64], ("logits",)),
        "nothing known": Guidance({}, {}),
    }.items():
        made = quantize_in_sequence(module, (item,), inputs[:64], method, guidance=guidance)
        other = copy.deepcopy(module)
        with torch.no_grad():
            other.middle.weight.copy_(dequantize(made["middle.weight"][0]))
        found[name] = divergence(module, other, inputs[64:])
    assert found["guided"] < 0.7 * found["plain"]
    assert found["nothing known"] == found["plain"]

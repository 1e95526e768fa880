"""What mixed precision is told of each format: bytes in the target's precision, cost in every place of a weight."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from edgeport.compress.assign import assign
from edgeport.compress.mixed import choose_formats, float_bytes
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.compress.sensitivity import measure_sensitivity
from edgeport.model.types import Axis, Model, Source, TensorSpec
from edgeport.quantized import dequantize
from edgeport.recipe import Recipe
from edgeport.schema import parse_mapping
from edgeport.target import load_target


def recipe(precision: str = "target", **options: object) -> Recipe:
    value = {"name": "t", "summary": "t", "compress": [{"method": "gptq", **options}], "gate": {}}
    return parse_mapping(Recipe, {**value, "lower": {"precision": precision}}, "t")


@pytest.mark.parametrize(
    ("target", "precision", "expected"),
    [
        ("ios18-coreml", "target", 2),
        ("ios18-coreml", "fp32", 4),
        ("linux-x86_64-ort", "target", 4),
        ("linux-x86_64-ort", "fp16", 2),
    ],
)
def test_float_weights_take_the_bytes_of_the_precision(target, precision, expected):
    assert float_bytes(recipe(precision, linear="int8"), load_target(target)) == expected


def tied_decoder() -> Model:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    module = AutoModelForCausalLM.from_config(config).eval()
    axis = Axis("sequence", 1, 16, 8)
    specs = (TensorSpec("input_ids", "int64", (1, axis)),)
    outputs = (TensorSpec("logits", "float32", (1, axis, 64)),)
    source = Source("factory", "m:f", {})
    return Model("tied", module, source, "text-generation", "text", specs, outputs, {}, huggingface=True)


def test_a_tied_weight_costs_what_it_does_in_both_places():
    model, target = tied_decoder(), load_target("linux-x86_64-ort")
    formats = ["int8", "uint4_g32"]
    asked = recipe(linear=formats, embedding=formats, bits_per_weight=6.0)
    generator = torch.Generator().manual_seed(1)
    inputs = [{"input_ids": torch.randint(0, 64, (1, 12), generator=generator)} for _ in range(16)]
    assignments = assign(model, asked, target)
    _, table = choose_formats(model, asked, target, assignments, inputs)
    name = "model.embed_tokens.weight"
    item = next(item for item in assignments if item.name == name)
    layers: dict[str, nn.Module] = {key: model.module.get_submodule(key) for key in ("model.embed_tokens", "lm_head")}
    alone = measure_sensitivity(model.module, layers, inputs, ("logits",))
    weight = model.module.get_parameter(name).detach()
    change = dequantize(quantize_rtn(weight, item.grid, importance=alone["lm_head"].importance)) - weight
    option = next(option for option in table[name] if option.format == "int8")
    costs = {key: found.cost(change) for key, found in alone.items()}
    assert min(costs.values()) > 0
    assert option.cost == pytest.approx(sum(costs.values()), rel=0.02)


def test_without_a_weight_to_choose_for_everything_stays_as_assigned():
    # iOS 17 takes one 8-bit format for linear weights: nothing is left to choose, and no gradient is there to take.
    model, target = tied_decoder(), load_target("ios17-coreml")
    asked = recipe(linear=["int8", "int4_g32"], embedding=["int8"], bits_per_weight=6.0)
    assignments = assign(model, asked, target)
    assert choose_formats(model, asked, target, assignments, [{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}]) == (
        assignments,
        {},
    )

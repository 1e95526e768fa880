"""Without a target: every backend can store the scales, and a target takes or refuses weights as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from edgeport.compress.apply import apply_recipe
from edgeport.compress.assign import assign
from edgeport.compress.assign_compressed import assign_compressed
from edgeport.compress.portable import LEAST_SCALE, make_portable, portable_target
from edgeport.compress.stored import restate
from edgeport.errors import BadInputError, TargetRefusesError
from edgeport.model.types import Model, Source
from edgeport.quantized import dequantize, digest, round_scale
from edgeport.recipe import Budgets, Recipe, RoundToNearest, load_recipe
from edgeport.target import load_target


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 64)
        self.first = nn.Linear(64, 64)
        self.conv = nn.Conv1d(64, 64, 3)


def model_of(module: nn.Module) -> Model:
    return Model("net", module, Source("factory", "net", {}), "other", "other", (), (), {}, False)


@pytest.fixture
def net() -> Model:
    torch.manual_seed(0)
    return model_of(Net().requires_grad_(False))


def recipe_of(**formats: object) -> Recipe:
    return Recipe(name="r", summary="", compress=(RoundToNearest(method="rtn", **formats),), gate=Budgets())


INT4 = recipe_of(linear="int4_g32", embedding="int8", conv="int8", activations=("dynamic_int8", "float"))


def compressed(net: Model, recipe: Recipe) -> tuple[Model, dict[str, str], tuple]:
    target = portable_target(recipe)
    model, layers = apply_recipe(net, recipe, target)
    model, layers = make_portable(model, layers)
    return model, {item.name: item.format.name for item in assign(net, recipe, target)}, layers


def test_the_first_format_of_each_kind_is_taken(net: Model) -> None:
    recipe = recipe_of(linear=("lut4_g16", "int8"), embedding=("uint3_g32", "int8"), conv=("int5", "float"))
    found = {item.name: item for item in assign(net, recipe, portable_target(recipe))}
    assert {name: item.format.name for name, item in found.items()} == {
        "table.weight": "uint3_g32",
        "first.weight": "lut4_g16",
        "conv.weight": "int5",
    }
    assert {name: item.scale_dtype for name, item in found.items()} == {
        "table.weight": "bfloat16",
        "first.weight": "float16",  # palettes are stored like the scales of whole channels
        "conv.weight": "float16",
    }


def test_scales_fit_every_backend_and_tiny_weights_lose_at_most_half_a_step(net: Model) -> None:
    with torch.no_grad():
        net.module.first.weight[3, :32] *= 1e-4
        net.module.first.weight[5] = 0
        net.module.table.weight[7] *= 1e-6
    target = portable_target(INT4)
    before, records = apply_recipe(net, INT4, target)
    assert float(before.quantized["first.weight"].scale.min()) < LEAST_SCALE
    after, layers = make_portable(before, records)
    for name, tensor in after.quantized.items():
        assert torch.equal(round_scale(tensor.scale, "float16"), tensor.scale)
        assert float(tensor.scale.abs().min()) >= LEAST_SCALE
        if name == "first.weight":
            assert torch.equal(round_scale(tensor.scale, "bfloat16"), tensor.scale)
        assert torch.equal(after.module.get_parameter(name), dequantize(tensor))
    moved = dequantize(after.quantized["first.weight"]) - dequantize(before.quantized["first.weight"])
    assert 0 < float(moved.abs().max()) <= LEAST_SCALE / 2
    assert int((moved != 0).any(1).sum()) == 1
    by_name = {layer.name: layer for layer in layers}
    for name in after.quantized:
        weight = net.module.get_parameter(name)
        real = float((dequantize(after.quantized[name]) - weight).norm() / weight.norm())
        assert real <= by_name[name].relative_error * (1 + 1e-6)
        assert by_name[name].sha256 == digest(after.quantized[name])
    assert after.activations == before.activations != {}


def test_nothing_changes_where_nothing_must(net: Model) -> None:
    model, records = apply_recipe(net, INT4, portable_target(INT4))
    same, layers = make_portable(model, records)
    assert same is model
    assert layers is records


@pytest.mark.parametrize(("name", "activation"), [("linux-x86_64-ort", "dynamic_int8"), ("ios18-coreml", "float")])
def test_a_target_takes_the_weights_as_they_are(net: Model, name: str, activation: str) -> None:
    model, formats, layers = compressed(net, INT4)
    target = load_target(name)
    assignments = assign_compressed(model, formats, INT4, target)
    found, records = restate(model, layers, assignments)
    assert found.quantized["first.weight"].scale_dtype == target.scales.grouped
    assert found.quantized["conv.weight"].scale_dtype == target.scales.per_channel
    assert {name: digest(tensor) for name, tensor in found.quantized.items()} == {
        name: digest(tensor) for name, tensor in model.quantized.items()
    }
    assert found.activations["first.weight"] == activation
    assert {record.name: record.bytes_after for record in records} == {
        name: tensor.storage_bytes() for name, tensor in found.quantized.items()
    }


def refusal(net: Model, target: str, recipe: Recipe, change: Callable[[Model], None] = lambda _: None) -> str:
    model, formats, _ = compressed(net, recipe)
    change(model)
    with pytest.raises(TargetRefusesError) as caught:
        assign_compressed(model, formats, recipe, load_target(target))
    assert caught.value.allowed
    return str(caught.value)


def test_a_format_that_the_target_lacks_is_refused_with_those_it_has(net: Model) -> None:
    text = refusal(net, "linux-x86_64-ort", recipe_of(linear="int8", embedding="lut3", conv="int8"))
    assert "no embedding weights in lut3" in text
    assert "table.weight" in text
    assert "int8" in text.split("allowed:")[1]


def test_activations_that_the_target_lacks_are_refused(net: Model) -> None:
    assert "activations" in refusal(net, "linux-x86_64-ort", recipe_of(conv="int8", activations="dynamic_int8"))


def test_scales_that_the_target_cannot_store_are_refused(net: Model) -> None:
    def spoil(model: Model) -> None:
        model.quantized["first.weight"].scale[0, 0] = 1e-9

    assert "can't hold 1 of 128" in refusal(net, "ios18-coreml", INT4, spoil)


def test_a_weight_that_no_layer_has_is_refused(net: Model) -> None:
    model, formats, _ = compressed(net, INT4)
    model.quantized["ghost.weight"] = model.quantized["first.weight"]
    with pytest.raises(BadInputError, match="belongs to no layer"):
        assign_compressed(model, formats, INT4, load_target("linux-x86_64-ort"))


def test_a_tied_weight_takes_one_format_for_both_kinds() -> None:
    module = Net().requires_grad_(False)
    module.first = nn.Linear(64, 16, bias=False)
    module.first.weight = module.table.weight
    recipe = load_recipe("int4")
    found = {item.name: item for item in assign(model_of(module), recipe, portable_target(recipe))}
    assert found["table.weight"].format.name == "int4_g32"
    assert found["table.weight"].tied == ("table.weight", "first.weight")
    assert found["table.weight"].activation == "dynamic_int8"

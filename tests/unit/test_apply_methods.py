"""Every method through `apply_recipe` on a small decoder: what it promises, and what is stored of it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from edgeport.compress import apply_recipe, assign
from edgeport.compress.calibrate import as_tensors, calibration_samples
from edgeport.compress.chain import call
from edgeport.compress.saved import load_compressed, load_records, save_compressed
from edgeport.compress.statistics import observed, output_error
from edgeport.errors import BadInputError
from edgeport.model.build import build_huggingface
from edgeport.model.types import Model
from edgeport.quantized import dequantize, digest
from edgeport.recipe import Recipe
from edgeport.schema import parse_mapping
from edgeport.target import Target, load_target

FORMATS = {"linear": "int4_g32", "embedding": "int8"}


def decoder(*, tied: bool = False) -> Model:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.15,
    )
    module = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "norm" in name:
                value.copy_(torch.rand_like(value) * 4 + 0.1)  # channels of unlike size, as trained models have
    return build_huggingface(
        module,
        name="tiny",
        reference="tiny",
        kind="factory",
        task="text-generation",
        files={},
        assets={},
        licence=None,
        note=None,
    )


def recipe(*steps: dict[str, object]) -> Recipe:
    return parse_mapping(
        Recipe,
        {"name": "x", "summary": "x", "compress": list(steps), "calibration": {"samples": 24}, "gate": {}},
        "test",
    )


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target("linux-x86_64-ort")


def divergence(model: Model, other: Model) -> float:
    """Mean KL from the one to the other over random tokens, nats."""
    tokens = torch.randint(0, 96, (8, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        one, two = (m.module(input_ids=tokens, use_cache=False).logits.double().log_softmax(-1) for m in (model, other))
    return float((one.exp() * (one - two)).sum(-1).mean())


STEPS = {
    "rtn": [{"method": "rtn", **FORMATS}],
    "hqq": [{"method": "hqq", **FORMATS}],
    "gptq": [{"method": "gptq", **FORMATS}],
    "awq": [{"method": "awq"}, {"method": "rtn", **FORMATS}],
    "smooth": [{"method": "smooth"}, {"method": "rtn", **FORMATS}],
    "rotate": [{"method": "rotate"}, {"method": "rtn", **FORMATS}],
    "awq+gptq": [{"method": "awq"}, {"method": "gptq", **FORMATS}],
}


@pytest.fixture(scope="module")
def compressed(target):
    model = decoder()
    return model, {name: apply_recipe(model, recipe(*steps), target) for name, steps in STEPS.items()}


@pytest.mark.parametrize("name", STEPS)
def test_weights_hold_what_their_codes_stand_for(compressed, name):
    model, made = compressed
    other, records = made[name]
    parameters = dict(other.module.named_parameters())
    assert set(other.quantized) == {record.name for record in records if record.sha256 is not None}
    assert len(other.quantized) == 16
    for weight, tensor in other.quantized.items():
        assert torch.equal(parameters[weight], dequantize(tensor))
    assert 0 < divergence(model, other) < 1


def test_what_is_tuned_on_data_is_closer(compressed):
    model, made = compressed
    lost = {name: divergence(model, other) for name, (other, _) in made.items()}
    assert lost["gptq"] < 0.8 * lost["rtn"]
    assert lost["awq"] < lost["rtn"]
    assert lost["awq+gptq"] < 0.8 * lost["rtn"]


def test_records_name_the_method_and_the_layers_output_error(compressed):
    for record in compressed[1]["gptq"][1]:
        assert record.method == ("rtn" if "embedding" in record.kinds else "gptq")
        assert (record.output_error is None) == ("embedding" in record.kinds)
        if record.output_error is not None:
            # Compensation makes the weight's error larger and the output's smaller.
            assert 0 < record.output_error < record.relative_error


@pytest.mark.parametrize("name", ["gptq", "awq", "rotate"])
def test_stored_and_loaded_again_it_is_the_same(compressed, name, target, tmp_path: Path):
    model, made = compressed
    other, records = made[name]
    save_compressed(tmp_path, model, other, records)
    again = load_compressed(tmp_path, model, assign(model, recipe(*STEPS[name]), target))
    for (weight, one), two in zip(other.module.named_parameters(), again.module.parameters(), strict=True):
        assert torch.equal(one, two), weight


def test_palettes_are_weighted_by_what_the_layer_sees():
    ios, model = load_target("ios18-coreml"), decoder()
    formats = {"linear": "lut4_g16", "embedding": "float"}
    plain, _ = apply_recipe(model, recipe({"method": "rtn", **formats}), ios)
    asked = recipe({"method": "gptq", **formats})
    weighted, records = apply_recipe(model, asked, ios)
    assert {record.method for record in records} == {"gptq", ""}
    # Nothing comes before the first block: its layers see what the float model's do.
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    layers = {name: model.module.get_submodule(name) for name in names}
    with torch.no_grad(), observed(layers) as moments:
        for sample in as_tensors(model, calibration_samples(model, asked)):
            call(model.module, sample)

    def error(other: Model, name: str) -> float:
        change = dequantize(other.quantized[f"{name}.weight"]) - layers[name].weight.detach()
        return output_error(change, moments[name].second)

    for name in names:
        assert error(weighted, name) < error(plain, name)


def test_a_tied_head_can_not_be_rotated(target):
    with pytest.raises(BadInputError, match="rotated"):
        apply_recipe(decoder(tied=True), recipe(*STEPS["rotate"]), target)


def test_preparation_after_quantizing_is_refused():
    with pytest.raises(BadInputError, match="before the step that quantizes"):
        recipe({"method": "rtn"}, {"method": "awq"})


def test_quantizing_twice_is_refused():
    with pytest.raises(BadInputError, match="once"):
        recipe({"method": "rtn"}, {"method": "gptq"})


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(BadInputError, match="gptq"):
        recipe({"method": "gtpq"})


MIXED = {"linear": ["int8", "int4_g32"], "embedding": ["int8"]}


def weight_bytes(records) -> int:
    return sum(record.bytes_after for record in records if record.sha256 is not None)


def test_mixed_precision_keeps_its_budget_and_loses_less_than_any_even_spread_of_it(target):
    model = decoder()
    lost, sizes = {}, {}
    for name, extra in {
        "int4": {"linear": "int4_g32"},
        "mixed": {"bits_per_weight": 6.5},
        "int8": {"linear": "int8"},
    }.items():
        other, records = apply_recipe(model, recipe({"method": "rtn", **MIXED, **extra}), target)
        lost[name], sizes[name] = divergence(model, other), weight_bytes(records)
        if name == "mixed":
            linear = [record for record in records if record.kinds == ("linear",)]
            weights = sum(other.quantized[record.name].codes.numel() for record in linear)
            assert 6.5 / 8 * weights * 0.9 < weight_bytes(linear) <= 6.5 / 8 * weights
            assert {record.format for record in records} == {"int4_g32", "int8"}
            table = [record.options for record in records if len(record.options) > 1]
            assert table
            for options in table:
                assert sum(option.chosen for option in options) == 1
                assert [o.bytes for o in options] == sorted(o.bytes for o in options)
                assert [o.cost for o in options] == sorted((o.cost for o in options), reverse=True)
    share = (sizes["mixed"] - sizes["int4"]) / (sizes["int8"] - sizes["int4"])
    assert 0.2 < share < 0.9
    assert lost["int8"] < lost["mixed"] < lost["int4"]
    # Bits given to layers at random would remove their share of the loss.
    assert lost["mixed"] < lost["int4"] - share * (lost["int4"] - lost["int8"])


def test_mixed_precision_goes_through_storage(target, tmp_path: Path):
    model, asked = (
        decoder(tied=True),
        recipe({"method": "gptq", **MIXED, "embedding": ["int8", "int4_g32"], "bits_per_weight": 6}),
    )
    other, records = apply_recipe(model, asked, target)
    save_compressed(tmp_path, model, other, records)
    assert load_records(tmp_path) == records
    again = load_compressed(tmp_path, model, assign(model, asked, target))
    assert all(digest(again.quantized[name]) == digest(tensor) for name, tensor in other.quantized.items())
    assert again.activations == other.activations


def test_a_budget_below_the_smallest_formats_is_refused(target):
    with pytest.raises(BadInputError, match="at least") as error:
        apply_recipe(decoder(), recipe({"method": "rtn", **MIXED, "bits_per_weight": 4}), target)
    assert error.value.where == "bits_per_weight"


def test_weights_that_can_not_be_as_small_as_the_budget_are_not_counted(target):
    """As depthwise convolutions, which some targets have in 8 bits and some in float only."""
    step = {"method": "rtn", **MIXED, "embedding": ["int8", "float"], "bits_per_weight": 6.5}
    other, records = apply_recipe(decoder(), recipe(step), target)
    linear = [record for record in records if record.kinds == ("linear",)]
    weights = sum(other.quantized[record.name].codes.numel() for record in linear)
    assert 6.5 / 8 * weights * 0.9 < weight_bytes(linear) <= 6.5 / 8 * weights
    assert [record.format for record in records if record.kinds == ("embedding",)] == ["int8"]

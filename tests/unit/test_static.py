"""Static activations through `apply_recipe`: what they cost, what is left out, and what is stored of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgeport.activations import fake_quantize, round_layers
from edgeport.compress import apply_recipe, assign
from edgeport.compress.apply import LayerRecord
from edgeport.compress.bias import mean_outputs
from edgeport.compress.calibrate import as_tensors
from edgeport.compress.saved import load_compressed, load_records, save_compressed
from edgeport.compress.sites import Site
from edgeport.compress.static import fix_ranges, leave_out
from edgeport.data.samples import SampleRecord, Samples
from edgeport.errors import BadInputError
from edgeport.model.types import Model, Source, TensorSpec
from edgeport.quantized import dequantize, digest
from edgeport.recipe import Recipe
from edgeport.target import Target, load_target

KINDS = ("linear", "conv", "depthwise_conv")


class Net(nn.Module):
    """Convolution, depthwise convolution, residual, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project = nn.Conv2d(16, 16, 1)
        self.classifier = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x).clamp(0, 6)
        y = y + self.project(self.depthwise(y).relu())
        logits: torch.Tensor = self.classifier(y.mean((-2, -1)) * 8)
        return logits


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target("linux-x86_64-ort")


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 8, 8)
    return Model(
        name="net",
        module=Net().eval().requires_grad_(False),
        source=Source("factory", "net", {}),
        task="image-classification",
        modality="image",
        inputs=(TensorSpec("x", "float32", (1, 3, 8, 8)),),
        outputs=(TensorSpec("logits", "float32", (1, 10)),),
        example={"x": x},
        huggingface=False,
    )


def calibration(count: int = 16, bad: float | None = None) -> Samples:
    generator = np.random.default_rng(0)
    inputs = [{"x": generator.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]
    if bad is not None:
        inputs[-1]["x"][0, 0, 0, 0] = bad
    return Samples(inputs, SampleRecord("test", False, {}, "random", None, count))


def recipe(**options: Any) -> Recipe:
    step = {"method": "rtn", **dict.fromkeys(KINDS, "int8"), "activations": ["static_int8", "dynamic_int8", "float"]}
    return Recipe.model_validate({"name": "t", "summary": "t", "compress": [{**step, **options}], "gate": {}})


def compress(
    model: Model, target: Target, samples: Samples | None = None, **options: Any
) -> tuple[Model, dict[str, LayerRecord]]:
    made, records = apply_recipe(model, recipe(**options), target, calibration=samples or calibration())
    return made, {record.name: record for record in records}


def run(module: nn.Module, samples: Samples | None = None) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([module(torch.from_numpy(sample["x"])) for sample in (samples or calibration()).inputs])


def rounded(model: Model) -> nn.Module:
    module = copy.deepcopy(model.module)
    round_layers(module, model.ranges)
    return module


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_every_layer_gets_its_grids_and_a_chain_shares_them(model: Model, target: Target) -> None:
    made, records = compress(model, target, activation_budget=100)
    assert {record.activation for record in records.values()} == {"static_int8"}
    ranges = made.ranges
    assert set(ranges) == set(made.quantized) == set(records)
    assert ranges["depthwise.weight"].input == ranges["stem.weight"].output
    assert ranges["stem.weight"].output is not None
    assert ranges["stem.weight"].output.within(0, 6)
    assert ranges["project.weight"].input == ranges["depthwise.weight"].output
    assert ranges["classifier.weight"].output is None, "ONNX Runtime's integer matrix product gives float"
    # 8-bit activations lose little, and something.
    change = divergence(run(made.module), run(rounded(made)))
    assert 0 < change < 1e-2


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_a_cost_is_the_divergence_that_the_site_alone_makes(model: Model, target: Target, method: str) -> None:
    made, _ = compress(model, target, activation_budget=100, ranges=method)
    step = recipe(ranges=method, activation_budget=100).quantize
    assert step is not None
    inputs = as_tensors(made, calibration(64))
    fixed = fix_ranges(made, assign(model, recipe(), target), step, target, inputs)
    reference = run(made.module, calibration(64))
    total = 0.0
    for site in fixed.costs:
        if site.output:
            continue
        module, grid = copy.deepcopy(made.module), fixed.ranges[site.layer].input
        module.get_submodule(site.layer.removesuffix(".weight")).register_forward_pre_hook(
            lambda _layer, inputs, grid=grid: (fake_quantize(inputs[0], grid),)
        )
        alone = divergence(reference, run(module, calibration(64)))
        # A sampled expectation of a second-order figure: right to a factor, over orders of magnitude.
        assert alone / 4 < fixed.costs[site] < alone * 4
        total += alone
    assert total > 0


def test_the_costliest_sites_go_with_the_layers_on_both_sides() -> None:
    costs = {Site("a", False): 1.0, Site("a", True): 8.0, Site("b", True): 2.0, Site("d", False): 4.0}
    names, source = ["a", "b", "c", "d"], {"b": "a", "c": "b"}
    assert leave_out(costs, names, source, 15.0) == {}
    assert leave_out(costs, names, source, 14.0) == {"a": 8.0, "b": 8.0}
    # What b gives is still rounded by c; what a reads is not any more.
    assert leave_out(costs, names, source, 5.0) == {"a": 8.0, "b": 8.0, "d": 4.0}
    assert set(leave_out(costs, names, source, 0.0)) == {"a", "b", "c", "d"}


def test_a_budget_of_nothing_leaves_no_layer_static_and_says_what_it_would_cost(model: Model, target: Target) -> None:
    made, records = compress(model, target, activation_budget=0)
    assert made.ranges == {}
    assert records["classifier.weight"].activation == "dynamic_int8"
    assert records["stem.weight"].activation == "float"
    for record in records.values():
        number = float(record.reason.split("would cost ")[1].split(" ")[0])
        assert 0 < number < 1
    torch.testing.assert_close(run(rounded(made)), run(made.module), rtol=0, atol=0)


def test_a_kind_that_has_only_static_kernels_goes_back_to_the_prepared_float_weight(model: Model) -> None:
    phone = load_target("android-arm64-executorch")
    made, records = compress(model, phone, activation_budget=0, correct_bias=True)
    assert records["depthwise.weight"].format == "float"
    assert torch.equal(made.module.get_parameter("depthwise.bias"), model.module.get_parameter("depthwise.bias"))
    assert not torch.equal(made.module.get_parameter("project.bias"), model.module.get_parameter("project.bias"))
    assert records["depthwise.weight"].method == ""
    assert "nothing else" in records["depthwise.weight"].reason
    assert "depthwise.weight" not in made.quantized
    assert torch.equal(made.module.get_parameter("depthwise.weight"), model.module.get_parameter("depthwise.weight"))
    # Without static activations in the recipe the depthwise layer is float from the start.
    asked = recipe(activations=["dynamic_int8"], depthwise_conv=["int8", "float"])
    kinds = {item.name: item.format.name for item in assign(model, asked, phone)}
    assert kinds["depthwise.weight"] == "float"
    assert kinds["project.weight"] == "int8"


def test_a_channel_that_training_switched_off_keeps_its_bias(model: Model, target: Target) -> None:
    with torch.no_grad():
        model.module.depthwise.weight[3] *= 1e-18
        model.module.depthwise.bias[3] = 2.0
    made, _ = compress(model, target, activation_budget=100)
    tensor, found = made.quantized["depthwise.weight"], made.ranges["depthwise.weight"]
    steps = model.module.depthwise.bias.double() / (found.input.scale * tensor.scale.double().reshape(-1))
    assert float(steps.abs().max()) < 2**31
    assert torch.equal(made.module.depthwise.weight, dequantize(tensor))
    assert float((made.module.depthwise.weight[3] - model.module.depthwise.weight[3]).abs().max()) < 1e-7


def test_corrected_biases_keep_each_layers_mean(model: Model, target: Target) -> None:
    options = {"activations": ["float"], "scale_search": False}
    plain, _ = compress(model, target, **options)
    fixed, _ = compress(model, target, correct_bias=True, **options)
    inputs = as_tensors(model, calibration())
    names = list(fixed.quantized)
    before = mean_outputs(plain.module, {n: model.module.get_parameter(n) for n in names}, inputs)
    after = mean_outputs(plain.module, {n: plain.module.get_parameter(n) for n in names}, inputs)
    for name in names:
        bias = name.replace("weight", "bias")
        shift = fixed.module.get_parameter(bias) - model.module.get_parameter(bias)
        torch.testing.assert_close(after[name] + shift, before[name], rtol=0, atol=1e-6)
        assert float(shift.abs().max()) > 1e-6
    # The first layer reads the very same inputs, so its mean output is exactly the float model's.
    with torch.no_grad():
        means = [
            torch.stack([m.stem(x["x"]).mean((0, 2, 3)) for x in inputs]).mean(0) for m in (model.module, fixed.module)
        ]
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=1e-5)


def test_what_is_stored_is_read_again(model: Model, target: Target, tmp_path: Path) -> None:
    everything, _ = compress(model, target, activation_budget=100, correct_bias=True)
    step = recipe().quantize
    assert step is not None
    fixed = fix_ranges(everything, assign(model, recipe(), target), step, target, as_tensors(model, calibration()))
    asked = recipe(activation_budget=sum(fixed.costs.values()) / 2, correct_bias=True)
    made, records = apply_recipe(model, asked, target, calibration=calibration())
    assert 0 < len(made.ranges) < 4, "some layers are left out"
    save_compressed(tmp_path, model, made, records)
    again = load_compressed(tmp_path, model, assign(model, asked, target))
    assert again.ranges == made.ranges
    assert again.activations == made.activations
    assert load_records(tmp_path) == records
    assert torch.equal(run(rounded(again)), run(rounded(made)))


def test_the_same_data_gives_the_same_grids(model: Model, target: Target) -> None:
    first, _ = compress(model, target, activation_budget=1e-4)
    second, _ = compress(replace(model, module=copy.deepcopy(model.module)), target, activation_budget=1e-4)
    assert first.ranges == second.ranges
    assert {n: digest(t) for n, t in first.quantized.items()} == {n: digest(t) for n, t in second.quantized.items()}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_data_that_is_not_finite_is_one_clear_error(model: Model, target: Target, bad: float) -> None:
    with pytest.raises(BadInputError, match="not finite") as caught:
        compress(model, target, calibration(bad=bad))
    assert "stem.weight" in str(caught.value)


def test_no_data_is_one_clear_error(model: Model, target: Target) -> None:
    with pytest.raises(BadInputError, match="no calibration data"):
        compress(model, target, calibration(0))


def test_formats_without_static_kernels_take_the_next_activations(model: Model, target: Target) -> None:
    formats = {item.name: item for item in assign(model, recipe(linear="int8_g16"), target)}
    assert formats["classifier.weight"].activation == "dynamic_int8"
    assert formats["stem.weight"].activation == "static_int8"
    mixed, records = compress(model, target, linear=["int8", "int4_g16"], bits_per_weight=5.1, activation_budget=100)
    assert records["classifier.weight"].format == "int4_g16"
    assert records["classifier.weight"].activation == "dynamic_int8"
    assert "classifier.weight" not in mixed.ranges


@pytest.mark.parametrize("option", [{"ranges": "minmax"}, {"activation_budget": 0.1}])
def test_options_of_static_activations_are_refused_without_them(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="static_int8"):
        recipe(activations=["float"], **option)
    stored = recipe(activations=["float"]).model_dump(mode="json")
    assert Recipe.model_validate(stored).model_dump(mode="json") == stored


class Normed(nn.Module):
    """A norm that makes two channels 40 times the others, and a layer that reads them with small weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.classifier = nn.LayerNorm(64), nn.Linear(64, 10)
        with torch.no_grad():
            self.norm.weight[:2] *= 40
            self.classifier.weight[:, :2] /= 40

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.norm(x.flatten(1)[:, :64]))
        return logits


def test_smoothing_before_it_helps_where_channels_stick_out(model: Model, target: Target) -> None:
    torch.manual_seed(0)
    original = replace(model, module=Normed().eval().requires_grad_(False))
    reference = run(original.module)
    errors = {}
    for smooth in (False, True):
        asked = recipe(activation_budget=100, ranges="minmax").model_dump(mode="json")
        asked["compress"] = [{"method": "smooth"}] * smooth + list(asked["compress"])
        made, _ = apply_recipe(original, Recipe.model_validate(asked), target, calibration=calibration())
        assert set(made.ranges) == {"classifier.weight"}
        errors[smooth] = float((run(rounded(made)) - reference).norm())
    assert errors[True] < 0.5 * errors[False]

"""Low-rank correction: its matrices against a slow independent way, what it promises, and what is stored of it."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig

from edgeport.compress import apply_recipe, assign
from edgeport.compress.quantize.grid import Grid
from edgeport.compress.quantize.qera import damped, low_rank_factors, make_correction
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.compress.saved import load_compressed, load_records, save_compressed
from edgeport.data.samples import SampleRecord, Samples
from edgeport.errors import BadInputError, TargetRefusesError
from edgeport.model.build import build_huggingface
from edgeport.model.corrected import CorrectedLinear, add_correction, corrected_layer, factor_names
from edgeport.model.types import Model
from edgeport.plan import planned_layers
from edgeport.quantized import code_range, dequantize, digest, round_scale
from edgeport.recipe import Recipe
from edgeport.schema import parse_mapping
from edgeport.target import load_target

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FORM = {"linear": ["uint2_g32", "int8"], "embedding": "int8", "activations": ["dynamic_int8", "float"]}
GPTQ = {"method": "gptq", **FORM}


def built(family: str) -> Model:
    torch.manual_seed(0)
    if family == "bert":
        module, task = AutoModel.from_config(BertConfig(**SIZES, initializer_range=0.15)), "feature-extraction"
    else:
        config = LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.15)
        module, task = AutoModelForCausalLM.from_config(config), "text-generation"
    return build_huggingface(
        module.eval(),
        name="tiny",
        reference="tiny",
        kind="factory",
        task=task,
        files={},
        assets={},
        licence=None,
        note=None,
    )


def tokens(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    samples = [{"input_ids": torch.randint(1, 64, (1, 12), generator=generator)} for _ in range(count)]
    return [{**sample, "attention_mask": torch.ones_like(sample["input_ids"])} for sample in samples]


def calibration() -> Samples:
    inputs = [{name: value.numpy() for name, value in sample.items()} for sample in tokens(40, seed=1)]
    return Samples(inputs, SampleRecord("random", False, {}, "all", None, 40))


def recipe(*steps: dict[str, object]) -> Recipe:
    return parse_mapping(Recipe, {"name": "x", "summary": "x", "compress": list(steps), "gate": {}}, "test")


def problem(rows: int = 20, columns: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, inputs of very unlike directions, and their second moment."""
    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, columns)
    inputs = torch.randn(400, columns, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, inputs, inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("rank", [1, 3, 20])
def test_the_matrices_against_a_symmetric_root_in_numpy(rank):
    residual, _, second = problem()
    down, up = low_rank_factors(residual, second, rank)
    # The paper's way: the symmetric root of the second moment, its inverse, and the whole decomposition.
    values, vectors = np.linalg.eigh(second.numpy())
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    left, size, right = np.linalg.svd(residual.numpy() @ root, full_matrices=False)
    expected = (left[:, :rank] @ np.diag(size[:rank]) @ right[:rank]) @ np.linalg.inv(root)
    assert down.shape == (rank, 32)
    assert up.shape == (20, rank)
    np.testing.assert_allclose((up @ down).numpy(), expected, rtol=1e-6, atol=1e-8)
    left_over = residual - up @ down
    error = float((left_over @ second * left_over).sum())
    assert error == pytest.approx(float((size[rank:] ** 2).sum()), rel=1e-6, abs=1e-9)


def test_what_comes_out_of_the_first_matrix_has_variance_one():
    residual, inputs, second = problem()
    down, _ = low_rank_factors(residual, second, 5)
    found = inputs @ down.T
    assert torch.allclose(found.T @ found / len(inputs), torch.eye(5, dtype=torch.float64), atol=1e-8)


def test_full_rank_gives_the_float_layer_back():
    weight, inputs, second = problem()
    tensor = quantize_rtn(weight, Grid(2, 16, False))
    layer = torch.nn.Linear(32, 20).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
    wanted = layer(inputs)
    holder = torch.nn.Sequential(copy.deepcopy(layer))
    with torch.no_grad():
        holder[0].weight.copy_(dequantize(tensor))
    assert float((holder(inputs) - wanted).norm() / wanted.norm()) > 0.1
    corrected = add_correction(holder, "0", 20).double()
    down, up = low_rank_factors(weight - dequantize(tensor).double(), damped(second), 20)
    with torch.no_grad():
        corrected.correction_down.weight.copy_(down)
        corrected.correction_up.weight.copy_(up)
    assert float((holder(inputs) - wanted).norm() / wanted.norm()) < 1e-9


def made(rank: int):
    """The correction of a 2-bit weight: weight, its codes, inputs, what `make_correction` gives."""
    weight, inputs, second = problem()
    tensor = quantize_rtn(weight, Grid(2, 16, False))
    module = torch.nn.Sequential(torch.nn.Linear(32, 20))
    model = Model("x", module, None, "x", "other", (), (), {}, False)  # type: ignore[arg-type]  # shapes alone are read
    asked = recipe({"method": "rtn", "linear": "int8"}, {"method": "qera", "rank": rank})
    _, down, up = assign(model, asked, load_target("linux-x86_64-ort"))
    return weight, tensor, inputs, make_correction(weight, tensor, second.float(), down, up)


def test_the_output_error_falls_with_the_rank_and_is_the_one_on_record():
    errors = []
    for rank in (1, 4, 8, 20):
        weight, tensor, inputs, found = made(rank)
        wanted = inputs @ weight.T
        plain = float((inputs @ dequantize(tensor).double().T - wanted).norm() / wanted.norm())
        branch = inputs @ dequantize(found.down).double().T @ dequantize(found.up).double().T
        error = float((inputs @ dequantize(tensor).double().T + branch - wanted).norm() / wanted.norm())
        assert found.output_error == pytest.approx(error, rel=0.02)
        errors.append(error / plain)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.9
    assert errors[-1] < 0.02  # 8-bit matrices: not the float layer, but near


def test_the_matrices_lie_on_the_targets_grid():
    for tensor in (made(4)[3].down, made(4)[3].up):
        lowest, highest = code_range(8, symmetric=True)
        assert tensor.per_channel
        assert tensor.symmetric
        assert lowest <= int(tensor.codes.min()) <= int(tensor.codes.max()) <= highest
        assert torch.equal(tensor.scale, round_scale(tensor.scale, tensor.scale_dtype))


def test_the_second_matrix_makes_up_for_the_rounding_of_the_first():
    weight, tensor, _, found = made(4)
    _, _, second = problem()
    residual = weight - dequantize(tensor).double()
    down = dequantize(found.down).double()
    _, plain = low_rank_factors(residual, damped(second), 4)

    def error(up: torch.Tensor) -> float:
        left = residual - up @ down
        return float((left @ second * left).sum())

    assert error(found.exact[1].double()) <= error(plain) * (1 + 1e-6)


def test_a_layer_whose_inputs_are_all_zero():
    weight, tensor, _, _ = made(2)
    _, down, up = assign(
        Model("x", torch.nn.Sequential(torch.nn.Linear(32, 20)), None, "x", "other", (), (), {}, False),  # type: ignore[arg-type]
        recipe({"method": "rtn", "linear": "int8"}, {"method": "qera", "rank": 2}),
        load_target("linux-x86_64-ort"),
    )
    found = make_correction(weight, tensor, torch.zeros(32, 32), down, up)
    for part in (found.down, found.up):
        assert bool(torch.isfinite(dequantize(part)).all())


@pytest.fixture(scope="module")
def target():
    return load_target("linux-x86_64-ort")


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_through_a_recipe_and_storage(family, target, tmp_path: Path):
    model, asked = built(family), recipe(GPTQ, {"method": "qera", "rank": 4})
    before, plain = apply_recipe(model, recipe(GPTQ), target, calibration=calibration())
    after, records = apply_recipe(model, asked, target, calibration=calibration())

    def error(other: Model) -> float:
        found = []
        for sample in tokens(30, seed=2):
            with torch.no_grad():
                one, two = (m.module(**sample)[0].double() for m in (model, other))
            found.append(float((one - two).norm() / one.norm()))
        return sum(found) / len(found)

    assert error(after) < 0.9 * error(before)
    # The codes of the weights are those without a correction; a table, and a head tied to it, get none.
    assert all(digest(after.quantized[name]) == digest(tensor) for name, tensor in before.quantized.items())
    added = {record.name: record for record in records if record.bytes_before == 0}
    linears = {r.name for r in plain if r.sha256 is not None and r.kinds == ("linear",)}
    assert set(added) == {factor for name in linears for factor in factor_names(name)}
    for name, record in added.items():
        assert record.method == "qera"
        assert record.format == "int8"
        rows, columns = record.shape
        assert record.bytes_after == rows * columns + 4 * rows
        assert record.sha256 == digest(after.quantized[name])
        assert torch.equal(after.module.get_parameter(name), dequantize(after.quantized[name]))
        assert 0 < record.relative_error < 0.02
        weight = next(r for r in records if r.name == f"{corrected_layer(name)}.weight")
        assert record.output_error < weight.output_error
        assert after.activations[name] == after.activations[weight.name]
    planned = {layer.name: layer for layer in planned_layers(assign(model, asked, target))}
    assert {name: (r.bytes_before, r.bytes_after) for name, r in added.items()} == {
        name: (planned[name].bytes_before, planned[name].bytes_after) for name in added
    }
    assert not any(isinstance(layer, CorrectedLinear) for layer in model.module.modules())
    save_compressed(tmp_path, model, after, records)
    again = load_compressed(tmp_path, model, assign(model, asked, target))
    state = after.module.state_dict()
    assert again.module.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in again.module.state_dict().items())
    assert again.activations == after.activations
    assert load_records(tmp_path) == records


def test_with_training_afterwards(target):
    model = built("bert")
    asked = recipe(GPTQ, {"method": "qera", "rank": 2}, {"method": "qat", "steps": 10})
    after, records = apply_recipe(model, asked, target, calibration=calibration())
    for record in records:
        if record.sha256 is not None:
            assert torch.equal(after.module.get_parameter(record.name), dequantize(after.quantized[record.name]))
            assert record.sha256 == digest(after.quantized[record.name])


def test_layers_that_mixed_precision_leaves_in_float_get_none(target):
    asked = recipe(
        {"method": "gptq", "linear": ["int8", "float"], "embedding": "int8", "bits_per_weight": 20},
        {"method": "qera", "rank": 2},
    )
    after, records = apply_recipe(built("bert"), asked, target, calibration=calibration())
    formats = {record.name: record.format for record in records}
    assert "float" in formats.values()
    for name in after.quantized:
        layer = corrected_layer(name)
        assert layer is None or formats[f"{layer}.weight"] == "int8"
    corrected = {name for name in formats if corrected_layer(name)}
    assert len(corrected) == 2 * sum(
        r.format == "int8" and r.kinds == ("linear",) and corrected_layer(r.name) is None for r in records
    )


def test_a_rank_larger_than_a_weight_is_refused(target):
    with pytest.raises(BadInputError, match="rank 33") as error:
        assign(built("bert"), recipe(GPTQ, {"method": "qera", "rank": 33}), target)
    assert "1 to 32" in str(error.value.allowed)
    assert "encoder.layer.0" in str(error.value.where)


def test_a_target_without_8_bit_layers_is_refused(target):
    weights = target.weights.model_copy(update={"linear": ("float", "uint2_g32")})
    narrow = target.model_copy(update={"weights": weights})
    with pytest.raises(TargetRefusesError, match="int8"):
        assign(built("bert"), recipe(GPTQ, {"method": "qera"}), narrow)


def test_only_linear_layers_can_be_corrected():
    module = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1), torch.nn.Linear(3, 4))
    with pytest.raises(TypeError, match="Conv1d"):
        add_correction(module, "0", 1)
    first = add_correction(module, "1", 1)
    assert add_correction(module, "1", 1) is first

"""Quantization-aware training: its gradients by hand, and what it gives on small models of three families."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig

from edgeport.compress import apply_recipe, assign
from edgeport.compress.distill import distance
from edgeport.compress.distill.train import rate_factor
from edgeport.compress.quantize.grid import Grid
from edgeport.compress.quantize.palette import quantize_palette
from edgeport.compress.quantize.qat import fine_tune
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.compress.quantize.straight import TrainedWeight
from edgeport.compress.saved import load_compressed, load_records, save_compressed
from edgeport.data.samples import SampleRecord, Samples
from edgeport.errors import BadInputError
from edgeport.model.build import build_huggingface
from edgeport.model.types import Model, Source, TensorSpec
from edgeport.quantized import QuantizedTensor, code_range, dequantize, digest, round_scale
from edgeport.recipe import Qat, Recipe, RoundToNearest
from edgeport.schema import parse_mapping
from edgeport.target import load_target

SETTINGS = Qat(method="qat", steps=60, batch=3, learning_rate=0.01)
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def built(module: nn.Module, task: str) -> Model:
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


def llama() -> Model:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.15)
    return built(AutoModelForCausalLM.from_config(config), "text-generation")


def bert() -> Model:
    torch.manual_seed(0)
    return built(AutoModel.from_config(BertConfig(**SIZES, initializer_range=0.15)), "feature-extraction")


def convolutions() -> Model:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU6(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.ReLU6(),
        nn.Conv2d(16, 24, 1),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = module

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.layers(pixels * 3)

    return Model(
        name="net",
        module=Net().eval(),
        source=Source("factory", "net", {}),
        task="image-classification",
        modality="image",
        inputs=(TensorSpec("pixels", "float32", (1, 3, 12, 12)),),
        outputs=(TensorSpec("features", "float32", (1, 10)),),
        example={"pixels": torch.zeros(1, 3, 12, 12)},
        huggingface=False,
    )


def data(model: Model, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    if model.modality == "image":
        return [{"pixels": torch.randn(1, 3, 12, 12, generator=generator)} for _ in range(count)]
    samples = [{"input_ids": torch.randint(1, 64, (1, 12), generator=generator)} for _ in range(count)]
    return [{**sample, "attention_mask": torch.ones_like(sample["input_ids"])} for sample in samples]


def rounded(model: Model, bits: int, *, scale_dtype: str = "float16") -> Model:
    """Every weight of two or more dimensions to nearest, in groups of 16 where they fit."""
    module, quantized = copy.deepcopy(model.module), {}
    for name, value in module.named_parameters():
        if value.ndim < 2:
            continue
        columns = value.numel() // value.shape[0]
        grid = Grid(bits, 16 if columns % 16 == 0 else None, bits != 3, scale_dtype)
        quantized[name] = quantize_rtn(value, grid)
        with torch.no_grad():
            value.copy_(dequantize(quantized[name]))
    return replace(model, module=module, quantized=quantized)


def installed(model: Model, quantized: dict[str, QuantizedTensor], floats: dict[str, torch.Tensor]) -> Model:
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        for name, value in floats.items():
            module.get_parameter(name).copy_(value)
        for name, tensor in quantized.items():
            module.get_parameter(name).copy_(dequantize(tensor))
    return replace(model, module=module, quantized=quantized)


def loss(model: Model, teacher: Model, inputs: list[dict[str, torch.Tensor]]) -> float:
    """Mean KL of logits or relative squared error, computed in float64 by other means than the training."""
    found = []
    with torch.no_grad():
        for sample in inputs:
            outputs = [m.module(**sample) for m in (teacher, model)]
            for name in (spec.name for spec in model.outputs):
                one, two = (o if isinstance(o, torch.Tensor) else o[name] for o in outputs)
                one, two = one.double(), two.double()
                if name == "logits":
                    p, q = one.softmax(-1), two.softmax(-1)
                    found.append(float((p * (p / q).log()).sum(-1).mean()))
                else:
                    found.append(float((one - two).norm() ** 2 / one.norm() ** 2))
    return sum(found) / len(inputs)


@pytest.fixture(scope="module")
def tuned():
    """family -> (teacher, quantized model, what training made)."""
    made = {}
    for name, (build, bits) in {"llama": (llama, 2), "bert": (bert, 2), "conv": (convolutions, 2)}.items():
        teacher = build()
        start = rounded(teacher, bits)
        made[name] = teacher, start, fine_tune(start, teacher, data(teacher, 120, seed=1), SETTINGS)
    return made


@pytest.mark.parametrize(("family", "share"), [("llama", 0.87), ("bert", 0.5), ("conv", 0.5)])
def test_on_inputs_never_seen_the_model_is_closer(tuned, family, share):
    teacher, start, made = tuned[family]
    fresh = data(teacher, 30, seed=2)
    after = loss(installed(start, made.quantized, made.floats), teacher, fresh)
    assert after < share * loss(start, teacher, fresh)


@pytest.mark.parametrize("family", ["llama", "bert", "conv"])
def test_the_held_out_losses_are_those_of_what_is_returned(tuned, family):
    teacher, start, made = tuned[family]
    inputs = data(teacher, 120, seed=1)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0)).tolist()
    held = [inputs[index] for index in order[:24]]
    result = installed(start, made.quantized, made.floats)
    assert made.loss_before == pytest.approx(loss(start, teacher, held), rel=1e-3)
    assert made.loss_after == pytest.approx(loss(result, teacher, held), rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "bert", "conv"])
def test_the_form_is_the_one_that_came_in(tuned, family):
    _, start, made = tuned[family]
    assert made.quantized.keys() == start.quantized.keys()
    for name, tensor in made.quantized.items():
        before = start.quantized[name]
        lowest, highest = code_range(tensor.bits, symmetric=tensor.zero_point is None)
        assert tensor.codes.dtype == torch.int8
        assert lowest <= int(tensor.codes.min()) <= int(tensor.codes.max()) <= highest
        assert tensor.scale.dtype == torch.float32
        assert torch.equal(tensor.scale, round_scale(tensor.scale, "float16"))
        assert bool((tensor.scale * before.scale > 0).all())
        assert (tensor.bits, tensor.group_size, tensor.axis) == (before.bits, before.group_size, before.axis)
        assert tensor.codes.shape == before.codes.shape
        assert tensor.scale.shape == before.scale.shape
        if before.zero_point is not None:
            assert torch.equal(tensor.zero_point, before.zero_point)
    assert any(not torch.equal(made.quantized[name].codes, start.quantized[name].codes) for name in made.quantized)
    parameters = dict(start.module.named_parameters())
    assert {name for name, value in parameters.items() if value.ndim == 1} == set(made.floats)


def test_the_models_given_are_not_changed(tuned):
    for build, family in ((llama, "llama"), (bert, "bert"), (convolutions, "conv")):
        teacher, start, _ = tuned[family]
        for name, value in build().module.named_parameters():
            assert torch.equal(teacher.module.get_parameter(name), value)
            assert teacher.module.get_parameter(name).grad is None
            assert start.module.get_parameter(name).grad is None
            if name in start.quantized:
                assert torch.equal(start.module.get_parameter(name), dequantize(start.quantized[name]))


def test_the_same_twice():
    teacher = llama()
    start, inputs = rounded(teacher, 4), data(teacher, 20, seed=1)
    settings = Qat(method="qat", steps=8, batch=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one, two = (fine_tune(start, teacher, inputs, settings) for _ in range(2))
        other = fine_tune(start, teacher, inputs, settings.model_copy(update={"seed": 1}))
    finally:
        torch.set_num_threads(threads)
    assert {n: digest(t) for n, t in one.quantized.items()} == {n: digest(t) for n, t in two.quantized.items()}
    assert one.floats.keys() == two.floats.keys()
    assert all(torch.equal(value, two.floats[name]) for name, value in one.floats.items())
    assert (one.loss_before, one.loss_after) == (two.loss_before, two.loss_after)
    assert other.loss_before != one.loss_before  # other inputs are held out


def test_an_interrupted_training_goes_on_with_the_same_bits(tmp_path: Path):
    teacher = llama()
    start, inputs = rounded(teacher, 4), data(teacher, 20, seed=1)
    settings, checkpoint = Qat(method="qat", steps=8, batch=2), tmp_path / "qat.safetensors"
    seen: list[int] = []

    def interrupt(step: int, _steps: int, _loss: float) -> None:
        seen.append(step)
        if step == 5 and seen.count(5) == 1:
            raise KeyboardInterrupt

    whole = fine_tune(start, teacher, inputs, settings)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(start, teacher, inputs, settings, checkpoint=checkpoint, progress=interrupt)
    made = fine_tune(start, teacher, inputs, settings, checkpoint=checkpoint, progress=interrupt)
    assert seen == [1, 2, 3, 4, 5, 5, 6, 7, 8]  # with eight steps every one is a check
    assert {n: digest(t) for n, t in made.quantized.items()} == {n: digest(t) for n, t in whole.quantized.items()}
    assert all(torch.equal(value, whole.floats[name]) for name, value in made.floats.items())
    assert (made.loss_before, made.loss_after) == (whole.loss_before, whole.loss_after)
    assert not checkpoint.exists()


def test_training_scales_alone_leaves_the_codes():
    teacher = bert()
    start, seen = rounded(teacher, 2), []
    settings = Qat(method="qat", steps=20, train="scales")
    made = fine_tune(start, teacher, data(teacher, 60, seed=1), settings, progress=lambda *report: seen.append(report))
    assert made.loss_after < made.loss_before
    for name, tensor in made.quantized.items():
        assert torch.equal(tensor.codes, start.quantized[name].codes)
    assert any(not torch.equal(made.quantized[name].scale, start.quantized[name].scale) for name in made.quantized)
    assert [(done, total) for done, total, _ in seen] == [(step, 20) for step in range(1, 21)]
    assert all(math.isfinite(value) and value > 0 for _, _, value in seen)


def test_an_absurd_learning_rate_returns_the_start():
    teacher = llama()
    start = rounded(teacher, 4)
    settings = Qat(method="qat", steps=10, learning_rate=10)
    made = fine_tune(start, teacher, data(teacher, 20, seed=1), settings)
    assert {n: digest(t) for n, t in made.quantized.items()} == {n: digest(t) for n, t in start.quantized.items()}
    assert made.floats == {}
    assert made.loss_after == made.loss_before


def test_palettes_stay_as_they_are():
    teacher = bert()
    start = rounded(teacher, 2)
    name = "encoder.layer.0.intermediate.dense.weight"
    palette = quantize_palette(
        teacher.module.get_parameter(name), bits=4, group_size=None, scale_dtype="float16", importance=None
    )
    start = installed(start, {**start.quantized, name: palette}, {})
    made = fine_tune(start, teacher, data(teacher, 40, seed=1), Qat(method="qat", steps=10))
    assert made.loss_after < made.loss_before
    assert digest(made.quantized[name]) == digest(palette)


def test_one_input_is_not_enough():
    teacher = llama()
    with pytest.raises(BadInputError, match="held out") as error:
        fine_tune(rounded(teacher, 4), teacher, data(teacher, 1, seed=1), SETTINGS)
    assert error.value.where == "[calibration]"


def small(codes: list[list[int]], scale: list[list[float]], zero: list[list[int]] | None = None) -> QuantizedTensor:
    return QuantizedTensor(
        codes=torch.tensor(codes, dtype=torch.int8),
        scale=torch.tensor(scale),
        zero_point=None if zero is None else torch.tensor(zero, dtype=torch.int8),
        bits=3,
        group_size=2,
        scale_dtype="bfloat16",
    )


def test_gradients_by_hand():
    weight = TrainedWeight(small([[1, -2, 3, 0]], [[0.5, -2.0]]), torch.Generator())
    with torch.no_grad():
        # In steps; the grid goes from -4 to 3. 0.7 rounds up, -4.2 and 3.6 are cut off, -1.5 rounds to even.
        weight.master.copy_(torch.tensor([[[0.7, -4.2], [3.6, -1.5]]]))
    value = weight.value()
    assert torch.equal(value, torch.tensor([[0.5, -2.0, -6.0, 4.0]]))
    value.backward(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    # Inside the grid the scale times what arrives, outside 0.
    assert torch.equal(weight.master.grad, torch.tensor([[[0.5, 0.0], [0.0, -2000.0]]]))
    # d value / d log s = s * code, codes 1, -4 | 3, -2.
    expected = torch.tensor([[[0.5 * (1 - 40)], [-2.0 * (300 - 2000)]]])
    assert torch.allclose(weight.log_ratio.grad, expected)


def test_zero_points_shift_the_grid():
    weight = TrainedWeight(small([[1, -4]], [[0.25]], [[-3]]), torch.Generator())
    with torch.no_grad():
        weight.master.copy_(torch.tensor([[[6.4, -1.2]]]))  # steps go from -1 to 6
    value = weight.value()
    assert torch.equal(value, torch.tensor([[1.5, -0.25]]))
    value.sum().backward()
    assert torch.equal(weight.master.grad, torch.zeros(1, 1, 2))
    assert torch.equal(weight.tensor().codes, torch.tensor([[3, -4]], dtype=torch.int8))
    weight.stay_on_grid()
    assert torch.equal(weight.master.detach(), torch.tensor([[[6.0, -1.0]]]))


@pytest.mark.parametrize("scale_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_computed_with_is_what_is_stored(scale_dtype, symmetric):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, 3, 4, generator=generator)
    start = quantize_rtn(weight, Grid(4, 8, symmetric, scale_dtype))
    trained = TrainedWeight(start, generator)
    assert digest(trained.tensor()) == digest(start)
    assert torch.equal(trained.value(), dequantize(start))
    with torch.no_grad():
        trained.master += torch.randn(trained.master.shape, generator=generator)
        trained.log_ratio += torch.randn(trained.log_ratio.shape, generator=generator) / 9
    stored = trained.tensor()
    assert torch.equal(trained.value(), dequantize(stored))
    assert torch.equal(stored.scale, round_scale(stored.scale, scale_dtype))
    assert not torch.equal(stored.codes, start.codes)


def test_padding_does_not_count():
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(1, 5, 7, generator=generator), torch.randn(1, 5, 7, generator=generator)
    mask = {"attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    p, q = one[:, :3].double().softmax(-1), two[:, :3].double().softmax(-1)
    divergence = float((p * (p / q).log()).sum(-1).mean())
    assert float(distance({"logits": two}, {"logits": one}, mask)) == pytest.approx(divergence, rel=1e-5)
    relative = float((one[:, :3] - two[:, :3]).norm() ** 2 / one[:, :3].norm() ** 2)
    assert float(distance({"hidden": two}, {"hidden": one}, mask)) == pytest.approx(relative, rel=1e-5)


def test_the_learning_rate_rises_and_falls():
    factors = [rate_factor(40, 0.05)(step) for step in range(40)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert factors[21] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert 0 < factors[-1] < 0.01


def recipe(*steps: dict[str, object]) -> Recipe:
    return parse_mapping(Recipe, {"name": "x", "summary": "x", "compress": list(steps), "gate": {}}, "test")


GPTQ = {"method": "gptq", "linear": "int4_g32", "embedding": "int4_g32"}


def test_through_a_recipe_and_storage(tmp_path: Path):
    model, target = llama(), load_target("linux-x86_64-ort")
    asked = recipe(GPTQ, {"method": "qat", "steps": 30})
    inputs = [{name: value.numpy() for name, value in sample.items()} for sample in data(model, 100, seed=1)]
    calibration = Samples(inputs, SampleRecord("random", False, {}, "all", None, 100))
    _, before = apply_recipe(model, recipe(GPTQ), target, calibration=calibration)
    losses: list[float] = []
    other, records = apply_recipe(
        model, asked, target, calibration=calibration, training=lambda _done, _total, value: losses.append(value)
    )
    assert len(losses) == 30
    # The head and the table are one weight, before and after.
    assert other.module.lm_head.weight is other.module.model.embed_tokens.weight
    assert "lm_head.weight" not in other.quantized
    parameters = dict(other.module.named_parameters())
    for record, untrained in zip(records, before, strict=True):
        if record.sha256 is None:
            continue
        assert torch.equal(parameters[record.name], dequantize(other.quantized[record.name]))
        assert record.sha256 == digest(other.quantized[record.name])
        assert record.bytes_after == untrained.bytes_after
        if record.sha256 != untrained.sha256:
            assert record.method == f"{untrained.method}+qat"
            assert record.output_error is None
    assert {record.method for record in records} >= {"gptq+qat"}
    norms = [name for name, value in parameters.items() if value.ndim == 1]
    assert any(not torch.equal(parameters[name], model.module.get_parameter(name)) for name in norms)
    save_compressed(tmp_path, model, other, records)
    assert load_records(tmp_path) == records
    again = load_compressed(tmp_path, model, assign(model, asked, target))
    for name, value in again.module.named_parameters():
        assert torch.equal(value, parameters[name]), name
    assert all(digest(again.quantized[name]) == digest(tensor) for name, tensor in other.quantized.items())


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{"method": "qat"}], "before the step that quantizes"),
        ([{"method": "qat"}, GPTQ], "before the step that quantizes|after the step that quantizes"),
        ([GPTQ, {"method": "qat"}, {"method": "qat"}], "once"),
        ([GPTQ, {"method": "qat"}, {"method": "awq"}], "before the step that quantizes"),
        ([{"method": "awq"}, {"method": "qat"}, GPTQ], "after the step that quantizes"),
    ],
)
def test_training_in_the_wrong_place_is_refused(steps, words):
    with pytest.raises(BadInputError, match=words):
        recipe(*steps)


def test_a_recipe_that_trains_needs_data():
    asked = recipe({"method": "awq"}, {"method": "rtn", "linear": "int4_g32"}, {"method": "qat"})
    assert asked.calibrates
    assert recipe({"method": "rtn"}, {"method": "qat"}).calibrates
    assert [step.method for step in asked.prepare] == ["awq"]
    assert isinstance(asked.quantize, RoundToNearest)
    assert asked.tune == Qat(method="qat")

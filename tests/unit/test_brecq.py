"""Block reconstruction: its loss by hand, and what it gives on small models of three families."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, LlamaConfig

from edgeport.compress import apply_recipe, assign
from edgeport.compress.chain import hidden_states
from edgeport.compress.journal import Journal
from edgeport.compress.quantize.brecq import block_loss, reconstruct
from edgeport.compress.quantize.grid import Grid
from edgeport.compress.quantize.palette import quantize_palette
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.compress.saved import load_compressed, save_compressed
from edgeport.data.samples import SampleRecord, Samples
from edgeport.errors import BadInputError
from edgeport.model.build import build_huggingface
from edgeport.model.types import Model, Source, TensorSpec
from edgeport.quantized import code_range, dequantize, digest, round_scale
from edgeport.recipe import Brecq, Recipe
from edgeport.schema import parse_mapping
from edgeport.target import load_target

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = ("bert", "llama")
BRECQ = {"method": "brecq", "steps": 40, "batch": 3, "learning_rate": 0.03}


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


def data(count: int, seed: int, *, padding: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        mask = torch.ones(1, 12, dtype=torch.long)
        mask[:, 12 - padding :] = 0
        found.append({"input_ids": torch.randint(1, 64, (1, 12), generator=generator), "attention_mask": mask})
    return found


def calibration(count: int = 120) -> Samples:
    inputs = [{name: value.numpy() for name, value in sample.items()} for sample in data(count, seed=1)]
    return Samples(inputs, SampleRecord("random", False, {}, "all", None, count))


def recipe(*steps: dict[str, object]) -> Recipe:
    return parse_mapping(Recipe, {"name": "x", "summary": "x", "compress": list(steps), "gate": {}}, "test")


def blocks(model: Model) -> torch.nn.ModuleList:
    return model.module.encoder.layer if model.name == "tiny" and hasattr(model.module, "encoder") else layers(model)


def layers(model: Model) -> torch.nn.ModuleList:
    found: torch.nn.ModuleList = model.module.model.layers
    return found


def last_states(model: Model, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """What the last block gives, (T, H) for each input."""
    states = []
    handle = blocks(model)[-1].register_forward_hook(lambda _m, _a, output: states.append(hidden_states(output)[0]))
    with torch.no_grad():
        for sample in inputs:
            model.module(**sample)
    handle.remove()
    return states


def error(model: Model, other: Model, inputs: list[dict[str, torch.Tensor]]) -> float:
    """Mean over tokens of |y - y'|^2 / |y'|^2 after the last block, in float64."""
    pairs = zip(last_states(other, inputs), last_states(model, inputs), strict=True)
    per = [((y.double() - w.double()).norm(dim=-1) / w.double().norm(dim=-1)).square().mean() for y, w in pairs]
    return float(torch.stack(per).mean())


FORM = {"linear": ["uint2_g32", "int8"], "embedding": "int8", "activations": ["dynamic_int8", "float"]}


@pytest.fixture(scope="module")
def target():
    return load_target("linux-x86_64-ort")


@pytest.fixture(scope="module")
def made(target):
    """family -> (float model, after rtn, after brecq, records of the two)."""
    found = {}
    for family in FAMILIES:
        model, seen = built(family), calibration()
        nearest = {"method": "rtn", **FORM}
        before, records = apply_recipe(model, recipe(nearest), target, calibration=seen)
        after, tuned = apply_recipe(model, recipe(nearest, BRECQ), target, calibration=seen)
        found[family] = model, before, after, records, tuned
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_on_inputs_never_seen_the_blocks_are_closer(made, family):
    model, before, after, _, _ = made[family]
    fresh = data(40, seed=2)
    assert error(model, after, fresh) < 0.8 * error(model, before, fresh)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_form_stays_on_the_targets_grid(made, family):
    _, before, after, records, tuned = made[family]
    assert after.quantized.keys() == before.quantized.keys()
    for name, tensor in after.quantized.items():
        start = before.quantized[name]
        lowest, highest = code_range(tensor.bits, symmetric=tensor.zero_point is None)
        assert tensor.codes.dtype == torch.int8
        assert lowest <= int(tensor.codes.min()) <= int(tensor.codes.max()) <= highest
        assert torch.equal(tensor.scale, round_scale(tensor.scale, tensor.scale_dtype))
        assert (tensor.bits, tensor.group_size, tensor.scale_dtype) == (start.bits, start.group_size, start.scale_dtype)
        assert torch.equal(after.module.get_parameter(name), dequantize(tensor))
    changed = {record.name for record in tuned if record.method == "rtn+brecq"}
    linears = {name for name in after.quantized if "embed" not in name and "pooler" not in name}
    assert changed == linears
    sizes = {record.name: record.bytes_after for record in records}
    for record in tuned:
        assert record.bytes_after == sizes[record.name]
        if record.sha256 is not None:
            assert record.sha256 == digest(after.quantized[record.name])


def test_the_float_model_is_not_changed(made):
    for family in FAMILIES:
        for name, value in built(family).module.named_parameters():
            assert torch.equal(made[family][0].module.get_parameter(name), value)
            assert made[family][0].module.get_parameter(name).requires_grad == value.requires_grad


def linear_block(bits: int = 2):
    """One layer as a block: start, float weight, forward over random inputs, what is wanted."""
    generator = torch.Generator().manual_seed(3)
    weight, mix = torch.randn(16, 32, generator=generator), torch.randn(6, 32, generator=generator)
    # Inputs that lie near a plane of few dimensions: errors of some weights can be made up for by others.
    inputs = torch.randn(30, 1, 9, 6, generator=generator) @ mix + 0.1 * torch.randn(30, 1, 9, 32, generator=generator)
    start = quantize_rtn(weight, Grid(bits, 16, False, "float16"))
    wanted = [sample @ weight.T for sample in inputs]

    def forward(index: int, values: dict[str, torch.Tensor]) -> torch.Tensor:
        return inputs[index] @ values["w"].T

    return start, weight, forward, wanted, inputs


def test_the_losses_are_those_of_what_is_returned():
    start, weight, forward, wanted, inputs = linear_block()
    settings = Brecq(method="brecq", steps=30, learning_rate=0.03)
    reports: list[tuple[int, float]] = []
    found = reconstruct(
        forward, wanted, [None] * 30, {"w": start}, {"w": weight}, settings, progress=lambda *r: reports.append(r)
    )
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    held = inputs[order[:6]].double()
    exact = held @ weight.double().T

    def loss(matrix: torch.Tensor) -> float:
        return float(((held @ matrix.double().T - exact).norm(dim=-1) / exact.norm(dim=-1)).square().mean())

    assert found.loss_before == pytest.approx(loss(dequantize(start)), rel=1e-5)
    assert found.loss_after == pytest.approx(loss(dequantize(found.quantized["w"])), rel=1e-5)
    assert found.loss_after < 0.9 * found.loss_before
    assert [step for step, _ in reports] == list(range(1, 31))


def test_an_absurd_learning_rate_returns_the_start():
    start, weight, forward, wanted, _ = linear_block(4)
    settings = Brecq(method="brecq", steps=5, learning_rate=10)
    found = reconstruct(forward, wanted, [None] * 30, {"w": start}, {"w": weight}, settings)
    assert digest(found.quantized["w"]) == digest(start)
    assert found.loss_after == found.loss_before


def test_palettes_stay_as_they_are():
    start, weight, forward, wanted, _ = linear_block()
    palette = quantize_palette(weight, bits=3, group_size=None, scale_dtype="float16", importance=None)
    settings = Brecq(method="brecq", steps=5)
    found = reconstruct(forward, wanted, [None] * 30, {"w": palette}, {"w": weight}, settings)
    assert digest(found.quantized["w"]) == digest(palette)

    def both(index: int, values: dict[str, torch.Tensor]) -> torch.Tensor:
        return forward(index, {"w": values["w"]}) + forward(index, {"w": values["p"]})

    twice = [2 * value for value in wanted]
    settings = Brecq(method="brecq", steps=30, learning_rate=0.03)
    found = reconstruct(both, twice, [None] * 30, {"w": start, "p": palette}, {"w": weight, "p": weight}, settings)
    assert digest(found.quantized["p"]) == digest(palette)
    assert found.loss_after < found.loss_before


def test_the_loss_by_hand():
    wanted = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [100.0, 0.0]]])
    output = torch.tensor([[[3.0, 3.0], [1.0, 1.0], [0.0, 0.0]]])
    assert float(block_loss(output, wanted)) == pytest.approx((1 / 25 + 2 / 4 + 1) / 3)
    assert float(block_loss(output, wanted, torch.tensor([[1, 1, 0]]))) == pytest.approx((1 / 25 + 2 / 4) / 2)
    # A feature map has no tokens: it counts as one vector.
    feature, other = wanted.unsqueeze(0), output.unsqueeze(0)
    assert float(block_loss(other, feature)) == pytest.approx((1 + 2 + 10000) / (25 + 4 + 10000))
    # A vector of zeros is measured with the mean energy.
    zero = torch.tensor([[[0.0, 0.0], [2.0, 0.0]]])
    assert float(block_loss(zero + 1, zero)) == pytest.approx((2 / 2 + 2 / 4) / 2)


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path, target):
    model, asked = built("bert"), recipe({"method": "gptq", **FORM}, {**BRECQ, "steps": 10})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    class Killed(Exception):
        pass

    class Dying(Journal):
        def write(self, *args: object) -> None:
            super().write(*args)
            raise Killed

    try:
        whole, _ = apply_recipe(model, asked, target, calibration=calibration())
        with pytest.raises(Killed):
            apply_recipe(model, asked, target, calibration=calibration(), journal=Dying(tmp_path))
        steps: list[int] = []
        resumed, _ = apply_recipe(
            model,
            asked,
            target,
            calibration=calibration(),
            journal=Journal(tmp_path),
            training=lambda done, _total, _loss: steps.append(done),
        )
    finally:
        torch.set_num_threads(threads)
    assert steps == list(range(1, 11))  # the second block alone
    assert {n: digest(t) for n, t in resumed.quantized.items()} == {n: digest(t) for n, t in whole.quantized.items()}
    for name, value in whole.module.named_parameters():
        assert torch.equal(resumed.module.get_parameter(name), value)


def test_after_gptq_and_through_storage(tmp_path: Path, target):
    model = built("bert")
    gptq = {"method": "gptq", **FORM}
    asked = recipe(gptq, {**BRECQ, "steps": 20})
    assert asked.calibrates
    after, records = apply_recipe(model, asked, target, calibration=calibration())
    assert "gptq+brecq" in {record.method for record in records}
    assert {record.method for record in records if record.sha256} <= {"rtn", "gptq", "gptq+brecq"}
    save_compressed(tmp_path, model, after, records)
    again = load_compressed(tmp_path, model, assign(model, asked, target))
    assert {n: digest(t) for n, t in again.quantized.items()} == {n: digest(t) for n, t in after.quantized.items()}


def test_one_sample_is_not_enough():
    start, weight, forward, wanted, _ = linear_block()
    with pytest.raises(BadInputError, match="held out"):
        reconstruct(forward, wanted[:1], [None], {"w": start}, {"w": weight}, Brecq(method="brecq"))


def test_outputs_that_are_not_finite_are_refused():
    start, weight, forward, wanted, _ = linear_block()
    damaged = [value / 0 for value in wanted]
    with pytest.raises(BadInputError, match="not finite"):
        reconstruct(forward, damaged, [None] * 30, {"w": start}, {"w": weight}, Brecq(method="brecq"))


def test_a_model_without_blocks_is_refused(target):
    model = Model(
        name="flat",
        module=torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).eval(),
        source=Source("factory", "flat", {}),
        task="image-classification",
        modality="other",
        inputs=(TensorSpec("input", "float32", (1, 32)),),
        outputs=(TensorSpec("output", "float32", (1, 8)),),
        example={"input": torch.zeros(1, 32)},
        huggingface=False,
    )
    inputs = [{"input": torch.randn(1, 32).numpy()} for _ in range(4)]
    seen = Samples(inputs, SampleRecord("random", False, {}, "all", None, 4))
    with pytest.raises(BadInputError, match="no chain of blocks"):
        apply_recipe(model, recipe({"method": "rtn", "linear": "int8"}, BRECQ), target, calibration=seen)


@pytest.mark.parametrize(
    "steps",
    [
        [BRECQ],
        [BRECQ, {"method": "rtn"}],
        [{"method": "rtn"}, BRECQ, BRECQ],
        [{"method": "rtn"}, {"method": "qat"}, BRECQ],
    ],
)
def test_tuning_in_the_wrong_place_is_refused(steps):
    with pytest.raises(BadInputError, match="the step that quantizes"):
        recipe(*steps)

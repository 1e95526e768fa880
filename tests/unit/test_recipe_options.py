"""Every option of a recipe changes something, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from edgeport.compress import apply_recipe, assign
from edgeport.compress.portable import check_some_target_takes, portable_target
from edgeport.data.samples import SampleRecord, Samples
from edgeport.errors import BadInputError, TargetRefusesError
from edgeport.model.build import build_huggingface
from edgeport.model.types import Model, Source
from edgeport.quantized import dequantize, round_scale
from edgeport.recipe import Recipe, load_recipe
from edgeport.schema import parse_mapping
from edgeport.target import load_target, target_names

TARGET = load_target("linux-x86_64-ort")


def recipe(*steps: dict[str, object], **tables: object) -> Recipe:
    values = {"name": "x", "summary": "x", "compress": list(steps), "gate": {}, **tables}
    return parse_mapping(Recipe, values, "test")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 64)
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 8)
        self.conv = nn.Conv1d(64, 64, 3)


@pytest.fixture
def net() -> Model:
    torch.manual_seed(0)
    return Model("net", Net().eval(), Source("factory", "net", {}), "other", "other", (), (), {}, False)


def llama(hidden_size: int = 32, intermediate_size: int = 64) -> Model:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return build_huggingface(
        AutoModelForCausalLM.from_config(config).eval(),
        name="tiny",
        reference="tiny",
        kind="factory",
        task="text-generation",
        files={},
        assets={},
        licence=None,
        note=None,
    )


def test_without_a_search_the_largest_weight_decides_the_scale(net: Model):
    scales = {}
    for search in (True, False):
        asked = recipe({"method": "rtn", "linear": "int4_g32", "scale_search": search})
        scales[search] = apply_recipe(net, asked, TARGET)[0].quantized["first.weight"].scale
    groups = net.module.first.weight.detach().reshape(64, 2, 32)
    assert torch.equal(scales[False], round_scale(groups.abs().amax(2) / 7, "float16"))
    assert not torch.equal(scales[True], scales[False])


def test_awq_chooses_for_the_quantizer_that_follows():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 64, (1, 24), generator=generator) for _ in range(16)]
    inputs = [{"input_ids": row.numpy(), "attention_mask": torch.ones_like(row).numpy()} for row in ids]
    calibration = Samples(inputs, SampleRecord("random", False, {}, "all", None, 16))
    norms, lines = {}, []
    for search in (True, False):
        asked = recipe({"method": "awq"}, {"method": "rtn", "linear": "int4_g32", "scale_search": search})
        made, _ = apply_recipe(llama(), asked, TARGET, calibration=calibration, log=lines.append)
        norms[search] = torch.cat([p.detach().flatten() for p in made.module.parameters() if p.ndim == 1])
    assert not torch.equal(norms[True], norms[False])
    assert lines[0] == lines[1]
    assert lines[0].startswith("awq: ")
    assert lines[0].endswith(" pairs of layers scaled")


@pytest.mark.parametrize(
    ("method", "samples", "refused"), [("rtn", 128, True), ("rtn", 64, False), ("gptq", 128, False)]
)
def test_calibration_that_nothing_reads_is_refused(tmp_path: Path, method: str, samples: int, refused: bool):
    path = tmp_path / "mine.toml"
    step = f'[[compress]]\nmethod = "{method}"\nlinear = "int8"\n'
    path.write_text(f'name = "mine"\nsummary = "x"\n{step}[calibration]\nsamples = {samples}\n[gate]\n')
    if refused:
        with pytest.raises(BadInputError, match="changes nothing") as error:
            load_recipe(str(path))
        assert error.value.where == str(path)
    else:
        assert load_recipe(str(path)).calibration.samples == samples


def test_a_budget_of_bits_needs_a_choice():
    with pytest.raises(BadInputError, match=r"bits_per_weight' is wrong: .* name two or more"):
        recipe({"method": "gptq", "linear": "int4_g32", "embedding": "int8", "bits_per_weight": 5})


def test_a_pattern_that_excludes_nothing_is_refused_with_names_like_it(net: Model):
    asked = recipe({"method": "rtn", "linear": "int8", "exclude": ["first.wieght"]})
    with pytest.raises(BadInputError, match=r"'first\.wieght' matches no weight") as error:
        assign(net, asked, TARGET)
    assert "first.weight" in error.value.allowed
    rows = assign(net, recipe({"method": "rtn", "linear": "int8", "exclude": ["first*"]}), TARGET)
    assert {row.name: row.format.name for row in rows} == {
        "table.weight": "float",
        "first.weight": "float",
        "second.weight": "int8",
        "conv.weight": "float",
    }


@pytest.mark.parametrize(
    ("formats", "layer"),
    [
        ({"linear": "int5"}, "first.weight"),
        ({"conv": "int4_g32"}, "conv.weight"),
        ({"embedding": "int3_g32"}, "table.weight"),
        ({"linear": "int4_g32", "conv": "int8"}, None),
    ],
)
def test_without_a_target_some_target_must_take_each_format(net: Model, formats: dict[str, str], layer: str | None):
    asked = recipe({"method": "rtn", **formats})
    rows = assign(net, asked, portable_target(asked))
    if layer is None:
        check_some_target_takes(rows)
        return
    with pytest.raises(TargetRefusesError, match="No target takes") as error:
        check_some_target_takes(rows)
    assert error.value.where == f"layer {layer}"
    assert "int8" in error.value.allowed


@pytest.mark.parametrize("target", target_names())
def test_the_recipe_that_trains_fits_every_target_that_int4_fits(net: Model, target: str):
    trains, plain = load_recipe("int4-qat"), load_recipe("int4")
    assert trains.tune is not None
    assert trains.calibration.samples > plain.calibration.samples
    assert assign(net, trains, load_target(target)) == assign(net, plain, load_target(target))


@pytest.mark.parametrize("target", target_names())
def test_the_recipe_with_groups_of_64_takes_32_where_64_do_not_fit(target: str):
    """Rows of 96 and of 128 columns."""
    model = llama(hidden_size=96, intermediate_size=128)
    chosen, plain = (
        {row.name: (row.shape[1], row.format.name) for row in assign(model, load_recipe(name), load_target(target))}
        for name in ("int4-g64", "int4")
    )
    fits = {96: "int4_g32", 128: "int4_g64"}
    assert chosen == {
        name: (columns, fits[columns] if form == "int4_g32" else form) for name, (columns, form) in plain.items()
    }
    assert {columns for columns, _ in chosen.values()} == {96, 128}


def test_a_recipe_with_training_gives_the_same_size_and_a_smaller_loss():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 64, (1, 16), generator=generator) for _ in range(180)]
    inputs = [{"input_ids": row.numpy(), "attention_mask": torch.ones_like(row).numpy()} for row in ids[:160]]
    calibration = Samples(inputs, SampleRecord("random", False, {}, "all", None, 160))
    asked = load_recipe("int4-qat")
    assert asked.tune is not None
    shorter = (*asked.compress[:-1], asked.tune.model_copy(update={"steps": 60}))
    model, lines = llama(), []
    with torch.no_grad():
        for value in model.module.parameters():
            if value.ndim == 2:
                value.mul_(8)  # the initial 0.02 leaves logits that are all alike
    made = {}
    for name, steps in (("gptq", asked.compress[:-1]), ("qat", shorter)):
        chosen = asked.model_copy(update={"compress": steps})
        made[name], _ = apply_recipe(model, chosen, TARGET, calibration=calibration, log=lines.append)
    loss = {}
    for name, other in made.items():
        with torch.no_grad():
            wanted = [model.module(input_ids=row).logits.log_softmax(-1) for row in ids[160:]]
            got = [other.module(input_ids=row).logits.log_softmax(-1) for row in ids[160:]]
        loss[name] = float(
            sum((w.exp() * (w - g)).sum(-1).mean() for w, g in zip(wanted, got, strict=True)) / len(wanted)
        )
    # On inputs that neither saw.
    assert loss["qat"] < 0.93 * loss["gptq"], loss
    before, after = (float(word) for word in lines[-1].replace(",", "").split() if word[0].isdigit())
    assert lines[-1].startswith("qat: loss on held-out inputs ")
    assert after < 0.97 * before
    sizes = {name: sum(t.storage_bytes() for t in other.quantized.values()) for name, other in made.items()}
    assert sizes["qat"] == sizes["gptq"]
    for name, tensor in made["qat"].quantized.items():
        assert torch.equal(made["qat"].module.get_parameter(name), dequantize(tensor))


@pytest.mark.parametrize("target", target_names())
def test_the_accurate_recipe_keeps_8_bits_or_float_on_every_target(net: Model, target: str):
    rows = assign(net, load_recipe("int8-accurate"), load_target(target))
    assert {row.format.bits for row in rows} <= {8, 32}
    assert sum(row.format.bits == 8 for row in rows) >= 3


def test_the_accurate_recipe_spends_its_bits_on_what_loses_most():
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(0, 64, (1, 16), generator=generator) for _ in range(64)]
    inputs = [{"input_ids": row.numpy(), "attention_mask": torch.ones_like(row).numpy()} for row in ids[:32]]
    calibration = Samples(inputs, SampleRecord("random", False, {}, "all", None, 32))
    model, lost = llama(), {}
    with torch.no_grad():
        for value in model.module.parameters():
            if value.ndim == 2:
                value.mul_(8)  # the initial 0.02 leaves logits that are all alike
        wanted = [model.module(input_ids=row).logits.log_softmax(-1) for row in ids[32:]]
    for name in ("int8", "int8-accurate"):
        made, records = apply_recipe(model, load_recipe(name), TARGET, calibration=calibration)
        with torch.no_grad():
            got = [made.module(input_ids=row).logits.log_softmax(-1) for row in ids[32:]]
        lost[name] = sum(float((w.exp() * (w - g)).sum(-1).mean()) for w, g in zip(wanted, got, strict=True))
        weights = sum(record.bytes_before / 4 for record in records)
        assert 8 * sum(record.bytes_after for record in records) / weights <= 8.5 or name == "int8"
    assert lost["int8-accurate"] < 0.85 * lost["int8"]

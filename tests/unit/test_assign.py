"""A recipe meets a target: what each weight becomes, and what is refused."""

from pathlib import Path

import pytest
import torch

from edgeport.compress import apply_recipe, assign
from edgeport.errors import BadInputError, TargetRefusesError
from edgeport.model.types import Model, Source
from edgeport.quantized import dequantize
from edgeport.recipe import Quantize, Recipe, load_recipe, recipe_names
from edgeport.schema import parse_mapping
from edgeport.target import load_target, target_names


class Net(torch.nn.Module):
    """One layer of each kind; the head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 32)
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.depthwise = torch.nn.Conv2d(8, 8, 3, groups=8)
        self.fc = torch.nn.Linear(32, 32)
        self.odd = torch.nn.Linear(20, 4)
        self.head = torch.nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight


def model_of(module: torch.nn.Module) -> Model:
    torch.manual_seed(0)
    return Model(
        name="net",
        module=module.eval(),
        source=Source("factory", "tests:net", {}),
        task="other",
        modality="other",
        inputs=(),
        outputs=(),
        example={},
        huggingface=False,
    )


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return model_of(Net())


def formats(model: Model, recipe: str, target: str) -> dict[str, tuple[str, str]]:
    rows = assign(model, load_recipe(recipe), load_target(target))
    return {row.name: (row.format.name, row.activation) for row in rows}


def test_onnxruntime_takes_every_kind_and_runs_linear_dynamically(model):
    assert formats(model, "int8", "android-arm64-ort") == {
        "embed.weight": ("int8", "dynamic_int8"),  # tied: it is a linear layer too
        "conv.weight": ("int8", "float"),
        "depthwise.weight": ("int8", "float"),
        "fc.weight": ("int8", "dynamic_int8"),
        "odd.weight": ("int8", "dynamic_int8"),
    }


def test_xnnpack_leaves_depthwise_convolutions_in_float(model):
    chosen = formats(model, "int8", "android-arm64-executorch")
    assert chosen["depthwise.weight"] == ("float", "float")
    assert chosen["conv.weight"] == ("int8", "dynamic_int8")


def test_a_group_that_does_not_divide_falls_back_to_the_next_format(model):
    chosen = formats(model, "int4", "ios18-coreml")
    assert chosen["fc.weight"][0] == "int4_g32"
    assert chosen["odd.weight"][0] == "int8"


def test_a_table_of_a_few_rows_stays_in_float():
    rows = assign(
        model_of(torch.nn.ModuleDict({"types": torch.nn.Embedding(2, 32), "tokens": torch.nn.Embedding(9, 32)})),
        load_recipe("int8"),
        load_target("linux-x86_64-ort"),
    )
    assert {row.name: row.format.name for row in rows} == {"types.weight": "float", "tokens.weight": "int8"}
    assert "2 rows" in rows[0].reason


def test_a_tied_weight_is_one_row_with_all_its_names(model):
    rows = {row.name: row for row in assign(model, load_recipe("int8"), load_target("android-arm64-ort"))}
    assert rows["embed.weight"].tied == ("embed.weight", "head.weight")
    assert rows["embed.weight"].kinds == ("embedding", "linear")
    assert "head.weight" not in rows


def test_scales_are_searched_on_the_grid_the_target_stores(model):
    rows = assign(model, load_recipe("int4"), load_target("android-arm64-executorch"))
    by_name = {row.name: row for row in rows}
    assert by_name["fc.weight"].scale_dtype == "bfloat16"
    assert by_name["odd.weight"].scale_dtype == "float32"
    int4 = load_recipe("int4")
    step = {**int4.compress[-1].model_dump(include=set(Quantize.model_fields)), "method": "rtn", "correct_bias": False}
    nearest = Recipe.model_validate({**int4.model_dump(), "compress": [step]})
    compressed, _ = apply_recipe(model, nearest, load_target("android-arm64-executorch"))
    scale = compressed.quantized["fc.weight"].scale
    assert torch.equal(scale, scale.bfloat16().float())


def test_every_refusal_names_layer_and_alternatives(model):
    recipe = Recipe.model_validate(
        {
            "name": "mine",
            "summary": "",
            "compress": [{"method": "rtn", "linear": "int4_g32", "activations": "dynamic_int8"}],
            "gate": {},
        }
    )
    with pytest.raises(TargetRefusesError) as caught:
        assign(model, recipe, load_target("ios17-coreml"))
    assert caught.value.exit_code == 3
    assert "fc.weight" in caught.value.where
    assert "int8" in caught.value.allowed
    with pytest.raises(TargetRefusesError, match="activations"):
        assign(model, recipe, load_target("ios18-coreml"))


def test_precision_the_target_lacks_is_refused(model):
    with pytest.raises(TargetRefusesError, match="fp16") as caught:
        assign(model, load_recipe("fp16"), load_target("raspberry-pi-5-executorch"))
    assert caught.value.allowed == "fp32"


def test_weight_only_linear_is_never_assigned_on_xnnpack(model):
    recipe = Recipe.model_validate(
        {
            "name": "weight-only",
            "summary": "",
            "compress": [{"method": "rtn", "linear": "int8", "activations": "float"}],
            "gate": {},
        }
    )
    with pytest.raises(TargetRefusesError):
        assign(model, recipe, load_target("android-arm64-executorch"))


def test_the_compressed_module_computes_with_exactly_the_logical_numbers(model):
    before = {n: p.clone() for n, p in model.module.named_parameters()}
    compressed, records = apply_recipe(model, load_recipe("int8"), load_target("linux-x86_64-ort"))
    parameters = dict(compressed.module.named_parameters(remove_duplicate=False))
    for name, tensor in compressed.quantized.items():
        assert torch.equal(parameters[name], dequantize(tensor))
    assert compressed.module.head.weight is compressed.module.embed.weight
    for name, value in model.module.named_parameters():
        assert torch.equal(value, before[name]), "the uncompressed model was changed in place"
    for record in records:
        weight = before[record.name]
        error = (parameters[record.name] - weight).norm() / weight.norm()
        assert record.relative_error == pytest.approx(float(error), rel=1e-5)
        assert record.bytes_after < record.bytes_before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(model, value):
    with torch.no_grad():
        model.module.fc.weight[3, 4] = value
    with pytest.raises(BadInputError, match="1 of 1024") as caught:
        apply_recipe(model, load_recipe("int8"), load_target("linux-x86_64-ort"))
    assert caught.value.where == "fc.weight"


def test_exclude_leaves_a_layer_alone(model):
    recipe = load_recipe("int8")
    step = recipe.compress[0].model_copy(update={"exclude": ("fc*",)})
    rows = assign(model, recipe.model_copy(update={"compress": (step,)}), load_target("linux-x86_64-ort"))
    assert {row.name: row.format.name for row in rows}["fc.weight"] == "float"


def test_every_shipped_target_and_recipe_reads():
    assert {load_recipe(name).name for name in recipe_names()} == set(recipe_names())
    targets = [load_target(name) for name in target_names()]
    assert {t.name for t in targets} == set(target_names())
    assert {t.runtime for t in targets} == {"onnxruntime", "executorch", "coreml"}
    assert all(t.sources for t in targets)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name = 'x'\n", "The key 'summary' is missing"),
        ("name = 'x'\nsummary = ''\ngate = {}\nbogus = 1\n", "'bogus' is unknown"),
        ("name = 'x'\nsummary = ''\n[gate]\ncosine_mim = 1\n", "Did you mean 'cosine_min'"),
        ("name = 'x'\nsummary = ''\n[gate]\ncosine_min = 10\n", "gate.cosine_min"),
        ("name = 'x'\nsummary = ''\ngate = {}\n[[compress]]\nmethod='rtn'\nlinear='int9'\n", "int9"),
        ("name = \n", "not valid TOML"),
    ],
)
def test_a_wrong_recipe_gives_one_clear_error(tmp_path: Path, text: str, expected: str):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(BadInputError) as caught:
        load_recipe(str(path))
    assert expected in str(caught.value)
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("load", [load_recipe, load_target])
def test_an_unknown_name_lists_what_there_is(load):
    with pytest.raises(BadInputError) as caught:
        load("int-8")
    assert caught.value.allowed


def two_bits(activations: list[str], linear: list[str]) -> Recipe:
    step = {"method": "rtn", "linear": linear, "embedding": ["uint2_g32", "int8"], "activations": activations}
    return parse_mapping(Recipe, {"name": "r", "summary": "s", "compress": [step], "gate": {}}, "r")


def test_formats_that_only_integers_multiply_fast_need_such_activations() -> None:
    """2 bits beside float activations would be slower than float32: never chosen, and refused before any work."""
    torch.manual_seed(0)
    plain = model_of(torch.nn.Sequential(torch.nn.Embedding(50, 32), torch.nn.Linear(32, 32)))
    target = load_target("linux-x86_64-ort")
    for activations, expected in ((["dynamic_int8", "float"], "uint2_g32"), (["float", "dynamic_int8"], "int8")):
        table, layer = assign(plain, two_bits(activations, ["uint2_g32", "int8"]), target)
        assert (table.format.name, layer.format.name) == ("uint2_g32", expected)
    with pytest.raises(TargetRefusesError, match="far slower than float32") as caught:
        assign(plain, two_bits(["float"], ["uint2_g32"]), target)
    assert caught.value.where == "layer 1.weight"

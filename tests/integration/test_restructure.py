"""Recipes that chain steps: what they promise is what lies on disk, and evidence compares with the original."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from edgeport.bundle.read import read_bundle
from edgeport.compress.cuts import load_restructured, save_restructured
from edgeport.compress.restructure import outline, parameter_count, restructure
from edgeport.compression import CompressRequest, compress
from edgeport.compression import plan as plan_compress
from edgeport.errors import BadInputError, TargetRefusesError
from edgeport.job import ExportRequest
from edgeport.model.compressed import load_compressed
from edgeport.model.load import load_model
from edgeport.model.types import SCORED
from edgeport.pipeline import export
from edgeport.pipeline import plan as plan_export
from edgeport.plan import GRAPH_BYTES
from edgeport.prepare import prepare
from edgeport.progress import Silent
from edgeport.recipe import Recipe
from edgeport.runtime.session import open_session
from edgeport.runtime.torch import TorchSession
from edgeport.schema import parse_mapping
from edgeport.target import load_target
from edgeport.vectors import load_vectors

ORT = "linux-x86_64-ort"
DEPTH = {"method": "prune_depth", "layers": 1}
WIDTH = {"method": "prune_width", "ffn": 0.5, "heads": 0.5}
LOWRANK = {"method": "lowrank", "keep": 0.6, "multiple": 1}
INT8 = {
    "method": "rtn",
    "linear": "int8",
    "embedding": "int8",
    "activations": ["dynamic_int8", "float"],
}


def recipe(*steps: dict[str, object]) -> Recipe:
    tables = {"calibration": {"samples": 8}, "gate": {}}
    return parse_mapping(Recipe, {"name": "chain", "summary": "x", "compress": list(steps), **tables}, "test")


def same_state(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    one, other = left.state_dict(), right.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_pruned_folder_is_what_from_pretrained_loads(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_model("llama")
    request = CompressRequest(str(source), recipe(DEPTH, WIDTH), tmp_path / "out", samples=8)
    planned = plan_compress(request)
    result = compress(request)
    folder = result.folder
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        stored = sum(file.get_tensor(name).numel() * 4 for name in file.keys())  # noqa: SIM118
    assert planned.bytes_after == stored == result.steps[-1].bytes_after
    assert 0 <= result.bytes_after - stored < 4096  # the file's header
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert loaded.config.num_hidden_layers == 1
    assert (loaded.config.num_attention_heads, loaded.config.num_key_value_heads) == (2, 1)
    assert loaded.config.intermediate_size == 64
    again = load_compressed(folder)
    assert same_state(loaded, again.module)
    call = load_vectors(folder / "reference" / "inputs.safetensors")[0]
    with torch.no_grad():
        wanted = loaded(**{name: torch.from_numpy(value) for name, value in call.items()}).logits.numpy()
    np.testing.assert_allclose(TorchSession(again).run(call)["logits"], wanted, rtol=1e-5, atol=1e-5)
    # The stored outputs are the original's.
    stored_outputs = load_vectors(folder / "reference" / "outputs.safetensors")[0]["logits"]
    np.testing.assert_allclose(TorchSession(load_model(str(source))).run(call)["logits"], stored_outputs, atol=1e-5)
    assert not np.allclose(stored_outputs, wanted, atol=1e-2)
    assert [step.method for step in result.steps] == ["prune_depth", "prune_width"]
    depth, width = result.steps
    assert depth.parameters_before == parameter_count(load_model(str(source)))
    assert depth.parameters_after == width.parameters_before
    assert width.parameters_after * 4 == stored
    assert width.flops_after < width.flops_before < depth.flops_before
    assert width.divergence > 0
    assert {part.after for part in depth.parts} == {"1 layer", "removed"}


def test_a_chain_ends_in_the_shipped_file(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_model("llama")
    request = ExportRequest(
        str(source), load_target(ORT), recipe(DEPTH, WIDTH, LOWRANK, INT8), tmp_path / "bundle", samples=4, quick=True
    )
    planned = plan_export(request)
    assert [stage.name for stage in planned.stages] == [
        *("reference", "restructure", "compress", "lower", "baseline", "validate")
    ]
    export(request)
    bundle = read_bundle(tmp_path / "bundle")
    steps = bundle.manifest.steps
    assert [step.method for step in steps] == ["prune_depth", "prune_width", "lowrank"]
    assert bundle.manifest.parameters == steps[0].parameters_before
    # Every weight of the file is the logical one, and there are those of one layer in two factors each.
    names = {layer.name for layer in bundle.manifest.layers}
    assert "model.layers.0.mlp.down_proj.factor_down.weight" in names
    assert not any(name.startswith("model.layers.1.") for name in names)
    assert bundle.evidence is not None
    weights = bundle.evidence.weights
    assert weights.checked == weights.equal == len(names)
    # Parameters of the layers with weights, counted once more from what the manifest says of each.
    counted = sum(int(np.prod(layer.shape)) for layer in bundle.manifest.layers)
    norms = 3 * 64
    assert counted + norms == steps[-1].parameters_after
    size = bundle.evidence.size
    graph = GRAPH_BYTES["onnxruntime"]
    assert abs(planned.predicted_bytes - graph - sum(layer.bytes_after for layer in bundle.manifest.layers)) < 2048
    assert size.bytes < size.baseline_bytes
    # What the evidence compares with are the original's outputs on the same tokens.
    golden = bundle.golden()
    original = TorchSession(load_model(str(source))).run(
        {"input_ids": golden.inputs[0]["input_ids"], "attention_mask": np.ones_like(golden.inputs[0]["input_ids"])}
    )["logits"][:, -SCORED:]
    np.testing.assert_allclose(golden.outputs[0]["logits"], original, atol=1e-4)
    own = open_session(bundle.artifact).run(golden.inputs[0])["logits"]
    assert own.shape == original.shape
    assert not np.allclose(own, original, atol=0.05)


def test_cuts_and_values_come_back(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_model(str(tiny_model("bert")))
    steps = recipe(
        {"method": "prune_depth", "layers": 1},
        {"method": "prune_width", "ffn": 0.5},
        LOWRANK,
        {"method": "sparsegpt", "sparsity": 0.5},
    )
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(3):
        ids = torch.randint(0, 128, (1, 24), generator=generator)
        inputs.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        )
    with pytest.raises(BadInputError, match="groups of 5"):
        restructure(model, recipe({"method": "sparsegpt", "pattern": "1:5"}), inputs)
    made = restructure(model, steps, inputs)
    save_restructured(tmp_path, model, made)
    again = load_restructured(tmp_path, model)
    assert same_state(made.model.module, again.model.module)
    assert dict(made.model.sparse) == dict(again.model.sparse)
    assert again.steps == made.steps
    assert again.cuts == made.cuts
    # The outline that plans are made on has the very shapes.
    shapes = {name: value.shape for name, value in outline(model, steps).module.state_dict().items()}
    assert shapes == {name: value.shape for name, value in made.model.module.state_dict().items()}
    (tmp_path / "second").mkdir()
    save_restructured(tmp_path / "second", model, restructure(model, steps, inputs))
    assert (tmp_path / "second" / "values.safetensors").read_bytes() == (tmp_path / "values.safetensors").read_bytes()
    assert json.loads((tmp_path / "second" / "cuts.json").read_text()) == json.loads(
        (tmp_path / "cuts.json").read_text()
    )


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([INT8, DEPTH], "comes before"),
        ([LOWRANK, DEPTH], "comes first"),
        ([LOWRANK, LOWRANK], "once each"),
        ([{"method": "magnitude", "sparsity": 0.5}, INT8], "either sparse or quantized"),
        ([{"method": "prune_width"}], "removes nothing"),
        ([{"method": "prune_depth", "layers": 0}], "greater than or equal to 1"),
        ([{"method": "lowrank", "keep": 1.5}], "less than 1"),
    ],
)
def test_recipes_that_make_no_sense(steps: list[dict[str, object]], words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        recipe(*steps)


@pytest.mark.parametrize("target", [ORT, "android-arm64-executorch"])
def test_zeros_that_save_nothing_are_refused(target: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    chosen = recipe({"method": "magnitude", "sparsity": 0.5})
    request = ExportRequest(str(tiny_model("bert")), load_target(target), chosen, tmp_path / "out")
    with pytest.raises(TargetRefusesError, match="save neither bytes nor time"):
        prepare(request, Silent())


def test_a_model_of_no_family_is_refused(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    request = ExportRequest(str(tiny_model("wav2vec2")), load_target(ORT), recipe(DEPTH), tmp_path / "out")
    with pytest.raises(BadInputError, match="does not know where"):
        prepare(request, Silent())
    too_deep = recipe({"method": "prune_depth", "layers": 2})
    with pytest.raises(BadInputError, match="2 layers"):
        prepare(ExportRequest(str(tiny_model("bert")), load_target(ORT), too_deep, tmp_path / "out"), Silent())


def test_gpt2_goes_back_to_transposed_weights(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 96, "initializer_range": 0.2}
    source = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(source)
    request = CompressRequest(
        str(source), recipe({**DEPTH, "layers": 2}, {"method": "prune_width", "ffn": 0.5}), tmp_path / "out", samples=4
    )
    folder = compress(request).folder
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert loaded.transformer.h[0].mlp.c_fc.weight.shape == (32, 64)
    again = load_compressed(folder).module
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, again(ids).logits, atol=1e-5)


def test_fewer_tokens_go_into_tables_head_and_tokenizer(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat in the hat\nthe hat and the cat")
    step = {"method": "prune_vocabulary", "tokens": 272, "corpus": str(corpus)}
    chosen = parse_mapping(Recipe, {"name": "chain", "summary": "x", "compress": [step, INT8], "gate": {}}, "test")
    source = tiny_model("llama")
    request = ExportRequest(str(source), load_target(ORT), chosen, tmp_path / "bundle", samples=4, quick=True)
    export(request)
    bundle = read_bundle(tmp_path / "bundle")
    table = next(layer for layer in bundle.manifest.layers if layer.name == "model.embed_tokens.weight")
    assert table.shape == (272, 64)
    assert table.tied == ("model.embed_tokens.weight", "lm_head.weight")
    assert bundle.evidence is not None
    assert bundle.evidence.weights.checked == bundle.evidence.weights.equal > 0
    tokenizer = Tokenizer.from_file(str(tmp_path / "bundle" / bundle.manifest.assets / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 272
    whole = Tokenizer.from_file(str(source / "tokenizer.json"))
    old = whole.get_vocab()
    kept = [old[token] for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    golden = bundle.golden()
    ids = golden.inputs[0]["input_ids"]
    original = load_model(str(source)).module
    with torch.no_grad():
        wanted = original(input_ids=torch.tensor(kept)[torch.from_numpy(ids)]).logits[:, -SCORED:, kept].numpy()
    np.testing.assert_allclose(golden.outputs[0]["logits"], wanted, atol=1e-4)
    # The baseline has all tokens.
    dense = 4 * sum(parameter.numel() for parameter in original.parameters())
    assert bundle.evidence.size.baseline_bytes > dense
    (record,) = bundle.manifest.steps
    assert (record.method, record.parameters_before - record.parameters_after) == ("prune_vocabulary", (320 - 272) * 64)
    assert bundle.manifest.parameters == record.parameters_before == dense // 4
    assert "320 to 272 tokens" in bundle.manifest.source.note


@pytest.mark.parametrize(("target", "pattern"), [("ios17-coreml", "2:4"), ("ios18-coreml", "1:4")])
def test_core_ml_stores_zeros_as_a_mask(
    target: str, pattern: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from edgeport.mlpackage.constants import constants
    from edgeport.mlpackage.package import load_package
    from edgeport.mlpackage.program import parse_function

    chosen = recipe({"method": "magnitude", "pattern": pattern})
    request = ExportRequest(
        str(tiny_model("bert")), load_target(target), chosen, tmp_path / "bundle", samples=4, quick=True
    )
    planned = plan_export(request)
    export(request)
    bundle = read_bundle(tmp_path / "bundle")
    facts = bundle.manifest.facts
    parts = {part.name: part for part in bundle.manifest.steps[0].parts}
    assert facts["sparse_weights"] == len(parts) == 12
    found = constants(parse_function(load_package(bundle.artifact.path)).body).values()
    masks = [one for one in found if one.operator == "constexpr_sparse_to_dense"]
    kept, group = (int(part) for part in pattern.split(":"))
    module = load_model(str(tiny_model("bert"))).module
    for one in masks:
        values = np.asarray(one.value())
        groups = (values.reshape(len(values), -1, group) != 0).sum(-1)
        assert (groups == kept).all()
        # The numbers left are the original's, the largest of each group, in float16.
        assert any(
            values.shape == tuple(weight.shape)
            and np.array_equal(np.where(values != 0, weight.half().float().numpy(), 0), values)
            for weight in (module.get_submodule(name).weight for name in parts)
        )
    weights = sum(module.get_submodule(name).weight.numel() for name in parts)
    assert bundle.evidence is not None
    size = bundle.evidence.size.bytes
    dense = sum(parameter.numel() for parameter in module.parameters()) * 2
    saved = weights * 2 - (weights * 2 * kept // group + weights // 8)
    assert abs(size - (dense - saved)) < 120_000  # the program around the weights
    assert abs(planned.predicted_bytes - GRAPH_BYTES["coreml"] - facts["weight_file_bytes"]) < 8_000  # blobs' headers
    assert facts["weight_file_bytes"] < dense - 0.9 * saved

"""`edgeport compress` on tiny models: the folder gives back every bit, and exports like the model it came from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy as copy_module
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeport.bundle.read import read_bundle
from edgeport.cli.main import main
from edgeport.compress import apply_recipe
from edgeport.compress.folder import Compressed, calibration_record, layer_records, write_compressed
from edgeport.compress.portable import portable_target
from edgeport.compress.stored import open_for_target
from edgeport.compression import CompressRequest, compress, plan
from edgeport.errors import BadInputError, TargetRefusesError
from edgeport.export.artifact import Artifact
from edgeport.export.dispatch import lower, read_weights
from edgeport.job import ExportRequest, Job
from edgeport.making import make_compressed
from edgeport.model.compressed import RECORD, WEIGHTS, load_compressed, read_record
from edgeport.model.load import load_model
from edgeport.model.types import SCORED
from edgeport.pipeline import export
from edgeport.pipeline import plan as plan_export
from edgeport.prepare import prepare
from edgeport.progress import Silent
from edgeport.quantized import digest
from edgeport.recipe import Recipe, load_recipe
from edgeport.runtime.session import open_session
from edgeport.runtime.torch import TorchSession
from edgeport.storage import canonical_json, hash_file, hash_tree, read_json
from edgeport.target import load_target
from edgeport.vectors import load_vectors

ORT = "linux-x86_64-ort"


def tiny_recipe(name: str) -> Recipe:
    """A recipe whose gate looks only at what this file is about: a tiny random model's numbers are no model's."""
    recipe = load_recipe(name)
    return recipe.model_copy(update={"gate": recipe.gate.model_copy(update={"size_ratio_max": None})})


def request(
    model: Path | str, output: Path, *, recipe: str = "int8", target: str | None = None, **more
) -> CompressRequest:
    chosen = None if target is None else load_target(target)
    return CompressRequest(str(model), tiny_recipe(recipe), output, target=chosen, samples=8, **more)


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A compressed folder of a tiny model, made once for each set of arguments."""
    made: dict[tuple[str, str, str | None], Path] = {}

    def get(architecture: str, recipe: str = "int8", target: str | None = None) -> Path:
        key = (architecture, recipe, target)
        if key not in made:
            output = tmp_path_factory.mktemp("compressed") / f"{architecture}-{recipe}"
            compress(request(tiny_model(architecture), output, recipe=recipe, target=target))
            made[key] = output
        return made[key]

    return get


@pytest.fixture
def copy(folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A compressed BERT to damage."""
    return shutil.copytree(folder("bert"), tmp_path / "copy")


def resign(folder: Path) -> None:
    """Make the record's hashes fit the files, as someone who damages a folder on purpose would."""
    record = read_json(folder / RECORD)
    record["files"] = {name: digest for name, digest in hash_tree(folder).items() if name != RECORD}
    (folder / RECORD).write_text(canonical_json(record))


@pytest.mark.parametrize(
    ("architecture", "recipe"),
    [("bert", "int8"), ("llama", "int4"), ("vit", "int4"), ("mobilenet", "int8"), ("t5", "int8"), ("wav2vec2", "int8")],
)
def test_what_is_loaded_is_what_was_compressed(
    architecture: str, recipe: str, folder: Callable[..., Path], tiny_model: Callable[[str], Path]
) -> None:
    original = load_model(str(tiny_model(architecture)))
    chosen = tiny_recipe(recipe)
    expected, _ = apply_recipe(original, chosen, portable_target(chosen))
    found = load_model(str(folder(architecture, recipe)))
    assert {n: digest(t) for n, t in found.quantized.items()} == {n: digest(t) for n, t in expected.quantized.items()}
    assert {n: t.scale_dtype for n, t in found.quantized.items()} == {
        n: t.scale_dtype for n, t in expected.quantized.items()
    }
    assert found.activations == expected.activations
    for field in ("name", "task", "modality", "inputs", "outputs", "image", "labels"):
        assert getattr(found, field) == getattr(original, field), field
    assert found.source.kind == "compressed"
    with torch.no_grad():
        one, other = (dict(m.module(**original.example)) for m in (found, expected))
    for name in (spec.name for spec in original.outputs):
        assert torch.equal(one[name], other[name])


def test_tied_weights_are_stored_once_and_stay_tied(folder: Callable[..., Path]) -> None:
    path = folder("llama", "int4")
    stored = load_file(path / WEIGHTS)
    assert "model.embed_tokens.weight.codes" in stored
    assert not [name for name in stored if name.startswith("lm_head")]
    module = load_model(str(path)).module
    assert module.lm_head.weight is module.model.embed_tokens.weight


def test_the_file_is_as_dense_as_the_formats_say(folder: Callable[..., Path]) -> None:
    path = folder("llama", "int4")
    model = load_model(str(path))
    packed = {
        name: part for name, part in load_file(path / WEIGHTS).items() if name.rpartition(".")[0] in model.quantized
    }
    assert sum(part.numel() * part.element_size() for part in packed.values()) == sum(
        tensor.storage_bytes() for tensor in model.quantized.values()
    )
    assert all(part.dtype == torch.bfloat16 for name, part in packed.items() if name.endswith(".scale"))


def lowered(wanted: ExportRequest, out: Path) -> tuple[Job, Artifact]:
    """The first half of an export: what would be shipped, without the measurements."""
    job = prepare(wanted, Silent())
    model, _, _ = make_compressed(job, Silent())
    out.mkdir()
    return job, lower(model, wanted.target, job.settings, out)


def test_the_folder_is_lowered_to_the_bytes_of_a_direct_export(
    folder: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    models = {"direct": tiny_model("vit"), "folder": folder("vit", "int4", ORT)}
    jobs = {}
    for name, model in models.items():
        wanted = ExportRequest(str(model), load_target(ORT), tiny_recipe("int4"), tmp_path / "out")
        jobs[name], _ = lowered(wanted, tmp_path / name)
    assert hash_tree(tmp_path / "folder") == hash_tree(tmp_path / "direct")
    assert jobs["folder"].lower_key != jobs["direct"].lower_key
    assert [(item.name, item.format, item.activation, item.scale_dtype) for item in jobs["folder"].assignments] == [
        (item.name, item.format, item.activation, item.scale_dtype) for item in jobs["direct"].assignments
    ]


def test_the_export_of_a_folder_measures_against_the_original(
    folder: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = folder("llama", "int4", ORT)
    wanted = ExportRequest(str(path), load_target(ORT), tiny_recipe("int4"), tmp_path / "bundle", quick=True)
    result = export(wanted)
    direct = ExportRequest(str(tiny_model("llama")), load_target(ORT), tiny_recipe("int4"), tmp_path / "out")
    lowered(direct, tmp_path / "direct")
    made, bundled = hash_tree(tmp_path / "direct"), hash_tree(tmp_path / "bundle" / "model")
    assert {name: digest for name, digest in bundled.items() if name in made} == made  # beside it lies the tokenizer
    evidence, manifest = result.evidence, result.manifest
    assert evidence["weights"]["equal"] == len(load_model(str(path)).quantized) > 0
    assert "dequantised weights" in manifest["source"]["note"]
    assert "stored when it was compressed" in evidence["data"]["slice"]
    assert evidence["data"]["samples"] == 8
    original = TorchSession(load_model(str(tiny_model("llama"))))
    session = open_session(read_bundle(tmp_path / "bundle").artifact)
    square = difference = 0.0
    for call in load_vectors(path / "reference" / "inputs.safetensors"):
        ours = session.run({"input_ids": call["input_ids"]})["logits"].astype(np.float64)
        theirs = original.run(call)["logits"].astype(np.float64)[:, -SCORED:]
        square, difference = square + (theirs**2).sum(), difference + ((ours - theirs) ** 2).sum()
    assert evidence["parity"][0]["relative_l2"] == pytest.approx((difference / square) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("target", ["android-arm64-executorch", "ios18-coreml"])
def test_a_portable_folder_goes_to_other_runtimes(target: str, folder: Callable[..., Path], tmp_path: Path) -> None:
    path = folder("llama", "int4")
    wanted = ExportRequest(str(path), load_target(target), tiny_recipe("int4"), tmp_path / "out")
    _, artifact = lowered(wanted, tmp_path / "lowered")
    logical = load_model(str(path)).quantized
    assert {name: digest(tensor) for name, tensor in read_weights(artifact).items()} == {
        name: digest(tensor) for name, tensor in logical.items()
    }


def test_a_plan_says_what_is_done_already(folder: Callable[..., Path], tmp_path: Path) -> None:
    planned = plan_export(
        ExportRequest(str(folder("bert")), load_target("ios18-coreml"), tiny_recipe("int8"), tmp_path / "out")
    )
    details = {stage.name: stage.detail for stage in planned.stages}
    assert details["compress"] == "recipe int8, done before"
    assert details["reference"] == "stored with the compressed model"
    assert "dequantised" in details["baseline"]
    token_types = "bert.embeddings.token_type_embeddings.weight"
    assert {layer.format for layer in planned.layers if layer.name != token_types} == {"int8"}
    assert {layer.activation for layer in planned.layers} == {"float"}


def test_two_runs_give_equal_bytes(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here, and in another process with another hash seed, cache and place."""
    packages = (Path(os.environ["EDGEPORT_CACHE"]) / "packages").resolve()
    caches = [tmp_path / "cache-one", tmp_path / "cache-two"]
    for cache in caches:
        cache.mkdir()
        (cache / "packages").symlink_to(packages, target_is_directory=True)
    monkeypatch.setenv("EDGEPORT_CACHE", str(caches[0]))
    script = (
        "import sys; from pathlib import Path; from edgeport.compression import CompressRequest, compress;"
        "from edgeport.recipe import Recipe; recipe = Recipe.model_validate_json(sys.argv[1]);"
        "compress(CompressRequest(sys.argv[2], recipe, Path(sys.argv[3]), samples=8))"
    )
    for name in ("here", "elsewhere"):
        shutil.copytree(tiny_model("llama"), tmp_path / name / "model")
    compress(request(tmp_path / "here" / "model", tmp_path / "one", recipe="int4"))
    arguments = [tiny_recipe("int4").model_dump_json(), str(tmp_path / "elsewhere" / "model"), str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "EDGEPORT_CACHE": str(caches[1])}
    subprocess.run([sys.executable, "-c", script, *arguments], env=environment, check=True, capture_output=True)
    assert hash_tree(tmp_path / "one") == hash_tree(tmp_path / "two")
    for name in (RECORD, "config.json", "reference/record.json"):
        assert str(tmp_path) not in (tmp_path / "one" / name).read_text()


def test_what_methods_were_tuned_on_comes_along(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "tuned",
            "summary": "",
            "compress": [{"method": "gptq", "linear": "int4_g32", "embedding": "int8", "activations": "float"}],
            "calibration": {"samples": 8},
            "gate": {},
        }
    )
    out = tmp_path / "folder"
    result = compress(CompressRequest(str(tiny_model("bert")), recipe, out, samples=4))
    record = read_record(out)
    assert layer_records(record) == result.layers
    tuned = calibration_record(record)
    assert tuned is not None
    assert tuned.samples == 8
    assert {layer.method for layer in result.layers if "linear" in layer.kinds} == {"gptq"}
    job = prepare(ExportRequest(str(out), load_target(ORT), recipe, tmp_path / "out"), Silent())
    assert job.compressed is not None
    assert job.compressed.calibration == tuned
    assert [layer.output_error for layer in job.compressed.layers] == [layer.output_error for layer in result.layers]


def test_ties_and_biases_that_a_pass_changed_come_back(
    tiny_model: Callable[[str], Path], folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Rotation gives a tied head a weight of its own, and folded norms give Linears biases that the config lacks."""
    original = load_model(str(tiny_model("llama")))
    module = copy_module(original.module)
    module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach() * 2)
    module.model.layers[1].mlp.up_proj.bias = torch.nn.Parameter(torch.randn(128))
    recipe = tiny_recipe("int8")
    model, layers = apply_recipe(replace(original, module=module), recipe, portable_target(recipe))
    out = tmp_path / "folder"
    out.mkdir()
    write_compressed(
        out, Compressed(original, model, recipe, None, layers, None, folder("llama", "int4") / "reference", {})
    )
    found = load_model(str(out)).module
    assert found.lm_head.weight is not found.model.embed_tokens.weight
    expected, actual = model.module.state_dict(), found.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    with torch.no_grad():
        assert torch.equal(found(**original.example).logits, model.module(**original.example).logits)


def test_fixed_grids_of_activations_come_back_where_the_target_takes_them(
    tiny_model: Callable[[str], Path], folder: Callable[..., Path], tmp_path: Path
) -> None:
    original = load_model(str(tiny_model("bert")))
    recipe = Recipe.model_validate(
        {
            "name": "static",
            "summary": "t",
            "compress": [
                {"method": "rtn", "linear": "int8", "activations": ["static_int8", "float"], "activation_budget": 100}
            ],
            "gate": {},
        }
    )
    model, layers = apply_recipe(original, recipe, portable_target(recipe))
    assert model.ranges
    out = tmp_path / "folder"
    out.mkdir()
    write_compressed(out, Compressed(original, model, recipe, None, layers, None, folder("bert") / "reference", {}))
    found = load_model(str(out))
    assert found.ranges == model.ranges
    there, _, _ = open_for_target(found, out, recipe, load_target(ORT))
    assert there.ranges == model.ranges
    # Core ML has no such kernels: the layer's next format is taken, and the grids stay behind.
    elsewhere, _, _ = open_for_target(found, out, recipe, load_target("ios18-coreml"))
    assert elsewhere.ranges == {}
    assert set(elsewhere.activations.values()) == {"float"}
    record = json.loads((out / RECORD).read_text())
    del record["ranges"][next(iter(record["ranges"]))]
    (out / RECORD).write_text(json.dumps(record))
    with pytest.raises(BadInputError, match="ranges don't fit"):
        load_model(str(out))


class _Sabotage:
    """A watcher that takes a file of the model away when the folder is about to be written."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def stage(self, name: str, detail: str = "") -> None:
        if name == "folder":
            self.victim.unlink()

    def update(self, done: int, total: int, detail: str = "") -> None:
        pass

    def message(self, text: str) -> None:
        pass


def test_a_run_that_fails_leaves_nothing(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model("bert"), tmp_path / "model")
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInputError, match="can't be written"):
        compress(request(model, tmp_path / "out" / "folder"), _Sabotage(model / "tokenizer_config.json"))
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_folder_is_replaced_only_with_force(copy: Path, tiny_model: Callable[[str], Path]) -> None:
    (copy / "mine.txt").write_text("keep")
    model = tiny_model("bert")
    with pytest.raises(BadInputError, match="exists already"):
        compress(request(model, copy))
    assert (copy / "mine.txt").exists()
    compress(request(model, copy, force=True))
    assert not (copy / "mine.txt").exists()
    (copy / RECORD).unlink()
    with pytest.raises(BadInputError, match="is no compressed model"):
        compress(request(model, copy, force=True))


def test_refusals_before_anything_long(
    folder: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(BadInputError, match="already compressed"):
        plan(request(folder("bert"), out))
    with pytest.raises(BadInputError, match="compresses no weight"):
        plan(request(tiny_model("bert"), out, recipe="fp32"))
    assert not out.exists()


def test_a_recipe_beside_the_recorded_one_is_refused(folder: Callable[..., Path], tmp_path: Path) -> None:
    wanted = ExportRequest(str(folder("bert")), load_target(ORT), tiny_recipe("int4"), tmp_path / "out")
    with pytest.raises(BadInputError, match="already compressed, by a recipe 'int8'"):
        plan_export(wanted)


def test_a_target_that_lacks_the_format_is_refused(folder: Callable[..., Path], tmp_path: Path) -> None:
    wanted = ExportRequest(
        str(folder("mobilenet")), load_target("android-arm64-executorch"), tiny_recipe("int8"), tmp_path / "out"
    )
    # Its depthwise kernels are static ones, and the folder has no ranges for activations.
    with pytest.raises(TargetRefusesError, match="can't run quantized depthwise_conv layers") as caught:
        plan_export(wanted)
    assert "static_int8" in (caught.value.allowed or "")


def test_shapes_that_the_stored_inputs_lack_are_refused(folder: Callable[..., Path], tmp_path: Path) -> None:
    wanted = ExportRequest(str(folder("bert")), load_target(ORT), tiny_recipe("int8"), tmp_path / "out", sequence=48)
    with pytest.raises(BadInputError, match="does not fit the shapes") as caught:
        plan_export(wanted)
    assert caught.value.allowed == "a sequence of 48"


def test_inputs_of_one_length_fit_fixed_shapes(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    compress(request(tiny_model("bert"), tmp_path / "folder", sequence=48))
    wanted = ExportRequest(
        str(tmp_path / "folder"), load_target(ORT), tiny_recipe("int8"), tmp_path / "out", sequence=48
    )
    assert plan_export(wanted).shapes == "fixed"


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    resign(folder)


def _edit(folder: Path, change: Callable[[dict], None]) -> None:
    record = read_json(folder / RECORD)
    change(record)
    (folder / RECORD).write_text(canonical_json(record))


NAME = "bert.encoder.layer.0.attention.self.query.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "record missing": (lambda f: (f / RECORD).unlink(), "A file is missing"),
    "record damaged": (lambda f: (f / RECORD).write_text("{"), "can't be read as JSON"),
    "schema": (lambda f: _edit(f, lambda r: r.update(schema_version=2)), "schema version 2"),
    "unknown key": (lambda f: _edit(f, lambda r: r.update(extra=1)), "'extra' is unknown"),
    "weights missing": (lambda f: (f / WEIGHTS).unlink(), f"lacks {WEIGHTS}"),
    "byte flipped": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1] + b"\x55"),
        "sha256 differs",
    ),
    "reference changed": (lambda f: (f / "reference/record.json").write_text("{}"), "sha256 differs"),
    "config changed": (lambda f: (f / "config.json").write_text("{}"), "sha256 differs"),
    "tokenizer missing": (lambda f: (f / "tokenizer.json").unlink(), "lacks tokenizer.json"),
    "file not named": (lambda f: _edit(f, lambda r: r["files"].pop("config.json")), "names no config.json"),
    "codes missing": (lambda f: _rewrite(f, lambda t: t.pop(f"{NAME}.codes")), "lack bert.encoder.*codes"),
    "bias missing": (lambda f: _rewrite(f, lambda t: t.pop("classifier.bias")), "classifier.bias is missing"),
    "tensor added": (lambda f: _rewrite(f, lambda t: t.update(ghost=torch.ones(1))), "ghost is .* unknown in Bert"),
    "code out of range": (lambda f: _rewrite(f, lambda t: t[f"{NAME}.codes"].fill_(128)), "out of range"),
    "codes too short": (
        lambda f: _rewrite(f, lambda t: t.update({f"{NAME}.codes": t[f"{NAME}.codes"][:-1].clone()})),
        "its codes is",
    ),
    "other shape": (
        lambda f: _edit(f, lambda r: r["forms"][NAME].update(shape=[32, 128])),
        "scale is .* damaged|damaged",
    ),
    "form wrong": (lambda f: _edit(f, lambda r: r["forms"][NAME].update(bits=9)), "'bits' is wrong"),
    "other class": (lambda f: _edit(f, lambda r: r.update(architecture="BertModel")), "don't fit the config"),
    "no class": (lambda f: _edit(f, lambda r: r.update(architecture="os")), "'os' is unknown to transformers"),
    "asset outside": (lambda f: _edit(f, lambda r: r["assets"].append("../secret")), "no sha256 of the asset"),
    "tie to nothing": (
        lambda f: _edit(f, lambda r: r["tied"].append([NAME, "bert.forward"])),
        "no parameter 'bert.forw",
    ),
    "activation": (lambda f: _edit(f, lambda r: r["activations"].pop(NAME)), "activations don't fit"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_folder_is_one_clear_error(fault: str, copy: Path) -> None:
    damage, message = FAULTS[fault]
    damage(copy)
    with pytest.raises(BadInputError, match=message):
        load_model(str(copy))


def test_other_files_in_the_folder_do_no_harm(copy: Path) -> None:
    (copy / "README.md").write_text("a model card")
    assert load_compressed(copy).quantized


def test_another_task_is_refused(copy: Path) -> None:
    with pytest.raises(BadInputError, match="for the task 'text-classification'"):
        load_model(str(copy), task="feature-extraction")


def test_no_other_tool_takes_it_for_float_weights(copy: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    quantization = json.loads((copy / "config.json").read_text())["quantization_config"]
    assert quantization["quant_method"] == "edgeport"
    # transformers only warns about a method it does not know, and would go on with random weights.
    with pytest.raises(OSError, match="no file named"):
        AutoModelForSequenceClassification.from_pretrained(copy)


def test_the_command_line_ends_as_a_ci_system_expects(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "folder"
    arguments = ["compress", str(tiny_model("bert")), "--recipe", "int8", "--samples", "4", "-o", str(out)]
    assert main([*arguments, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["files"][WEIGHTS] == hash_file(out / WEIGHTS)
    assert document["bytes_after"] == (out / WEIGHTS).stat().st_size
    layers = {layer["name"]: layer for layer in document["layers"]}
    assert {name: layer["format"] for name, layer in layers.items()} == {
        layer["name"]: layer["format"] for layer in planned["layers"]
    }
    header = document["bytes_after"] - planned["bytes_after"]
    assert 0 < header < 16_000  # the prediction leaves out the file's header of names
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    text = capsys.readouterr().out
    worst = max(layers.values(), key=lambda layer: layer["relative_error"])
    assert f"{worst['relative_error']:.4f} {worst['name']}" in text
    assert main(["export", str(out), "-t", ORT, "-o", str(tmp_path / "b"), "-r", "int4", "--json"]) == 2
    assert "already compressed" in json.loads(capsys.readouterr().out)["what"]
    assert main(["export", str(out), "-t", ORT, "-o", str(tmp_path / "b"), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "int8"

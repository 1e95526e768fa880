"""`edgeport explain` on shipped files of tiny models: exact sums, planted faults, flips against a count by hand."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgeport.bundle.read import read_bundle, verify_files
from edgeport.cli.main import main
from edgeport.compress import apply_recipe
from edgeport.data.samples import SampleRecord, Samples
from edgeport.errors import BadInputError, MeasurementError
from edgeport.explain.document import Bytes, Explanation
from edgeport.explain.layers import layer_errors
from edgeport.explain.sensitivity import measure_sensitivity
from edgeport.explain.shipped import Shipped
from edgeport.explain.sizes import read_bytes
from edgeport.explaining import explain_bundle, shipped_of
from edgeport.export.artifact import EncoderPart, LoweringSettings
from edgeport.export.dispatch import lower, read_weights
from edgeport.export.executorch.shell import wrap_package
from edgeport.model.decoder import for_generation
from edgeport.model.efficientnet_lite import EfficientNetLite, Stage
from edgeport.model.fold import fold_norms
from edgeport.model.load import load_model
from edgeport.model.types import Axis, Model, Source, TensorSpec
from edgeport.pipeline import ExportRequest, export
from edgeport.quantized import dequantize
from edgeport.recipe import load_recipe
from edgeport.runtime.session import open_session
from edgeport.storage import hash_file, list_files
from edgeport.target import load_target

ORT, XNNPACK, COREML = "linux-x86_64-ort", "android-arm64-executorch", "ios18-coreml"


def ignore(done: int, total: int, detail: str) -> None:
    """A watcher that shows nothing."""


def texts(*names: str, count: int = 2, length: int = 12) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    found = []
    for _ in range(count):
        ids = generator.integers(4, 100, (1, length))
        mask = np.ones_like(ids)
        mask[:, -2:] = 0
        values = {"attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        found.append({name: values.get(name, ids) for name in names})
    return found


def ship(
    model: Model,
    out: Path,
    samples: list[dict[str, np.ndarray]],
    *,
    target: str = ORT,
    recipe: str = "int8",
    context: int | None = None,
    ort_format: bool = False,
    linear: str | None = None,
    calibration: Samples | None = None,
) -> Shipped:
    """A model compressed and lowered, with what a bundle would record of it."""
    wanted, steps = load_target(target), load_recipe(recipe)
    if linear is not None:
        step = steps.quantize.model_copy(update={"linear": (linear,)})
        steps = steps.model_copy(update={"compress": (step,)})
    if recipe == "int8-static":
        step = steps.quantize.model_copy(update={"activation_budget": 100.0})
        steps = steps.model_copy(update={"compress": (step,)})
    compressed, layers = apply_recipe(model, steps, wanted, calibration=calibration)
    if context is not None:
        compressed = for_generation(compressed, context)
    coreml = target == COREML
    settings = LoweringSettings(
        "fp16" if coreml else "fp32", "fixed" if coreml else wanted.shapes[0], ort_format=ort_format
    )
    out.mkdir()
    artifact = lower(compressed, wanted, settings, out)
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    return Shipped(artifact, model.task, steps, parameters, layers, (), tuple(samples))


def efficientnet() -> tuple[Model, list[dict[str, np.ndarray]]]:
    torch.manual_seed(0)
    module = EfficientNetLite((Stage(1, 3, 1, 1, 16), Stage(2, 3, 2, 2, 24)), classes=10).eval().requires_grad_(False)
    example = {"pixel_values": torch.randn(1, 3, 32, 32)}
    fold_norms(module, example)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.bias, std=0.3)
    model = Model(
        name="efficientnet",
        module=module,
        source=Source("factory", "efficientnet", {}),
        task="image-classification",
        modality="image",
        inputs=(TensorSpec("pixel_values", "float32", (Axis("batch", 1, 8, 1), 3, 32, 32)),),
        outputs=(TensorSpec("logits", "float32", (Axis("batch", 1, 8, 1), 10)),),
        example=example,
        huggingface=False,
    )
    generator = np.random.default_rng(0)
    return model, [{"pixel_values": generator.normal(size=(1, 3, 32, 32)).astype(np.float32)} for _ in range(8)]


class Words(nn.Module):
    """An embedding and two layers: what every backend lowers in a second."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 32)
        self.fc1, self.head = nn.Linear(32, 64), nn.Linear(64, 12)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.gelu(self.fc1(self.embed(input_ids))))


def words() -> Model:
    torch.manual_seed(0)
    return Model(
        name="words",
        module=Words().eval().requires_grad_(False),
        source=Source("factory", "words", {}),
        task="token-classification",
        modality="text",
        inputs=(TensorSpec("input_ids", "int64", (1, 12)),),
        outputs=(TensorSpec("logits", "float32", (1, 12, 12)),),
        example={"input_ids": torch.randint(0, 128, (1, 12))},
        huggingface=False,
    )


@pytest.fixture(scope="module")
def bert(tiny_model) -> Model:
    return load_model(str(tiny_model("bert")))


@pytest.fixture(scope="module")
def llama(tiny_model) -> Model:
    return load_model(str(tiny_model("llama")), task="text-generation")


@pytest.fixture(scope="module")
def shipped(bert, llama, tmp_path_factory) -> Callable[[str], tuple[Shipped, Model]]:
    """A shipped file with its original: `shipped("onnx")`. Each is made when it is first asked for."""
    root = tmp_path_factory.mktemp("shipped")
    names = [spec.name for spec in bert.inputs]
    samples, tokens = texts(*names), texts("input_ids")
    small = words()
    made: dict[str, tuple[Shipped, Model]] = {}

    def static(out: Path) -> tuple[Shipped, Model]:
        model, pictures = efficientnet()
        record = SampleRecord("test", False, {}, "random", None, len(pictures))
        return ship(model, out, pictures[:2], recipe="int8-static", calibration=Samples(pictures, record)), model

    makers: dict[str, Callable[[Path], tuple[Shipped, Model]]] = {
        "onnx": lambda out: (ship(bert, out, samples, ort_format=True), bert),
        "onnx float": lambda out: (ship(bert, out, samples, recipe="fp32"), bert),
        "onnx decoder": lambda out: (ship(llama, out, tokens, context=32), llama),
        "onnx static": static,
        "pte": lambda out: (ship(small, out, tokens, target=XNNPACK), small),
        "mlpackage": lambda out: (ship(small, out, tokens, target=COREML), small),
        "palettes": lambda out: (ship(small, out, tokens, target=COREML, linear="lut4"), small),
    }

    def get(kind: str) -> tuple[Shipped, Model]:
        if kind not in made:
            made[kind] = makers[kind](root / kind)
        return made[kind]

    return get


def check_sum(found: Bytes, root: Path) -> None:
    """Three sums and the file system agree to the byte."""
    size = sum(os.path.getsize(root / file.path) for file in found.files)
    assert found.file == size == sum(cell.bytes for cell in found.cells)
    assert found.original + sum(step.change for step in found.steps) == size
    everything = {path.relative_to(root).as_posix() for path in list_files(root)}
    assert {file.path for file in (*found.files, *found.beside)} == everything


@pytest.mark.parametrize("kind", ["onnx", "onnx float", "onnx decoder", "onnx static", "pte", "mlpackage", "palettes"])
def test_the_bytes_of_a_file_add_up_to_its_size(shipped, kind):
    """And those of codes and scales are what the logical weights need."""
    found = read_bytes(shipped(kind)[0])
    check_sum(found, shipped(kind)[0].artifact.root)
    logical = read_weights(shipped(kind)[0].artifact) if shipped(kind)[0].artifact.weights else {}
    stored: dict[str, int] = {}
    for tensor in found.tensors:
        if tensor.part == "codes" and tensor.parameter in logical:
            stored[tensor.parameter] = max(stored.get(tensor.parameter, 0), tensor.bytes)
    for name, weight in logical.items():
        assert stored[name] == weight.codes.numel() * weight.bits // 8
    palettes = sum(weight.palette.numel() * 2 for weight in logical.values() if weight.palette is not None)
    assert sum(tensor.bytes for tensor in found.tensors if tensor.part == "palettes") == palettes
    assert (palettes > 0) == (kind == "palettes")


def test_an_ort_format_file_and_data_beside_the_graph_add_up_too(shipped, tmp_path):
    whole, model = shipped("onnx")
    check_sum(read_bytes(replace(whole, artifact=replace(whole.artifact, entry="model.ort"))), whole.artifact.root)
    path = tmp_path / "model.onnx"
    graph = onnx.load(whole.artifact.path)
    onnx.save(graph, path, save_as_external_data=True, location="model.onnx.data", size_threshold=256)
    found = read_bytes(replace(whole, artifact=replace(whole.artifact, root=tmp_path)))
    check_sum(found, tmp_path)
    inside = {(cell.group, cell.part): cell.bytes for cell in read_bytes(whole).cells}
    beside = {(cell.group, cell.part): cell.bytes for cell in found.cells}
    for key in inside:
        assert key[0] == "file" or inside[key] == beside[key]
    assert [file.path for file in found.files] == ["model.onnx", "model.onnx.data"]
    apart = replace(whole, artifact=replace(whole.artifact, root=tmp_path))
    assert layer_errors(apart, model, ignore).rows == layer_errors(whole, model, ignore).rows


def test_a_program_around_a_core_ml_package_is_told_file_by_file(shipped, tmp_path):
    package, model = shipped("mlpackage")
    settings, target = LoweringSettings("fp16", "fixed"), load_target("ios18-executorch-coreml")
    found = replace(package, artifact=wrap_package(package.artifact, model, target, settings, tmp_path))
    sizes = read_bytes(found)
    check_sum(sizes, tmp_path)
    inside = read_bytes(package)
    told, alone = ({(cell.group, cell.part): cell.bytes for cell in each.cells} for each in (sizes, inside))
    assert {key: told[key] for key in alone if key[0] != "file"} == {k: v for k, v in alone.items() if k[0] != "file"}
    errors = layer_errors(found, model, ignore)
    assert errors.source == "shipped graph"
    assert errors.rows == layer_errors(package, model, ignore).rows


def test_float_weights_that_the_exporter_renamed_are_found_by_the_original(shipped):
    found, model = shipped("onnx float")
    told = read_bytes(found, model.module.state_dict())
    cells = {(cell.group, cell.part): cell.bytes for cell in told.cells}
    for group, before in told.before.items():
        if group != "other":
            assert cells[group, "floats"] == before


@pytest.mark.parametrize("kind", ["onnx", "onnx float", "onnx decoder", "onnx static", "mlpackage", "palettes"])
def test_errors_inside_the_file_are_those_of_its_outputs(shipped, kind):
    """The last layer's error is that of the file's own output; the first's that of the rows looked up."""
    found, model = shipped(kind)
    errors = layer_errors(found, model, ignore)
    assert errors.source == "shipped graph"
    assert errors.output_change == 0
    assert not errors.missing
    assert {row.parameter for row in errors.rows} == set(found.records)
    session = open_session(found.artifact)
    difference = square = 0.0
    for sample in found.samples:
        tensors = {name: torch.from_numpy(value) for name, value in sample.items()}
        with torch.no_grad():
            result = model.module(**tensors)
        expected = (result.logits if hasattr(result, "logits") else result).numpy()
        given = session.run(sample)["logits"]
        if found.artifact.context is not None:
            expected, given = expected[:, -1], given[:, -1]
        difference += float(((given - expected) ** 2).sum())
        square += float((expected**2).sum())
    last = errors.rows[-1]
    assert last.relative_error == pytest.approx((difference / square) ** 0.5, rel=1e-3, abs=1e-7)
    assert last.layer in ("classifier", "lm_head", "head")


def test_the_error_of_a_lookup_is_that_of_the_rows(shipped):
    found, model = shipped("onnx")
    errors = {row.layer: row for row in layer_errors(found, model, ignore).rows}
    name = "bert.embeddings.word_embeddings"
    stored = dequantize(read_weights(found.artifact)[f"{name}.weight"])
    original = model.module.get_parameter(f"{name}.weight").detach()
    ids = np.concatenate([sample["input_ids"][sample["attention_mask"] != 0] for sample in found.samples])
    expected = float((stored[ids] - original[ids]).norm() / original[ids].norm())
    assert errors[name].relative_error == pytest.approx(expected, rel=1e-4)
    assert errors[name].growth == errors[name].relative_error


def plant(artifact_root: Path, out: Path, name: str) -> None:
    """A copy of a file in which one weight's scales are in another order."""
    out.mkdir()
    graph = onnx.load(artifact_root / "model.onnx")
    scale = next(item for item in graph.graph.initializer if item.name == f"{name}.scale")
    values = onnx.numpy_helper.to_array(scale)
    order = np.random.default_rng(0).permutation(len(values))
    # Rows of different sizes: the scales of a random layer are too much alike to do harm in another order.
    scale.raw_data = (values[order] * np.linspace(0.2, 3, len(values), dtype=np.float32)).astype(values.dtype).tobytes()
    onnx.save(graph, out / "model.onnx")


@pytest.mark.parametrize(
    "layer", ["bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.1.attention.output.dense"]
)
def test_a_planted_bad_layer_is_where_the_error_grows_and_what_matters_most(shipped, tmp_path, layer):
    found, model = shipped("onnx")
    plant(found.artifact.root, tmp_path / "bad", f"{layer}.weight")
    bad = replace(found, artifact=replace(found.artifact, root=tmp_path / "bad"))
    assert layer_errors(found, model, ignore).grows_most != layer
    errors = layer_errors(bad, model, ignore)
    assert errors.grows_most == layer
    row = next(row for row in errors.rows if row.layer == layer)
    assert row.input_error < 0.02 < 0.3 < row.relative_error
    sensitivity = measure_sensitivity(bad, model, ignore)
    assert sensitivity.source == "measured"
    assert sensitivity.rows[0].layer == layer


def test_a_delegate_hides_its_values_and_the_logical_form_takes_their_place(shipped):
    found, model = shipped("pte")
    errors = layer_errors(found, model, ignore)
    assert (errors.source, errors.output_change) == ("logical form", None)
    assert "Not possible inside the shipped graph here: an ExecuTorch delegate" in errors.statement
    weights = read_weights(found.artifact)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    copy = load_model_like(model)
    with torch.no_grad():
        for name, weight in weights.items():
            copy.get_parameter(name).copy_(dequantize(weight))
    difference = square = 0.0
    for sample in found.samples:
        tensors = {name: torch.from_numpy(value) for name, value in sample.items()}
        with torch.no_grad():
            a, b = copy(**tensors), model.module(**tensors)
        difference, square = difference + float(((a - b) ** 2).sum()), square + float((b**2).sum())
    assert errors.rows[-1].relative_error == pytest.approx((difference / square) ** 0.5, rel=1e-4)
    # The original is itself again.
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, before[name])


def load_model_like(model: Model) -> nn.Module:
    import copy

    return copy.deepcopy(model.module)


def test_two_files_are_explained_by_the_logical_form(shipped, tmp_path):
    """An encoder-decoder's artifact: the decoder's file, and the encoder's beside it."""
    found, model = shipped("onnx")
    artifact = replace(found.artifact, root=tmp_path)
    for name in ("model.onnx", "encoder.onnx"):
        shutil.copy(found.artifact.path, tmp_path / name)
    both = replace(artifact, encoder=EncoderPart("encoder.onnx", artifact.inputs, artifact.outputs))
    errors = layer_errors(replace(found, artifact=both), model, ignore)
    assert errors.source == "logical form"
    assert "two files" in errors.statement


def test_sensitivity_is_the_effect_of_one_layer_alone(shipped):
    found, model = shipped("onnx")
    sensitivity = measure_sensitivity(found, model, ignore)
    effects = [row.effect for row in sensitivity.rows if row.format != "float"]
    assert effects == sorted(effects, reverse=True)
    assert None not in effects
    name = "bert.pooler.dense.weight"
    alone = load_model_like(model)
    with torch.no_grad():
        alone.get_parameter(name).copy_(dequantize(read_weights(found.artifact)[name]))
        difference = square = divergence = 0.0
        for sample in found.samples:
            tensors = {key: torch.from_numpy(value) for key, value in sample.items()}
            a, b = alone(**tensors).logits.double(), model.module(**tensors).logits.double()
            difference, square = difference + float(((a - b) ** 2).sum()), square + float((b**2).sum())
            divergence += float(
                torch.nn.functional.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="sum")
            )
    row = next(row for row in sensitivity.rows if row.parameter == name)
    assert row.effect == pytest.approx((difference / square) ** 0.5, rel=1e-3)
    assert row.kl == pytest.approx(divergence / len(found.samples), rel=1e-2)
    assert row.bits == pytest.approx(8 + 32 / 64)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"steps": "cut"}, "The recipe made another model of it"),
        ({"samples": ()}, "no golden inputs"),
    ],
)
def test_layers_that_are_others_than_the_originals_are_not_compared(shipped, change, why):
    from edgeport.compress.restructure import StepRecord

    found, model = shipped("onnx")
    if "steps" in change:
        change = {"steps": (StepRecord("prune_depth", 2, 1, 8, 4, 2, 1, None, ()),)}
    with pytest.raises(MeasurementError, match=why):
        layer_errors(replace(found, **change), model, ignore)


TEXTS = [
    f"{word} {'and the hat ' * (index % 5)}in a cat {index}" for index, word in enumerate("abcdefghijklmnopqrst" * 2)
]


@pytest.fixture(scope="module")
def bundles(tiny_model, tmp_path_factory) -> tuple[Path, Path, Path]:
    """Two bundles of one model, int8 and with a suite, 2-bit and without; and the suite, all of which the original
    has right."""
    from tokenizers import Tokenizer

    root = tmp_path_factory.mktemp("bundles")
    module = load_model(str(tiny_model("bert"))).module
    tokenizer = Tokenizer.from_file(str(tiny_model("bert") / "tokenizer.json"))
    texts = []
    for text in TEXTS:
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([tokenizer.encode(text).ids])).logits
        texts.append({"text": text, "label": str(int(logits.argmax()))})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (root / "mine.toml").write_text(
        'name = "mine"\ntitle = "mine"\nkind = "text_classification"\ndata = "rows.jsonl"\n'
        f"[evaluation]\nstart = 0\nstop = {len(texts)}\n"
    )
    suite = root / "mine.toml"
    for name, suites, linear, embedding in (
        ("int8", (str(suite),), "int8", "int8"),
        ("int2", (), "int2_g32", "int4_g16"),
    ):
        recipe = load_recipe("int8")
        step = recipe.quantize.model_copy(update={"linear": (linear,), "embedding": (embedding,)})
        gate = recipe.gate.model_copy(update={"size_ratio_max": None})
        request = ExportRequest(
            model=str(tiny_model("bert")),
            target=load_target(ORT),
            recipe=recipe.model_copy(update={"compress": (step,), "gate": gate}),
            output=root / name,
            samples=4,
            quick=True,
            suites=suites,
        )
        export(request)
    return root / "int8", root / "int2", suite


def test_a_bundle_is_explained_beside_what_the_manifest_hashes(bundles, tiny_model, capsys):
    bundle, _, suite = bundles
    before = {path.name: hash_file(path) for path in list_files(bundle)}
    arguments = ["explain", str(bundle), "--original", str(tiny_model("bert")), "--suite", str(suite), "--json"]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    written = (bundle / "explain.json").read_text()
    assert json.loads(written) == printed
    found = Explanation.model_validate(printed)
    added = {"explain.json", "report.html"}
    after = {path.name: hash_file(path) for path in list_files(bundle) if path.name not in added}
    assert after == {name: value for name, value in before.items() if name not in added}
    assert '"relative_error"' in (bundle / "report.html").read_text()
    verify_files(read_bundle(bundle))
    assert found.manifest_sha256 == before["manifest.json"]
    assert main(arguments) == 0
    assert (bundle / "explain.json").read_text() == written, "the same bundle gives the same bytes"
    assert (found.layers_absent, found.flips_absent, found.sensitivity_absent) == (None, None, None)
    evidence = read_bundle(bundle).evidence
    assert [claim.metric for claim in found.claims][: len(evidence.verdict.checks)] == [
        check.metric for check in evidence.verdict.checks
    ]


def test_flips_of_a_suite_equal_those_that_the_two_models_show(bundles, tiny_model):
    """Asked again here, one text at a time, without any of the suite's code."""
    from tokenizers import Tokenizer

    bundle, other, suite = bundles
    found = explain_bundle(
        other, suites=[str(suite)], original=str(tiny_model("bert")), parts=("flips",), against=bundle
    )
    model = load_model(str(tiny_model("bert")))
    tokenizer = Tokenizer.from_file(str(tiny_model("bert") / "tokenizer.json"))
    session, older = (open_session(shipped_of(read_bundle(path)).artifact) for path in (other, bundle))
    worse, better, against = set(), set(), 0
    for line in (suite.parent / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        encoding = tokenizer.encode(row["text"])
        arrays = {
            "input_ids": np.array([encoding.ids]),
            "attention_mask": np.array([encoding.attention_mask]),
            "token_type_ids": np.array([encoding.type_ids]),
        }
        with torch.no_grad():
            original = int(model.module(**{k: torch.from_numpy(v) for k, v in arrays.items()}).logits.argmax())
        file, old = (int(one.run(arrays)["logits"].argmax()) for one in (session, older))
        wanted = int(row["label"])
        (worse if original == wanted != file else better if file == wanted != original else set()).add(row["text"])
        against += (file == wanted) - (old == wanted)
    (flips,) = found.flips
    assert {flip.shown for flip in flips.flips if flip.worse} == worse
    assert {flip.shown for flip in flips.flips if not flip.worse} == better
    assert (flips.worse, flips.better) == (len(worse), len(better))
    assert worse
    assert {each.by for each in flips.slices} == {"length", "class", "confidence"}
    (changed,) = found.changes.flips
    assert changed.better - changed.worse == against
    assert changed.other == str(bundle)


def test_two_bundles_as_differences(bundles, tiny_model):
    bundle, other, _ = bundles
    found = explain_bundle(other, original=str(tiny_model("bert")), against=bundle, parts=("layers",))
    sizes = [os.path.getsize(path / "model" / "model.onnx") for path in (bundle, other)]
    assert found.changes.other_file == sizes[0]
    assert sum(cell.this - cell.other for cell in found.changes.cells) == sizes[1] - sizes[0]
    for row in found.changes.layers:
        if row.format == "float":
            assert "token_type" in row.layer
            continue
        assert (row.other_format, row.format) == ("int8", "int4_g16" if "embeddings" in row.layer else "int2_g32")
        assert row.error > row.other_error
    assert any("was not measured" in note for note in found.changes.notes) is False


def test_without_the_original_it_is_said_what_is_missing(bundles):
    found = explain_bundle(bundles[1])
    assert found.original is None
    assert found.layers is None
    assert "--original" in found.layers_absent
    assert found.sensitivity.source == "weights alone"
    assert found.flips == ()
    assert "--suite" in found.flips_absent
    check_sum(found.bytes, bundles[1] / "model")


def test_bad_requests_end_with_one_clear_error(bundles, tiny_model, tmp_path, capsys):
    bundle = str(bundles[0])
    shutil.copytree(tiny_model("bert"), tmp_path / "another")
    with (tmp_path / "another" / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(BadInputError, match="not the one that the bundle was made of"):
        explain_bundle(bundles[0], original=str(tmp_path / "another"))
    assert main(["explain", bundle, "--part", "bites"]) == 2
    assert "There is no part 'bites'" in capsys.readouterr().err
    assert main(["explain", str(tmp_path)]) == 2
    assert "is no bundle" in capsys.readouterr().err
    assert main(["explain", bundle, "--part", "bytes", "-o", str(tmp_path / "file" / "x.json")]) == 0
    (tmp_path / "taken").write_text("")
    assert main(["explain", bundle, "--part", "bytes", "-o", str(tmp_path / "taken" / "x.json")]) == 2
    assert "can't be written" in capsys.readouterr().err

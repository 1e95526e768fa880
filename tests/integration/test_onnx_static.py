"""Static int8 activations in ONNX Runtime: integer kernels, the torch form's numbers, the logical codes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edgeport.activations import round_layers
from edgeport.compress import apply_recipe
from edgeport.data.samples import SampleRecord, Samples
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.onnx.lower import lower
from edgeport.export.onnx.weights import read_weights
from edgeport.model.efficientnet_lite import EfficientNetLite, Stage
from edgeport.model.fold import fold_norms
from edgeport.model.types import Axis, Model, Source, TensorSpec
from edgeport.quantized import digest
from edgeport.recipe import Recipe, load_recipe
from edgeport.runtime.onnxruntime import OnnxRuntimeSession
from edgeport.target import load_target

TARGET = load_target("linux-x86_64-ort")
BATCH = Axis("batch", 1, 8, 1)
SEQUENCE = Axis("sequence", 1, 64, 12)


def efficientnet() -> Model:
    """Two stages: stem and a depthwise layer with stride 2 behind a padding, a residual sum, a classifier."""
    torch.manual_seed(0)
    module = EfficientNetLite((Stage(1, 3, 1, 1, 16), Stage(2, 3, 2, 2, 24)), classes=10).eval().requires_grad_(False)
    example = {"pixel_values": torch.randn(1, 3, 32, 32)}
    fold_norms(module, example)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.bias, std=0.3)
    return Model(
        name="efficientnet",
        module=module,
        source=Source("factory", "efficientnet", {}),
        task="image-classification",
        modality="image",
        inputs=(TensorSpec("pixel_values", "float32", (BATCH, 3, 32, 32)),),
        outputs=(TensorSpec("logits", "float32", (BATCH, 10)),),
        example=example,
        huggingface=False,
    )


def bert() -> Model:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    example = {"input_ids": torch.randint(0, 200, (1, 12)), "attention_mask": torch.ones(1, 12, dtype=torch.int64)}
    return Model(
        name="bert",
        module=BertModel(config).eval().requires_grad_(False),
        source=Source("factory", "bert", {}),
        task="feature-extraction",
        modality="text",
        inputs=tuple(TensorSpec(name, "int64", (BATCH, SEQUENCE)) for name in example),
        outputs=(TensorSpec("last_hidden_state", "float32", (BATCH, SEQUENCE, 64)),),
        example=example,
        huggingface=True,
    )


def inputs_of(model: Model, count: int, seed: int = 1, batch: int = 1) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        if model.modality == "image":
            found.append({"pixel_values": generator.normal(size=(batch, 3, 32, 32)).astype(np.float32)})
        else:
            ids = generator.integers(0, 200, (batch, 12))
            found.append({"input_ids": ids, "attention_mask": np.ones((batch, 12), np.int64)})
    return found


def compress(model: Model, **options: object) -> Model:
    base = load_recipe("int8-static")
    assert base.quantize is not None
    step = base.quantize.model_copy(update={"activation_budget": 100.0, **options})
    recipe: Recipe = base.model_copy(update={"compress": (step,)})
    inputs = inputs_of(model, 12)
    samples = Samples(inputs, SampleRecord("test", False, {}, "random", None, len(inputs)))
    return apply_recipe(model, recipe, TARGET, calibration=samples)[0]


def torch_form(model: Model, inputs: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    module = copy.deepcopy(model.module)
    round_layers(module, model.ranges)
    results = []
    for sample in inputs:
        with torch.no_grad():
            result = module(**{name: torch.from_numpy(value) for name, value in sample.items()})
        results.append((result if isinstance(result, torch.Tensor) else result.last_hidden_state).numpy())
    return results


def run(artifact: Artifact, inputs: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    session = OnnxRuntimeSession(artifact)
    return [session.run(sample)[artifact.outputs[0].name] for sample in inputs]


def fused_operators(path: Path, folder: Path) -> Counter[str]:
    """What ONNX Runtime makes of a file when it loads it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def relative(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    difference = sum(float(np.square(a - b).sum()) for a, b in zip(left, right, strict=True))
    return (difference / sum(float(np.square(a).sum()) for a in left)) ** 0.5


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Model, Model, Artifact]]:
    found = {}
    for make in (efficientnet, bert):
        original = make()
        model = compress(original)
        out = tmp_path_factory.mktemp(original.name)
        settings = LoweringSettings("fp32", "dynamic", ort_format=True)
        found[original.name] = (original, model, lower(model, TARGET, settings, out))
    return found


@pytest.mark.parametrize("name", ["efficientnet", "bert"])
def test_the_file_computes_what_the_torch_form_computes(
    lowered: Mapping[str, tuple[Model, Model, Artifact]], name: str
) -> None:
    _, model, artifact = lowered[name]
    inputs = [*inputs_of(model, 6, seed=2), *inputs_of(model, 2, seed=3, batch=3)]
    expected, found = torch_form(model, inputs), run(artifact, inputs)
    plain = torch_form(replace(model, ranges={}), inputs)
    apart = [relative([a], [b]) for a, b in zip(expected, found, strict=True)]
    rounding = [relative([a], [b]) for a, b in zip(expected, plain, strict=True)]
    # A value that lies between two codes may fall to either side, and moves others then: in a few inputs one does.
    assert float(np.median(apart)) < 0.01 * float(np.median(rounding))
    assert max(apart) < max(rounding) < 0.1


@pytest.mark.parametrize("name", ["efficientnet", "bert"])
def test_the_file_holds_the_logical_codes(lowered: Mapping[str, tuple[Model, Model, Artifact]], name: str) -> None:
    _, model, artifact = lowered[name]
    stored = read_weights(artifact)
    assert set(stored) | set(artifact.facts.get("unused_weights", ())) == set(model.quantized)
    assert all(digest(tensor) == digest(model.quantized[name]) for name, tensor in stored.items())
    for tensor in (name for name in stored if name in model.ranges):
        assert stored[tensor].codes.dtype == torch.int8


def test_convolutions_run_in_integers(lowered: Mapping[str, tuple[Model, Model, Artifact]], tmp_path: Path) -> None:
    _, model, artifact = lowered["efficientnet"]
    fused = fused_operators(artifact.path, tmp_path)
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in model.module.modules())
    assert fused["QLinearConv"] == convolutions
    assert fused["MatMulIntegerToFloat"] == 1
    assert not {"Conv", "Clip", "Pad", "MatMul", "Gemm"} & set(fused)
    # Grids are shared: the image, the sum, the mean's input and output, and what each convolution gives.
    assert artifact.facts["operators"]["QuantizeLinear"] <= convolutions + 4


def test_linear_layers_run_in_integers(lowered: Mapping[str, tuple[Model, Model, Artifact]], tmp_path: Path) -> None:
    _, model, artifact = lowered["bert"]
    fused = fused_operators(artifact.path, tmp_path)
    linears = [name for name in artifact.weights if name in model.ranges]
    assert len(linears) == 12
    assert fused["MatMulIntegerToFloat"] == 12
    # Query, key and value read one tensor, which is quantized once.
    assert artifact.facts["operators"]["QuantizeLinear"] == 8


@pytest.mark.parametrize("name", ["efficientnet", "bert"])
def test_the_ort_format_file_computes_the_same(lowered: Mapping[str, tuple[Model, Model, Artifact]], name: str) -> None:
    _, model, artifact = lowered[name]
    inputs = inputs_of(model, 3, seed=4)
    ort = replace(artifact, entry=artifact.facts["ort_format"])
    assert relative(run(artifact, inputs), run(ort, inputs)) < 1e-3
    assert ort.path.stat().st_size < 1.6 * artifact.path.stat().st_size


def test_equal_inputs_give_equal_bytes(lowered: Mapping[str, tuple[Model, Model, Artifact]], tmp_path: Path) -> None:
    _, _, artifact = lowered["efficientnet"]
    again = lower(compress(efficientnet()), TARGET, LoweringSettings("fp32", "dynamic", ort_format=True), tmp_path)
    for name in ("model.onnx", "model.ort"):
        assert (again.root / name).read_bytes() == (artifact.root / name).read_bytes()


def test_layers_that_are_left_out_stay_beside_those_that_are_not(
    lowered: Mapping[str, tuple[Model, Model, Artifact]], tmp_path: Path
) -> None:
    _, model, _ = lowered["efficientnet"]
    left = ["blocks.1.depthwise.1.weight", "blocks.2.expand.0.weight"]
    partly = replace(
        model,
        ranges={name: found for name, found in model.ranges.items() if name not in left},
        activations={**model.activations, **dict.fromkeys(left, "float")},
    )
    artifact = lower(partly, TARGET, LoweringSettings("fp32", "fixed"), tmp_path)
    inputs = inputs_of(model, 9, seed=5)
    expected, found = torch_form(partly, inputs), run(artifact, inputs)
    plain = torch_form(replace(model, ranges={}), inputs)
    apart = [relative([a], [b]) for a, b in zip(expected, found, strict=True)]
    # ONNX Runtime must not round the float weights between rounded activations by itself.
    assert float(np.median(apart)) < 0.1 * relative(expected, plain)
    assert fused_operators(artifact.path, tmp_path)["QLinearConv"] == len(partly.ranges) - 1


def test_half_precision_storage_leaves_integers_alone(
    lowered: Mapping[str, tuple[Model, Model, Artifact]], tmp_path: Path
) -> None:
    _, model, _ = lowered["efficientnet"]
    artifact = lower(model, TARGET, LoweringSettings("fp16", "fixed"), tmp_path)
    stored = read_weights(artifact)
    assert all(digest(tensor) == digest(model.quantized[name]) for name, tensor in stored.items())
    inputs = inputs_of(model, 3, seed=6)
    assert relative(torch_form(model, inputs), run(artifact, inputs)) < 5e-3

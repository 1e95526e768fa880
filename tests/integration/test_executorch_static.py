"""Static int8 activations in XNNPACK: integer kernels, the torch form's numbers, the logical codes."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeport.activations import grid_of, round_layers
from edgeport.compress import apply_recipe
from edgeport.data.samples import SampleRecord, Samples
from edgeport.errors import TargetRefusesError
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.dispatch import lower, read_weights
from edgeport.export.executorch.pte import read_program, xnnpack_payloads
from edgeport.model.types import Model, Source, TensorSpec
from edgeport.quantized import digest
from edgeport.recipe import load_recipe
from edgeport.runtime.executorch import ExecuTorchSession
from edgeport.target import Target, load_target


class Net(nn.Module):
    """A padded stem, depthwise with a padding of its own, a 1x1 projection, a sum, a 1-D convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2)
        self.depthwise = nn.Conv2d(16, 16, 3, stride=2, groups=16)
        self.inner = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project = nn.Conv2d(16, 16, 1)
        self.line = nn.Conv1d(16, 8, 64)
        self.classifier = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = nn.functional.relu6(self.stem(nn.functional.pad(x, (0, 1, 0, 1))))
        y = nn.functional.hardtanh(self.depthwise(nn.functional.pad(y, (0, 1, 0, 1))), 0.0, 4.0)
        y = y + self.project(self.inner(y).relu())
        y = self.line(y.flatten(2)).flatten(1)
        return self.classifier(y), y


NAMES = ("logits", "features")


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target("android-arm64-executorch")


@pytest.fixture(scope="module")
def compressed(target: Target) -> Model:
    torch.manual_seed(0)
    model = Model(
        name="net",
        module=Net().eval().requires_grad_(False),
        source=Source("factory", "net", {}),
        task="image-classification",
        modality="image",
        inputs=(TensorSpec("x", "float32", (1, 3, 32, 32)),),
        outputs=(TensorSpec("logits", "float32", (1, 10)), TensorSpec("features", "float32", (1, 8))),
        example={"x": torch.randn(1, 3, 32, 32)},
        huggingface=False,
    )
    recipe = load_recipe("int8-static")
    assert recipe.quantize is not None
    recipe = recipe.model_copy(update={"compress": (recipe.quantize.model_copy(update={"activation_budget": 100.0}),)})
    samples = Samples(inputs(12, 0), SampleRecord("test", False, {}, "random", None, 12))
    return apply_recipe(model, recipe, target, calibration=samples)[0]


@pytest.fixture(scope="module")
def artifact(compressed: Model, target: Target, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return lower(compressed, target, LoweringSettings("fp32", "fixed"), tmp_path_factory.mktemp("static"))


def inputs(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    return [{"x": generator.normal(size=(1, 3, 32, 32)).astype(np.float32)} for _ in range(count)]


def torch_form(model: Model, samples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    module = copy.deepcopy(model.module)
    round_layers(module, model.ranges)
    with torch.no_grad():
        results = [module(torch.from_numpy(sample["x"])) for sample in samples]
    return {name: torch.cat(values).numpy() for name, values in zip(NAMES, zip(*results, strict=True), strict=True)}


def run(artifact: Artifact, samples: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    session = ExecuTorchSession(artifact)
    results = [session.run(sample) for sample in samples]
    return {name: np.concatenate([result[name] for result in results]) for name in NAMES}


def test_the_program_computes_what_the_torch_form_computes(compressed: Model, artifact: Artifact) -> None:
    samples = inputs(16, 1)
    found, expected = run(artifact, samples), torch_form(compressed, samples)
    grid = compressed.ranges["line.weight"].output
    assert grid is not None
    codes = found["features"] / grid.scale
    assert np.abs(codes - np.round(codes)).max() < 1e-3, "what the last convolution gives is on its grid"
    # Rounding in another order moves few codes, and by one; rounding left out moves more than half of them.
    moved = np.round(codes - expected["features"] / grid.scale)
    assert np.abs(moved).max() <= 1
    assert (moved != 0).mean() < 0.1
    plain = torch_form(replace(compressed, ranges={}), samples)["features"] / grid.scale
    assert (np.abs(plain - np.round(plain)) > 0.1).mean() > 0.5
    # The classifier's activations are rounded on the fly, which the torch form does not do.
    assert np.linalg.norm(found["logits"] - expected["logits"]) < 0.02 * np.linalg.norm(expected["logits"])


def test_every_convolution_runs_in_integers(compressed: Model, artifact: Artifact) -> None:
    kinds: Counter[str] = Counter()
    for payload in xnnpack_payloads(read_program(artifact.path)):
        types = {}
        for entry in payload.graph["xvalues"]:
            tensor = entry["xvalue_union"].get("tensor_value", entry["xvalue_union"])
            types[tensor["id_out"]] = tensor["datatype"]
        for node in payload.graph["xnodes"]:
            kinds[node["xnode_union_type"]] += 1
            if node["xnode_union_type"] in ("XNNConv2d", "XNNDepthwiseConv2d"):
                values = node["xnode_union"]
                assert types[values["input1_id"]] == types[values["output_id"]] == "xnn_datatype_qint8"
                assert types[values["filter_id"]] == "xnn_datatype_qcint8"
    assert (kinds["XNNConv2d"], kinds["XNNDepthwiseConv2d"]) == (3, 2)
    # Grids make the clamps of stem and depthwise; padding of rounded tensors stays in integers.
    assert kinds["XNNClamp"] == 0
    assert not any("conv" in name for name in artifact.facts["outside_delegates"])


def test_the_file_holds_the_logical_codes(compressed: Model, artifact: Artifact) -> None:
    stored = read_weights(artifact)
    assert set(stored) == set(compressed.quantized)
    assert compressed.activations["depthwise.weight"] == "static_int8"
    assert compressed.activations["classifier.weight"] == "dynamic_int8"
    assert {name: digest(tensor) for name, tensor in stored.items()} == {
        name: digest(tensor) for name, tensor in compressed.quantized.items()
    }


def test_equal_inputs_give_equal_bytes(compressed: Model, artifact: Artifact, target: Target, tmp_path: Path) -> None:
    again = lower(compressed, target, LoweringSettings("fp32", "fixed"), tmp_path)
    assert again.path.read_bytes() == artifact.path.read_bytes()


def test_what_xnnpack_can_not_do_is_refused(compressed: Model, target: Target, tmp_path: Path) -> None:
    name = "depthwise.weight"
    half = replace(compressed.ranges[name], output=None)
    with pytest.raises(TargetRefusesError, match="no range for its output"):
        lower(
            replace(compressed, ranges={**compressed.ranges, name: half}),
            target,
            LoweringSettings("fp32", "fixed"),
            tmp_path,
        )
    without = {other: found for other, found in compressed.ranges.items() if other != name}
    with pytest.raises(TargetRefusesError, match="full convolutions only"):
        lower(replace(compressed, ranges=without), target, LoweringSettings("fp32", "fixed"), tmp_path)


def test_a_static_linear_layer_runs_in_integers_too(compressed: Model, target: Target, tmp_path: Path) -> None:
    """No target asks for it (it is no faster than rounding on the fly, and coarser), but the form is right."""
    name = "classifier.weight"
    static = replace(compressed.ranges["line.weight"], input=grid_of(0.0, 1.0), output=grid_of(-2.0, 2.0))
    model = replace(
        compressed,
        ranges={**compressed.ranges, name: static},
        activations={**compressed.activations, name: "static_int8"},
    )
    artifact = lower(model, target, LoweringSettings("fp32", "fixed"), tmp_path)
    samples = inputs(16, 2)
    found, expected = run(artifact, samples)["logits"], torch_form(model, samples)["logits"]
    assert static.output is not None
    steps = np.abs(found - expected) / static.output.scale
    assert steps.max() < 1.01
    assert (steps > 0.5).mean() < 0.1

"""Tiny models through ExecuTorch's own runtime, against the same arithmetic written out in torch."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeport.compress import apply_recipe
from edgeport.compress.quantize.grid import Grid
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.errors import BadInputError, TargetRefusesError
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.dispatch import lower, read_weights
from edgeport.model.types import Axis, Model, Source, TensorSpec
from edgeport.quantized import QuantizedTensor
from edgeport.recipe import load_recipe
from edgeport.runtime.executorch import open_executorch
from edgeport.target import load_target

pytest.importorskip("executorch")

XNNPACK = "android-arm64-executorch"
COREML = "ios18-executorch-coreml"
BATCH = Axis("batch", 1, 4, 2)


def make_model(
    module: nn.Module,
    example: Mapping[str, torch.Tensor],
    inputs: Mapping[str, tuple[int | Axis, ...]],
    outputs: Mapping[str, tuple[int | Axis, ...]],
    *,
    huggingface: bool = False,
) -> Model:
    return Model(
        name="tiny",
        module=module.eval(),
        source=Source("factory", "tiny", {}),
        task="other",
        modality="other",
        inputs=tuple(TensorSpec(k, str(example[k].dtype).removeprefix("torch."), s) for k, s in inputs.items()),
        outputs=tuple(TensorSpec(name, "float32", shape) for name, shape in outputs.items()),
        example=dict(example),
        huggingface=huggingface,
    )


def compress(model: Model, recipe: str, target: str = XNNPACK) -> Model:
    return apply_recipe(model, load_recipe(recipe), load_target(target))[0]


def lower_to(
    model: Model, out: Path, *, shapes: str = "fixed", precision: str = "fp32", target: str = XNNPACK
) -> Artifact:
    out.mkdir()
    return lower(model, load_target(target), LoweringSettings(precision, shapes), out)


def run(artifact: Artifact, inputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return open_executorch(artifact).run({name: tensor.numpy() for name, tensor in inputs.items()})


def fake_quantize(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Asymmetric int8 with one scale over `dims`, the range widened to hold 0 (the scheme of XNNPACK's qdint8)."""
    low, high = x.amin(dims, keepdim=True).clamp_max(0), x.amax(dims, keepdim=True).clamp_min(0)
    scale = ((high - low) / 255).clamp_min(1e-12)
    zero = torch.clamp(torch.round(-128 - low / scale), -128, 127)
    return (torch.clamp(torch.round(x / scale) + zero, -128, 127) - zero) * scale


def quantized_eager(model: Model, inputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The compressed model in torch, with activations rounded as the runtime rounds them."""
    compressed = {id(dict(model.module.named_parameters(remove_duplicate=False))[name]) for name in model.quantized}
    hooks = []
    for layer in model.module.modules():
        if isinstance(layer, nn.Linear) and id(layer.weight) in compressed:
            hooks.append(layer.register_forward_pre_hook(lambda _, args: (fake_quantize(args[0], (-1,)),)))
        if isinstance(layer, nn.Conv1d | nn.Conv2d) and id(layer.weight) in compressed:
            hooks.append(
                layer.register_forward_pre_hook(
                    lambda _, args: (fake_quantize(args[0], tuple(range(1, args[0].dim()))),)
                )
            )
    with torch.no_grad():
        result = model.module(**inputs)
    for hook in hooks:
        hook.remove()
    names = [spec.name for spec in model.outputs]
    if isinstance(result, Mapping):
        return {name: result[name].numpy() for name in names}
    values = (result,) if isinstance(result, torch.Tensor) else result
    return {name: value.numpy() for name, value in zip(names, values, strict=False)}


def relative(value: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference relative to the reference's largest value."""
    assert value.shape == reference.shape
    return float(np.abs(value - reference).max() / np.abs(reference).max())


def assert_same_weights(artifact: Artifact, expected: Mapping[str, QuantizedTensor]) -> None:
    stored = read_weights(artifact)
    assert set(stored) == set(expected)
    for name, tensor in expected.items():
        assert stored[name].codes.dtype == torch.int8
        assert torch.equal(stored[name].codes, tensor.codes), name
        assert torch.equal(stored[name].scale, tensor.scale), name


# --- single layers: one program with each of them, tight tolerances ---


class Layers(nn.Module):
    """Every kind of layer that has a compressed form, each with an output of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 96)
        self.narrow = nn.Linear(32, 8, bias=False)
        self.table = nn.Embedding(50, 64, padding_idx=0)
        self.positions = nn.Embedding(20, 32)
        self.image = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.groups = nn.Conv2d(16, 32, 1, groups=2, bias=False)
        self.sound = nn.Conv1d(8, 16, 5, stride=2, padding=2, dilation=1)

    def forward(
        self, ids: torch.Tensor, rows: torch.Tensor, picture: torch.Tensor, wave: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return (
            self.linear(rows),
            self.narrow(rows[..., :32]),
            self.table(ids),
            self.positions.weight[2 : 2 + ids.shape[1]] + self.positions.weight[ids % 20],
            self.image(picture),
            self.groups(torch.cat([picture] * 5 + [picture[:, :1]], 1)),
            self.sound(wave),
        )


LAYER_OUTPUTS = {
    "linear": (BATCH, 7, 96),
    "narrow": (BATCH, 7, 8),
    "table": (BATCH, 5, 64),
    "positions": (BATCH, 5, 32),
    "image": (BATCH, 16, 8, 8),
    "groups": (BATCH, 32, 16, 16),
    "sound": (BATCH, 16, 20),
}


def layers_model() -> Model:
    torch.manual_seed(0)
    # The two samples differ in scale a hundredfold: a range shared between them would show.
    loud = torch.tensor([1.0, 100.0])
    example = {
        "ids": torch.randint(0, 50, (2, 5)),
        "rows": torch.randn(2, 7, 64) * loud.view(2, 1, 1),
        "picture": torch.randn(2, 3, 16, 16) * loud.view(2, 1, 1, 1),
        "wave": torch.randn(2, 8, 40) * loud.view(2, 1, 1),
    }
    inputs = {"ids": (BATCH, 5), "rows": (BATCH, 7, 64), "picture": (BATCH, 3, 16, 16), "wave": (BATCH, 8, 40)}
    return make_model(Layers(), example, inputs, LAYER_OUTPUTS)


@pytest.fixture(scope="module", params=["int8", "int4"])
def layers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Artifact]:
    model = compress(layers_model(), request.param)
    return model, lower_to(model, tmp_path_factory.mktemp("layers") / "out")


def test_each_layer_computes_what_its_codes_say(layers: tuple[Model, Artifact]):
    model, artifact = layers
    outputs, expected = run(artifact, model.example), quantized_eager(model, model.example)
    assert list(outputs) == list(LAYER_OUTPUTS)
    errors = {name: max(relative(outputs[name][i], expected[name][i]) for i in range(2)) for name in outputs}
    assert max(errors.values()) < 1e-5, errors


def test_layers_weights_lie_in_the_file_bit_for_bit(layers: tuple[Model, Artifact]):
    model, artifact = layers
    assert len(model.quantized) == 7
    assert_same_weights(artifact, model.quantized)


def test_layers_are_delegated(layers: tuple[Model, Artifact]):
    _, artifact = layers
    outside = set(artifact.facts["outside_delegates"])
    assert not {name for name in outside if "linear" in name or "convolution" in name or "quantize_per" in name}


def test_changed_weight_is_noticed(layers: tuple[Model, Artifact], tmp_path: Path):
    model, artifact = layers
    data = bytearray(artifact.path.read_bytes())
    codes = model.quantized["linear.weight"].codes
    if model.quantized["linear.weight"].bits == 8:
        stored = codes.numpy().tobytes()
    else:
        shifted = (codes + 8).to(torch.uint8).numpy()
        stored = (shifted[:, 1::2] << 4 | shifted[:, 0::2]).tobytes()
    start = bytes(data).index(stored)
    data[start] ^= 1
    (tmp_path / artifact.entry).write_bytes(data)
    changed = read_weights(replace(artifact, root=tmp_path))["linear.weight"]
    assert int((changed.codes != codes).sum()) == 1


def test_artifact_survives_json(layers: tuple[Model, Artifact]):
    _, artifact = layers
    back = Artifact.from_json(json.loads(json.dumps(artifact.to_json())), artifact.root)
    assert set(read_weights(back)) == set(artifact.weights)


class BeforeConvolutions(nn.Module):
    """Operators that a layout pass must not confuse, each between the picture and a convolution of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Conv2d(3, 6, 3, padding=1), nn.ModuleList(nn.Conv2d(6, 8, 3) for _ in range(3))
        self.padded, self.scaled = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(3, 8, 1)
        self.register_buffer("gain", torch.tensor([1.0, 30.0, 0.1]).view(3, 1, 1))

    def forward(self, picture: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.first(picture)
        return (
            self.padded(nn.functional.pad(picture, (0, 1, 0, 2))),
            self.scaled(picture * self.gain),
            self.rest[0](x.reshape(1, 6, 10, 12)),
            self.rest[1](nn.functional.max_pool2d(x, 2)),
            self.rest[2](x * torch.sigmoid(x.mean((2, 3), keepdim=True))),
        )


def test_convolutions_see_their_inputs_in_the_right_layout(tmp_path: Path):
    torch.manual_seed(0)
    shapes = {"padded": (8, 6, 5), "scaled": (8, 12, 10), "view": (8, 8, 10), "pool": (8, 4, 3), "gate": (8, 10, 8)}
    outputs = {name: (1, *shape) for name, shape in shapes.items()}
    # All positive, as pictures often are: the zero point is then far from 0.
    example = {"picture": torch.rand(1, 3, 12, 10)}
    model = compress(make_model(BeforeConvolutions(), example, {"picture": (1, 3, 12, 10)}, outputs), "int8")
    found = run(lower_to(model, tmp_path / "out"), example)
    expected = quantized_eager(model, example)
    # A rounding that falls the other way shows in the third digit; a wrong layout in the first.
    errors = {name: relative(found[name], expected[name]) for name in outputs}
    assert max(errors.values()) < 2e-2, errors


# --- architectures ---


class Residual(nn.Module):
    """Inverted bottleneck: 1x1, batch norm, depthwise, batch norm, 1x1, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.expand = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.project = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.stem(pixels)
        x = x + self.project(self.deep(self.expand(x)))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def convnet() -> Model:
    torch.manual_seed(0)
    module = Residual()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    example = {"pixels": torch.randn(2, 3, 32, 32)}
    return make_model(module, example, {"pixels": (BATCH, 3, 32, 32)}, {"logits": (BATCH, 10)})


def text_inputs(count: int, sequence: Axis) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int | Axis, ...]]]:
    mask = torch.ones(2, sequence.example, dtype=torch.int64)
    mask[1, -3:] = 0
    example = {"input_ids": torch.randint(1, count, (2, sequence.example)), "attention_mask": mask}
    return example, dict.fromkeys(example, (BATCH, sequence))


SEQUENCE = Axis("sequence", 1, 32, 10)


def bert() -> Model:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    example, inputs = text_inputs(128, SEQUENCE)
    outputs = {"last_hidden_state": (BATCH, SEQUENCE, 64)}
    return make_model(BertModel(config), example, inputs, outputs, huggingface=True)


class Tied(nn.Module):
    """Looks ids up in a table and scores them with the same table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, 64)
        self.mix = nn.Linear(64, 64)
        self.head = nn.Linear(64, 512, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.embed(ids))))


def tied() -> Model:
    torch.manual_seed(0)
    example = {"ids": torch.randint(0, 512, (2, 6))}
    return make_model(Tied(), example, {"ids": (BATCH, 6)}, {"logits": (BATCH, 6, 512)})


# A rounding that falls the other way moves one activation by 1/255 of its range: tolerances are those of a few.
@pytest.mark.parametrize(("build", "shapes"), [(convnet, "fixed"), (bert, "dynamic")])
def test_int8_architecture(build: Callable[[], Model], shapes: str, tmp_path: Path):
    original = build()
    before = {name: tensor.clone() for name, tensor in original.module.state_dict().items()}
    model = compress(original, "int8")
    artifact = lower_to(model, tmp_path / "out", shapes=shapes)
    inputs = dict(model.example)
    if shapes == "dynamic":
        inputs = {name: tensor[:1, :7].contiguous() for name, tensor in inputs.items()}
    outputs, expected = run(artifact, inputs), quantized_eager(model, inputs)
    with torch.no_grad():
        uncompressed = quantized_eager(replace(original, quantized={}), inputs)
    for name, value in outputs.items():
        assert relative(value, expected[name]) < 2e-2
        assert np.corrcoef(value.ravel(), uncompressed[name].ravel())[0, 1] > 0.999
    unused = set(artifact.facts["unused_weights"])
    assert unused == ({"pooler.dense.weight"} if build is bert else set())
    assert_same_weights(artifact, {n: t for n, t in model.quantized.items() if n not in unused})
    assert all(torch.equal(before[name], tensor) for name, tensor in original.module.state_dict().items())


@pytest.mark.parametrize("recipe", ["fp32", "int8", "int4"])
def test_tied_weight_lies_in_the_file_once(recipe: str, tmp_path: Path):
    model = compress(tied(), recipe)
    artifact = lower_to(model, tmp_path / "out")
    name = "embed.weight"
    weight = dict(model.module.named_parameters())[name].detach()
    data = artifact.path.read_bytes()
    if recipe == "fp32":
        stored = weight.numpy().tobytes()
        reference = quantized_eager(model, model.example)["logits"]
        assert relative(run(artifact, model.example)["logits"], reference) < 1e-5
    else:
        codes = model.quantized[name].codes
        shifted = (codes + 8).to(torch.uint8).numpy()
        stored = codes.numpy().tobytes() if recipe == "int8" else (shifted[:, 1::2] << 4 | shifted[:, 0::2]).tobytes()
        assert "kernel/" in artifact.weights[name]
        assert "xnnpack/" in artifact.weights[name]
        assert_same_weights(artifact, model.quantized)
        expected = quantized_eager(model, model.example)["logits"]
        assert relative(run(artifact, model.example)["logits"], expected) < 2e-2
    assert data.count(stored) == 1
    if recipe == "int4":
        other_order = (shifted[:, 0::2] << 4 | shifted[:, 1::2]).tobytes()
        assert other_order not in data


# --- the Core ML delegate ---


@pytest.mark.parametrize(("recipe", "precision", "tolerance"), [("int8", "fp32", 1e-5), ("int4", "fp16", 1e-2)])
def test_core_ml_delegate(recipe: str, precision: str, tolerance: float, tmp_path: Path):
    pytest.importorskip("coremltools")
    model = compress(bert(), recipe, COREML)
    artifact = lower_to(model, tmp_path / "out", precision=precision, target=COREML)
    session = open_executorch(artifact)
    assert not session.vendor_kernels
    outputs = session.run({name: tensor.numpy() for name, tensor in model.example.items()})
    with torch.no_grad():
        expected = model.module(**model.example).last_hidden_state.numpy()
    assert relative(outputs["last_hidden_state"], expected) < tolerance
    assert_same_weights(artifact, {n: t for n, t in model.quantized.items() if n != "pooler.dense.weight"})


def test_core_ml_program_has_the_form_that_executorch_writes(tmp_path: Path):
    ct = pytest.importorskip("coremltools")
    from executorch.backends.apple.coreml import executorchcoreml
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner
    from executorch.exir import to_edge_transform_and_lower

    from edgeport.export.executorch.pte import delegate_data, read_program

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 8)).eval()
    shapes = {"x": (2, 64)}
    wrapped = type("Named", (nn.Module,), {"forward": lambda self, x: self.net(x)})()
    wrapped.net = module
    model = make_model(wrapped, {"x": torch.randn(2, 64)}, shapes, {"y": (2, 8)})
    artifact = lower_to(model, tmp_path / "out", precision="fp32", target=COREML)
    ours = read_program(artifact.path).program

    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=ct.target.iOS18, compute_precision=ct.precision.FLOAT32
    )
    tupled = type("Tupled", (nn.Module,), {"forward": lambda self, x: (self.net(x),)})()
    tupled.net = module
    with torch.no_grad():
        program = torch.export.export(tupled, (), {"x": model.example["x"]})
        lowered = to_edge_transform_and_lower(program, partitioner=[CoreMLPartitioner(compile_specs=specs)])
    (tmp_path / "theirs.pte").write_bytes(lowered.to_executorch().buffer)
    theirs = read_program(tmp_path / "theirs.pte").program

    mine, official = ours.execution_plan[0], theirs.execution_plan[0]
    assert mine.delegates[0].id == official.delegates[0].id
    assert mine.delegates[0].compile_specs == official.delegates[0].compile_specs
    assert [c.instructions for c in mine.chains] == [c.instructions for c in official.chains]
    assert (mine.inputs, mine.outputs, mine.operators) == (official.inputs, official.outputs, official.operators)
    assert [(v.val.scalar_type, v.val.sizes, v.val.dim_order) for v in mine.values] == [
        (v.val.scalar_type, v.val.sizes, v.val.dim_order) for v in official.values
    ]
    assert json.loads(mine.container_meta_type.encoded_inp_str) == json.loads(
        official.container_meta_type.encoded_inp_str
    )
    assert json.loads(mine.container_meta_type.encoded_out_str) == json.loads(
        official.container_meta_type.encoded_out_str
    )
    # executorch's own reader takes our payload apart.
    (tmp_path / "unpacked").mkdir()
    executorchcoreml.unflatten_directory_contents(delegate_data(ours, "CoreMLBackend")[0], str(tmp_path / "unpacked"))
    files = {p.relative_to(tmp_path / "unpacked").as_posix() for p in (tmp_path / "unpacked").rglob("*") if p.is_file()}
    assert {"metadata.json", "model.mlpackage/Manifest.json"} <= {f.removeprefix("lowered_module/") for f in files}


# --- refusals, damage, determinism ---


class Sorts(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sort(x).values


class OneChannel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def test_operator_without_a_kernel_is_named(tmp_path: Path):
    model = make_model(Sorts(), {"x": torch.randn(2, 8)}, {"x": (2, 8)}, {"y": (2, 8)})
    with pytest.raises(TargetRefusesError, match="sort"):
        lower_to(model, tmp_path / "out")


def test_convolution_of_one_channel_is_refused_by_name(tmp_path: Path):
    model = make_model(OneChannel(), {"x": torch.randn(1, 1, 8, 8)}, {"x": (1, 1, 8, 8)}, {"y": (1, 8, 6, 6)})
    assert not compress(model, "int8").quantized, "XNNPACK's own targets leave it in float"
    # A target of the user's own may claim that it can be done.
    weight = quantize_rtn(model.module.conv.weight, Grid(bits=8, group_size=None))
    forced = replace(model, quantized={"conv.weight": weight}, activations={"conv.weight": "dynamic_int8"})
    with pytest.raises(TargetRefusesError) as refusal:
        lower_to(forced, tmp_path / "out")
    assert refusal.value.where == "layer conv.weight"


class Fixes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 8)


def test_axis_that_cannot_vary_is_refused_by_name(tmp_path: Path):
    model = make_model(Fixes(), {"x": torch.randn(2, 8)}, {"x": (BATCH, 8)}, {"y": (2, 8)})
    with pytest.raises(TargetRefusesError, match="batch"):
        lower_to(model, tmp_path / "out", shapes="dynamic")


def test_damaged_file_is_bad_input(layers: tuple[Model, Artifact], tmp_path: Path):
    _, artifact = layers
    (tmp_path / artifact.entry).write_bytes(artifact.path.read_bytes()[:1000])
    damaged = replace(artifact, root=tmp_path)
    with pytest.raises(BadInputError):
        open_executorch(damaged)
    with pytest.raises(BadInputError):
        read_weights(damaged)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_executorch_lower as t
artifact = t.lower_to(t.compress(t.tied(), "int8"), Path(sys.argv[2]))
import hashlib, json
print(hashlib.sha256(artifact.path.read_bytes()).hexdigest())
print(json.dumps(artifact.to_json(), sort_keys=True))
"""


def test_same_bytes_in_two_processes(tmp_path: Path):
    here = lower_to(compress(tied(), "int8"), tmp_path / "here")
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path / "there")]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    digest = hashlib.sha256(here.path.read_bytes()).hexdigest()
    assert there.stdout.splitlines() == [digest, json.dumps(here.to_json(), sort_keys=True)]

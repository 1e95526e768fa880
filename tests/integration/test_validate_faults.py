"""Planted faults: real ONNX files of a tiny model, broken on purpose, must not pass the gate.

The budgets are those of the int8 recipe, far looser than the faithful fp32 file needs.
"""

import copy
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from edgeport.errors import MeasurementError
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.gate import conclude
from edgeport.model.types import Axis, Model, Source, TensorSpec
from edgeport.quantized import QuantizedTensor, quantize_with_scale
from edgeport.recipe import load_recipe
from edgeport.runtime.torch import TorchSession
from edgeport.storage import canonical_json
from edgeport.target import load_target
from edgeport.validate.evidence import DataRecord, Evidence
from edgeport.validate.run import Effort, measure

BUDGETS = load_recipe("int8").gate.model_copy(update={"size_ratio_max": None})
EXECUTION = load_target("linux-x86_64-ort").execution
DATA = DataRecord(name="synthetic", real=False, sha256={}, slice="seeded", licence=None, samples=12)
FAST = Effort(queries=3, warmup=0, seconds=0.0, limit_seconds=1.0, probes=0)


class Classifier(torch.nn.Module):
    """Pictures 0..1 in, normalised inside, features and class scores out."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 0.45))
        self.register_buffer("std", torch.full((3, 1, 1), 0.22))
        self.stem = torch.nn.Conv2d(3, 8, 3, stride=2)
        self.hidden = torch.nn.Linear(8, 32)
        self.head = torch.nn.Linear(32, 10)

    def forward(self, pixel_values):
        x = torch.relu(self.stem((pixel_values - self.mean) / self.std)).mean(dim=(2, 3))
        features = torch.tanh(self.hidden(x))
        return {"logits": self.head(features) * 3, "features": features}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    module = Classifier().eval()
    return Model(
        name="tiny",
        module=module,
        source=Source("factory", "test:tiny", {}),
        task="image-classification",
        modality="image",
        inputs=(TensorSpec("pixel_values", "float32", (Axis("batch", 1, 4, 1), 3, 16, 16)),),
        outputs=(
            TensorSpec("logits", "float32", (Axis("batch", 1, 4, 1), 10)),
            TensorSpec("features", "float32", (Axis("batch", 1, 4, 1), 32)),
        ),
        example={"pixel_values": torch.rand(1, 3, 16, 16)},
        huggingface=False,
    )


@pytest.fixture(scope="module")
def samples():
    """Pictures of different brightness, contrast and texture."""
    random = np.random.default_rng(8)
    pictures = []
    for _ in range(DATA.samples):
        base = random.random((1, 3, 1, 1)) * 0.6
        pictures.append((base + random.random((1, 3, 16, 16)) * random.uniform(0.1, 0.4)).astype(np.float32))
    return [{"pixel_values": picture} for picture in pictures]


@pytest.fixture(scope="module")
def reference(model, samples):
    session = TorchSession(model)
    return [session.run(sample) for sample in samples]


class Flat(torch.nn.Module):
    """The outputs as a tuple, in order."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, pixel_values):
        found = self.module(pixel_values)
        return found["logits"], found["features"]


def write(model, folder, module=None):
    """A real .onnx file of a module, straight from torch's exporter."""
    flat = Flat(copy.deepcopy(model.module if module is None else module)).eval()
    torch.onnx.export(
        flat,
        (model.example["pixel_values"],),
        folder / "model.onnx",
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=["pixel_values"],
        output_names=["logits", "features"],
    )
    fixed = lambda specs: tuple(replace(spec, shape=spec.fixed_shape()) for spec in specs)  # noqa: E731
    return Artifact("onnxruntime", "cpu", folder, "model.onnx", fixed(model.inputs), fixed(model.outputs))


@pytest.fixture(scope="module")
def faithful(model, tmp_path_factory):
    return write(model, tmp_path_factory.mktemp("faithful"))


def judge(artifact, samples, reference, **changes):
    settings = {
        "samples": samples,
        "reference": reference,
        "task": "image-classification",
        "execution": EXECUTION,
        "logical": {},
        "data": DATA,
        "effort": FAST,
        **changes,
    }
    return conclude(measure(artifact, **settings), BUDGETS)


def failures(evidence):
    return {(check.metric, check.output) for check in evidence.verdict.checks if not check.passed}


def test_the_faithful_file_passes(faithful, samples, reference):
    evidence = judge(faithful, samples, reference)
    assert evidence.verdict.passed, failures(evidence)
    assert evidence.states.numerics_verified == "yes"
    assert evidence.states.executed_here == "runtime"
    by_name = {parity.output: parity for parity in evidence.parity}
    assert by_name["logits"].cosine_worst > 0.999999
    assert by_name["logits"].max_abs < 1e-4
    assert by_name["logits"].positions == len(samples)
    assert by_name["features"].positions is None
    assert evidence.size.bytes == faithful.path.stat().st_size
    assert evidence.latency.queries == 3
    assert evidence.latency.ratio is None, "there is no fp32 artifact beside it"
    assert evidence.memory is None
    assert "No fresh process" in evidence.memory_absent


def zeroed(weights):
    for weight in weights.values():
        weight[...] = 0


def head_zeroed(weights):
    weights["head.weight"][...] = 0


def one_layer_zeroed(weights):
    weights["hidden.weight"][...] = 0
    weights["hidden.bias"][...] = 0


def wrong_normalisation(weights):
    weights["mean"][...] = 0
    weights["std"][...] = 1


def pixels_not_scaled(weights):
    weights["std"][...] /= 255


def nan_weight(weights):
    weights["head.weight"][4, 7] = np.nan


def overflow(weights):
    weights["head.weight"][4] = 3e38


def permuted_channels(weights):
    weights["hidden.weight"][...] = np.roll(weights["hidden.weight"], 1, axis=0)


def sign_flipped(weights):
    weights["head.weight"][...] *= -1


FAULTS = [
    (zeroed, "features"),
    (head_zeroed, "logits"),
    (one_layer_zeroed, "features"),
    (wrong_normalisation, "logits"),
    (pixels_not_scaled, "logits"),
    (nan_weight, "logits"),
    (overflow, "logits"),
    (permuted_channels, "features"),
    (sign_flipped, "logits"),
]


def break_file(faithful, fault, folder):
    """A copy of a faithful file with its stored weights changed."""
    graph = onnx.load(faithful.path)
    stored = {tensor.name.removeprefix("module."): tensor for tensor in graph.graph.initializer}
    weights = {name: onnx.numpy_helper.to_array(tensor).copy() for name, tensor in stored.items()}
    weights = {name: weight for name, weight in weights.items() if weight.dtype == np.float32}
    fault(weights)
    for name, weight in weights.items():
        stored[name].CopyFrom(onnx.numpy_helper.from_array(weight, stored[name].name))
    onnx.save(graph, folder / "model.onnx")
    return replace(faithful, root=folder)


@pytest.mark.parametrize(("fault", "output"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_planted_fault_fails_the_gate(fault, output, faithful, samples, reference, tmp_path):
    evidence = judge(break_file(faithful, fault, tmp_path), samples, reference)
    assert not evidence.verdict.passed
    assert evidence.verdict.exit_code == 10
    assert output in {name for _, name in failures(evidence)}
    assert evidence.states.numerics_verified == "failed"
    # The evidence of a broken file is still a whole document: canonical JSON refuses NaN.
    assert Evidence(**json.loads(canonical_json(evidence.model_dump(mode="json")))) == evidence


def test_an_output_stuck_at_its_mean_fails(model, samples, reference, tmp_path):
    """A constant with the right mean is the closest that a broken graph can come."""

    class Stuck(torch.nn.Module):
        def __init__(self, module, value):
            super().__init__()
            self.module = module
            self.register_buffer("value", value)

        def forward(self, pixel_values):
            found = self.module(pixel_values)
            return {**found, "logits": found["logits"] * 0 + self.value}

    mean = torch.tensor(np.mean([row["logits"] for row in reference], axis=0))
    evidence = judge(write(model, tmp_path, Stuck(copy.deepcopy(model.module), mean)), samples, reference)
    assert ("varies", "logits") in failures(evidence)
    assert evidence.verdict.exit_code == 10


def test_permuted_scales_in_the_file_fail(model, samples, reference, tmp_path):
    """The exporter's own int8 file, with one weight's scales in the wrong order afterwards."""
    from edgeport.compress import apply_recipe
    from edgeport.export.dispatch import lower

    target = load_target("linux-x86_64-ort")
    compressed, _ = apply_recipe(model, load_recipe("int8"), target)
    artifact = lower(compressed, target, LoweringSettings(precision="fp32", shapes="fixed"), tmp_path)
    faithful = judge(artifact, samples, reference, logical=compressed.quantized)
    assert faithful.weights.checked == faithful.weights.equal == 3

    graph = onnx.load(artifact.path)
    scale = compressed.quantized["hidden.weight"].scale.numpy().reshape(-1)
    found = [t for t in graph.graph.initializer if np.array_equal(onnx.numpy_helper.to_array(t).reshape(-1), scale)]
    assert len(found) == 1
    shape = onnx.numpy_helper.to_array(found[0]).shape
    found[0].CopyFrom(onnx.numpy_helper.from_array(np.roll(scale, 5).reshape(shape), found[0].name))
    onnx.save(graph, artifact.path)

    evidence = judge(artifact, samples, reference, logical=compressed.quantized)
    assert ("weights_equal", None) in failures(evidence)
    assert evidence.weights.different[0].startswith("hidden.weight: 32 of 32 scales differ")
    assert evidence.verdict.exit_code == 10


def test_a_weight_that_stayed_float_fails(model, faithful, samples, reference):
    """Outputs alone could not tell: the file computes with the dequantised values, in float."""
    weight = model.module.hidden.weight.detach()
    tensor: QuantizedTensor = quantize_with_scale(
        weight, weight.abs().amax(1, keepdim=True) / 127, bits=8, group_size=8
    )
    evidence = judge(faithful, samples, reference, logical={"hidden.weight": tensor})
    assert failures(evidence) == {("weights_equal", None)}
    assert evidence.weights.different == ("hidden.weight: not in the file",)


def test_a_target_not_executed_here_is_told_apart(faithful, samples, reference):
    execution = EXECUTION.model_copy(update={"here": "none", "statement": "Converted only."})
    evidence = judge(faithful, samples, reference, execution=execution)
    assert evidence.states.executed_here == "none"
    assert evidence.states.numerics_verified == "no"
    assert evidence.parity == ()
    assert evidence.memory is None
    assert evidence.memory_absent
    assert evidence.verdict.exit_code == 15


def test_a_target_that_claims_another_way_of_running_is_refused(faithful, samples, reference):
    execution = EXECUTION.model_copy(update={"here": "reference"})
    with pytest.raises(MeasurementError, match="ran by 'runtime'"):
        judge(faithful, samples, reference, execution=execution)


def test_latency_and_memory_beside_the_baseline(faithful, samples, reference):
    seen = []
    evidence = judge(
        faithful,
        samples,
        reference,
        baseline=faithful,
        effort=replace(FAST, probes=1),
        predicted_bytes=5000,
        watch=lambda done, total, detail: seen.append((done, total)),
    )
    latency, memory = evidence.latency, evidence.memory
    assert latency is not None
    assert memory is not None
    assert latency.queries == 3
    assert latency.ratio.mean == pytest.approx(latency.p50_ms / latency.baseline_p50_ms, rel=1e-9)
    assert latency.ratio.low <= latency.ratio.mean <= latency.ratio.high
    assert latency.p50_ms <= latency.p90_ms
    assert not latency.valid
    assert "only 3 calls; 1024 are needed" in latency.note
    assert latency.input_shapes == {"pixel_values": (1, 3, 16, 16)}
    assert 0 < memory.runtime_rss_mb <= memory.peak_rss_mb
    assert memory.baseline_peak_rss_mb == pytest.approx(memory.peak_rss_mb, rel=0.2)
    assert evidence.size.ratio == 1.0
    assert evidence.size.predicted_bytes == 5000
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (seen[-1][1], seen[-1][1])

"""Planted faults in shipped files, and planted noise: the gate catches the ones and lets the other pass.

A tiny classifier of token ids, trained for a second so that it has a score to lose, as a real .onnx file. Parity is
held to the int8 recipe's budgets, and the suite to "no worse than 2 points".
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from edgeport.budgets import Budgets
from edgeport.errors import MeasurementError
from edgeport.export.artifact import Artifact
from edgeport.gate import conclude, judge
from edgeport.model.types import Model, Source, TensorSpec
from edgeport.recipe import load_recipe
from edgeport.runtime.session import open_session
from edgeport.runtime.torch import TorchSession
from edgeport.target import load_target
from edgeport.validate.evidence import DataRecord
from edgeport.validate.run import Effort, measure
from edgeport.validate.tasks import score_task

VOCABULARY, LENGTH, WIDTH, CLASSES = 48, 12, 32, 4
SAMPLES = 800
PARITY = load_recipe("int8").gate.model_copy(update={"size_ratio_max": None})
SUITE = Budgets(accuracy={"keys": {"drop_max": "2 points"}})
BUDGETS = PARITY.model_copy(update={"accuracy": SUITE.accuracy})
EXECUTION = load_target("linux-x86_64-ort").execution
DATA = DataRecord(name="keys", real=False, sha256={}, slice="seeded", licence=None, samples=SAMPLES)
FAST = Effort(queries=2, warmup=0, seconds=0.0, limit_seconds=1.0, probes=0)


class Classifier(torch.nn.Module):
    """Ids to class scores; the answer lies in which token stands at the key's position, so that positions matter."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.positions = torch.nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.attention = torch.nn.Linear(WIDTH, 1)
        self.register_buffer("mean", torch.full((WIDTH,), 0.3))
        self.register_buffer("std", torch.full((WIDTH,), 0.7))
        self.hidden = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids):
        x = (self.embedding(input_ids) + self.positions - self.mean) / self.std
        pooled = (torch.softmax(self.attention(torch.tanh(x)), dim=1) * x).sum(dim=1)
        return self.head(torch.relu(self.hidden(pooled)))


def make_data(seed, count):
    """Ids (count, LENGTH), and the class of each: that of the token at position 3."""
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (count, LENGTH))
    return ids, ids[:, 3] * CLASSES // VOCABULARY


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    module = Classifier()
    ids, labels = (torch.from_numpy(each) for each in make_data(1, 2000))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(ids), labels).backward()
        optimizer.step()
    return Model(
        name="tiny",
        module=module.eval(),
        source=Source("factory", "test:tiny", {}),
        task="text-classification",
        modality="text",
        inputs=(TensorSpec("input_ids", "int64", (1, LENGTH)),),
        outputs=(TensorSpec("logits", "float32", (1, CLASSES)),),
        example={"input_ids": ids[:1]},
        huggingface=False,
    )


@pytest.fixture(scope="module")
def data():
    """Inputs of the suite, one a call, and their labels."""
    ids, labels = make_data(2, SAMPLES)
    return [{"input_ids": row[None]} for row in ids], labels


@pytest.fixture(scope="module")
def reference(model, data):
    session = TorchSession(model)
    return [session.run(call) for call in data[0]]


@pytest.fixture(scope="module")
def faithful(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faithful")
    torch.onnx.export(
        copy.deepcopy(model.module),
        (model.example["input_ids"],),
        folder / "model.onnx",
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=["input_ids"],
        output_names=["logits"],
    )
    return Artifact("onnxruntime", "cpu", folder, "model.onnx", model.inputs, model.outputs)


def changed(faithful, folder, change):
    """A copy of the file with its stored weights changed."""
    graph = onnx.load(faithful.path)
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    weights = {name: onnx.numpy_helper.to_array(tensor).copy() for name, tensor in stored.items()}
    change(weights)
    for name, weight in weights.items():
        stored[name].CopyFrom(onnx.numpy_helper.from_array(weight, name))
    onnx.save(graph, folder / "model.onnx")
    return replace(faithful, root=folder)


def right(outputs, labels):
    return [float(row["logits"].argmax() == label) for row, label in zip(outputs, labels, strict=True)]


def measured(artifact, data, reference):
    """Parity on the first 64 samples and the suite on all of them, both through the shipped file."""
    inputs, labels = data
    found = measure(
        artifact,
        samples=inputs[:64],
        reference=reference[:64],
        task="text-classification",
        execution=EXECUTION,
        logical={},
        data=DATA,
        effort=FAST,
    )
    session = open_session(artifact)
    task = score_task(
        suite="keys",
        metric="accuracy",
        unit="share",
        chance=1 / CLASSES,
        original=right(reference, labels),
        artifact=right((session.run(call) for call in inputs), labels),
        answers=[int(row["logits"].argmax()) for row in reference],
        data=DATA,
    )
    return found.model_copy(update={"tasks": (task,)})


def failures(verdict):
    return {check.metric for check in verdict.checks if not check.passed}


def test_the_faithful_file_passes(faithful, data, reference):
    evidence = conclude(measured(faithful, data, reference), BUDGETS)
    assert evidence.verdict.passed, failures(evidence.verdict)
    task = evidence.tasks[0]
    assert task.baseline_problem is None
    assert task.original.mean > 0.9, "the classifier must have something to lose"


def off_by_one_positions(weights):
    weights["positions"][...] = np.roll(weights["positions"], 1, axis=0)


def wrong_normalisation(weights):
    weights["mean"][...] = -2.0
    weights["std"][...] = 1.0


def swapped_labels(weights):
    for name in ("head.weight", "head.bias"):
        weights[name][...] = weights[name][[1, 0, 2, 3]]


def unknown_tokens(weights):
    """A vocabulary cut after three quarters: every later token reads the row of token 0."""
    cut = VOCABULARY * 3 // 4
    weights["embedding.weight"][cut:] = weights["embedding.weight"][0]


def permuted_rows(weights):
    weights["hidden.weight"][...] = np.roll(weights["hidden.weight"], 5, axis=0)


@pytest.mark.parametrize(
    "fault", [off_by_one_positions, wrong_normalisation, swapped_labels, unknown_tokens, permuted_rows]
)
def test_a_planted_fault_is_caught_twice(fault, faithful, data, reference, tmp_path):
    """By its outputs and, were there no budget on these, by the suite."""
    found = measured(changed(faithful, tmp_path, fault), data, reference)
    assert judge(found, PARITY).exit_code == 10
    verdict = judge(found, SUITE)
    assert verdict.exit_code == 11
    assert failures(verdict) == {"accuracy_drop_max"}
    against = judge(found, Budgets(), against=measured(faithful, data, reference))
    assert "regression.accuracy_drop_max" in failures(against)
    assert against.exit_code == 10


def test_a_table_that_lacks_rows_stops_with_a_clear_error(faithful, data, reference, tmp_path):
    def truncated(weights):
        weights["embedding.weight"] = weights["embedding.weight"][: VOCABULARY // 2]

    with pytest.raises(MeasurementError, match="ONNX Runtime stopped"):
        measured(changed(faithful, tmp_path, truncated), data, reference)


@pytest.mark.parametrize("seed", range(5))
def test_planted_noise_passes(seed, faithful, data, reference, tmp_path):
    """Every weight off by up to 0.1%, as much as another order of summing and more."""

    def jitter(weights):
        random = np.random.default_rng(seed)
        for weight in weights.values():
            if weight.dtype == np.float32:
                weight[...] *= 1 + 1e-3 * random.uniform(-1, 1, weight.shape).astype(np.float32)

    noisy = measured(changed(faithful, tmp_path, jitter), data, reference)
    assert noisy.parity[0].max_abs > 1e-4, "the noise must be there"
    verdict = judge(noisy, BUDGETS, against=measured(faithful, data, reference))
    assert verdict.passed, [check.message for check in verdict.checks if not check.passed]


def test_a_delegate_that_silently_fell_back_is_caught(tmp_path):
    """The same program with and without its delegate: the outputs agree, and only the file's own list tells."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    torch.manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    samples = [{"x": np.random.default_rng(at).normal(size=(1, 8)).astype(np.float32)} for at in range(6)]
    wanted = [{"y": module(torch.from_numpy(call["x"])).detach().numpy()} for call in samples]
    verdicts = {}
    for name, partitioners in (("delegated", [XnnpackPartitioner()]), ("fell back", [])):
        program = torch.export.export(module, (torch.zeros(1, 8),))
        folder = tmp_path / name
        folder.mkdir()
        lowered = to_edge_transform_and_lower(program, partitioner=partitioners).to_executorch()
        (folder / "model.pte").write_bytes(lowered.buffer)
        artifact = Artifact(
            runtime="executorch",
            delegate="xnnpack",
            root=folder,
            entry="model.pte",
            inputs=(TensorSpec("x", "float32", (1, 8)),),
            outputs=(TensorSpec("y", "float32", (1, 4)),),
        )
        found = measure(
            artifact,
            samples=samples,
            reference=wanted,
            task="other",
            execution=load_target("android-arm64-executorch").execution,
            logical={},
            data=DATA,
            effort=FAST,
        )
        assert found.parity[0].cosine_worst > 0.99999
        verdicts[name] = judge(found, Budgets(cosine_min=0.999))
        if name == "fell back":
            outside = tuple(kernel.partition(".")[0] for kernel in found.delegation.kernels)
            assert "aten::addmm" in outside or "aten::linear" in outside
            assert not judge(found, Budgets(fallback_allowed=outside)).passed, "nothing is delegated at all"
    assert verdicts["delegated"].passed, failures(verdicts["delegated"])
    assert failures(verdicts["fell back"]) == {"delegated"}
    assert verdicts["fell back"].exit_code == 12

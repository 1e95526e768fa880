"""What all rows of the quality bench share: a model, its inputs, the float model's outputs, and the measuring."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from quality_table import SPEECH, Corpus
from rich.console import Console

from edgeport.data.cards import load_card
from edgeport.data.samples import CARDS, prompt_tokens, samples
from edgeport.data.text import open_tokenizer, read_texts
from edgeport.export.artifact import Artifact
from edgeport.model.load import load_model
from edgeport.runtime.torch import TorchSession
from edgeport.validate.outputs import SENTENCE_EMBEDDING
from edgeport.validate.parity import compare

if TYPE_CHECKING:
    import onnx

    from edgeport.model.types import Model

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 64
"""Inputs to measure on and inputs to calibrate on, or as many as the data has; texts have no limit but time."""
FILE, FLOAT = "model.onnx", "float"
OPSET = 21
LANGUAGE = "text-generation"
CORPORA = {"owt_5.jsonl": "openwebtext", "wikipedia_5.jsonl": "wikipedia"}
WINDOWS, WINDOW = 8, 256
"""Language models are measured on this many windows of this many tokens of each corpus."""

Arrays = Mapping[str, np.ndarray]
console = Console(stderr=True, width=200)


@dataclass(frozen=True)
class Made:
    """What a row made.

    Attributes:
        outputs: of each of the bench's inputs, in their order.
        bytes: of what ships.
        bits: a quantized weight takes on average.
        runtime: what ran it.
        file: an ONNX file that can be timed against the float one.
        simulated: there is no file, PyTorch ran dequantised weights.
        cpu_ratio: processor time relative to the float file, where the row measured it itself.
    """

    outputs: Iterable[Arrays]
    bytes: int
    bits: float
    runtime: str
    file: Path | None = None
    simulated: bool = False
    cpu_ratio: float | None = None


@dataclass(frozen=True)
class Bench:
    """A model and its data.

    Attributes:
        reference: what `load_model` takes.
        groups: of language models, the corpus of each input.
        labels: of pictures, their true classes.
        answers: the float model's outputs of each input.
    """

    reference: str
    model: Model
    folder: Path
    inputs: list[dict[str, np.ndarray]]
    calibration: list[dict[str, np.ndarray]]
    answers: list[dict[str, np.ndarray]]
    groups: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()

    @property
    def shared(self) -> Path:
        """The folder of what several rows need."""
        folder = self.folder / FLOAT
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def plain(self) -> Path:
        """The plainly exported float ONNX file, made when first asked for."""
        path = self.shared / FILE
        if not path.is_file():
            export_plain(self.model, path)
        return path

    def ask(self, run: Callable[[Arrays], Arrays]) -> Iterator[Arrays]:
        """The answers of a session."""
        return (run(row) for row in self.inputs)

    def stored(self, name: str) -> Path:
        """The inputs (`inputs`) or the calibration inputs (`calibration`) in a file, for a tool in its own process."""
        path = self.shared / f"{name}.npz"
        if not path.is_file():
            rows = self.inputs if name == "inputs" else self.calibration
            np.savez(path, **{f"{i}/{key}": value for i, row in enumerate(rows) for key, value in row.items()})
        return path


def prepare(name: str, out: Path) -> Bench:
    """Load a model by its name in the zoo or by its folder, and run it."""
    reference = name if "/" in name else f"zoo:{name}"
    model = load_model(reference)
    folder = out / model.name
    groups: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    if model.task == LANGUAGE:
        inputs, groups = windows(model)
    else:
        found = samples(model, count=SAMPLES, split="parity")
        inputs, labels = found.inputs, found.labels
    calibration = samples(model, count=SAMPLES, split="calibration").inputs
    session = TorchSession(model)
    answers = [session.run(row) for row in inputs]
    return Bench(reference, model, folder, inputs, calibration, answers, groups, labels)


def windows(model: Model) -> tuple[list[dict[str, np.ndarray]], tuple[str, ...]]:
    """Windows of tokens of each corpus, texts behind one another with the end-of-text token before each."""
    card = load_card(CARDS["text"])
    tokenizer = open_tokenizer(model.assets["tokenizer.json"], 1 << 20)
    end = int(getattr(model.module.config, "eos_token_id", None) or 0)  # type: ignore[arg-type,union-attr]
    inputs, groups = [], []
    for path in card.fetch():
        ids: list[int] = []
        for text in read_texts(card, [path], "parity"):
            ids += [end, *tokenizer.encode(text).ids]
        for start in range(0, WINDOWS * WINDOW, WINDOW):
            window = np.asarray([ids[start : start + WINDOW]], np.int64)
            inputs.append({"input_ids": window, "attention_mask": np.ones_like(window)})
            groups.append(CORPORA[path.name])
    return inputs, tuple(groups)


def export_plain(model: Model, out: Path) -> None:
    """The model in float32 through its exporter alone, as the peers' users have it."""
    import onnx
    import torch

    from edgeport.export.onnx.trace import quiet

    vary = torch.export.Dim.AUTO
    with quiet():
        if model.huggingface:
            from transformers.exporters import OnnxConfig, OnnxExporter

            # Two of each, so that the exporter does not take a batch of one for a constant.
            example = {name: torch.cat([value, value]) for name, value in model.example.items()}
            shapes = {
                spec.name: {index: vary for index, size in enumerate(spec.shape) if not isinstance(size, int)}
                for spec in model.inputs
            }
            config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=OPSET)
            OnnxExporter().export(model.module, example, config).save_pretrained(out.parent / "exported")
            program = onnx.load(next((out.parent / "exported").rglob("*.onnx")))
        else:
            names = [spec.name for spec in model.outputs]
            exported = torch.onnx.export(
                model.module, kwargs=dict(model.example), opset_version=OPSET, dynamo=True, output_names=names
            )
            program = exported.model_proto
    fold_transposes(program)
    # The quantizers infer the shapes again, and refuse to where the exporter's own differ.
    del program.graph.value_info[:]
    onnx.save(program, out)


def fold_transposes(program: onnx.ModelProto) -> None:
    """Give a tied head a weight of its own: every quantizer leaves out one that is the table's, transposed."""
    from onnx import numpy_helper

    graph = program.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in tensors]:
        order = next((list(item.ints) for item in node.attribute if item.name == "perm"), None)
        value = np.transpose(numpy_helper.to_array(tensors[node.input[0]]), order)
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), node.output[0]))
        graph.node.remove(node)


def artifact(model: Model, path: Path) -> Artifact:
    """An ONNX file of whatever tool, to be opened like ours."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    names = {value.name for value in graph.input}
    inputs = tuple(spec for spec in model.inputs if spec.name in names)
    return Artifact("onnxruntime", "cpu", path.parent, path.name, inputs, model.outputs)


def language(bench: Bench, outputs: Iterable[Arrays]) -> dict[str, Any]:
    """Perplexity, divergence and agreement on each corpus; the error is the mean over both."""
    corpora = of_corpora(bench, outputs, bench.groups, "input_ids", 1)
    return {
        "metric": "mean KL, nats",
        "error": float(np.mean([corpus.kl for corpus in corpora.values()])),
        "top1": float(np.mean([corpus.top1 for corpus in corpora.values()])),
        "corpora": corpora,
    }


def of_corpora(
    bench: Bench, outputs: Iterable[Arrays], groups: Iterable[str], ids: str, given: int
) -> dict[str, Corpus]:
    """Each group's divergence, agreement, and perplexity: exp of the mean negative log-likelihood of its tokens.

    Args:
        groups: the corpus of each input.
        ids: the input with the tokens.
        given: tokens at the start of each input that nothing predicts, or that are always the same.
    """
    import torch

    sums: dict[str, torch.Tensor] = {}
    for group, row, answer, output in zip(groups, bench.inputs, bench.answers, outputs, strict=True):
        want = torch.from_numpy(answer["logits"][0]).float().log_softmax(-1)
        got = torch.from_numpy(np.array(output["logits"][0], np.float32)).log_softmax(-1)
        if not bool(torch.isfinite(got).all()):
            raise SystemExit("logits are not finite")
        following = torch.from_numpy(row[ids][0, given:])[:, None]
        first = given - 1
        found = [
            (want.exp() * (want - got)).sum(-1, dtype=torch.float64).sum(),
            (want.argmax(-1) == got.argmax(-1)).sum(),
            -got[first:-1].gather(1, following).sum(dtype=torch.float64),
            -want[first:-1].gather(1, following).sum(dtype=torch.float64),
            torch.tensor(float(len(want))),
            torch.tensor(float(len(following))),
        ]
        sums[group] = sums.get(group, torch.zeros(6, dtype=torch.float64)) + torch.stack([x.double() for x in found])
    return {
        group: Corpus(
            kl=float(kl / positions),
            top1=float(same / positions),
            perplexity=float((loss / tokens).exp()),
            float_perplexity=float((plain / tokens).exp()),
        )
        for group, (kl, same, loss, plain, positions, tokens) in sums.items()
    }


def measure(bench: Bench, outputs: Iterable[Arrays]) -> dict[str, Any]:
    """The metrics of a Result that come from its outputs."""
    if bench.groups:
        return {"samples": len(bench.inputs), **language(bench, outputs)}
    kept: list[Arrays] = []

    def note() -> Iterator[Arrays]:
        for output in outputs:
            kept.append(output)
            yield output

    task, inputs = bench.model.task, bench.inputs
    found = {parity.output: parity for parity in compare(bench.answers, note(), task=task, inputs=inputs)}
    first = next(iter(found.values()))
    main = found.get(SENTENCE_EMBEDDING, first)
    if main.cosine is None:
        raise SystemExit(f"{main.output} is not finite")
    result = {
        "samples": len(inputs),
        "metric": "1 - mean cosine" if main.kl is None else "mean KL, nats",
        "error": 1 - main.cosine.mean if main.kl is None else main.kl.mean,
        "mean": main.cosine.mean,
        "worst": main.cosine_worst,
        "hidden": None if main is first or first.cosine is None else first.cosine.mean,
        "top1": None if main.top1_agreement is None else main.top1_agreement.mean,
    }
    if "decoder_input_ids" in inputs[0]:
        prompt = len(prompt_tokens(bench.model))
        result["corpora"] = of_corpora(bench, kept, [SPEECH] * len(inputs), "decoder_input_ids", prompt)
    if bench.labels:
        result["accuracy"] = accuracy(kept, bench.labels)
        result["float_accuracy"] = accuracy(bench.answers, bench.labels)
    return result


def accuracy(outputs: Iterable[Arrays], labels: tuple[int, ...]) -> float:
    """Share of pictures whose greatest score is their class's."""
    pairs = zip(outputs, labels, strict=True)
    return float(np.mean([int(next(iter(output.values())).argmax()) == label for output, label in pairs]))


def cpu_ratio(bench: Bench, path: Path, rounds: int) -> float:
    """Median over rounds of the processor time of one run, relative to the float file's; they take turns."""
    import time

    from edgeport.runtime.session import open_session

    sessions = [open_session(artifact(bench.model, file)) for file in (bench.plain, path)]
    row = max(bench.inputs, key=lambda row: sum(value.size for value in row.values()))
    times: list[list[float]] = [[], []]
    for turn in range(rounds + 3):
        for index in (0, 1) if turn % 2 else (1, 0):
            start = time.process_time()
            sessions[index].run(row)
            times[index].append(time.process_time() - start)
    return float(np.median(times[1][3:]) / np.median(times[0][3:]))


@cache
def provenance() -> tuple[str, dict[str, str]]:
    """The commit that the code is at (with a + where it was changed since), and the libraries' versions."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run([*git, "status", "--porcelain", "edgeport"], capture_output=True, text=True, check=True)
    names = ("torch", "transformers", "onnx", "onnxruntime", "torchao", "coremltools", "gguf", "numpy")
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else ""), {name: version(name) for name in names}

#!/usr/bin/env python
"""Language models on ONNX Runtime: our files beside onnxruntime-genai's, and beside their own matrix products alone.

    OMP_NUM_THREADS=1 python scripts/bench/llm.py out/lm-int4 out/lm-int8 --genai FOLDER [--docs docs/llm.md]

Each of the first arguments is a bundle of `edgeport export`. FOLDER is what onnxruntime-genai's builder made of the
same checkpoint (`python -m onnxruntime_genai.models.builder -i HF_FOLDER -o FOLDER -p int4 -e cpu`, version 0.18), run
here by ONNX Runtime alone, its cache in one buffer as its own runtime has it. All files are called in turn in one
process, one thread; what is compared is processor time, because other work on the machine does not count in it.
"Products alone" are the file's own MatMulNBits, called as one graph; "of bandwidth" is the bytes of those weights a
second, over what this core reads (the sum of an array far larger than its caches). Perplexity is that of the last 32
tokens of the texts of the parity slice, through the cache.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import onnx
import onnxruntime
from scipy.special import log_softmax

from edgeport.bundle.read import read_bundle
from edgeport.data.samples import samples
from edgeport.export.artifact import Artifact
from edgeport.model.load import load_model
from edgeport.model.types import SCORED, Axis, TensorSpec
from edgeport.runtime.decoder import DecoderSession
from edgeport.runtime.onnx_decoder import LOGITS, OnnxRuntimeTokens
from edgeport.storage import write_text

CONTEXTS = (32, 512, 2000)
PRODUCT = "MatMulNBits"
MARK = "<!-- bench -->"


class Foreign(OnnxRuntimeTokens):
    """Another tool's file: it gives the scores of every token, so their place is a new one at each call."""

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """See `Tokens.feed`."""
        self._binding.bind_output(LOGITS)
        return super().feed(ids)


@dataclass
class Candidate:
    """A file and what was measured of it; times in seconds of processor time."""

    name: str
    path: Path
    bytes: int
    tokens: OnnxRuntimeTokens
    products: onnxruntime.InferenceSession | None
    product_bytes: int
    prefill: dict[int, float]
    decode: dict[int, list[float]]
    alone: list[float]
    perplexity: float = 0.0


def foreign_artifact(folder: Path, like: Artifact) -> Artifact:
    """The genai builder's file, with the widths of its cache from ours: it leaves them open."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    wanted = {spec.name: spec for spec in (*like.inputs, *like.outputs)}
    inputs = tuple(wanted[value.name] for value in graph.input if value.name in wanted)
    vocabulary = wanted[LOGITS].fixed_shape()[-1]
    outputs = (TensorSpec(LOGITS, "float32", (1, Axis("sequence", 1, 1 << 20, 1), vocabulary)),)
    return Artifact("onnxruntime", "cpu", folder, "model.onnx", inputs, outputs, context=like.context)


def options() -> onnxruntime.SessionOptions:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    return settings


def products_alone(path: Path) -> tuple[onnxruntime.InferenceSession | None, int]:
    """A session with nothing but the file's quantized products, each on an input of ones, and their weights' bytes."""
    model = onnx.load(path)
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == PRODUCT]
    if not nodes:
        return None, 0
    kept: dict[int, onnx.NodeProto] = {}
    names: set[str] = set()

    def keep(name: str) -> None:
        if name in constants:
            names.add(name)
        elif name in makers:
            kept[id(makers[name])] = makers[name]
            for source in makers[name].input:
                keep(source)

    size, inputs = 0, {}
    for node in nodes:
        columns = next(attribute.i for attribute in node.attribute if attribute.name == "K")
        node.input[0] = f"x{columns}"
        inputs[f"x{columns}"] = columns
        for name in node.input[1:]:
            if name:
                keep(name)
        kept[id(node)] = node
    size = sum(len(constants[name].raw_data) for name in names)
    order = [node for node in graph.node if id(node) in kept]
    outputs = [onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None) for node in nodes]
    given = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1, k]) for name, k in inputs.items()]
    small = onnx.helper.make_graph(order, "products", given, outputs, [constants[name] for name in sorted(names)])
    proto = onnx.helper.make_model(small, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options(), providers=["CPUExecutionProvider"])
    return session, size


def candidate(name: str, artifact: Artifact, tokens: OnnxRuntimeTokens) -> Candidate:
    products, product_bytes = products_alone(artifact.path)
    size = sum(path.stat().st_size for path in artifact.root.glob("model.onnx*"))
    return Candidate(name, artifact.path, size, tokens, products, product_bytes, {}, {}, [])


def clocked(call: object, *arguments: object) -> float:
    start = time.process_time()
    call(*arguments)  # type: ignore[operator]
    return time.process_time() - start


def bandwidth() -> float:
    """Bytes a second that this core reads."""
    array = np.ones(100_000_000, np.float32)
    return float(array.nbytes / min(clocked(array.sum) for _ in range(5)))


def measure(found: list[Candidate], repeats: int) -> None:
    ids = np.random.default_rng(0).integers(0, found[0].tokens._vocabulary, max(CONTEXTS) + 1)
    for context in CONTEXTS:
        times: dict[str, list[float]] = {one.name: [] for one in found}
        for _ in range(3):
            for one in found:
                one.tokens.rewind()
                times[one.name].append(clocked(one.tokens.feed, ids[:context]))
        for one in found:
            one.prefill[context], one.decode[context] = min(times[one.name]), []
        for _ in range(repeats):
            for one in found:
                for _warm in range(3):
                    one.tokens.rewind(context)
                    taken = clocked(one.tokens.feed, ids[context:])
                    if _warm:
                        one.decode[context].append(taken)
        print(f"context {context}: done", file=sys.stderr)
    for _ in range(repeats):
        for one in found:
            if one.products is not None:
                feed = {value.name: np.ones(value.shape, np.float32) for value in one.products.get_inputs()}
                one.alone += [clocked(one.products.run, None, feed) for _ in range(3)][1:]


def score(found: list[Candidate], model: str, count: int) -> None:
    texts = samples(load_model(model), count=count, split="parity").inputs
    for one in found:
        session, total, number = DecoderSession(one.tokens, SCORED), 0.0, 0
        for text in texts:
            ids = text["input_ids"]
            rows = log_softmax(session.run({"input_ids": ids})[LOGITS][0].astype(np.float64), axis=-1)
            wanted = ids[0, -len(rows) + 1 :]
            total -= float(rows[np.arange(len(wanted)), wanted].sum())
            number += len(wanted)
        one.perplexity = float(np.exp(total / number))
        print(f"{one.name}: perplexity {one.perplexity:.2f}", file=sys.stderr)


def table(found: list[Candidate], read: float) -> str:
    base = next((one for one in found if one.name == "onnxruntime-genai"), found[0])
    heads = "".join(f" decode at {context}, ms (x) | prefill {context}, tok/s (x) |" for context in CONTEXTS)
    rows = [
        f"| file | MB | perplexity |{heads} products alone, ms | their share | of bandwidth |",
        "|---" * (6 + 2 * len(CONTEXTS)) + "|",
    ]
    for one in found:
        cells = ""
        for context in CONTEXTS:
            ours, theirs = float(np.median(one.decode[context])), float(np.median(base.decode[context]))
            prefill = context / one.prefill[context]
            cells += f" {ours * 1e3:.2f} ({theirs / ours:.2f}) |"
            cells += f" {prefill:.0f} ({base.prefill[context] / one.prefill[context]:.2f}) |"
        alone = float(np.median(one.alone)) if one.alone else 0.0
        share = alone / float(np.median(one.decode[CONTEXTS[0]]))
        used = one.product_bytes / float(np.median(one.decode[CONTEXTS[0]])) / read
        tail = f" {alone * 1e3:.2f} | {share:.0%} | {used:.0%} |" if alone else " - | - | - |"
        rows.append(f"| {one.name} | {one.bytes / 1e6:.1f} | {one.perplexity:.2f} |{cells}{tail}")
    note = f"\n\n(x): how many times as fast as {base.name}. This core reads {read / 1e9:.1f} GB/s."
    return "\n".join(rows) + note + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--genai", type=Path, help="a folder of onnxruntime-genai's model builder")
    parser.add_argument("--model", default="zoo:smollm2", help="whose tokenizer makes the texts' ids")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--docs", type=Path, help="a page with the mark <!-- bench --> around the table's place")
    arguments = parser.parse_args()
    found = []
    for path in arguments.bundles:
        bundle = read_bundle(path)
        name = f"edgeport {bundle.manifest.recipe.name}"
        found.append(candidate(name, bundle.artifact, OnnxRuntimeTokens(bundle.artifact)))
    if arguments.genai is not None:
        artifact = foreign_artifact(arguments.genai, read_bundle(arguments.bundles[0]).artifact)
        found.append(candidate("onnxruntime-genai", artifact, Foreign(artifact)))
    read = bandwidth()
    measure(found, arguments.repeats)
    score(found, arguments.model, arguments.texts)
    text = table(found, read)
    print(text)
    if arguments.docs is not None:
        before, _, after = arguments.docs.read_text().split(MARK)
        write_text(arguments.docs, f"{before}{MARK}\n\n{text}\n{MARK}{after}")


if __name__ == "__main__":
    main()

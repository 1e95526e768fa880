"""One language model in one process, for `llm.py`, which starts several and asks them in turn.

llm_worker.py SOCKET KIND PATH THREADS [large]

KIND is how PATH is run: `edgeport` (a bundle), `onnx` (a folder of onnxruntime-genai's builder, by ONNX Runtime alone),
`genai` (such a folder, by onnxruntime-genai), `llama` (a folder with a .pte of `peer_executorch.py`), `products` (a
bundle's or folder's quantized matrix products alone). `large` puts it on large pages once it is loaded.
"""

from __future__ import annotations

import json
import os
import sys
import time
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from edgeport.usage import resident_mb

CONTEXT = 2048
PRODUCT = "MatMulNBits"


class Engine(Protocol):
    """A loaded model."""

    def start(self, ids: np.ndarray) -> np.ndarray:
        """Read a prompt, int64 (S,), into an empty cache; the scores (V,) of the next token."""

    def step(self) -> None:
        """Take the best token, and compute the scores of the one that follows."""

    def cut(self, length: int) -> None:
        """Forget all but the first `length` tokens, and be ready for a step."""


class Fed:
    """An engine around `edgeport.runtime.decoder.Tokens`."""

    def __init__(self, tokens: Any) -> None:
        self.tokens = tokens
        self.ids, self.scores = np.zeros(0, np.int64), np.zeros(1, np.float32)

    def start(self, ids: np.ndarray) -> np.ndarray:
        self.tokens.rewind()
        self.ids, self.scores = ids, self.tokens.feed(ids)
        return self.scores

    def step(self) -> None:
        self.scores = self.tokens.feed(np.array([self.scores.argmax()]))

    def cut(self, length: int) -> None:
        self.tokens.rewind(length)

    def read(self, ids: np.ndarray, scored: int) -> np.ndarray:
        """Scores after each of the last tokens of a text, through the cache."""
        from edgeport.runtime.decoder import DecoderSession

        return DecoderSession(self.tokens, scored).run({"input_ids": ids[None]})["logits"][0]


class Generator:
    """onnxruntime-genai's own loop."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(str(folder))
        counts = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": counts}}}))
        self.model = og.Model(config)
        settings = og.GeneratorParams(self.model)
        settings.set_search_options(max_length=CONTEXT, do_sample=False)
        self.generator = og.Generator(self.model, settings)
        self.ids = np.zeros(0, np.int32)

    def start(self, ids: np.ndarray) -> np.ndarray:
        self.generator.rewind_to(0)
        self.ids = ids.astype(np.int32)
        self.generator.append_tokens(self.ids)
        return np.asarray(self.generator.get_logits())[0, -1]

    def step(self) -> None:
        self.generator.generate_next_token()

    def cut(self, length: int) -> None:
        self.generator.rewind_to(length - 1)
        self.generator.append_tokens(self.ids[length - 1 : length])
        self.generator.generate_next_token()  # its scores are there: this one only takes the best


def bundle_artifact(path: Path) -> Any:
    """The artifact of a bundle, or of a `lower` stage's output in the cache."""
    from edgeport.bundle.read import read_bundle
    from edgeport.export.artifact import Artifact

    stage = path / "artifact.json"
    if stage.exists():
        return Artifact.from_json(json.loads(stage.read_text()), path / "files")
    return read_bundle(path).artifact


def builder_tokens(folder: Path, threads: int) -> Any:
    """onnxruntime-genai's file in ONNX Runtime alone, its cache in one buffer, as its own runtime has it."""
    import onnx

    from edgeport.export.artifact import Artifact
    from edgeport.model.types import Axis, TensorSpec
    from edgeport.runtime.onnx_decoder import OnnxRuntimeTokens

    config = json.loads((folder / "genai_config.json").read_text())["model"]
    decoder, length = config["decoder"], Axis("length", 0, CONTEXT, 1)
    cache = (1, decoder["num_key_value_heads"], length, decoder["head_size"])
    names = [value.name for value in onnx.load(folder / "model.onnx", load_external_data=False).graph.input]
    inputs = [TensorSpec(name, "float32", cache) for name in names if name.startswith("past_key_values")]
    inputs += [TensorSpec(name, "int64", (1, length)) for name in names if not name.startswith("past_key_values")]
    outputs = (TensorSpec("logits", "float32", (1, length, config["vocab_size"])),)

    class AllScores(OnnxRuntimeTokens):
        """The file gives the scores of every token, in memory that it takes at each call."""

        def feed(self, ids: np.ndarray) -> np.ndarray:
            if len(ids) == 1:
                self._binding.bind_ortvalue_output("logits", self.last)
                return super().feed(ids)
            self._binding.bind_output("logits")
            super().feed(ids)
            return self._binding.get_outputs()[0].numpy()[0, -1].copy()

    import onnxruntime

    tokens = AllScores(
        Artifact("onnxruntime", "cpu", folder, "model.onnx", tuple(inputs), outputs, context=CONTEXT), threads=threads
    )
    tokens.last = onnxruntime.OrtValue.ortvalue_from_numpy(tokens._scores)
    return tokens


def llama_tokens(folder: Path, threads: int) -> Any:
    """The program of ExecuTorch's own export: its interface is that of ours."""
    from edgeport.export.artifact import Artifact
    from edgeport.model.types import Axis, TensorSpec
    from edgeport.runtime.executorch_decoder import ExecuTorchTokens

    facts = json.loads((folder / "facts.json").read_text())
    inputs = (TensorSpec("tokens", "int64", (1, Axis("sequence", 1, facts["most_tokens"], 1))),)
    outputs = (TensorSpec("logits", "float32", (1, facts["vocabulary"])),)
    artifact = Artifact(
        "executorch", "xnnpack", folder, "model.pte", inputs, outputs, facts=facts, context=facts["context"]
    )
    return ExecuTorchTokens(artifact, threads=threads)


class Products:
    """The quantized matrix products of an ONNX file, each on its own input of noise, called as one graph.

    Attributes:
        bytes: of their weights and scales, as the kernels read them: scales are float32 there.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import onnx
        import onnxruntime

        model = onnx.load(path)
        nodes, self.bytes, inputs = [], 0.0, {}
        for node in model.graph.node:
            if node.op_type == PRODUCT:
                size = {attribute.name: attribute.i for attribute in node.attribute}
                columns, rows, group = size["K"], size["N"], size["block_size"]
                self.bytes += rows * columns * (size["bits"] / 8 + 4 / group)
                node.input[0] = f"x{columns}"
                inputs[f"x{columns}"] = columns
                nodes.append(node)
        needed = {name for node in nodes for name in node.input}
        made = []
        for node in reversed(model.graph.node):
            if node.op_type != PRODUCT and needed & set(node.output):
                needed |= set(node.input)
                made.insert(0, node)
        constants = [tensor for tensor in model.graph.initializer if tensor.name in needed]
        float32 = onnx.TensorProto.FLOAT
        given = [onnx.helper.make_tensor_value_info(name, float32, [1, 1, size]) for name, size in inputs.items()]
        taken = [onnx.helper.make_tensor_value_info(node.output[0], float32, None) for node in nodes]
        graph = onnx.helper.make_graph([*made, *nodes], "products", given, taken, constants)
        proto = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads, settings.log_severity_level = threads, 1, 3
        self.session = onnxruntime.InferenceSession(
            proto.SerializeToString(), settings, providers=["CPUExecutionProvider"]
        )
        self.binding = self.session.io_binding()
        for name, size in inputs.items():
            noise = np.random.default_rng(size).standard_normal((1, 1, size)).astype(np.float32)
            self.binding.bind_cpu_input(name, noise)
        for value in taken:
            self.binding.bind_output(value.name)

    def start(self, ids: np.ndarray) -> np.ndarray:
        return np.zeros(1, np.float32)

    def step(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def cut(self, length: int) -> None:
        pass


def model_path(path: Path) -> Path:
    return path / "model.onnx" if (path / "model.onnx").exists() else bundle_artifact(path).path


def open_engine(kind: str, path: Path, threads: int) -> Any:
    from edgeport.runtime.session import open_tokens

    if kind == "edgeport":
        return Fed(open_tokens(bundle_artifact(path), threads=threads))
    if kind == "onnx":
        return Fed(builder_tokens(path, threads))
    if kind == "llama":
        return Fed(llama_tokens(path, threads))
    if kind == "products":
        return Products(model_path(path), threads)
    return Generator(path if (path / "model.onnx").exists() else model_path(path).parent, threads)


def clocked(call: Any, *given: Any) -> tuple[float, float]:
    """Seconds of processor time and of the wall's that a call takes."""
    wall, used = time.perf_counter(), time.process_time()
    call(*given)
    return time.process_time() - used, time.perf_counter() - wall


def answer(engine: Any, question: tuple[Any, ...]) -> Any:
    match question:
        case ("prompt", ids):
            return clocked(engine.start, ids)
        case ("steps", length, count, warm):
            engine.cut(length)
            return [clocked(engine.step) for _ in range(warm + count)][warm:]
        case ("read", ids, scored):
            return engine.read(ids, scored)
        case ("bytes",):
            return engine.bytes
        case ("peak",):
            return resident_mb("VmHWM")
    raise ValueError(question)


def main() -> None:
    socket, kind, path, threads, *large = sys.argv[1:]
    with Client(socket) as driver:
        before = resident_mb("VmRSS")
        engine: list[Any] = []
        load = clocked(lambda: engine.append(open_engine(kind, Path(path), int(threads))))
        large_mb = 0.0
        if large:
            from edgeport.runtime.large_pages import use_large_pages

            large_mb = use_large_pages()
        driver.send((load, before, large_mb))
        while question := driver.recv():
            driver.send(answer(engine[0], question))
        driver.send(None)


if __name__ == "__main__":
    main()

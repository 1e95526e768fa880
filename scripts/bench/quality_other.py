"""Peers of the quality bench that run in environments of their own (peer_env.py makes them)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from quality_bench import LANGUAGE, ROOT, Bench, Made
from quality_coreml import coreml_peers
from quality_gguf import gguf_peers
from quality_peers import ASYMMETRIC, BLOCK, SYMMETRIC, Arrays, Peer, onnx_bits, onnx_file
from quality_table import ORT

HERE = Path(__file__).parent
NNCF = "nncf 3.4"


def call(python: Path, script: str, *arguments: object) -> None:
    """Run one of the scripts beside this file in a peer's interpreter; its talk goes to stderr."""
    command = [str(python), str(HERE / script), *(str(argument) for argument in arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)


def nncf(python: Path, bench: Bench, mode: str, detail: str) -> Callable[[Bench, Path], Made]:
    """NNCF on the plain export."""

    def make(plain: Path, _inputs: list[Arrays], out: Path) -> None:
        call(python, "peer_nncf.py", plain, bench.stored("calibration"), out, mode, detail)

    return onnx_file(make)


def nncf_peers(python: Path, bench: Bench) -> Iterator[Peer]:
    image = bench.model.modality == "image"
    if not image:
        for mode, weights in (("INT4_SYM", SYMMETRIC), ("INT4_ASYM", ASYMMETRIC)):
            make = nncf(python, bench, mode, str(BLOCK))
            name = f"{mode}, AWQ + scale estimation"
            yield Peer(NNCF, name, f"{weights}; embeddings int8", make, calibrated=True)
    if bench.model.task != LANGUAGE:
        for name, mode in (("quantize", "PTQ"), ("quantize, full bias correction", "PTQ_BIAS")):
            make = nncf(python, bench, mode, "other" if image else "transformer")
            yield Peer(NNCF, name, "int8 per channel", make, "static int8", calibrated=True)


def litert_peers(python: Path, bench: Bench) -> Iterator[Peer]:
    """AI Edge Quantizer's recipes on litert-torch's file, run by LiteRT's own interpreter."""
    image = bench.model.modality == "image"
    rows = [
        ("dynamic_wi8_afp32", "int8 per channel", "dynamic int8", 8.1),
        ("weight_only_wi8_afp32", "int8 per channel", "float", 8.1),
        *([("static_wi8_ai8", "int8 per channel", "static int8", 8.1)] if image else []),
        ("dynamic_wi4b32_afp32", "int4 g32 symmetric", "dynamic int8", 4.5),
        ("dynamic_wi4b32_afp32 octav", "int4 g32 symmetric", "dynamic int8", 4.5),
        ("dynamic_wi4b32_afp32 gptq", "int4 g32 symmetric", "dynamic int8", 4.5),
    ]
    for recipe, weights, activations, bits in rows:
        calibrated = recipe.endswith("gptq") or recipe.startswith("static")
        yield Peer("ai-edge-quantizer 0.10.0", recipe, weights, litert(python, recipe, bits), activations, calibrated)


def litert(python: Path, recipe: str, bits: float) -> Callable[[Bench, Path], Made]:
    def make(bench: Bench, folder: Path) -> Made:
        path = folder / "model.tflite"
        stored = (bench.stored("inputs"), bench.stored("calibration"))
        plain = (bench.plain, bench.plain.with_suffix(".tflite"))
        call(python, "peer_litert.py", bench.reference, *stored, *plain, path, recipe)
        answers = folder / "outputs.npz"
        with np.load(answers) as found:
            ratio = float(found["cpu_ratio"])
        return Made(cut(bench, answers), path.stat().st_size, bits, "LiteRT 2.3.0", cpu_ratio=ratio)

    return make


def cut(bench: Bench, path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """Stored outputs of padded inputs, without what the padding gave."""
    with np.load(path) as stored:
        for index, answer in enumerate(bench.answers):
            yield {
                name: stored[f"{index}/{name}"][tuple(slice(size) for size in value.shape)]
                for name, value in answer.items()
            }
    path.unlink()


def genai_peers(python: Path, bench: Bench) -> Iterator[Peer]:
    """The model builder of onnxruntime-genai; its file is run by plain ONNX Runtime."""
    if bench.model.task != LANGUAGE or not Path(bench.reference).is_dir():
        return
    rows = [
        ("int4", "int4", "algo_config=default", "int4 g32 symmetric"),
        ("int4 asymmetric", "int4", "is_symmetric=false", "int4 g32 asymmetric"),
        ("int4 k_quant_last", "int4", "algo_config=k_quant_last", "int4 g32; head int8"),
        ("int4 k_quant_mixed", "int4", "algo_config=k_quant_mixed", "int4 g32; head and most sensitive int8"),
        ("int8", "int8", "algo_config=default", "int8 g32 symmetric"),
    ]
    for name, precision, option, weights in rows:
        yield Peer("onnxruntime-genai 0.18.0", name, weights, genai(python, precision, option))


def genai(python: Path, precision: str, option: str) -> Callable[[Bench, Path], Made]:
    def make(bench: Bench, folder: Path) -> Made:
        command = [python, "-m", "onnxruntime_genai.models.builder", "-i", bench.reference, "-o", folder]
        command += ["-p", precision, "-e", "cpu", "-c", folder / "cache", "--extra_options"]
        command += ["block_size=32", "accuracy_level=4", option]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr, env=environment)
        path = folder / "model.onnx"
        size = path.stat().st_size + sum(file.stat().st_size for file in folder.glob("model.onnx.data"))
        return Made(without_past(bench, path), size, onnx_bits(path), ORT)

    return make


def without_past(bench: Bench, path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """The logits of a decoder with a cache, called once a window with the cache empty."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    config: Any = bench.model.module.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for row in bench.inputs:
        known = {**row, "position_ids": np.arange(row["input_ids"].shape[1])[None]}
        feed = {}
        for value in session.get_inputs():
            dtype = dtypes[value.type]
            if value.name in known:
                feed[value.name] = known[value.name].astype(dtype)
            else:
                feed[value.name] = np.zeros((1, config.num_key_value_heads, 0, head), dtype)
        yield {"logits": session.run(["logits"], feed)[0]}


def olive_peers(python: Path, bench: Bench) -> Iterator[Peer]:
    """Olive's own passes for ONNX (its others call the tools that have rows of their own)."""
    if bench.model.modality == "image":
        return
    grouped, only = f"int4 g{BLOCK}", "; embeddings float"
    for name, words, settings in (
        ("OnnxBlockWiseRtnQuantization", f"{grouped} symmetric", {"block_size": BLOCK, "is_symmetric": True}),
        ("OnnxKQuantQuantization", f"{grouped} asymmetric", {"block_size": BLOCK}),
    ):
        make = onnx_file(olive(python, name, settings))
        yield Peer("olive-ai 0.13.0", name, words + (only if "Rtn" not in name else ""), make)


def olive(python: Path, name: str, settings: Mapping[str, Any]) -> Callable[[Path, list[Arrays], Path], None]:
    def make(plain: Path, _inputs: list[Arrays], out: Path) -> None:
        folder = out.parent / "olive"
        call(python, "peer_olive.py", plain, folder, name, json.dumps(settings))
        found = next(folder.rglob("*.onnx"))
        onnx.save(onnx.load(found), out)
        shutil.rmtree(folder)

    return make


def other_peers(bench: Bench, folder: Path | None) -> Iterator[Peer]:
    """The rows of coremltools, and of every peer whose environment lies in a folder."""
    yield from coreml_peers(bench.model)
    if folder is None:
        return
    makers = {"nncf": nncf_peers, "litert": litert_peers, "genai": genai_peers, "olive": olive_peers}
    for name, make in makers.items():
        python = folder.absolute() / name / "bin" / "python"
        if python.exists():
            yield from make(python, bench)
    yield from gguf_peers(folder / "llama", bench)

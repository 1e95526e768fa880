"""The language model bench: what it counts as a step, and the products that it times alone."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from edgeport.compress import apply_recipe
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.onnx.lower import lower
from edgeport.model.build import build_huggingface
from edgeport.model.decoder import for_generation
from edgeport.model.types import Model
from edgeport.quantized import dequantize
from edgeport.recipe import Recipe
from edgeport.runtime.generate import generate
from edgeport.runtime.session import open_tokens
from edgeport.schema import parse_mapping
from edgeport.target import load_target

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
TARGET = load_target("linux-x86_64-ort")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


worker, bench = script("llm_worker"), script("llm")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Artifact]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    module = LlamaForCausalLM(config)
    named = {"name": "tiny", "reference": "tiny", "kind": "factory", "task": "text-generation"}
    model = build_huggingface(module, **named, files={}, assets={}, licence=None, note=None)
    step = {"method": "rtn", "linear": "int4_g32", "activations": "dynamic_int8"}
    recipe = parse_mapping(Recipe, {"name": "test", "summary": "test", "compress": [step], "gate": {}}, "test")
    compressed = for_generation(apply_recipe(model, recipe, TARGET)[0], 64)
    out = tmp_path_factory.mktemp("tiny")
    return compressed, lower(compressed, TARGET, LoweringSettings("fp32", "dynamic"), out)


def test_a_step_feeds_the_best_token_and_no_more(made: tuple[Model, Artifact]) -> None:
    _, artifact = made
    ids = np.random.default_rng(0).integers(0, 96, 20)
    _, wanted = generate(open_tokens(artifact), ids, most=8)
    tokens = open_tokens(artifact)
    engine = worker.Fed(tokens)
    engine.start(ids)
    fed = []
    for _ in range(8):
        fed.append(int(engine.scores.argmax()))
        engine.step()
    assert fed == list(wanted)
    assert tokens.length == 20 + 8
    times = worker.answer(engine, ("steps", 20, 5, 2))
    assert len(times) == 5
    assert tokens.length == 20 + 7


def test_products_alone_are_the_files_own(made: tuple[Model, Artifact]) -> None:
    """Every quantized product on one input of noise: what torch makes of its weight, up to 8-bit activations."""
    model, artifact = made
    products = worker.Products(artifact.path, 1)
    # A layer's queries, keys and values are one product of (4 + 2 + 2) * 16 rows.
    expected = {"self_attn": ["q_proj", "k_proj", "v_proj"], "self_attn.o": ["o_proj"]}
    expected |= {"mlp.gate": ["gate_proj"], "mlp.up": ["up_proj"], "mlp.down": ["down_proj"]}
    weights = {name: dequantize(tensor).numpy() for name, tensor in model.quantized.items()}
    wanted = []
    for layer in range(2):
        for parts in expected.values():
            named = [value for part in parts for name, value in weights.items() if f"{layer}." in name and part in name]
            wanted.append(np.concatenate(named))
    wanted.append(weights["lm_head.weight"])
    products.step()
    found = [value.numpy()[0, 0] for value in products.binding.get_outputs()]
    assert sorted(len(row) for row in found) == sorted(len(weight) for weight in wanted)
    for row in found:
        errors = []
        for weight in (one for one in wanted if len(one) == len(row)):
            noise = np.random.default_rng(weight.shape[1]).standard_normal(weight.shape[1]).astype(np.float32)
            exact = weight @ noise
            errors.append(np.linalg.norm(row - exact) / np.linalg.norm(exact))
        assert min(errors) < 0.02
    assert products.bytes == sum(weight.size for weight in wanted) * (0.5 + 4 / 32)


def test_one_thread_is_timed_by_processor_time_and_more_by_the_wall() -> None:
    times = [(1.0, 9.0), (3.0, 5.0), (2.0, 7.0)]
    assert bench.typical(times, 1) == 2.0
    assert bench.typical(times, 2) == pytest.approx(5.4)  # a tenth of the way through 5, 7, 9


def test_the_files_that_count_are_the_models(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"1234")
    (tmp_path / "model.onnx.data").write_bytes(b"12345678")
    (tmp_path / "tokenizer.json").write_text(json.dumps({}))
    assert bench.model_bytes(tmp_path) == 12


def test_the_table_says_share_and_bandwidth(tmp_path: Path) -> None:
    row = bench.Row("edgeport int4, ONNX Runtime", "edgeport", tmp_path, bytes=72_000_000)
    alone = bench.Row("its products alone: edgeport int4", "products", tmp_path, weight_bytes=80e6)
    for one, seconds in ((row, 0.010), (alone, 0.008)):
        one.prompt, one.steps = {32: [(0.064, 0.07)]}, {32: [(seconds, 0.02)]}
        one.load = [(0.5, 0.6)]
    text = bench.table([row, alone], "1 thread", 1, 20e9)
    assert "| edgeport int4, ONNX Runtime | 100 | 500 | 64 | 0.5 | 0 | 72.0 |" in text
    # 8 of 10 ms; 80 MB in 10 ms are 8 of 20 GB/s.
    assert "| edgeport int4 | 8.00 | 80% | 40% |" in text

"""The quality bench's pure functions: who is compared with whom, and when the aim counts as met."""

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgeport.compress.assign import assign
from edgeport.model.types import Model, Source
from edgeport.target import load_target

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"


def load(name: str) -> ModuleType:
    """A script of scripts/bench, which is no package."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def _scripts_find_each_other():
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


table = load("quality_table")


def row(tool, *, bits, size, error, **fields):
    values = {
        "model": "m",
        "name": f"{tool} {bits} {size}",
        "weights": "int",
        "activations": "float",
        "calibration": "none",
        "samples": 64,
        "simulated": False,
        "metric": "1 - mean cosine",
        "mean": 1 - error,
        "worst": 1 - error,
        "seconds": 1.0,
    }
    return table.Result(tool=tool, bits=bits, bytes=size, error=error, **{**values, **fields})


def test_a_peer_only_meets_rows_of_ours_that_are_no_larger_in_bytes_and_in_bits():
    peer = row("peer 1", bits=5.0, size=100, error=0.04)
    rows = [
        peer,
        row("edgeport", bits=4.5, size=101, error=0.001),  # too large a file
        row("edgeport", bits=8.0, size=90, error=0.001),  # too many bits: it leaves less in float
        row("edgeport", bits=4.6, size=99, error=0.02),
        row("edgeport", bits=4.5, size=90, error=0.03),
    ]
    (duel,) = table.duels(rows)
    assert duel.ours is rows[3]
    assert duel.ratio == pytest.approx(0.5)
    assert duel.met


def test_core_ml_files_are_compared_with_core_ml_files():
    evaluated = {"runtime": table.EVALUATOR}
    rows = [
        row("coremltools", bits=4.1, size=100, error=0.04, **evaluated),
        row("peer 1", bits=4.1, size=100, error=0.05),
        row("edgeport", bits=4.1, size=99, error=0.02, **evaluated),
        row("edgeport", bits=4.1, size=98, error=0.01),
    ]
    assert [duel.ours for duel in table.duels(rows)] == [rows[2], rows[3]]


def test_numbers_of_a_tool_that_makes_no_file_stand_against_any_of_ours():
    rows = [
        row("llama.cpp", bits=6.1, size=100, error=0.05, runtime="PyTorch, dequantised"),
        row("peer 1", bits=6.1, size=100, error=0.06),
        row("edgeport", bits=6.1, size=99, error=0.03),
        row("edgeport", bits=6.1, size=98, error=0.02, runtime="PyTorch", simulated=True, name="gptq lut6 coreml"),
    ]
    assert [duel.ours for duel in table.duels(rows)] == [rows[3], rows[2]]


def test_an_error_above_half_of_the_peers_misses_the_aim_and_so_does_having_nothing_as_small():
    peers = [row("peer 1", bits=5, size=100, error=0.04), row("peer 1", bits=5, size=10, error=0.09)]
    first, second = table.duels([*peers, row("edgeport", bits=5, size=100, error=0.0201)])
    assert (first.peer, second.peer) == tuple(peers)
    assert not first.met
    assert first.ratio == pytest.approx(0.5025)
    assert not second.met
    assert second.ratio is None


def test_the_docs_list_the_peers_and_models_that_were_not_run():
    docs = load("quality_docs")
    peer = row("nncf", bits=5.0, size=100, error=0.04, model="minilm")
    text = docs.document([peer, row("edgeport", bits=4.5, size=100, error=0.03, model="minilm")])
    missing = text.partition("## Not measured")[2]
    assert "peer nncf" not in missing
    assert "peer olive-ai" in missing
    assert "model minilm" not in missing
    assert "model whisper-tiny.en" in missing
    assert "0 of 1" in text  # 0.75 of the peer's error is not half


def test_the_docs_say_by_how_much_the_perplexity_aim_is_missed():
    docs = load("quality_docs")
    corpora = {
        "a": table.Corpus(kl=0.01, top1=0.99, perplexity=20.02, float_perplexity=20.0),  # 0.1%
        "b": table.Corpus(kl=0.02, top1=0.98, perplexity=10.05, float_perplexity=10.0),  # 0.5%
    }
    fields = {"metric": "mean KL, nats", "top1": 0.985, "mean": None, "worst": None, "model": "smollm2-float"}
    (line,) = docs.int8_aim([row("edgeport", bits=8.1, size=100, error=0.015, corpora=corpora, **fields)])
    assert "missed by 0.30%" in line
    kept = {"a": corpora["a"]}
    (line,) = docs.int8_aim([row("edgeport", bits=8.1, size=100, error=0.015, corpora=kept, **fields)])
    assert "**met**" in line


def test_a_stored_row_is_read_as_it_was_written(tmp_path):
    corpora = {"a": table.Corpus(kl=0.01, top1=0.99, perplexity=20.02, float_perplexity=20.0)}
    result = row("peer 1", bits=5.0, size=100, error=0.04, corpora=corpora, versions={"torch": "2"}, load=0.5)
    path = tmp_path / "row.json"
    path.write_text(json.dumps(asdict(result)))
    assert table.read_row(path) == result


def test_language_models_are_measured_by_divergence_agreement_and_perplexity_of_each_corpus():
    bench = load("quality_bench")
    generator = np.random.default_rng(0)
    rows = [{"input_ids": generator.integers(0, 11, (1, 7))} for _ in range(3)]
    answers = [{"logits": generator.normal(size=(1, 7, 11)).astype(np.float32)} for _ in rows]
    outputs = [{"logits": a["logits"] + 0.1 * generator.normal(size=(1, 7, 11)).astype(np.float32)} for a in answers]
    given = bench.Bench("", None, Path(), rows, [], answers, ("x", "y", "x"))
    found = bench.measure(given, outputs)

    def chances(logits):
        return torch.from_numpy(logits[0].astype(np.float64)).softmax(-1)

    for name, indices in (("x", (0, 2)), ("y", (1,))):
        kl, same, loss = [], [], []
        for i in indices:
            p, q = chances(answers[i]["logits"]), chances(outputs[i]["logits"])
            kl += [(p * (p / q).log()).sum(-1)]
            same += [(p.argmax(-1) == q.argmax(-1)).double()]
            loss += [-torch.stack([q[t, rows[i]["input_ids"][0, t + 1]].log() for t in range(6)])]
        corpus = found["corpora"][name]
        assert corpus.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
        assert corpus.top1 == pytest.approx(float(torch.cat(same).mean()))
        assert corpus.perplexity == pytest.approx(float(torch.cat(loss).mean().exp()), rel=1e-5)
    assert found["error"] == pytest.approx((found["corpora"]["x"].kl + found["corpora"]["y"].kl) / 2)


def test_speech_is_measured_by_the_perplexity_of_the_words_behind_the_prompt():
    bench = load("quality_bench")
    generator = np.random.default_rng(0)
    rows = [{"decoder_input_ids": generator.integers(0, 11, (1, size))} for size in (7, 5)]
    outputs = [{"logits": generator.normal(size=(1, row["decoder_input_ids"].size, 11))} for row in rows]
    given = bench.Bench("", None, Path(), rows, [], outputs)
    found = bench.of_corpora(given, outputs, ["spoken"] * 2, "decoder_input_ids", 2)["spoken"]
    chances = [torch.from_numpy(output["logits"][0]).softmax(-1) for output in outputs]
    loss = [
        -chances[call][place - 1, row["decoder_input_ids"][0, place]].log()
        for call, row in enumerate(rows)
        for place in range(2, row["decoder_input_ids"].size)
    ]
    assert found.perplexity == found.float_perplexity == pytest.approx(float(torch.stack(loss).mean().exp()), rel=1e-5)
    assert (found.kl, found.top1) == (pytest.approx(0, abs=1e-7), 1)


def test_bits_a_weight_are_read_from_the_integers_and_scales_of_a_file(tmp_path):
    peers = load("quality_peers")
    rows, columns = 16, 64
    matrix = onnx.helper.make_node(
        "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=columns, N=rows, bits=4, block_size=32
    )
    codes = np.zeros((rows, columns // 32, 16), np.uint8)
    scales = np.ones((rows, columns // 32), np.float32)
    looked_up = onnx.helper.make_node("DequantizeLinear", ["t", "ts"], ["table"], axis=0)
    table_codes, table_scales = np.zeros((100, 8), np.int8), np.ones(100, np.float32)
    tensors = {"b": codes, "s": scales, "t": table_codes, "ts": table_scales}
    graph = onnx.helper.make_graph(
        [matrix, looked_up],
        "g",
        [],
        [],
        [onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    stored = 8 * sum(value.nbytes for value in tensors.values())
    # A few bytes of each tensor are its name and shape.
    assert peers.onnx_bits(tmp_path / "m.onnx") == pytest.approx(stored / (rows * columns + 800), rel=0.03)


def test_a_tied_head_becomes_a_weight_of_its_own():
    bench = load("quality_bench")
    table_ = np.arange(6, dtype=np.float32).reshape(3, 2)
    nodes = [
        onnx.helper.make_node("Transpose", ["table"], ["head"], perm=[1, 0]),
        onnx.helper.make_node("MatMul", ["x", "head"], ["y"]),
    ]
    program = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", [], [], [onnx.numpy_helper.from_array(table_, "table")])
    )
    bench.fold_transposes(program)
    assert [node.op_type for node in program.graph.node] == ["MatMul"]
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in program.graph.initializer}
    assert np.array_equal(found["head"], table_.T)
    assert np.array_equal(found["table"], table_)


def test_rows_of_q_and_k_go_to_llama_cpps_order_and_back():
    gguf = load("quality_gguf")
    weight = np.arange(24).reshape(12, 2)
    moved = gguf.swap_halves(weight, 2)
    # A head of 6 rows: halves (0 1 2 | 3 4 5) become pairs (0 3) (1 4) (2 5).
    assert moved[:6, 0].tolist() == [0, 6, 2, 8, 4, 10]
    assert np.array_equal(gguf.swap_halves(moved, 2, back=True), weight)


@pytest.mark.parametrize(
    ("modality", "task", "least"),
    [("text", "feature-extraction", 20), ("text", "text-generation", 20), ("image", "image-classification", 10)],
)
def test_every_row_of_ours_is_a_recipe_that_its_target_takes(modality, task, least):
    rows = load("quality_rows")
    layers = [nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=32)] if modality == "image" else [nn.Embedding(64, 32)]
    module = nn.Sequential(*layers, nn.Linear(32, 64))
    model = Model("tiny", module, Source("factory", "m:f", {}), task, modality, (), (), {}, huggingface=False)
    found = list(rows.our_rows(model))
    assert len({row.name for row in found}) == len(found) >= least
    for row in found:
        assigned = assign(model, row.recipe, load_target(row.target))
        assert any(item.format.quantized for item in assigned), row.name


def test_weights_on_the_4_bit_grid_have_no_residual_and_random_ones_that_of_an_even_spread():
    bench = load("float_smollm2")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (512, 64), generator=generator)
    codes[:, ::32], codes[:, 1::32] = 0, 15
    on_grid = bench.off_grid([codes * 0.037 - 0.2])
    assert on_grid.residual < 1e-5
    assert on_grid.on_grid == 1
    assert on_grid.distinct <= 16
    spread = bench.off_grid([torch.rand(4096, 64, generator=generator)])
    # The two ends of each block's grid are weights themselves: 30 of 32 have a residual.
    assert spread.residual == pytest.approx((30 / 32) ** 0.5 * bench.UNIFORM, rel=0.02)
    assert spread.on_grid == 0
    assert sum(spread.histogram) == pytest.approx(1, abs=1e-3)


def test_a_stopped_run_sees_the_same_windows_as_one_that_went_through():
    bench = load("float_smollm2")
    ids = torch.arange(1000)
    through = bench.batches(ids, 2, 16, seed=3, first=0)
    seen = [next(through) for _ in range(5)]
    resumed = bench.batches(ids, 2, 16, seed=3, first=3)
    assert torch.equal(next(resumed), seen[3])
    assert torch.equal(next(resumed), seen[4])
    assert not torch.equal(seen[3], seen[4])

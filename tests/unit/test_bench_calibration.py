"""The calibration bench: its line, its place in the docs, and what makes the cost linear, counted."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from edgeport.compress.assign import assign
from edgeport.compress.journal import Note
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.compress.sequential import quantize_in_sequence
from edgeport.model.build import build_huggingface
from edgeport.recipe import load_recipe
from edgeport.target import load_target

PATH = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "calibration.py"
SPEC = importlib.util.spec_from_file_location("bench_calibration", PATH)
assert SPEC is not None
assert SPEC.loader is not None
bench = importlib.util.module_from_spec(SPEC)
sys.modules["bench_calibration"] = bench
SPEC.loader.exec_module(bench)


def test_the_line_is_the_least_squares_one():
    line = bench.fit([2, 4, 8], [5.0, 9.0, 17.0])
    assert (line.base, line.slope) == (pytest.approx(1), pytest.approx(2))
    assert line.off == pytest.approx(0, abs=1e-9)
    # Points 1, 2, 2 at 0, 1, 2: 7/6 + x/2, furthest at 1, where it gives 5/3 of 2.
    line = bench.fit([0, 1, 2], [1.0, 2.0, 2.0])
    assert (line.base, line.slope, line.off) == (pytest.approx(7 / 6), pytest.approx(0.5), pytest.approx(1 / 6))


def row(layers: int, samples: int, seconds: float) -> object:
    return bench.Row(layers, samples, 1_000_000, seconds, 45.0, (1.0, 1.0, 2.0, 2.0))


def test_the_section_is_put_into_the_docs_once(tmp_path: Path):
    path = tmp_path / "benchmarks.md"
    path.write_text("# Speed\n\nwords\n\n## After\n\nmore\n")
    for seconds in (1.0, 3.0):
        section = bench.document([row(2, 16, seconds), row(4, 16, 2 * seconds)], [row(4, 8, 1.0), row(4, 64, 8.0)])
        bench.put(path, section)
    text = path.read_text()
    assert text.count(bench.HEADING) == 1
    assert text.startswith("# Speed\n\nwords\n\n## After\n\nmore\n\n## Calibration")
    assert "| 4 | 16 | 2048 | 6.00 | 6.00 | 45 | 40 |" in text
    assert "2 times the blocks take 2.0 times the time" in text
    assert "2.00 times as long" in text


@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("samples", [1, 4])
def test_every_input_runs_through_every_block_as_often_whatever_the_depth(layers: int, samples: int):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2
    )
    module = AutoModelForCausalLM.from_config(config).eval()
    model = build_huggingface(
        module,
        name="tiny",
        reference="tiny",
        kind="factory",
        task="text-generation",
        files={},
        assets={},
        licence=None,
        note=None,
    )
    calls: list[int] = []
    for index, block in enumerate(module.model.layers):
        # A copy of the module keeps the hook.
        block.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    rows = assign(model, load_recipe("int4"), load_target("linux-x86_64-ort"))
    inputs = [{"input_ids": torch.randint(0, 32, (1, 5))} for _ in range(samples)]
    done = quantize_in_sequence(
        module, rows, inputs, lambda item, weight, _moments: (quantize_rtn(weight, item.grid), Note("rtn", None))
    )
    assert len(done) == 7 * layers + 2
    # One forward finds the blocks; one a sample shows the table and the head; two a sample go block by block. The
    # first block is also called, and stopped, where its inputs are taken.
    once = 1 + 3 * samples
    assert [calls.count(index) for index in range(layers)] == [once + samples, *[once] * (layers - 1)]

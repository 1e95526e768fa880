"""What a calibration run tells whoever watches it, and what it says of its cost."""

from __future__ import annotations

import io
import mmap
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from edgeport.cli.progress import watch
from edgeport.cli.summary import cost_words
from edgeport.compress import apply_recipe
from edgeport.compress.cost import Cost, cost_of, load_cost, save_cost
from edgeport.compress.journal import Journal, Note
from edgeport.compress.lines import block_line, weight_line
from edgeport.data.samples import SampleRecord, Samples
from edgeport.model.build import build_huggingface
from edgeport.model.types import Model
from edgeport.recipe import Recipe
from edgeport.schema import parse_mapping
from edgeport.target import load_target
from edgeport.usage import Meter, Usage, peak_mb, resident_mb

TARGET = load_target("linux-x86_64-ort")
SLACK = 1.0
"""MB: the kernel counts pages in batches."""


def llama() -> Model:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return build_huggingface(
        AutoModelForCausalLM.from_config(config).eval(),
        name="tiny",
        reference="tiny",
        kind="factory",
        task="text-generation",
        files={},
        assets={},
        licence=None,
        note=None,
    )


def tokens(count: int, length: int = 9) -> Samples:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 64, (1, length), generator=generator) for _ in range(count)]
    inputs = [{"input_ids": row.numpy(), "attention_mask": torch.ones_like(row).numpy()} for row in ids]
    return Samples(inputs, SampleRecord("random", False, {}, "all", None, count))


def recipe(**step: object) -> Recipe:
    chosen = {"method": "gptq", "linear": "int4_g32", "embedding": "int4_g32", **step}
    return parse_mapping(Recipe, {"name": "x", "summary": "x", "compress": [chosen], "gate": {}}, "test")


def test_a_weight_is_named_with_its_error_and_a_block_with_its_worst():
    notes = {"m.layers.3.mlp.up.weight": Note("gptq", 0.02), "m.layers.3.attn.q.weight": Note("gptq", 0.04)}
    assert (
        weight_line("m.layers.3.mlp.up.weight", notes["m.layers.3.mlp.up.weight"]) == "error 0.0200 m.layers.3.mlp.up"
    )
    assert weight_line("m.table.weight", Note("rtn", None)) == "m.table"
    assert block_line("m.layers.3", notes) == "m.layers.3: 2 weights, output error 0.0300, worst 0.0400 in attn.q"
    assert block_line("m.table", {"m.table.weight": Note("rtn", None)}) == "m.table: 1 weight"


def test_each_weight_is_told_with_the_error_on_record_and_each_block_once():
    seen: list[tuple[int, int, str]] = []
    lines: list[str] = []
    _, records = apply_recipe(
        llama(),
        recipe(),
        TARGET,
        calibration=tokens(6),
        progress=lambda *report: seen.append(report),
        log=lines.append,
    )
    assert [report[:2] for report in seen] == [(index + 1, 15) for index in range(15)]
    # The order is that of the run: the table, then block by block.
    assert [detail.split()[-1] for *_, detail in seen] == [record.name.removesuffix(".weight") for record in records]
    for record, (*_, detail) in zip(records, seen, strict=True):
        assert record.output_error is not None
        assert detail == f"error {record.output_error:.4f} {record.name.removesuffix('.weight')}"
    assert [line.split(":")[0] for line in lines] == ["model.layers.0", "model.layers.1"]
    for block, line in enumerate(lines):
        errors = [r.output_error for r in records if r.name.startswith(f"model.layers.{block}.") and r.output_error]
        mean, worst = re.search(r"7 weights, output error ([\d.]+), worst ([\d.]+) in", line).groups()
        assert float(mean) == pytest.approx(sum(errors) / 7, abs=5.1e-5)
        assert float(worst) == pytest.approx(max(errors), abs=5.1e-5)


def test_a_method_without_data_tells_each_weight_too():
    seen: list[tuple[int, int, str]] = []
    apply_recipe(llama(), recipe(method="rtn"), TARGET, progress=lambda *report: seen.append(report))
    assert seen[0] == (1, 15, "model.embed_tokens")
    assert seen[-1] == (15, 15, "model.layers.1.mlp.down_proj")


def test_choosing_bits_is_told_apart_from_quantizing():
    seen: list[tuple[int, int, str]] = []
    mixed = recipe(linear=["int8", "int4_g32"], embedding=["int8", "int4_g32"], bits_per_weight=6)
    apply_recipe(llama(), mixed, TARGET, calibration=tokens(4), progress=lambda *report: seen.append(report))
    assert [done for done, _, _ in seen] == [*range(1, 16), *range(1, 16)]
    assert all(detail.startswith("choosing bits, ") for *_, detail in seen[:15])
    assert all(detail.startswith("error ") for *_, detail in seen[15:])


def test_the_pass_for_gradients_is_told_sample_by_sample():
    seen: list[tuple[int, int, str]] = []
    apply_recipe(llama(), recipe(), TARGET, calibration=tokens(32), progress=lambda *report: seen.append(report))
    assert seen[:32] == [(index + 1, 32, f"gradients of sample {index + 1}") for index in range(32)]
    assert seen[32][:2] == (1, 15)


def test_a_run_taken_up_again_says_so(tmp_path: Path):
    class Killed(Exception):
        pass

    def cut(done: int, _total: int, _detail: str) -> None:
        if done == 9:
            raise Killed

    journal = Journal(tmp_path / "journal")
    assert journal.finished() == 0
    with pytest.raises(Killed):
        apply_recipe(llama(), recipe(), TARGET, calibration=tokens(6), progress=cut, journal=journal)
    assert journal.finished() == 8
    lines: list[str] = []
    apply_recipe(llama(), recipe(), TARGET, calibration=tokens(6), log=lines.append, journal=journal)
    assert lines[0] == "8 of 15 weights were finished by a run before this one."
    assert [line.split(":")[0] for line in lines[1:]] == ["model.layers.1"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def drawn(stream: io.StringIO, columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with watch(stream, lambda: 0.0) as watcher:
        watcher.stage("compress", "x")
        apply_recipe(llama(), recipe(), TARGET, calibration=tokens(6), progress=watcher.update, log=watcher.message)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())


def test_a_bar_names_the_last_layer_and_its_error(monkeypatch: pytest.MonkeyPatch):
    text = drawn(Terminal(), 140, monkeypatch)
    last = text[text.rindex("Compress ") :]
    assert "15/15" in last
    assert re.search(r"error 0\.\d{4} model\.layers\.1\.mlp\.down_proj", last)
    assert "model.layers.0: 7 weights, output error" in text


def test_a_narrow_bar_still_has_the_error(monkeypatch: pytest.MonkeyPatch):
    text = drawn(Terminal(), 100, monkeypatch)
    assert re.search(r"15/15 .*error 0\.\d{4}", text[text.rindex("Compress ") :])


def test_a_log_has_one_line_a_block(monkeypatch: pytest.MonkeyPatch):
    lines = drawn(io.StringIO(), 80, monkeypatch).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("[   0.0 s] model.layers.0: 7 weights, output error 0.")
    assert lines[2].startswith("[   0.0 s] model.layers.1: 7 weights, output error 0.")


def test_peak_is_that_of_the_part_measured():
    # Pages of their own: what an allocator gives may be memory that it kept from before.
    with mmap.mmap(-1, 60_000_000) as large:
        large.write(b"1" * 60_000_000)
        before = peak_mb()
    meter = Meter()
    kept = mmap.mmap(-1, 20_000_000)
    for _ in range(20):
        kept.write(b"1" * 1_000_000)
    usage = meter.read()
    assert usage.start_rss_mb is not None
    assert usage.peak_rss_mb is not None
    assert usage.peak_rss_mb - usage.start_rss_mb == pytest.approx(20, abs=4)
    assert usage.peak_rss_mb < before - 30
    # The whole process's peak is not forgotten.
    assert peak_mb() >= before - SLACK
    kept.close()
    assert resident_mb("VmRSS") <= peak_mb() + SLACK


def test_the_cost_counts_tokens_and_comes_back_from_disk(tmp_path: Path):
    model, calibration = llama(), tokens(6)
    made, _ = apply_recipe(model, recipe(), TARGET, calibration=calibration)
    cost = cost_of(Usage(1.5, 100.0, 120.0), made, calibration, weights_before=3)
    assert cost == Cost(1.5, 100.0, 120.0, weights=15, weights_before=3, samples=6, tokens=54)
    save_cost(tmp_path, cost)
    assert load_cost(tmp_path) == cost
    words = "1.5 s of processor time; peak 120 MB, 100 MB when it began; 15 weights, 3 of them by a run before; "
    assert cost_words(vars(cost)) == words + "6 inputs of 54 tokens"
    plain = cost_of(Usage(0.04, None, None), made, None)
    assert cost_words(vars(plain)) == "0.0 s of processor time; 15 weights"

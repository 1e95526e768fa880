"""Memory plans: what is counted, and the refusal of what a device can't hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgeport.device_memory import check_fits, plan_memory, planned_by
from edgeport.errors import EXIT_TARGET_REFUSES, TargetRefusesError
from edgeport.export.artifact import Artifact
from edgeport.export.dispatch import cache_bytes
from edgeport.export.onnx.decoder import SLACK
from edgeport.formats import CacheFormat
from edgeport.model.live import live_bytes
from edgeport.model.types import AttentionLayer, Decoder, Model, Source, TensorSpec
from edgeport.target import Device, OnnxRuntimeOptions, Target, load_target

WIDE = AttentionLayer(heads=8, kv_heads=2, head_dim=16, scale=0.25)
NEAR = replace(WIDE, window=100)
ORT, XNNPACK = load_target("linux-x86_64-ort"), load_target("raspberry-pi-5-executorch")


def decoder(context: int, cache: CacheFormat = "float") -> Decoder:
    return Decoder((WIDE, NEAR), context, 97, cache)


@pytest.mark.parametrize(("cache", "of_eight"), [("float", 32), ("int8", 8), ("int4", 4)])
def test_a_cache_counts_shared_heads_widths_and_windows(cache: CacheFormat, of_eight: int) -> None:
    """Keys and values, of 2 heads and not 8; the second layer drops what its window has passed."""
    broad = tuple(replace(layer, head_dim=32) for layer in (WIDE, NEAR))
    values = 2 * 2 * 32 * (1000 + 100 + SLACK)
    assert cache_bytes(Decoder(broad, 1000, 97, cache), ORT) == values * of_eight // 8
    short = 2 * 2 * 32 * (100 + 100)
    assert cache_bytes(Decoder(broad, 100, 97, cache), ORT) == short * of_eight // 8


def test_four_bits_in_narrow_heads_are_kept_whole() -> None:
    """The kernel that drops tokens takes heads of 32, 64, ... only; the one that keeps all takes 16 as well."""
    assert cache_bytes(decoder(1000, "int4"), ORT) == 2 * 2 * 16 * (1000 + 1000) // 2
    assert cache_bytes(decoder(1000, "int8"), ORT) == 2 * 2 * 16 * (1000 + 100 + SLACK)


def model(module: torch.nn.Module, width: int, held: Decoder | None = None) -> Model:
    return Model(
        name="tiny",
        module=module,
        source=Source("factory", "tiny", {}),
        task="other",
        modality="other",
        inputs=(TensorSpec("input", "float32", (4, width)),),
        outputs=(TensorSpec("output", "float32", (4, width)),),
        example={"input": torch.zeros(4, width)},
        huggingface=False,
        decoder=held,
    )


class Widening(torch.nn.Module):
    """(4, 8) through (4, 80) and a copy of it, alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 80), torch.nn.Linear(80, 8)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        wide = self.up(input)
        answer: torch.Tensor = self.down(wide.relu() + 1)
        return answer


def test_the_most_that_is_alive_at_once_is_counted() -> None:
    """wide, wide.relu() and their sum with 1: weights and what has been dropped are not in it."""
    assert live_bytes(model(Widening(), 8)).at_example == 3 * 4 * 80 * 4
    assert (
        live_bytes(model(torch.nn.Sequential(torch.nn.Linear(8, 80), torch.nn.Linear(80, 8)), 8)).at_example
        == (4 * 80 + 4 * 8) * 4
    )


def with_ram(target: Target, gigabytes: float | None) -> Target:
    return target.model_copy(update={"device": Device(ram_gb=gigabytes)})


def test_what_a_device_can_not_hold_is_refused() -> None:
    target = with_ram(ORT, 0.05)
    plan = plan_memory(model(Widening(), 8), target, weights=30_000_000, repacked=20_000_000)
    assert plan.total_bytes == 30_000_000 + 20_000_000 + 12_000_000 + 3 * (3 * 4 * 80 * 4)
    assert (plan.context, plan.cache_bytes, plan.longest_context) == (None, 0, None)
    with pytest.raises(TargetRefusesError, match=r"needs 0\.062 GB .*weights 0\.03 GB.* has 0\.05 GB") as caught:
        check_fits(plan, target)
    assert caught.value.exit_code == EXIT_TARGET_REFUSES
    fitting = with_ram(ORT, 0.07)
    check_fits(plan_memory(model(Widening(), 8), fitting, weights=30_000_000, repacked=20_000_000), fitting)
    unknown = with_ram(ORT, None)
    check_fits(plan_memory(model(Widening(), 8), unknown, weights=10**12, repacked=0), unknown)


def test_the_longest_context_that_fits_is_named() -> None:
    """The module can't be traced as a decoder, so activations are unknown: weights, loading and cache remain."""
    held = Decoder((WIDE,), 4000, 97)
    room = 1000 * 2 * 2 * 16 * 4
    target = with_ram(ORT, (10_000_000 + 12_000_000 + room + 100) / 1e9)
    plan = plan_memory(model(Widening(), 8, held), target, weights=10_000_000, repacked=0)
    assert plan.activations_bytes is None
    assert plan.cache_bytes == 4 * room
    assert plan.longest_context == 1000
    with pytest.raises(TargetRefusesError, match="context of 4000 tokens") as caught:
        check_fits(plan, target)
    assert caught.value.allowed == "a context of at most 1000 tokens"
    assert "--context 1000" in (caught.value.next_step or "")
    none = plan_memory(model(Widening(), 8, held), target, weights=10**9, repacked=0)
    assert none.longest_context == 0
    with pytest.raises(TargetRefusesError) as caught:
        check_fits(none, target)
    assert "fewer bits" in (caught.value.next_step or "")


def test_a_cache_that_grows_is_there_twice() -> None:
    standard = ORT.model_copy(update={"onnxruntime": OnnxRuntimeOptions(opset=23, attention="standard")})
    held = Decoder((NEAR,), 1000, 97)
    plan = plan_memory(model(Widening(), 8, held), standard, weights=0, repacked=0)
    assert plan.cache_bytes == 1000 * 2 * 2 * 16 * 4  # the window does not forget there
    assert plan.total_bytes == 2 * plan.cache_bytes + plan.loading_bytes


def test_the_files_own_arena_replaces_the_estimate(tmp_path: Path) -> None:
    held = Decoder((WIDE,), 50, 97)
    plan = plan_memory(model(Widening(), 8, held), XNNPACK, weights=1000, repacked=0)
    (tmp_path / "model.pte").write_bytes(b"0" * 1234)
    artifact = Artifact("executorch", "xnnpack", tmp_path, "model.pte", (), (), facts={"planned_memory_bytes": 500_000})
    known = planned_by(plan, artifact)
    assert (known.weights_bytes, known.activations_from) == (1234, "planned arena")
    assert known.cache_bytes + (known.activations_bytes or 0) == 500_000
    assert known.total_bytes == 1234 + 500_000 + plan.loading_bytes

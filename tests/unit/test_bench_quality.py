"""The quality bench's pure functions: who is compared with whom, and when the aim counts as met."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

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
        "hidden": None,
        "top1": None,
        "perplexity": None,
        "cpu_ratio": None,
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
    missing = text.partition("## Not measured yet")[2]
    assert "peer nncf" not in missing
    assert "peer olive" in missing
    assert "model minilm" not in missing
    assert "model whisper-tiny.en" in missing
    assert "0 of 1" in text  # 0.75 of the peer's error is not half


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

"""Fixed int8 grids, and how they are chosen, against slow implementations and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgeport.activations import ActivationGrid, LayerRange, fake_quantize, grid_of, least_weight_scale, round_layers
from edgeport.compress.ranges import BINS, Histogram, choose_grid, choose_range

NUMBERS = st.floats(-(2.0**99), 2.0**99, allow_nan=False, width=32)


@given(NUMBERS, NUMBERS)
@settings(max_examples=200, deadline=None)
def test_a_grid_has_256_steps_holds_0_and_covers_its_range_to_half_a_step(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    grid = grid_of(low, high)
    assert grid.scale == np.float32(grid.scale) > 0
    assert -128 <= grid.zero_point <= 127
    step = grid.scale * (0.5 + 1e-4)
    assert grid.low <= min(low, 0) + step
    assert grid.high >= max(high, 0) - step
    assert grid.high - grid.low == pytest.approx(255 * grid.scale)
    assert float(fake_quantize(torch.zeros(1), grid)) == 0


def test_rounding_is_the_formula_value_by_value() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, 7, generator=generator) * 4
    grid = grid_of(-3.0, 7.0)
    rounded = fake_quantize(values, grid)
    for value, found in zip(values.flatten().tolist(), rounded.flatten().tolist(), strict=True):
        code = min(max(round(float(np.float32(value) / np.float32(grid.scale))) + grid.zero_point, -128), 127)
        assert found == pytest.approx(grid.scale * (code - grid.zero_point), rel=1e-6)
    assert torch.equal(fake_quantize(rounded, grid), rounded), "what is on the grid stays where it is"


def test_a_grid_within_a_clamp_is_not_changed_by_it() -> None:
    grid = grid_of(0.0, 6.0)
    assert grid.zero_point == -128
    assert grid.within(0.0, 6.0)
    assert grid.within(0.0, float("inf"))
    assert not grid.within(0.0, 5.9)
    assert not grid_of(-0.5, 6.0).within(0.0, 6.0)
    values = fake_quantize(torch.linspace(-1, 8, 1000), grid)
    torch.testing.assert_close(values.clamp(0, 6), values, rtol=1e-6, atol=0)


def _histogram(values: torch.Tensor) -> Histogram:
    histogram = Histogram(float(values.min()), float(values.max()))
    for part in values.split(1000):
        histogram.add(part)
    return histogram


def _normal_with_outliers() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(40_000, generator=generator)
    values[:4] = torch.tensor([60.0, -45.0, 52.0, 58.0])
    return values


def test_a_histogram_filled_in_parts_counts_every_value_once() -> None:
    values = _normal_with_outliers()
    histogram = _histogram(values)
    edges = np.linspace(histogram.low, histogram.high, BINS + 1)
    expected, _ = np.histogram(values.double().numpy(), edges)
    assert int(histogram.counts.sum()) == values.numel()
    # A value on an edge may fall to either side.
    assert np.abs(np.cumsum(expected) - np.cumsum(histogram.counts.numpy())).max() <= 2


def test_minmax_holds_everything_and_percentile_all_but_a_ten_thousandth() -> None:
    values = _normal_with_outliers()
    assert choose_range(_histogram(values), "minmax") == (float(values.min()), float(values.max()))
    low, high = choose_range(_histogram(values), "percentile")
    expected = np.quantile(values.double().numpy(), [0.5e-4, 1 - 0.5e-4])
    width = float(values.max() - values.min()) / BINS
    assert low == pytest.approx(expected[0], abs=2 * width + 0.3)
    assert high == pytest.approx(expected[1], abs=2 * width + 0.3)
    outside = int(((values < low) | (values > high)).sum())
    assert 1 <= outside <= values.numel() * 1e-4 + 1


def test_mse_finds_what_brute_force_over_the_values_finds() -> None:
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(3))
    values[0] = 12.0

    def error(grid: ActivationGrid) -> float:
        return float((fake_quantize(values, grid) - values).double().square().mean())

    found = error(choose_grid(_histogram(values), "mse"))
    ends = [(low, high) for low in np.linspace(-5, -3, 9) for high in np.linspace(3, 12, 19)]
    assert found <= min(error(grid_of(low, high)) for low, high in ends) * 1.02
    assert found < 0.8 * error(choose_grid(_histogram(values), "minmax"))


def test_entropy_clips_outliers_and_leaves_a_flat_distribution_alone() -> None:
    low, high = choose_range(_histogram(_normal_with_outliers()), "entropy")
    assert -45 < low < -2
    assert 2 < high < 60
    flat = torch.linspace(0, 1, 50_000)
    assert choose_range(_histogram(flat), "entropy")[1] > 0.97


def test_zeros_that_a_relu_makes_do_not_narrow_the_entropy_range() -> None:
    positive = torch.rand(50_000, generator=torch.Generator().manual_seed(2))
    with_zeros = torch.cat([positive, torch.zeros(200_000)])
    without = choose_range(_histogram(torch.cat([positive, torch.zeros(1)])), "entropy")
    assert choose_range(_histogram(with_zeros), "entropy")[1] == pytest.approx(without[1], rel=0.05)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize(
    "values",
    [torch.zeros(10), torch.full((10,), 3.0), torch.full((10,), -1e-30), torch.tensor([-1e30, 1e30, 0.0])],
    ids=["zero", "constant", "tiny", "huge"],
)
def test_every_method_takes_degenerate_tensors(method: str, values: torch.Tensor) -> None:
    grid = choose_grid(_histogram(values), method)  # type: ignore[arg-type]
    rounded = fake_quantize(values, grid)
    assert bool(torch.isfinite(rounded).all())
    assert float((rounded - values).abs().max()) <= max(grid.scale, 1e-29)


def test_layers_round_what_they_read_and_give() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(5, 4)
    ranges = {
        "0.weight": LayerRange(grid_of(-1.0, 2.0), grid_of(0.0, 1.0)),
        "2.weight": LayerRange(grid_of(0.0, 1.0)),
    }
    first = fake_quantize(net[0](fake_quantize(x, ranges["0.weight"].input)), grid_of(0.0, 1.0))
    expected = net[2](fake_quantize(first.relu(), grid_of(0.0, 1.0)))
    round_layers(net, ranges)
    assert torch.equal(net(x), expected)


def test_the_least_weight_scale_leaves_room_for_the_bias_in_int32() -> None:
    bias, grid = torch.tensor([5.0, -0.25, 0.0]), grid_of(0.0, 6.0)
    least = least_weight_scale(bias, grid)
    assert least[2] == 0
    steps = bias[:2].double() / (grid.scale * least[:2].double())
    assert float(steps.abs().max()) <= 2**30 * (1 + 1e-6)

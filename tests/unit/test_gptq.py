"""GPTQ and the refinement afterwards, against an implementation written column by column and against algebra."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeport.compress.quantize.gptq import inverse_factor, quantize_gptq
from edgeport.compress.quantize.grid import Grid, fit_scales
from edgeport.compress.quantize.refine import refine
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.compress.statistics import output_error
from edgeport.quantized import dequantize

GRIDS = [
    Grid(4, 16),
    Grid(4, 16, symmetric=False),
    Grid(3, None, symmetric=False),
    Grid(8, None),
    Grid(2, 8, signed_scales=True),
]


def layer(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, correlated inputs (T, K) whose columns differ in energy, and their second moment."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(-1, 1, columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing / columns**0.5
    return torch.randn(rows, columns, generator=generator), inputs, inputs.T @ inputs


def slow_gptq(weight: torch.Tensor, second: torch.Tensor, grid: Grid, damping: float, order: list[int]) -> torch.Tensor:
    """One column at a time, solving for the best change of all columns not yet rounded (the paper's section 3)."""
    energy = second.diagonal()
    scale, zero = fit_scales(weight, grid, importance=energy / energy.mean() + 1e-6)
    size = grid.group_size or weight.shape[1]
    lowest, highest = grid.range
    damped = second.double() + damping * energy.double().mean() * torch.eye(len(energy), dtype=torch.float64)
    work, result = weight.double().clone(), torch.zeros_like(weight)
    left = list(order)
    while left:
        column = left[0]
        inverse = torch.linalg.inv(damped[left][:, left])
        step = scale[:, column // size].double()
        shift = torch.zeros_like(step) if zero is None else zero[:, column // size].double()
        code = torch.clamp(torch.round(work[:, column] / step) + shift, lowest, highest)
        value = (code - shift) * step
        error = (work[:, column] - value) / inverse[0, 0]
        work[:, left] -= torch.outer(error, inverse[0])
        result[:, column] = value.float()
        left = left[1:]
    return result


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("act_order", [False, True])
def test_equals_the_slow_way(grid, act_order):
    weight, _, second = layer(6, 48, 3)
    order = torch.argsort(second.diagonal(), descending=True, stable=True).tolist() if act_order else list(range(48))
    found = dequantize(quantize_gptq(weight, second, grid, act_order=act_order))
    expected = slow_gptq(weight, second, grid, 0.01, order)
    # A value within rounding of two codes' middle may go either way: few, and never by more than one code.
    differs = (found - expected).abs() > 1e-5
    assert differs.float().mean() < 0.02
    assert output_error(found - weight, second) == pytest.approx(output_error(expected - weight, second), rel=0.02)


@pytest.mark.parametrize(("grid", "seed"), list(itertools.product(GRIDS, range(3))))
def test_output_changes_less_than_by_rounding(grid, seed):
    weight, inputs, second = layer(32, 144, seed)
    nearest = dequantize(quantize_rtn(weight, grid)) - weight
    changed = dequantize(quantize_gptq(weight, second, grid)) - weight
    assert output_error(changed.clone(), second) < output_error(nearest, second)
    # tr(D H D^T) is what the layer's output really changes by.
    assert output_error(changed.clone(), second) == pytest.approx(float((inputs @ changed.T).square().sum()), rel=1e-3)


@given(rows=st.integers(1, 9), groups=st.integers(1, 6), seed=st.integers(0, 100), which=st.sampled_from(GRIDS))
@settings(max_examples=40, deadline=None)
def test_refining_never_increases_the_error_of_any_row(rows, groups, seed, which):
    weight, _, second = layer(rows, 16 * groups, seed)
    damped = second + 1e-3 * float(second.diagonal().mean()) * torch.eye(16 * groups)
    tensor = quantize_rtn(weight, which)
    for _ in range(3):
        better = refine(tensor, weight, second, rounds=1)
        before, after = dequantize(tensor) - weight, dequantize(better) - weight
        assert bool(((after @ damped * after).sum(1) <= (before @ damped * before).sum(1) * (1 + 1e-5) + 1e-6).all())
        lowest, highest = which.range
        assert lowest <= int(better.codes.min())
        assert int(better.codes.max()) <= highest
        tensor = better


@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_made_lies_in_order_in_memory(grid):
    """Writers of files may take a tensor's memory as it lies."""
    weight, _, second = layer(12, 48, 4)
    tensor = refine(quantize_gptq(weight, second, grid), weight, second)
    parts = [part for part in (tensor.codes, tensor.scale, tensor.zero_point) if part is not None]
    assert all(part.is_contiguous() for part in parts)


def test_refining_finds_the_best_scale_of_a_row():
    weight, _, second = layer(1, 8, 5)
    tensor = quantize_rtn(weight, Grid(4, None), scale_search=False)
    better = refine(tensor, weight, second, rounds=4)
    damped = second + 1e-3 * float(second.diagonal().mean()) * torch.eye(8)

    def error(scale: float) -> float:
        change = better.codes.float() * scale - weight
        return float((change @ damped * change).sum())

    around = [error(float(better.scale) * factor) for factor in (0.99, 1.01)]
    assert error(float(better.scale)) <= min(around)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(3, 16),
        torch.full((3, 16), 0.7),
        torch.full((3, 16), 1e30),
        torch.full((3, 16), 1e-30),
        torch.eye(3, 16) * 1e4,
    ],
    ids=["zero", "constant", "huge", "tiny", "outliers"],
)
@pytest.mark.parametrize("grid", GRIDS)
def test_odd_columns_stay_finite(weight, grid):
    _, _, second = layer(3, 16, 1)
    second[5], second[:, 5] = 0, 0  # an input that never moves
    tensor = refine(quantize_gptq(weight, second, grid), weight, second)
    values = dequantize(tensor)
    assert bool(torch.isfinite(values).all())
    assert bool(((values - weight).abs() <= weight.abs().amax(1, keepdim=True) * 1.01).all())
    if not bool(weight.any()):
        assert not bool(values.any())


def test_factor_of_the_inverse():
    _, _, second = layer(1, 24, 2)
    factor = inverse_factor(second, 0.01).double()
    damped = second.double() + 0.01 * second.diagonal().double().mean() * torch.eye(24)
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(24, dtype=torch.float64), atol=1e-4)
    assert torch.equal(factor, factor.triu())


def test_inputs_that_span_little_are_damped_until_they_can_be_inverted():
    one = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    factor = inverse_factor(one.T @ one, 1e-9)
    assert bool(torch.isfinite(factor).all())

"""HQQ: what it promises is a smaller |W - Q|_p, p = 0.7, on the grid as it is stored."""

import pytest
import torch

from edgeport.compress.quantize.grid import Grid
from edgeport.compress.quantize.hqq import quantize_hqq
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.quantized import dequantize, round_scale

GRIDS = [Grid(4, 32, symmetric=False), Grid(4, 32), Grid(3, 64, symmetric=False), Grid(2, 16, scale_dtype="float16")]


def heavy_tailed(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    return 0.02 * normal / torch.rand(rows, columns, generator=generator).clamp_min(0.05)


def lp(change: torch.Tensor) -> float:
    return float(change.abs().pow(0.7).sum())


@pytest.mark.parametrize("grid", GRIDS)
def test_error_is_sparser_than_that_of_least_squares(grid):
    weight = heavy_tailed(64, 128, 0)
    nearest = dequantize(quantize_rtn(weight, grid)) - weight
    found = dequantize(quantize_hqq(weight, grid)) - weight
    assert lp(found) < lp(nearest)
    # It is paid for in the squared error, never by much.
    assert float(found.norm()) < 1.5 * float(nearest.norm())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_constant_groups_of_any_size(grid, size):
    weight = torch.full((3, 64), size)
    tensor = quantize_hqq(weight, grid)
    values = dequantize(tensor)
    assert bool(torch.isfinite(values).all())
    if grid.scale_dtype == "float16" and size > 1e6:
        return  # beyond what such scales can say
    assert bool(((values - weight).abs() <= max(size * 0.51, 2e-4 if grid.scale_dtype == "float16" else 0)).all())
    assert torch.equal(tensor.scale, round_scale(tensor.scale, grid.scale_dtype))


def test_the_same_again():
    weight = heavy_tailed(16, 64, 1)
    first, second = (quantize_hqq(weight, GRIDS[0]) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)
    assert torch.equal(first.zero_point, second.zero_point)

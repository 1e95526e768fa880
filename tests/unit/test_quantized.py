"""The logical form of a compressed weight: algebra, bounds and the scale grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeport.compress.quantize.grid import Grid
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.quantized import QuantizedTensor, as_matrix, dequantize, from_matrix, quantize_with_scale, round_scale

shapes = st.sampled_from([(4, 64), (1, 32), (6, 96), (3, 2, 4, 8), (5, 1, 8, 4)])


def random_weight(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 8, 16, 32]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    symmetric=st.booleans(),
    signed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_rounding_error_is_at_most_half_a_step_inside_the_range(shape, bits, group, dtype, symmetric, signed, seed):
    weight = random_weight(shape, seed)
    columns = weight.numel() // shape[0]
    if group is not None and columns % group:
        return
    grid = Grid(bits, group, symmetric, dtype, signed)
    tensor = quantize_rtn(weight, grid)
    lowest, highest = grid.range
    assert lowest <= int(tensor.codes.min())
    assert int(tensor.codes.max()) <= highest
    groups = as_matrix(weight).reshape(shape[0], -1, tensor.group_size)
    scale = tensor.scale.unsqueeze(-1)
    assert signed or bool((scale > 0).all())
    zero = torch.zeros_like(scale) if symmetric else tensor.zero_point.to(torch.float32).unsqueeze(-1)
    ends = torch.stack([scale * (lowest - zero), scale * (highest - zero)])
    inside = (groups >= ends.amin(0)) & (groups <= ends.amax(0))
    error = (as_matrix(dequantize(tensor)).reshape(groups.shape) - groups).abs()
    assert bool((error[inside] <= (scale.abs().expand_as(error) * 0.5001)[inside]).all())
    # Values outside were clipped to the range's end, never wrapped.
    assert bool((error[~inside] <= groups.abs()[~inside] * 1.0001).all())


@given(shape=shapes, dtype=st.sampled_from(["float32", "float16", "bfloat16"]), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_scales_are_values_the_backend_can_store(shape, dtype, seed):
    tensor = quantize_rtn(random_weight(shape, seed), Grid(bits=4, group_size=None, scale_dtype=dtype))
    assert torch.equal(tensor.scale, round_scale(tensor.scale, dtype))


def test_dequantize_equals_the_formula_by_hand():
    codes = torch.tensor([[1, -2, 3, 4], [5, 6, -7, 0]], dtype=torch.int8)
    scale = torch.tensor([[0.5, 2.0], [0.25, 1.0]])
    zero = torch.tensor([[1, 0], [0, -1]], dtype=torch.int8)
    tensor = QuantizedTensor(codes, scale, zero, bits=4, group_size=2)
    expected = torch.tensor([[0.0, -1.5, 6.0, 8.0], [1.25, 1.5, -6.0, 1.0]])
    assert torch.equal(dequantize(tensor), expected)


def test_scale_search_never_loses_to_the_largest_weight():
    weight = random_weight((64, 128), 3) ** 3
    for bits, group in [(4, 32), (8, None), (3, 16)]:
        searched = quantize_rtn(weight, Grid(bits=bits, group_size=group))
        plain = quantize_rtn(weight, Grid(bits=bits, group_size=group), scale_search=False)
        error = [(dequantize(t) - weight).square().reshape(64, -1, t.group_size).sum(-1) for t in (searched, plain)]
        assert bool((error[0] <= error[1] + 1e-6).all())
    assert float(error[0].sum()) < 0.95 * float(error[1].sum())


def test_eight_bits_equal_torchs_own_per_channel_quantization():
    weight = random_weight((16, 40), 5)
    tensor = quantize_rtn(weight, Grid(bits=8, group_size=None), scale_search=False)
    reference = torch.quantize_per_channel(
        weight, tensor.scale[:, 0].double(), torch.zeros(16, dtype=torch.int64), axis=0, dtype=torch.qint8
    )
    assert torch.equal(tensor.codes, reference.int_repr())


def test_a_group_of_zeros_stays_zero():
    weight = torch.zeros(2, 32)
    weight[1] = 1.0
    tensor = quantize_rtn(weight, Grid(bits=4, group_size=32, scale_dtype="float16"))
    assert torch.equal(dequantize(tensor)[0], torch.zeros(32))
    assert bool(torch.isfinite(tensor.scale).all())


def test_tiny_weights_keep_a_scale_that_float16_can_hold():
    tensor = quantize_rtn(torch.full((1, 32), 1e-9), Grid(bits=8, group_size=None, scale_dtype="float16"))
    assert float(tensor.scale.min()) > 0
    assert float((dequantize(tensor) - 1e-9).abs().max()) <= 1e-9


@pytest.mark.parametrize("axis", [0, 1])
def test_matrix_view_round_trips_on_either_axis(axis):
    weight = random_weight((6, 4, 3, 3), 1)
    assert torch.equal(from_matrix(as_matrix(weight, axis), weight.shape, axis), weight)
    tensor = quantize_rtn(weight, Grid(bits=8, group_size=None), axis=axis)
    assert tensor.scale.shape == (weight.shape[axis], 1)
    assert float((dequantize(tensor) - weight).abs().max()) <= float(tensor.scale.max()) * 0.5001


def test_codes_come_back_exactly_from_their_own_values():
    tensor = quantize_rtn(random_weight((8, 64), 9), Grid(bits=4, group_size=32))
    again = quantize_with_scale(dequantize(tensor), tensor.scale, bits=4, group_size=32)
    assert torch.equal(again.codes, tensor.codes)


def test_storage_bytes_counts_codes_and_scales():
    tensor = quantize_rtn(random_weight((8, 64), 9), Grid(bits=4, group_size=32, scale_dtype="bfloat16"))
    assert tensor.storage_bytes() == 8 * 64 // 2 + 8 * 2 * 2

"""Palettes fitted to a layer's inputs: against algebra, a dense least-squares solution and a slow GPTQ."""

import itertools

import numpy as np
import pytest
import torch

from edgeport.compress.quantize.fitted import STEPS, best_entries, fit_palette, quantize_fitted_palette
from edgeport.compress.quantize.palette import quantize_palette
from edgeport.compress.quantize.refine import damped_second
from edgeport.compress.statistics import output_error
from edgeport.errors import BadInputError
from edgeport.quantized import QuantizedTensor, dequantize

FORMS = [(2, 4), (3, None), (4, 8), (6, None)]
"""Bits, and channels that share a palette."""


def layer(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the second moment of correlated inputs whose columns differ in energy."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(-1, 1, columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing / columns**0.5
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs


def clustered(weight: torch.Tensor, second: torch.Tensor, bits: int, group: int | None) -> QuantizedTensor:
    return quantize_palette(
        weight,
        bits=bits,
        group_size=group,
        scale_dtype="float32",
        importance=second.diagonal() / second.diagonal().mean(),
    )


@pytest.mark.parametrize(("form", "seed"), list(itertools.product(FORMS, range(2))))
def test_output_changes_much_less_than_by_clustering(form, seed):
    bits, group = form
    weight, second = layer(32, 96, seed)
    plain = dequantize(clustered(weight, second, bits, group)) - weight
    fitted = quantize_fitted_palette(weight, second, bits=bits, group_size=group, scale_dtype="float16")
    # Correlated inputs: compensation takes more than half of the error, as with integer grids.
    assert output_error(dequantize(fitted) - weight, second) < 0.5 * output_error(plain, second)
    assert torch.equal(fitted.palette, fitted.palette.half().float())
    assert bool((fitted.palette.diff(dim=1) >= 0).all())
    assert fitted.codes.dtype == torch.uint8
    assert int(fitted.codes.max()) < 2**bits


@pytest.mark.parametrize("form", FORMS)
def test_fitting_never_increases_the_error_of_a_palettes_channels(form):
    bits, group = form
    weight, second = layer(16, 40, 5)
    damped, tensor = damped_second(second), clustered(weight, second, bits, group)
    for _ in range(3):
        better = fit_palette(tensor, weight, second, rounds=1)
        before, after = (
            ((dequantize(t) - weight) @ damped * (dequantize(t) - weight)).reshape(tensor.palette.shape[0], -1).sum(1)
            for t in (tensor, better)
        )
        assert bool((after <= before * (1 + 1e-5)).all())
        tensor = better


def test_entries_are_the_least_squares_solution():
    """With every code taken and one palette the normal equations, written densely, have one solution."""
    weight, second = layer(6, 24, 1)
    second = damped_second(second)
    tensor = clustered(weight, second, 3, None)
    choice = torch.nn.functional.one_hot(tensor.codes.long(), 8).double()  # (N, K, E)
    system = torch.einsum("nke,kl,nlf->ef", choice, second.double(), choice)
    right = torch.einsum("nke,kl,nl->e", choice, second.double(), weight.double())
    best = np.linalg.solve(system.numpy(), right.numpy())
    dense = choice @ torch.from_numpy(best) - weight.double()
    least = float((dense @ second.double() * dense).sum())
    assert STEPS >= 8  # as many as entries: conjugate gradients have arrived
    found = best_entries(tensor.palette, tensor.codes.reshape(1, -1).long(), weight, second)
    change = found[0].double()[tensor.codes.long()] - weight.double()
    assert float((change @ second.double() * change).sum()) == pytest.approx(least, rel=1e-4)


def test_columns_are_compensated_as_gptq_does():
    """One column at a time, solving for the best change of all columns not yet rounded."""
    weight, second = layer(6, 32, 3)
    damping = 0.01
    palette = clustered(weight, second, 3, None).palette[0].double()
    damped = second.double() + damping * second.diagonal().double().mean() * torch.eye(32, dtype=torch.float64)
    work, expected = weight.double().clone(), torch.zeros_like(weight)
    left = list(range(32))
    while left:
        column = left[0]
        inverse = torch.linalg.inv(damped[left][:, left])
        value = palette[(work[:, column, None] - palette).abs().argmin(1)]
        work[:, left] -= torch.outer((work[:, column] - value) / inverse[0, 0], inverse[0])
        expected[:, column] = value.float()
        left = left[1:]
    found = quantize_fitted_palette(
        weight, second, bits=3, group_size=None, scale_dtype="float32", act_order=False, damping=damping, rounds=0
    )
    error = output_error(dequantize(found) - weight, second)
    # Importance is relative in one and absolute in the other: palettes differ in the last digits at most.
    assert error == pytest.approx(output_error(expected - weight, second), rel=0.02)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(4, 16), torch.full((4, 16), 0.7), torch.full((4, 16), 1e4), torch.eye(4, 16) * 1e3],
    ids=["zero", "constant", "large", "outliers"],
)
def test_odd_weights_stay_exact_where_few_values_are(weight):
    _, second = layer(4, 16, 1)
    second[5], second[:, 5] = 0, 0  # an input that never moves
    tensor = quantize_fitted_palette(weight, second, bits=4, group_size=2, scale_dtype="float32")
    assert torch.allclose(dequantize(tensor), weight, rtol=1e-5, atol=1e-5)


def test_channels_that_can_not_be_grouped_are_refused():
    weight, second = layer(6, 16, 0)
    with pytest.raises(BadInputError, match="share palettes"):
        quantize_fitted_palette(weight, second, bits=4, group_size=4, scale_dtype="float16")

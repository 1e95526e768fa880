"""Palettes against exact one-dimensional k-means, written here as the textbook dynamic program."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeport.compress.quantize import palette as palette_module
from edgeport.compress.quantize.palette import nearest_entries, quantize_palette
from edgeport.errors import BadInputError
from edgeport.quantized import QuantizedTensor, dequantize, digest


def least_error(values: np.ndarray, entries: int, weights: np.ndarray | None = None) -> float:
    """The optimum, O(entries * n**2)."""
    order = np.argsort(values, kind="stable")
    x = values[order].astype(np.float64) - float(values.mean())
    w = np.ones_like(x) if weights is None else weights[order].astype(np.float64)
    n = len(x)
    cost = np.zeros((n + 1, n + 1))
    for i in range(n):
        for j in range(i + 1, n + 1):
            mass = w[i:j].sum()
            mean = (w[i:j] * x[i:j]).sum() / mass if mass > 0 else 0.0
            cost[i, j] = (w[i:j] * (x[i:j] - mean) ** 2).sum()
    best = cost[0].copy()
    for _ in range(entries - 1):
        best = np.array([min(best[i] + cost[i, j] for i in range(j + 1)) for j in range(n + 1)])
    return float(best[n])


def error(weight: torch.Tensor, tensor: QuantizedTensor, importance: torch.Tensor | None = None) -> float:
    difference = (dequantize(tensor).double() - weight.double()).square()
    return float((difference if importance is None else difference * importance.double()).sum())


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("shape", ["normal", "cauchy", "clusters", "far from zero"])
def test_error_is_nearly_the_optimum(bits, shape):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(4, 24, generator=generator)
    if shape == "cauchy":
        weight = torch.tan(torch.pi * (torch.rand(4, 24, generator=generator) - 0.5))
    if shape == "clusters":
        weight = weight * 0.01 + torch.randint(0, 5, weight.shape, generator=generator)
    if shape == "far from zero":
        weight = 1000 + 0.01 * weight
    tensor = quantize_palette(weight, bits=bits, group_size=2, scale_dtype="float32")
    optimum = sum(least_error(part.numpy().ravel(), 2**bits) for part in weight.split(2))
    assert optimum * (1 - 1e-3) <= error(weight, tensor) <= optimum * 1.01


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("shape", ["normal", "cauchy"])
def test_never_worse_than_even_steps_or_quantiles_or_lloyd(bits, shape):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(2, 600, generator=generator)
    if shape == "cauchy":
        weight = torch.tan(torch.pi * (torch.rand(2, 600, generator=generator) - 0.5))
    fitted = error(weight, quantize_palette(weight, bits=bits, group_size=2, scale_dtype="float32"))
    values = weight.numpy().ravel().astype(np.float64)
    quantiles = np.quantile(values, (np.arange(2**bits) + 0.5) / 2**bits)
    for start in (quantiles, np.linspace(values.min(), values.max(), 2**bits)):
        centres = start
        for _ in range(6):
            nearest = np.abs(values[:, None] - centres).argmin(1)
            assert fitted < ((values - centres[nearest]) ** 2).sum()
            centres = np.array(
                [values[nearest == k].mean() if (nearest == k).any() else c for k, c in enumerate(centres)]
            )


def test_importance_weighs_columns():
    generator = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(3, 20, generator=generator), torch.rand(20, generator=generator) ** 4
    weighted = quantize_palette(weight, bits=2, group_size=None, scale_dtype="float32", importance=importance)
    plain = quantize_palette(weight, bits=2, group_size=None, scale_dtype="float32")
    optimum = least_error(weight.numpy().ravel(), 4, importance.repeat(3).numpy())
    assert optimum * (1 - 1e-5) <= error(weight, weighted, importance) <= optimum * 1.01
    assert error(weight, plain, importance) > optimum * 1.03


def test_a_histogram_is_as_good_as_the_values(monkeypatch):
    """Weights larger than BINS go through bins: at 100 values a bin the error stays within a percent."""
    weight = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    exact = quantize_palette(weight, bits=4, group_size=1, scale_dtype="float32")
    monkeypatch.setattr(palette_module, "BINS", 1000)
    binned = quantize_palette(weight, bits=4, group_size=1, scale_dtype="float32")
    assert not torch.equal(exact.palette, binned.palette)
    assert error(weight, binned) < 1.01 * error(weight, exact)
    importance = torch.rand(5000, generator=torch.Generator().manual_seed(1)) ** 4
    weighted = quantize_palette(weight, bits=4, group_size=1, scale_dtype="float32", importance=importance)
    assert error(weight, weighted, importance) < 0.95 * error(weight, exact, importance)


def test_form():
    weight = torch.randn(12, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    tensor = quantize_palette(weight, bits=3, group_size=4, scale_dtype="float16")
    assert tensor.codes.dtype == torch.uint8
    assert tensor.codes.shape == weight.shape
    assert tensor.palette.shape == (3, 8)
    assert torch.equal(tensor.palette, tensor.palette.half().float())
    assert bool((tensor.palette.diff(dim=1) >= 0).all())
    assert torch.equal(tensor.scale, torch.ones(12, 1))
    assert (tensor.bits, tensor.group_size, tensor.zero_point) == (3, 45, None)
    # Three bits a weight and 3 x 8 float16 entries.
    assert tensor.storage_bytes() == 540 * 3 // 8 + 1 + 48
    # No other entry of the channel's palette is nearer.
    entries = tensor.palette.repeat_interleave(4, 0).reshape(12, 1, 1, 1, 8)
    nearest = (weight.unsqueeze(-1).double() - entries.double()).abs().amin(-1)
    assert torch.equal((weight.double() - dequantize(tensor).double()).abs(), nearest)


def test_groups_are_palettes_of_their_own():
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 8)[:, None]
    whole = quantize_palette(weight, bits=4, group_size=2, scale_dtype="float32")
    for index, part in enumerate(weight.split(2)):
        alone = quantize_palette(part, bits=4, group_size=None, scale_dtype="float32")
        assert torch.equal(whole.palette[index : index + 1], alone.palette)
        assert torch.equal(whole.codes[2 * index : 2 * index + 2], alone.codes)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4, 6),
        torch.full((4, 6), -2.5),
        torch.tensor([[0.0, 1.0, 0.5]]).repeat(4, 50),
        torch.tensor([[0.0, 1e-4, 1.0, -7.0]]).half().float().repeat(4, 2),
        torch.zeros(4, 6).index_fill(1, torch.tensor([2]), 60000.0),
    ],
    ids=["zeros", "constant", "three values", "four values", "huge"],
)
def test_few_values_are_exact(weight):
    tensor = quantize_palette(weight, bits=4, group_size=4, scale_dtype="float16")
    assert torch.equal(dequantize(tensor), weight)


def test_few_values_are_exact_through_a_histogram(monkeypatch):
    monkeypatch.setattr(palette_module, "BINS", 64)
    weight = torch.tensor([[0.0, 1.0, 0.5, -2.0]]).repeat(4, 50)
    for values in (weight, torch.zeros(4, 200), torch.full((4, 200), 3.0)):
        assert torch.equal(dequantize(quantize_palette(values, bits=2, group_size=4, scale_dtype="float16")), values)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-7, 1e30])
def test_any_magnitude_has_the_same_relative_error(magnitude):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    expected = error(weight, quantize_palette(weight, bits=3, group_size=4, scale_dtype="float32"))
    scaled = weight * magnitude
    measured = error(scaled, quantize_palette(scaled, bits=3, group_size=4, scale_dtype="float32")) / magnitude**2
    assert measured == pytest.approx(expected, rel=1e-3)


def test_values_beyond_float16_meet_its_largest():
    weight = torch.tensor([[1e6, -1e6, 1.0, 0.0]])
    tensor = quantize_palette(weight, bits=2, group_size=1, scale_dtype="float16")
    assert dequantize(tensor).tolist() == [[65504.0, -65504.0, 1.0, 0.0]]


def test_columns_without_importance():
    """They move no entry, all of them without importance are all alike, and still every weight gets a near entry."""
    weight = torch.tensor([[-9.0, 1.0, 2.0, 3.0, 9.0]])
    tensor = quantize_palette(
        weight, bits=1, group_size=1, scale_dtype="float32", importance=torch.tensor([0.0, 1, 1, 1, 0])
    )
    assert tensor.palette.tolist() in ([[1.5, 3.0]], [[1.0, 2.5]])
    assert tensor.codes[0, 0] == 0
    assert tensor.codes[0, -1] == 1
    none = quantize_palette(weight, bits=1, group_size=1, scale_dtype="float32", importance=torch.zeros(5))
    assert torch.equal(none.palette, quantize_palette(weight, bits=1, group_size=1, scale_dtype="float32").palette)


def test_same_input_same_codes_and_the_weight_stays():
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    first, second = (quantize_palette(weight, bits=4, group_size=3, scale_dtype="float16") for _ in range(2))
    assert digest(first) == digest(second)
    assert torch.equal(weight, before)


def test_other_channel_axis():
    weight = torch.randn(5, 6, 2, generator=torch.Generator().manual_seed(0))
    moved = quantize_palette(weight.transpose(0, 1).contiguous(), bits=2, group_size=3, scale_dtype="float32")
    tensor = quantize_palette(weight, bits=2, group_size=3, axis=1, scale_dtype="float32")
    assert torch.equal(tensor.palette, moved.palette)
    assert torch.equal(dequantize(tensor), dequantize(moved).transpose(0, 1))


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(BadInputError, match="30522 channels can't share palettes by 16"):
        quantize_palette(torch.zeros(30522, 2), bits=4, group_size=16, scale_dtype="float16")


def test_half_way_takes_the_lower_entry():
    palette = torch.tensor([[0.0, 1.0, 1.0, 2.0]])
    above = float(np.nextafter(np.float32(0.5), np.float32(1)))
    nearest = nearest_entries(torch.tensor([[-1.0, 0.5, above, 1.0, 1.5, 3.0]]), palette)
    assert palette.gather(1, nearest.long()).tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0, 2.0]]

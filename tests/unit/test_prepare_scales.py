"""SmoothQuant and AWQ against slow implementations of their formulas, and their bounds."""

import numpy as np
import pytest
import torch

from edgeport.compress.prepare.awq import ALPHAS, awq_scale, scaled_error
from edgeport.compress.prepare.smooth import smooth_scale
from edgeport.compress.quantize.grid import Grid
from edgeport.errors import BadInputError


def problem(seed: int, columns: int = 32, tokens: int = 200) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Two weights and inputs with a few channels that are far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(size, columns, generator=generator) for size in (24, 12)]
    inputs = torch.randn(tokens, columns, generator=generator)
    inputs[:, :3] *= torch.tensor([30.0, 10.0, 20.0])
    return weights, inputs


def moments(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs.T @ inputs / len(inputs), inputs.abs().mean(0)


def slow_rounding(row: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Symmetric rounding to the nearest code, group by group, one scale for the largest weight."""
    highest = 2 ** (bits - 1) - 1
    out = np.zeros_like(row)
    for start in range(0, len(row), group):
        part = row[start : start + group]
        step = np.float32(np.abs(part).max() / highest)
        out[start : start + group] = np.clip(np.round(part / step), -highest - 1, highest) * step
    return out


def slow_awq(
    weights: list[torch.Tensor], inputs: torch.Tensor, bits: int, group: int
) -> tuple[np.ndarray, list[float]]:
    """Section 3.2 of the paper on the data itself: try each alpha, measure the outputs of each Linear."""
    x = inputs.numpy().astype(np.float64)
    mean = np.abs(x).mean(0)
    tried = []
    for step in range(20):
        s = np.maximum((mean / mean.mean()) ** (step / 20), 1e-4)
        s = s / np.sqrt(s.max() * s.min())
        loss = 0.0
        for weight in weights:
            w = weight.numpy().astype(np.float64)
            rounded = np.stack([slow_rounding((row * s).astype(np.float32), bits, group) for row in w]) / s
            loss += float(((x @ w.T - x @ rounded.T) ** 2).sum()) / len(x)
        tried.append((loss, s))
    losses = [loss for loss, _ in tried]
    return tried[int(np.argmin(losses))][1], losses


@pytest.mark.parametrize(("bits", "group", "seed"), [(4, 16, 0), (3, 8, 1), (4, 32, 2)])
def test_awq_is_the_papers_search_on_the_data(bits, group, seed):
    weights, inputs = problem(seed)
    expected, losses = slow_awq(weights, inputs, bits, group)
    found = awq_scale(weights, *moments(inputs), Grid(bits, group), scale_search=False, weighted=False)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
    at_best = scaled_error(weights, moments(inputs)[0], found, Grid(bits, group), scale_search=False, weighted=False)
    assert at_best == pytest.approx(min(losses), rel=1e-3)
    assert min(losses) < 0.8 * losses[0]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "grid", [Grid(4, 16), Grid(3, 8), Grid(4, 16, symmetric=False), Grid(8), Grid(4, 32, True, "float16")]
)
@pytest.mark.parametrize("weighted", [True, False])
def test_awq_is_never_worse_than_no_scale(seed, grid, weighted):
    weights, inputs = problem(seed)
    second_moment, mean_abs = moments(inputs)
    scale = awq_scale(weights, second_moment, mean_abs, grid, weighted=weighted)
    error = scaled_error(weights, second_moment, scale, grid, weighted=weighted)
    assert error <= scaled_error(weights, second_moment, torch.ones(32), grid, weighted=weighted)


def test_awq_lowers_the_error_where_activations_have_outliers():
    weights, inputs = problem(0)
    second_moment, mean_abs = moments(inputs)
    grid = Grid(4, 16)
    scale = awq_scale(weights, second_moment, mean_abs, grid)
    assert scaled_error(weights, second_moment, scale, grid) < 0.9 * scaled_error(
        weights, second_moment, torch.ones(32), grid
    )


@pytest.mark.parametrize("seed", range(12))
def test_alpha_chosen_on_a_few_rows_is_still_never_worse(seed):
    """With 3 bits and one sampled row the choice is often bad for the others: it must then be dropped."""
    weights, inputs = problem(seed)
    inputs[:, :3] /= torch.tensor([30.0, 10.0, 20.0])  # without outliers there is little to win
    second_moment, mean_abs = moments(inputs)
    grid = Grid(3, 16)
    unscaled = scaled_error(weights, second_moment, torch.ones(32), grid)
    few = awq_scale(weights, second_moment, mean_abs, grid, rows=1)
    every = awq_scale(weights, second_moment, mean_abs, grid)
    assert scaled_error(weights, second_moment, every, grid) <= scaled_error(weights, second_moment, few, grid)
    assert scaled_error(weights, second_moment, few, grid) <= unscaled
    assert torch.equal(awq_scale(weights, second_moment, mean_abs, grid, rows=24), every)


def test_awq_of_even_activations_is_no_scale():
    weights, _ = problem(0)
    scale = awq_scale(weights, torch.eye(32), torch.ones(32), Grid(4, 16))
    assert torch.equal(scale, torch.ones(32))


def test_sums_serve_as_well_as_means():
    weights, inputs = problem(3)
    second_moment, mean_abs = moments(inputs)
    of_means = awq_scale(weights, second_moment, mean_abs, Grid(4, 16))
    of_sums = awq_scale(weights, 256 * second_moment, 256 * mean_abs, Grid(4, 16))
    torch.testing.assert_close(of_sums, of_means)


def test_columns_that_read_one_channel_get_one_factor():
    weights, inputs = problem(1)
    columns = torch.arange(16).reshape(2, 1, 8).expand(-1, 2, -1).reshape(-1)
    second_moment, mean_abs = moments(inputs)
    scale = awq_scale(weights, second_moment, mean_abs, Grid(4, 16), columns=columns)
    assert scale.shape == (16,)
    error = scaled_error(weights, second_moment, scale[columns], Grid(4, 16))
    assert error <= scaled_error(weights, second_moment, torch.ones(32), Grid(4, 16))
    shared = torch.stack([mean_abs[:8], mean_abs[8:16]]).mean(0)  # alpha is at most .95: the order stays
    assert (scale[:8].argsort() == shared.argsort()).all() or torch.equal(scale, torch.ones(16))


def test_a_dead_channel_and_an_all_dead_input_give_finite_factors():
    weights, inputs = problem(2)
    inputs[:, 5] = 0
    for values in (inputs, torch.zeros_like(inputs)):
        scale = awq_scale(weights, *moments(values), Grid(4, 16))
        assert bool((torch.isfinite(scale) & (scale > 0)).all())
        assert bool((smooth_scale(weights, values.abs().amax(0)) > 0).all())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_smooth_is_the_papers_formula(alpha):
    weights, inputs = problem(4)
    found = smooth_scale(weights, inputs.abs().amax(0), alpha)
    for j in range(32):
        largest_input = max(abs(float(row[j])) for row in inputs)
        largest_weight = max(abs(float(row[j])) for weight in weights for row in weight)
        assert float(found[j]) == pytest.approx(largest_input**alpha / largest_weight ** (1 - alpha), rel=1e-5)


def test_smooth_half_gives_inputs_and_weights_the_same_range():
    """The paper's point of alpha = 0.5: max|x_j / s_j| == max|s_j W_j| for every channel."""
    weights, inputs = problem(5)
    scale = smooth_scale(weights, inputs.abs().amax(0), 0.5)
    weight_range = torch.cat(weights).abs().amax(0) * scale
    torch.testing.assert_close((inputs / scale).abs().amax(0), weight_range)


def test_smooth_of_shared_channels_takes_the_largest():
    weights = [torch.tensor([[1.0, -4.0], [2.0, 3.0]])]
    found = smooth_scale(weights, torch.tensor([9.0, 1.0]), 0.5, columns=torch.tensor([0, 0]))
    assert found.tolist() == pytest.approx([(9 / 4) ** 0.5])


def test_statistics_that_do_not_fit_or_are_not_finite_are_one_clear_error():
    weights, inputs = problem(0)
    second_moment, mean_abs = moments(inputs)
    with pytest.raises(BadInputError, match="NaN or infinite"):
        awq_scale(weights, second_moment, mean_abs * float("nan"), Grid(4, 16))
    with pytest.raises(BadInputError, match="second moment of the input is NaN"):
        awq_scale(weights, second_moment * float("inf"), mean_abs, Grid(4, 16))
    with pytest.raises(BadInputError, match=r"shape \(31,\).*\[32\] columns"):
        smooth_scale(weights, mean_abs[:31])


def test_the_alphas_are_the_papers():
    assert len(ALPHAS) == 20
    assert (ALPHAS[0], ALPHAS[-1]) == (0.0, 0.95)

"""The logical form of statically quantized activations: grids that were chosen before the model runs.

A grid is affine in int8, `value = scale * (code - zero_point)` (Jacob et al. 2018, https://arxiv.org/abs/1712.05877,
eq. 1), one for a whole tensor. Backends whose kernels want uint8 add 128 to the codes and to the zero point, which
changes no value. 0 is always a value of the grid, so padding with zeros costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LOWEST, HIGHEST = -128, 127
LEVELS = HIGHEST - LOWEST
LEAST_SCALE = 2.0**-60
"""Far below what any activation needs, and far enough above 0 to be multiplied by the scale of a weight."""


@dataclass(frozen=True)
class ActivationGrid:
    """One tensor's int8 grid.

    Attributes:
        scale: a float32 number, greater than 0.
        zero_point: the code of 0, -128 to 127.
    """

    scale: float
    zero_point: int

    @property
    def low(self) -> float:
        """The least value."""
        return self.scale * (LOWEST - self.zero_point)

    @property
    def high(self) -> float:
        """The greatest value."""
        return self.scale * (HIGHEST - self.zero_point)

    def within(self, low: float, high: float) -> bool:
        """Clamping its values to these bounds changes none of them by more than rounding in float32 does."""
        slack = self.scale * LEVELS * 2.0**-20
        return low - slack <= self.low and self.high <= high + slack


@dataclass(frozen=True)
class LayerRange:
    """The grids of one statically quantized layer.

    Attributes:
        input: what the layer reads is rounded to it.
        output: what the layer gives is rounded to it, before anything else reads it; None where it stays float.
    """

    input: ActivationGrid
    output: ActivationGrid | None = None


def grid_of(low: float, high: float) -> ActivationGrid:
    """The grid over the values from `low` to `high`, widened to hold 0.

    Args:
        low, high: finite.
    """
    import torch

    low, high = min(low, 0.0), max(high, 0.0)
    exact = max((high - low) / LEVELS, LEAST_SCALE)
    scale = float(torch.tensor(exact, dtype=torch.float32))
    zero_point = min(max(round(LOWEST - low / scale), LOWEST), HIGHEST)
    return ActivationGrid(scale, zero_point)


def fake_quantize(value: torch.Tensor, grid: ActivationGrid) -> torch.Tensor:
    """Round to the grid's nearest values, ties to even codes. Any shape; float32 in, float32 out."""
    import torch

    codes = torch.round(value / grid.scale) + grid.zero_point
    return (torch.clamp(codes, LOWEST, HIGHEST) - grid.zero_point) * grid.scale


Round = Callable[["torch.Tensor", ActivationGrid], "torch.Tensor"]


def round_layers(module: torch.nn.Module, ranges: Mapping[str, LayerRange], rounding: Round = fake_quantize) -> None:
    """Make layers round what they read and give, in place. With the default this is the torch form of the model.

    Args:
        module: a copy: the caller's own.
        ranges: by the name of each layer's weight.
        rounding: what rounds a tensor to a grid. Exporters put their backend's own operators here.
    """
    for name, found in ranges.items():
        layer = module.get_submodule(name.rpartition(".")[0])
        layer.register_forward_pre_hook(_before(found.input, rounding))
        if found.output is not None:
            layer.register_forward_hook(_after(found.output, rounding))


def _before(grid: ActivationGrid, rounding: Round) -> Any:
    def hook(_layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounding(inputs[0], grid), *inputs[1:])

    return hook


def _after(grid: ActivationGrid, rounding: Round) -> Any:
    def hook(_layer: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return rounding(output, grid)

    return hook


LARGEST_BIAS = 2**30
"""Integer kernels hold a bias as int32, in steps of the input's scale times the weight's; half of it is room to sum."""


def least_weight_scale(bias: torch.Tensor, grid: ActivationGrid) -> torch.Tensor:
    """The smallest scales of a weight's channels beside which int32 can hold the bias.

    Channels that training has switched off have next to no weights and scales, and a bias all the same.

    Args:
        bias: (N,).
        grid: of the layer's input.

    Returns:
        (N,) float32.
    """
    return (bias.abs() / (grid.scale * LARGEST_BIAS)).float()

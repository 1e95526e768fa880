"""A weight that is trained through its rounding: straight-through codes, learned scales.

The forward computes with `scale * round(clamp(master, lowest, highest))`. Backwards rounding counts as the identity
and what the clamp cuts off gets no gradient (Bengio et al. 2013, https://arxiv.org/abs/1308.3432). Scales are
learned as in LSQ (Esser et al. 2020, https://arxiv.org/abs/1902.08153), with one difference: masters are kept in
steps of the present scale, so that a scale that moves takes its weights along and changes no code. Its gradient is
then the code itself, not the rounding error of eq. 3 there: that one is 0 for a weight that begins at its code, and
flips codes which an earlier method chose together. One learning rate in steps fits weights of every size. Scales
too are rounded in the forward, to what their type holds.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from edgeport.compress.quantize.grid import Grid, stored_scales
from edgeport.quantized import QuantizedTensor, as_matrix, code_range, from_matrix

SPREAD = 0.45
"""How far from its code, in steps, a master may begin; below 0.5, so that it rounds to that code.

Were all of them in the middle, the optimizer's steps of equal size would bring them to the edges of their bins at the
same time: on a small BERT at 2 bits the loss doubled there, and ended at 0.44 instead of 0.25 of 0.85.
"""


def straight_through(value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Exactly `value` forwards, the identity of `gradient` backwards. Finite, equal shapes."""
    return value.detach() + (gradient - gradient.detach())


class TrainedWeight:
    """The state of one weight on an integer grid; its zero points stay.

    Attributes:
        master: (N, G, g) float32, in steps of the scale, without the zero point.
        log_ratio: (N, G, 1) float32, log of the scale relative to the first one. It keeps the scale's sign.
    """

    def __init__(self, start: QuantizedTensor, inside: torch.Generator | torch.Tensor) -> None:
        """Begin at the codes and scales of an integer form.

        Args:
            inside: where in their bins the masters begin: drawn, or as near to this float weight as `SPREAD` allows.
        """
        symmetric = start.zero_point is None
        lowest, highest = code_range(start.bits, symmetric=symmetric)
        self.start = start
        self.grid = Grid(start.bits, start.group_size, symmetric, start.scale_dtype)
        self.first = start.scale.unsqueeze(-1)
        self.zero = torch.zeros(()) if start.zero_point is None else start.zero_point.float().unsqueeze(-1)
        self.low, self.high = lowest - self.zero, highest - self.zero
        codes = as_matrix(start.codes, start.axis).to(torch.float32).reshape(start.rows, -1, start.group_size)
        steps = codes - self.zero
        if isinstance(inside, torch.Tensor):
            exact = as_matrix(inside.detach().to(torch.float32), start.axis).reshape(codes.shape) / self.first
            offset = torch.clamp(exact - steps, -SPREAD, SPREAD)
        else:
            offset = torch.rand(codes.shape, generator=inside).mul_(2 * SPREAD).sub_(SPREAD)
        self.master = torch.nn.Parameter(torch.clamp(steps + offset, self.low, self.high))
        self.log_ratio = torch.nn.Parameter(torch.zeros_like(self.first))

    def _scale(self) -> torch.Tensor:
        scale = self.first * self.log_ratio.exp()
        return straight_through(stored_scales(scale.detach(), self.grid), scale)

    def _steps(self) -> torch.Tensor:
        """code - zero_point, float, (N, G, g)."""
        inside = torch.clamp(self.master, self.low, self.high)
        return straight_through(inside.detach().round(), inside)

    def value(self) -> torch.Tensor:
        """The dequantised weight in its own shape, differentiable by master and log_ratio."""
        matrix = (self._steps() * self._scale()).reshape(self.start.rows, -1)
        return from_matrix(matrix, self.start.codes.shape, self.start.axis)

    @torch.no_grad()
    def tensor(self) -> QuantizedTensor:
        """What would be stored: `value` is exactly what it stands for."""
        codes = (self._steps() + self.zero).to(torch.int8).reshape(self.start.rows, -1)
        return replace(
            self.start,
            codes=from_matrix(codes, self.start.codes.shape, self.start.axis),
            scale=self._scale().squeeze(-1),
        )

    @torch.no_grad()
    def stay_on_grid(self) -> None:
        """Bring masters that a step took beyond the grid back to its edge, where they get gradients again."""
        self.master.copy_(torch.clamp(self.master, self.low, self.high))

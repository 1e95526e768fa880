"""Coordinate descent on a quantized weight: scales and codes in turn, so that the layer's output changes less.

The error tr(D H D^T), D = Q - W, is a quadratic in each row. With the codes fixed the best scales of a row solve
a small linear system; with the scales fixed the best code of one column, all others given, is the nearest to

    w_j - (sum over i != j of d_i H_ij) / H_jj

(coordinate descent as in CDQuant, https://arxiv.org/abs/2406.17542). A row keeps a change only when its error
fell, so the objective never increases, scale rounding included.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from edgeport.compress.quantize.gptq import Round
from edgeport.quantized import QuantizedTensor, as_matrix, code_range, dequantize, from_matrix, round_scale

BLOCK = 128
"""Columns between two updates of everything behind them, as in `gptq.py`."""


def _row_errors(change: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """d H d^T of each row. change (N, K), second (K, K) -> (N,)."""
    return (change @ second).mul_(change).sum(1)


def _steps(tensor: QuantizedTensor) -> torch.Tensor:
    """code - zero_point of each weight, (N, K) float32."""
    steps = as_matrix(tensor.codes, tensor.axis).to(torch.float32)
    if tensor.zero_point is not None:
        steps = steps - tensor.zero_point.to(torch.float32).repeat_interleave(tensor.group_size, 1)
    return steps


def _better_scales(tensor: QuantizedTensor, target: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The least-squares scales of every row for its codes, (N, G).

    target (N, K) is the float weight. For a row with steps c: minimise |sum_g s_g c_g - w|_H over s.
    """
    steps = _steps(tensor)
    rows, columns = steps.shape
    groups = columns // tensor.group_size
    right = (steps * (target @ second)).reshape(rows, groups, -1).sum(-1)
    system = torch.empty(rows, groups, groups)
    for group in range(groups):
        part = slice(group * tensor.group_size, (group + 1) * tensor.group_size)
        system[:, group] = (steps[:, part] @ second[part]).mul_(steps).reshape(rows, groups, -1).sum(-1)
    # A little towards the scales at hand, where the data leaves them open.
    ridge = system.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-30) * 1e-6
    system += ridge[:, None, None] * torch.eye(groups)
    solved = torch.linalg.solve(system, right + ridge[:, None] * tensor.scale)
    usable = torch.isfinite(solved) & (solved * tensor.scale > 0)
    return round_scale(torch.where(usable, solved, tensor.scale), tensor.scale_dtype).contiguous()


def swept_codes(
    codes: torch.Tensor, change: torch.Tensor, target: torch.Tensor, second: torch.Tensor, rounded: Round
) -> torch.Tensor:
    """One sweep over the columns: each to its best code with all others as they are now. (N, K) float32.

    Args:
        codes, change: those at hand, and what they stand for minus the float weight.
        target: the float weight, (N, K).
        rounded: the nearest codes of a column's values.
    """
    codes, change = codes.clone(), change.clone()
    gradient = change @ second
    diagonal = second.diagonal()
    for start in range(0, codes.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, codes.shape[1]))
        near, moves = gradient[:, block].clone(), torch.zeros_like(gradient[:, block])
        for offset, column in enumerate(range(block.start, block.stop)):
            if diagonal[column] <= 0:
                continue
            wanted = target[:, column] + change[:, column] - near[:, offset] / diagonal[column]
            codes[:, column], value = rounded(column, wanted)
            moves[:, offset] = value - target[:, column] - change[:, column]
            change[:, column] += moves[:, offset]
            near += torch.outer(moves[:, offset], second[column, block])
        gradient += moves @ second[block]
    return codes


def _better_codes(tensor: QuantizedTensor, target: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """One sweep over an integer form. (N, K) float32."""
    lowest, highest = code_range(tensor.bits, symmetric=tensor.zero_point is None)
    size, scale = tensor.group_size, tensor.scale
    shifts = torch.zeros_like(scale) if tensor.zero_point is None else tensor.zero_point.float()

    def rounded(column: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        step, shift = scale[:, column // size], shifts[:, column // size]
        codes = torch.clamp(torch.round(values / step) + shift, lowest, highest)
        return codes, (codes - shift) * step

    codes = as_matrix(tensor.codes, tensor.axis).to(torch.float32)
    change = as_matrix(dequantize(tensor), tensor.axis) - target
    return swept_codes(codes, change, target, second, rounded)


def damped_second(second: torch.Tensor) -> torch.Tensor:
    """Damped a little, so that directions which calibration never saw are not free. (K, K)."""
    return second + torch.diag(torch.full((second.shape[0],), 1e-3 * float(second.diagonal().mean())))


def refine(tensor: QuantizedTensor, weight: torch.Tensor, second: torch.Tensor, *, rounds: int = 2) -> QuantizedTensor:
    """The same weight with scales and codes that change the layer's output less.

    Args:
        tensor: an integer form (no palette).
        weight: the float weight, in its own shape.
        second: (K, K) float32, the sum of x x^T over the layer's inputs.
        rounds: sweeps over scales and codes.

    Returns:
        A weight whose error tr(D H D^T) is no larger, in any row.
    """
    target = as_matrix(weight.detach().to(torch.float32), tensor.axis)
    second = damped_second(second)
    error = _row_errors(as_matrix(dequantize(tensor), tensor.axis) - target, second)

    def keep(trial: QuantizedTensor) -> None:
        nonlocal tensor, error
        trial_error = _row_errors(as_matrix(dequantize(trial), tensor.axis) - target, second)
        better = (trial_error < error).unsqueeze(1)
        codes = torch.where(better, as_matrix(trial.codes, tensor.axis), as_matrix(tensor.codes, tensor.axis))
        tensor = replace(
            tensor,
            scale=torch.where(better, trial.scale, tensor.scale),
            codes=from_matrix(codes, tensor.codes.shape, tensor.axis),
        )
        error = torch.minimum(error, trial_error)

    for _ in range(rounds):
        keep(replace(tensor, scale=_better_scales(tensor, target, second)))
        codes = _better_codes(tensor, target, second).to(torch.int8)
        keep(replace(tensor, codes=from_matrix(codes, tensor.codes.shape, tensor.axis)))
    return tensor

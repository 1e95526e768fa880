"""QERA: give back what quantizing a weight took, as far as a product of two thin matrices can.

Zhang et al. 2024 (https://arxiv.org/abs/2410.06040; the exact form). The layer computes x Q^T + (x A^T) B^T, where B A
is the matrix of rank r that is nearest to R = W - Q in the layer's output. With H = S S^T the second moment of its
inputs, |D S|^2 = tr(D H D^T) is that distance; so with the singular value decomposition R S = U Z V^T

    B = U_r Z_r,    A = V_r^T S^-1

A comes out as numbers of variance 1, the error of rounding B counts alike in all its columns, and each row of A has a
scale of its own: both are stored in 8 bits, one scale a row. B is computed anew for the A that is stored,
B = R H A^T (A H A^T)^-1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from edgeport.compress.assign import Assignment
from edgeport.compress.chain import call, find_chains
from edgeport.compress.journal import Note
from edgeport.compress.quantize.rtn import quantize_rtn
from edgeport.compress.sequential import capture, hand_on
from edgeport.compress.statistics import Moments, observed, output_error
from edgeport.model.corrected import add_correction, factor_names
from edgeport.model.types import Model
from edgeport.quantized import QuantizedTensor, dequantize

DAMPING = 1e-4
"""Added to the diagonal of the second moment, relative to its mean: directions that calibration never saw."""


@dataclass(frozen=True)
class Correction:
    """The side branch of one layer.

    Attributes:
        down, up: A and B as stored.
        exact: A and B in float, as they were before rounding.
        output_error: relative error of the layer's output with the correction.
    """

    down: QuantizedTensor
    up: QuantizedTensor
    exact: tuple[torch.Tensor, torch.Tensor]
    output_error: float


def damped(second: torch.Tensor) -> torch.Tensor:
    """H in float64, positive definite. (K, K)."""
    mean = float(second.diagonal().mean())
    return second.to(torch.float64) + torch.eye(len(second), dtype=torch.float64) * (DAMPING * mean or 1.0)


def low_rank_factors(residual: torch.Tensor, second: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, K) and B (N, rank), float64, with B A nearest to the residual in the layer's output.

    Args:
        residual: R, (N, K).
        second: (K, K), positive definite.
        rank: at most min(N, K).
    """
    factor = torch.linalg.cholesky(second.to(torch.float64))
    left, size, right = torch.linalg.svd(residual.to(torch.float64) @ factor, full_matrices=False)
    down = torch.linalg.solve_triangular(factor, right[:rank], upper=False, left=False)
    return down, left[:, :rank] * size[:rank]


def make_correction(
    weight: torch.Tensor, tensor: QuantizedTensor, second: torch.Tensor, down: Assignment, up: Assignment
) -> Correction:
    """The side branch of a weight (N, K) that became `tensor`.

    Args:
        second: (K, K) float32, sum or mean of x x^T over the layer's inputs.
        down, up: what its matrices become.
    """
    moment = damped(second)
    original = weight.detach().to(torch.float64)
    residual = original - dequantize(tensor).to(torch.float64)
    exact_down, _ = low_rank_factors(residual, moment, down.shape[0])
    stored_down = quantize_rtn(exact_down, down.grid)
    matrix = dequantize(stored_down).to(torch.float64)
    seen = matrix @ moment
    # Rows of A that rounding made alike leave the system singular: the pseudoinverse takes the smallest B.
    exact_up = residual @ seen.T @ torch.linalg.pinv(seen @ matrix.T, hermitian=True)
    stored_up = quantize_rtn(exact_up, up.grid)
    left = residual - dequantize(stored_up).to(torch.float64) @ matrix
    energy = output_error(original.clone(), moment)
    relative = (max(output_error(left, moment), 0.0) / energy) ** 0.5 if energy > 0 else 0.0
    return Correction(stored_down, stored_up, (exact_down.float(), exact_up.float()), relative)


class _Pass:
    """One pass over a copy of the quantized module, whose layers get their side branches on the way."""

    def __init__(self, model: Model, original: torch.nn.Module, assignments: Sequence[Assignment]) -> None:
        self.module = copy.deepcopy(model.module)
        self.original = original
        self.model = model
        by_name = {item.name: item for item in assignments}
        added = [item.corrects for item in assignments if item.corrects in model.quantized]
        self.open = {
            weight: tuple(by_name[name] for name in factor_names(weight)) for weight in dict.fromkeys(added) if weight
        }
        self.done: dict[str, Correction] = {}

    def layers(self, prefix: str) -> dict[str, torch.nn.Module]:
        """The layers below a prefix that are still to be corrected, by the weight's name."""
        return {
            name: self.module.get_submodule(name.removesuffix(".weight"))
            for name in self.open
            if name.startswith(prefix)
        }

    def correct(self, moments: Mapping[str, Moments]) -> None:
        """Give every layer that was observed its branch."""
        for name, found in moments.items():
            down, up = self.open.pop(name)
            weight = self.original.get_parameter(name)
            made = make_correction(weight, self.model.quantized[name], found.second / found.count, down, up)
            layer = add_correction(self.module, name.removesuffix(".weight"), down.shape[0])
            layer.correction_down.weight.copy_(dequantize(made.down))
            layer.correction_up.weight.copy_(dequantize(made.up))
            self.done[name] = made


@torch.no_grad()
def correct(
    model: Model,
    original: torch.nn.Module,
    assignments: Sequence[Assignment],
    inputs: Sequence[Mapping[str, torch.Tensor]],
) -> tuple[Model, dict[str, Note], dict[str, torch.Tensor]]:
    """A quantized model with side branches, block by block: each sees what the corrected blocks before it make.

    Args:
        model: the module is not changed.
        original: the float module that it was made of.
        assignments: those with `corrects` say which weights get a branch and what its matrices become.
        inputs: calibration samples, as the module takes them, batch 1.

    Returns:
        The model; for each added matrix a note; and its float value before it was rounded.
    """
    run = _Pass(model, original, assignments)
    for chain in find_chains(run.module, inputs[0]):
        calls = capture(run.module, run.module.get_submodule(chain[0]), inputs)
        for name in chain:
            block = run.module.get_submodule(name)
            with observed(run.layers(f"{name}.")) as moments:
                for one in calls:
                    block(*one.arguments, **one.named)
            run.correct(moments)
            hand_on(block, calls)
    with observed(run.layers("")) as moments:
        for sample in inputs if run.open else ():
            call(run.module, sample)
    run.correct(moments)

    quantized, activations = dict(model.quantized), dict(model.activations)
    notes: dict[str, Note] = {}
    floats: dict[str, torch.Tensor] = {}
    for weight, made in run.done.items():
        for name, tensor, exact in zip(factor_names(weight), (made.down, made.up), made.exact, strict=True):
            quantized[name], floats[name] = tensor, exact
            notes[name] = Note("qera", made.output_error)
            activations[name] = model.activations[weight]
    return replace(model, module=run.module, quantized=quantized, activations=activations), notes, floats

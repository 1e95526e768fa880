"""Zeros in the weights of Linear layers: by magnitude, Wanda, or SparseGPT.

Scores, of which the smallest go:
    magnitude   |W_ij|, over the whole matrix
    Wanda       |W_ij| ||X_j||_2, over each row (https://arxiv.org/abs/2306.11695, section 3)
    SparseGPT   (W_ij / U_jj)^2, over all rows of 128 columns, with U the upper Cholesky factor of H^-1; what a zero
                loses is made up for by the columns behind it (https://arxiv.org/abs/2301.00774, sections 3.2 and 3.3)
With a pattern N:M each of them keeps N of every M neighbours in a row.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from edgeport.compress.lowrank.svd import relative_output_error
from edgeport.compress.statistics import Moments
from edgeport.compress.walk import Inputs, block_layers, walk
from edgeport.errors import BadInputError
from edgeport.model.types import Model
from edgeport.restructuring import Sparsify

BLOCK = 128
"""Columns whose zeros SparseGPT chooses at once."""


def zeros_in(count: int, sparsity: float) -> int:
    """How many of `count` weights become zero."""
    return int(count * sparsity + 1e-9)


def smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of the `count` smallest scores of each row, (..., columns); of equal ones the first."""
    order = torch.sort(scores, dim=-1, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def mask_by_score(scores: torch.Tensor, step: Sparsify) -> torch.Tensor:
    """Which weights become zero, (N, K): by the step's pattern, else of each row; of the whole matrix for magnitude."""
    if step.kept_of is not None:
        kept, group = step.kept_of
        return smallest(scores.reshape(len(scores), -1, group), group - kept).flatten(1)
    assert step.sparsity is not None
    if step.method == "magnitude":
        return smallest(scores.reshape(1, -1), zeros_in(scores.numel(), step.sparsity)).reshape(scores.shape)
    return smallest(scores, zeros_in(scores.shape[1], step.sparsity))


def sparsegpt(weight: torch.Tensor, second: torch.Tensor, step: Sparsify) -> torch.Tensor:
    """The weight (N, K) with zeros, the others changed to make up for them.

    Args:
        second: H, (K, K), the mean of x x^T.
    """
    values, hessian = weight.to(torch.float32).clone(), second.to(torch.float32).clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    values[:, dead] = 0
    hessian.diagonal().add_(step.damping * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    columns = values.shape[1]
    group = 1 if step.kept_of is None else step.kept_of[1]
    size = max(BLOCK // group, 1) * group
    for start in range(0, columns, size):
        end = min(start + size, columns)
        block, inside = values[:, start:end], upper[start:end, start:end]
        chosen = torch.zeros_like(block, dtype=torch.bool)
        if step.sparsity is not None:
            scores = (block / inside.diagonal()).square().reshape(1, -1)
            chosen = smallest(scores, zeros_in(block.numel(), step.sparsity)).reshape(block.shape)
        errors = torch.zeros_like(block)
        for column in range(end - start):
            if step.kept_of is not None and column % group == 0:
                near = slice(column, column + group)
                scores = (block[:, near] / inside.diagonal()[near]).square()
                chosen[:, near] = smallest(scores, group - step.kept_of[0])
            zero = chosen[:, column]
            errors[:, column] = torch.where(zero, block[:, column], 0.0) / inside[column, column]
            block[:, column + 1 :] -= errors[:, column : column + 1] * inside[column, column + 1 :]
            block[:, column] = torch.where(zero, 0.0, block[:, column])
        values[:, end:] -= errors @ upper[start:end, end:]
    return values


def sparsified(weight: torch.Tensor, moments: Moments | None, step: Sparsify) -> torch.Tensor:
    """One weight (N, K) with zeros.

    Args:
        moments: of the layer's inputs; None for magnitude.
    """
    if step.method == "magnitude" or moments is None:
        return weight.masked_fill(mask_by_score(weight.abs(), step), 0.0)
    second = moments.second / moments.count
    if step.method == "wanda":
        return weight.masked_fill(mask_by_score(weight.abs() * second.diagonal().sqrt(), step), 0.0)
    return sparsegpt(weight, second, step)


def sparse_bytes(places: int, numbers: int, width: int = 4) -> int:
    """Bytes of a sparse weight: its numbers, `width` bytes each, and a bit a place."""
    return width * numbers + (places + 7) // 8


def numbers_left(shape: tuple[int, ...], step: Sparsify) -> int:
    """Numbers of a weight (N, K) that are not zero."""
    rows, columns = shape
    if step.kept_of is not None:
        kept, group = step.kept_of
        return rows * columns // group * kept
    assert step.sparsity is not None
    if step.method == "magnitude":
        return rows * columns - zeros_in(rows * columns, step.sparsity)
    if step.method == "wanda":
        return rows * (columns - zeros_in(columns, step.sparsity))
    sizes = [min(BLOCK, columns - start) for start in range(0, columns, BLOCK)]
    return sum(rows * size - zeros_in(rows * size, step.sparsity) for size in sizes)


def sparse_layers(model: Model, step: Sparsify) -> dict[str, int]:
    """How many numbers are left of each weight that gets zeros, by layer.

    Raises:
        BadInputError: no layer can, or a row can't be cut into the pattern's groups.
    """
    found = {}
    for name in block_layers(model, step.exclude, step.method):
        rows, columns = model.module.get_submodule(name).get_parameter("weight").shape
        if step.kept_of is not None and columns % step.kept_of[1]:
            raise BadInputError(
                f"Rows of {columns} weights can't be cut into groups of {step.kept_of[1]}.",
                where=f"layer {name}",
                allowed=f"a group size that divides {columns}",
                next_step="Choose another pattern, or name the layer in `exclude`.",
            )
        found[name] = numbers_left((rows, columns), step)
    return found


@torch.no_grad()
def sparsify_layers(model: Model, step: Sparsify, inputs: Inputs) -> tuple[Model, dict[str, float]]:
    """The model with zeros, each layer on the inputs that the sparse ones before it make; and the relative error of
    each one's output on them (of the weight itself for magnitude, which sees no inputs).

    Raises:
        BadInputError: see `sparse_layers`.
    """
    left = sparse_layers(model, step)
    module = copy.deepcopy(model.module)
    errors: dict[str, float] = {}

    def visit(name: str, moments: Moments | None) -> None:
        weight = module.get_submodule(name).get_parameter("weight")
        before = weight.detach().clone()
        weight.copy_(sparsified(before, moments, step))
        if moments is None:
            errors[name] = float((weight - before).norm() / before.norm().clamp_min(1e-30))
        else:
            errors[name] = relative_output_error(before, weight.detach(), moments)

    if step.method == "magnitude":
        for name in left:
            visit(name, None)
    else:
        walk(module, list(left), inputs, visit)
    counts = {f"{name}.weight": count for name, count in left.items()}
    return replace(model, module=module, sparse=counts), errors

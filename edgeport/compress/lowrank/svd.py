"""Low rank: W (N, K) becomes B A with B (N, r) and A (r, K), for the least error on the layer's inputs.

SVD-LLM (https://arxiv.org/abs/2403.07378, section 3.1): with S S^T = E[x x^T] the error of the outputs is that of
W S, so with W S = U Sigma V^T the best B A of rank r is U_r Sigma_r V_r^T S^-1, and what it loses,
||(W - B A) S||, is the root of the sum of the squared singular values left out. Sigma goes to both sides by its root.
ASVD (https://arxiv.org/abs/2312.05821, section 3.2) scales by mean |x|^alpha instead of S. The decomposition is exact:
a randomised one loses far more.

The rank that keeps a share rho of the numbers is rho N K / (N + K).
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from edgeport.compress.statistics import Moments, output_error
from edgeport.compress.walk import Inputs, block_layers, walk
from edgeport.errors import BadInputError
from edgeport.model.factored import add_factors
from edgeport.model.types import Model
from edgeport.restructuring import LowRank

DAMPING = 1e-6
"""Added to the second moment's diagonal, relative to its mean: directions that no input has are left without error."""


def rank_for(rows: int, columns: int, keep: float, multiple: int = 1) -> int:
    """The largest rank whose two matrices hold no more than `keep` of the numbers, rounded down to a multiple where
    it reaches one; 0 where not even rank 1 does."""
    rank = int(keep * rows * columns / (rows + columns) + 1e-9)
    return rank - rank % multiple if rank >= multiple else rank


def choose_ranks(model: Model, step: LowRank) -> dict[str, int]:
    """The rank of every layer that becomes smaller by it, by name.

    Raises:
        BadInputError: none does.
    """
    ranks = {}
    for name in block_layers(model, step.exclude, step.method):
        rows, columns = model.module.get_submodule(name).get_parameter("weight").shape
        rank = rank_for(rows, columns, step.keep, step.multiple)
        if rank > 0:
            ranks[name] = rank
    if not ranks:
        raise BadInputError(
            f"Keeping {step.keep:g} of the numbers leaves not even rank 1 of any layer.",
            where="keep of lowrank",
            next_step="Keep more.",
        )
    return ranks


def whitening(moment: torch.Tensor) -> torch.Tensor:
    """S, lower triangular (K, K) float64, with S S^T = moment + damping."""
    damped = moment.to(torch.float64)
    diagonal = damped.diagonal().mean().clamp_min(1e-30)
    lower: torch.Tensor = torch.linalg.cholesky(
        damped + DAMPING * diagonal * torch.eye(len(damped), dtype=torch.float64)
    )
    return lower


def factorize(weight: torch.Tensor, scale: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, K) and B (N, rank), float32, with ||(W - B A) S|| least.

    Args:
        weight: W, (N, K).
        scale: S, (K, K), lower triangular and invertible.
    """
    left, values, right = torch.linalg.svd(weight.to(torch.float64) @ scale, full_matrices=False)
    root = values[:rank].sqrt()
    # A S = root * V^T, solved from the right.
    down = torch.linalg.solve_triangular(scale, root[:, None] * right[:rank], upper=False, left=False)
    return down.float(), (left[:, :rank] * root).float()


def _scale(moments: Moments, step: LowRank) -> torch.Tensor:
    if step.scaling == "whiten":
        return whitening(moments.second / moments.count)
    mean = (moments.mean_abs / moments.count).to(torch.float64)
    # A channel that is always 0 may not make S singular.
    return mean.clamp_min(1e-6 * float(mean.max().clamp_min(1e-12))).pow(step.alpha).diag()


@torch.no_grad()
def factorize_layers(model: Model, step: LowRank, inputs: Inputs) -> tuple[Model, dict[str, float]]:
    """The model with its Linear layers factored, each on the inputs that the factored layers before it make; and the
    relative error of each one's output on them.

    Raises:
        BadInputError: no layer gets smaller, or an activation is not finite.
    """
    ranks = choose_ranks(model, step)
    module = copy.deepcopy(model.module)
    errors: dict[str, float] = {}

    def visit(name: str, moments: Moments) -> None:
        layer = module.get_submodule(name)
        weight = layer.get_parameter("weight").detach().clone()
        down, up = factorize(weight, _scale(moments, step), ranks[name])
        bias = getattr(layer, "bias", None)
        add_factors(module, {name: ranks[name]})
        made = module.get_submodule(name)
        made.get_parameter("factor_down.weight").copy_(down)
        made.get_parameter("factor_up.weight").copy_(up)
        if bias is not None:
            made.get_parameter("factor_up.bias").copy_(bias)
        errors[name] = relative_output_error(weight, up @ down, moments)

    walk(module, list(ranks), inputs, visit)
    return replace(model, module=module), errors


def relative_output_error(before: torch.Tensor, after: torch.Tensor, moments: Moments) -> float:
    """||x (W' - W)^T|| / ||x W^T|| over the inputs of the moments."""
    energy = output_error(before.clone(), moments.second)
    return (max(output_error(after - before, moments.second), 0.0) / energy) ** 0.5 if energy > 0 else 0.0


def outline_factors(model: Model, ranks: dict[str, int]) -> Model:
    """The model with factored layers whose matrices are zeros."""
    module = copy.deepcopy(model.module)
    add_factors(module, ranks)
    return replace(model, module=module)

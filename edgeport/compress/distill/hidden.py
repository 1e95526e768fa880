"""Hidden states of the student's blocks towards those of the teacher's (TinyBERT, Jiao et al. 2020,
https://arxiv.org/abs/1909.10351, section 3.1, eq. 8).

Block m of M learns from block round(m N / M) of the teacher's N. The error is taken relative to the teacher's states,
so that blocks of every size count alike and one weight serves every model; the paper has the plain mean square. Where
the student is narrower, its states go through a matrix that is trained along and then forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from edgeport.errors import BadInputError


def layer_pairs(student: int, teacher: int, how: Literal["uniform", "last"]) -> list[tuple[int, int]]:
    """(student's block, teacher's block), counted from 0."""
    if how == "last":
        return [(student - 1, teacher - 1)]
    # Half up: round() would go to the even neighbour.
    return [(block, (2 * (block + 1) * teacher + student) // (2 * student) - 1) for block in range(student)]


def relative_error(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Squared error relative to the teacher's squared norm, a scalar.

    Args:
        student, teacher: (batch, sequence, channels), or any shape where `mask` is None.
        mask: bool (batch, sequence), positions that count.
    """
    student, teacher = student.float(), teacher.float()
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    return (student - teacher).square().sum() / teacher.square().sum().clamp_min(1e-12)


def projections(widths: Sequence[tuple[int, int]], seed: int) -> torch.nn.ModuleList:
    """For each pair of widths (student's, teacher's) a matrix between them; nothing where they are equal."""
    generator = torch.Generator().manual_seed(seed)
    made: list[torch.nn.Module] = []
    for narrow, wide in widths:
        if narrow == wide:
            made.append(torch.nn.Identity())
            continue
        layer = torch.nn.Linear(narrow, wide, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(wide, narrow, generator=generator) / narrow**0.5)
        made.append(layer)
    return torch.nn.ModuleList(made)


def hidden_loss(
    student: Mapping[str, torch.Tensor],
    teacher: Mapping[str, torch.Tensor],
    pairs: Sequence[tuple[str, str]],
    matrices: torch.nn.ModuleList,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Mean relative error over pairs of blocks, a scalar.

    Args:
        student, teacher: hidden states (batch, sequence, channels) by the name of the block.

    Raises:
        BadInputError: a block's states have no such shape.
    """
    total = torch.zeros(())
    for (own, other), matrix in zip(pairs, matrices, strict=True):
        state = matrix(student[own].float())
        if state.shape != teacher[other].shape:
            raise BadInputError(
                f"The student's states at {own} are {tuple(state.shape)}, the teacher's at {other} "
                f"{tuple(teacher[other].shape)}.",
                where="hidden of distill",
                next_step="Leave hidden out; outputs and relations don't need equal states.",
            )
        total = total + relative_error(state, teacher[other], mask)
    return total / len(pairs)

"""How far a student's distribution over classes or next tokens is from the teacher's.

With p the teacher's and q the student's softmax(logits / T):

    forward_kl   KL(p || q)                                  Hinton et al. 2015, https://arxiv.org/abs/1503.02531
    reverse_kl   KL(q || p)                                  MiniLLM, https://arxiv.org/abs/2306.08543
    jsd          beta KL(p || m) + (1 - beta) KL(q || m)     GKD, https://arxiv.org/abs/2306.13649, eq. 2
                 with m = beta p + (1 - beta) q

times T^2, which keeps the gradients' size. Vocabularies are large, so rows are taken some at a time and the gradient
is computed with the loss: beside the logits only their gradient is kept whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]

VALUES = 1 << 19
"""Numbers of the logits that are worked on together."""

IGNORED = -100
"""A row without a label."""

RowLoss = Callable[[torch.Tensor, slice], torch.Tensor]
"""Summed loss of some rows (n, classes), and which rows they are."""


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, kind: Divergence, *, beta: float = 0.5, temperature: float = 1.0
) -> torch.Tensor:
    """Of each row, nats.

    Args:
        student, teacher: logits (n, classes).
    """
    logs, target = (each.float().div(temperature).log_softmax(-1) for each in (student, teacher))
    if kind == "forward_kl":
        found = _kl(target, logs)
    elif kind == "reverse_kl":
        found = _kl(logs, target)
    else:
        middle = torch.logaddexp(target + math.log(beta), logs + math.log1p(-beta))
        found = beta * _kl(target, middle) + (1 - beta) * _kl(logs, middle)
    return found * temperature**2


def _kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL of the first from the second, both log probabilities."""
    return torch.nn.functional.kl_div(other, one, reduction="none", log_target=True).sum(-1)


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, logits: torch.Tensor, loss: RowLoss, rows: int) -> torch.Tensor:
        gradient = torch.empty_like(logits)
        total = logits.new_zeros((), dtype=torch.float32)
        for start in range(0, len(logits), rows):
            part = slice(start, min(start + rows, len(logits)))
            with torch.enable_grad():
                some = logits[part].detach().requires_grad_()
                value = loss(some, part)
            gradient[part] = torch.autograd.grad(value, some)[0]
            total += value.detach()
        context.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(context: Any, *arriving: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = context.saved_tensors
        return gradient * arriving[0].to(gradient.dtype), None, None


def by_rows(logits: torch.Tensor, loss: RowLoss) -> torch.Tensor:
    """The summed loss of all rows (n, classes), some of them at a time; a scalar, differentiable once."""
    rows = max(1, VALUES // logits.shape[-1])
    if not (torch.is_grad_enabled() and logits.requires_grad):
        parts = [slice(start, min(start + rows, len(logits))) for start in range(0, len(logits), rows)]
        return sum((loss(logits[part], part) for part in parts), logits.new_zeros((), dtype=torch.float32))
    found: torch.Tensor = _ByRows.apply(logits, loss, rows)  # type: ignore[no-untyped-call]
    return found


def logit_loss(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    targets: torch.Tensor | None,
    *,
    kind: Divergence,
    beta: float,
    temperature: float,
    labels: float,
) -> torch.Tensor:
    """(1 - labels) times the mean divergence + labels times the mean cross-entropy, a scalar.

    Args:
        student: logits (n, classes).
        teacher: logits of the same shape; None where `labels` is 1.
        targets: the true class of each row, int64 (n,), or `IGNORED`; None where `labels` is 0.
    """
    count = max(len(student), 1)
    known = 0 if targets is None else int((targets != IGNORED).sum())

    def loss(rows: torch.Tensor, part: slice) -> torch.Tensor:
        total = rows.new_zeros((), dtype=torch.float32)
        if teacher is not None and labels < 1:
            apart = divergence(rows, teacher[part], kind, beta=beta, temperature=temperature)
            total = total + (1 - labels) * apart.sum() / count
        if targets is not None and labels > 0 and known:
            told = torch.nn.functional.cross_entropy(rows.float(), targets[part], ignore_index=IGNORED, reduction="sum")
            total = total + labels * told / known
        return total

    return by_rows(student, loss)


def next_tokens(ids: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The token that follows each position, int64 (B, S); `IGNORED` at the end and where what follows is not counted.

    Args:
        ids: int64 (B, S).
        counted: bool (B, S), positions that are text.
    """
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = ids[:, 1:].masked_fill(~counted[:, 1:], IGNORED)
    return targets

"""Reverse KL of whole texts by policy gradient (MiniLLM, Gu et al. 2024, https://arxiv.org/abs/2306.08543, 2.2).

Texts y are drawn from m = share p + (1 - share) q, p the teacher and q the student. With r_t = log p(y_t) / q(y_t) and
w_t = q(y_t) / m(y_t), both without gradient, the gradient of KL(q || p) is that of the mean over tokens of

    w_t KL(q_t || p_t)  -  w_t R_t log q(y_t),     R_t = mean of r_s over the tokens s > t of the text

the first term exactly over the vocabulary (the paper's single-step part, eq. 5), the second what a token does to those
that follow, by their mean instead of their sum so that long texts are not shunned (length normalisation, eq. 6). A text
serves one update, so the paper's clipping of stale ratios has nothing to do.
"""

from __future__ import annotations

import torch

from edgeport.compress.distill.logits import by_rows, divergence


def what_follows(rewards: torch.Tensor, counted: torch.Tensor, *, mean: bool = True) -> torch.Tensor:
    """For each token the mean, or sum, of the rewards of those after it; 0 for the last.

    Args:
        rewards: (B, T).
        counted: bool (B, T): tokens that belong to the text.
    """
    kept = rewards * counted
    total = kept.flip(1).cumsum(1).flip(1) - kept
    if not mean:
        return total
    after = counted.long().flip(1).cumsum(1).flip(1) - counted.long()
    return total / after.clamp_min(1)


def policy_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    tokens: torch.Tensor,
    counted: torch.Tensor,
    *,
    share: float,
    temperature: float = 1.0,
    mean: bool = True,
) -> torch.Tensor:
    """A scalar whose gradient is that of the reverse KL, in expectation over texts drawn from the mixture.

    Args:
        student, teacher: logits (B, T, classes) that predict `tokens`, int64 (B, T).
        counted: bool (B, T).
        share: of the teacher in what the tokens were drawn from.
        mean: normalise by length; the plain sum is the exact gradient.
    """
    classes = student.shape[-1]
    with torch.no_grad():
        own, other = (_chosen(logits, tokens, temperature) for logits in (student, teacher))
        weight = 1 / (share * (other - own).exp() + (1 - share))
        follows = what_follows(other - own, counted, mean=mean)
    flat = counted.reshape(-1)
    rows, wanted = student.reshape(-1, classes)[flat], teacher.reshape(-1, classes)[flat]
    chosen, weights, after = (value.reshape(-1)[flat] for value in (tokens, weight, follows))

    def loss(some: torch.Tensor, part: slice) -> torch.Tensor:
        logs = some.float().div(temperature).log_softmax(-1).gather(1, chosen[part, None])[:, 0]
        step = divergence(some, wanted[part], "reverse_kl", temperature=temperature) / temperature**2
        return (weights[part] * (step - after[part] * logs)).sum() / max(len(rows), 1)

    return by_rows(rows, loss)


def _chosen(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log probability of each token, (B, T), one text at a time."""
    found = [
        one.float().div(temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        for one, ids in zip(logits, tokens, strict=True)
    ]
    return torch.stack(found)

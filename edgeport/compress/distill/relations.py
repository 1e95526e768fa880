"""Relations inside attention: how similar a layer's queries, keys and values are from token to token.

MiniLM (Wang et al. 2020, https://arxiv.org/abs/2002.10957, eq. 5-8): KL of the attention distributions, softmax(Q K^T
/ sqrt(d)), and of the value relation softmax(V V^T / sqrt(d)). MiniLM v2 (https://arxiv.org/abs/2012.15828, eq. 2-4):
of Q Q^T, K K^T and V V^T, with all heads laid together and cut anew into as many relation heads, so that teacher and
student need neither equal widths nor equally many heads. Queries and keys are seen as their layers give them, before
positions are rotated in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from edgeport.compress.prune.families import Sizes, family_of, sizes_of
from edgeport.errors import BadInputError

Vectors = Mapping[str, torch.Tensor]
"""q, k and v of one layer, (batch, sequence, channels)."""

NOWHERE = -1e9
"""The score of a position that is not looked at; finite, so that 0 times its logarithm is 0."""


def relation(one: torch.Tensor, other: torch.Tensor, heads: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Log of softmax(A B^T / sqrt(d)), (batch, heads, sequence, sequence).

    Args:
        one, other: (batch, sequence, heads * d) each.
        mask: bool (batch, sequence): positions that are looked at.
    """
    a, b = (each.float().reshape(*each.shape[:2], heads, -1).transpose(1, 2) for each in (one, other))
    scores: torch.Tensor = a @ b.transpose(-1, -2) / a.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], NOWHERE)
    return scores.log_softmax(-1)


def relation_loss(
    student: Vectors, teacher: Vectors, pairs: Sequence[str], heads: int, mask: torch.Tensor | None
) -> torch.Tensor:
    """KL of the teacher's relations from the student's, nats: mean over tokens, heads and pairs; a scalar.

    Args:
        pairs: such as "qk".
        mask: bool (batch, sequence): positions that count.
    """
    total = torch.zeros(())
    for first, second in map(tuple, pairs):
        own, wanted = (relation(one[first], one[second], heads, mask) for one in (student, teacher))
        apart = torch.nn.functional.kl_div(own, wanted, reduction="none", log_target=True).sum(-1).mean(1)
        total = total + (apart.mean() if mask is None else apart[mask].mean())
    return total / len(pairs)


def vector_layers(module: torch.nn.Module, block: int) -> dict[str, str]:
    """Names of the layers that give a block's q, k and v; one layer may give all three.

    Raises:
        BadInputError: the module is of no family that edgeport knows.
    """
    family, sizes = family_of(module), sizes_of(module)
    prefix = sizes.block(block)
    return {
        part: f"{prefix}.{name}" for part, name in zip("qkv", (family.query, family.key, family.value), strict=True)
    }


def vectors(seen: Mapping[str, torch.Tensor], layers: Mapping[str, str], sizes: Sizes) -> dict[str, torch.Tensor]:
    """q, k and v out of what the layers gave; keys and values of a group are repeated for each of its heads."""
    found = {part: seen[name] for part, name in layers.items()}
    if len(set(layers.values())) == 1:
        kv = sizes.kv_heads * sizes.head_dim
        parts = torch.split(found["q"], [sizes.heads * sizes.head_dim, kv, kv], -1)
        found = dict(zip("qkv", parts, strict=True))
    if sizes.kv_heads != sizes.heads:
        for part in "kv":
            grouped = found[part].reshape(*found[part].shape[:2], sizes.kv_heads, sizes.head_dim)
            found[part] = grouped.repeat_interleave(sizes.heads // sizes.kv_heads, 2).flatten(-2)
    return found


def check_heads(sizes: Sequence[Sizes], heads: int) -> None:
    """Refuse relation heads that don't divide what they cut.

    Raises:
        BadInputError: naming the widths.
    """
    widths = [one.heads * one.head_dim for one in sizes]
    if any(width % heads for width in widths):
        raise BadInputError(
            f"Queries of {' and '.join(map(str, widths))} channels can't be cut into {heads} relation heads.",
            where="relation_heads of distill",
            allowed="a divisor of both",
        )

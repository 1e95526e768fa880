"""Pair: a layer whose output channels may be scaled, with the Linears whose columns take the scale back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

PairKind = Literal["norm", "linear", "heads"]


@dataclass(frozen=True)
class Pair:
    """A producer and its only readers. Names are those of `module.named_parameters()`.

    Attributes:
        kind: "norm": a normalisation before Linears; "linear": a Linear that reaches another one channel by
            channel (`up` of a gated MLP, through its product; a Linear before a ReLU); "heads": the values of an
            attention, which reach its output Linear head by head, so that a head's channels may also be mixed.
        weight: the producer's weight.
        bias: the producer's bias, None where it has none.
        consumers: weights (N, K) of the Linears that read it, and nothing else does.
        rows: first and last + 1 of the producer's output channels that belong to the pair: all of them, or the
            values of a fused q, k, v.
        repeats: heads of the consumer that share one of the producer's (grouped queries); 1 otherwise.
        head_dim: channels of a head, for "heads".
        offset: what a normalisation adds to its weight before it multiplies: 1 for Gemma, otherwise 0.
    """

    kind: PairKind
    weight: str
    bias: str | None
    consumers: tuple[str, ...]
    rows: tuple[int, int]
    repeats: int = 1
    head_dim: int | None = None
    offset: float = 0.0

    @property
    def channels(self) -> int:
        """Channels that have a scale of their own."""
        return self.rows[1] - self.rows[0]

    @property
    def columns(self) -> torch.Tensor:
        """The channel that each of the consumers' columns reads, int64 (K,)."""
        index = torch.arange(self.channels)
        if self.head_dim is None or self.repeats == 1:
            return index
        return index.reshape(-1, 1, self.head_dim).expand(-1, self.repeats, -1).reshape(-1)

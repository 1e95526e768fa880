"""Which calibration samples a training learns from, and which only judge it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from edgeport.errors import BadInputError

HELD_OUT = 5
"""One sample in so many is not trained on."""


def split(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the samples that judge and of those that are learned from, each ascending.

    Raises:
        BadInputError: there are fewer than two samples.
    """
    if count < 2:
        raise BadInputError(
            f"Training was given {count} input: one must be held out to judge by.",
            where="[calibration]",
            allowed="2 or more inputs; hundreds are better",
            next_step="Ask for more `samples` in the recipe's [calibration] table.",
        )
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held = sorted(chosen[: max(1, count // HELD_OUT)])
    return held, sorted(set(range(count)) - set(held))


def in_turns(indices: Sequence[int], seed: int) -> Callable[[], int]:
    """The indices without end, in a new order every time round."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []

    def following() -> int:
        if not waiting:
            waiting.extend(torch.randperm(len(indices), generator=generator).tolist())
        return indices[waiting.pop()]

    return following

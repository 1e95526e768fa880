"""Inputs that run together, and which of their positions count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

Sample = Mapping[str, torch.Tensor]

PADDED = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids", "answer_mask"})
"""Inputs that zeros may follow, where the attention mask says so."""

SIDE = ("answer_mask", "labels")
"""What a sample has beside the model's inputs: which tokens are an answer, int64 (1, S); the true class, int64 (1,)."""


def collate(samples: Sequence[Sample]) -> dict[str, torch.Tensor] | None:
    """One batch of samples of batch 1, shorter ones padded with zeros; None where they can't be put together."""
    shapes = [{name: value.shape for name, value in sample.items()} for sample in samples]
    if all(one == shapes[0] for one in shapes):
        return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
    if "attention_mask" not in samples[0] or not samples[0].keys() <= PADDED:
        return None
    longest = max(sample["attention_mask"].shape[1] for sample in samples)
    return {
        name: torch.cat(
            [torch.nn.functional.pad(sample[name], (0, longest - sample[name].shape[1])) for sample in samples]
        )
        for name in samples[0]
    }


def inputs_of(sample: Sample) -> dict[str, torch.Tensor]:
    """What the model takes."""
    return {name: value for name, value in sample.items() if name not in SIDE}


def real_positions(sample: Sample) -> torch.Tensor | None:
    """Positions that are no padding, bool (B, S); None where all are."""
    mask = sample.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.bool()


def told_positions(sample: Sample) -> torch.Tensor | None:
    """Positions whose outputs count, bool (B, S): those that predict an answer's tokens, else all real ones."""
    if "decoder_input_ids" in sample:
        return None  # the mask is the encoder's; such samples are not padded
    answer = sample.get("answer_mask")
    if answer is None:
        return real_positions(sample)
    # What predicts a token stands one place before it.
    return torch.nn.functional.pad(answer[:, 1:], (0, 1)).bool()

"""Depth pruning: leave out the layers that change the hidden states least (ShortGPT, https://arxiv.org/abs/2403.03853).

Block influence of layer l: BI_l = 1 - mean over tokens of cos(h_l, h_{l+1}), with h_l its input and h_{l+1} its output
(section 3). The paper removes all at once; measuring again after each removal sees that of two layers which do the
same only one can go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from edgeport.compress.chain import call, hidden_states
from edgeport.compress.prune.cut import cut_depth
from edgeport.compress.prune.families import sizes_of
from edgeport.errors import BadInputError
from edgeport.model.types import Model
from edgeport.restructuring import PruneDepth

Inputs = Sequence[Mapping[str, torch.Tensor]]


def layers_left(model: Model, step: PruneDepth) -> int:
    """How many layers stay.

    Raises:
        BadInputError: there are not more layers than that.
    """
    have = sizes_of(model.module).layers
    left = max(1, round(have * step.keep)) if step.layers is None and step.keep is not None else step.layers
    assert left is not None, "a step says how many"
    if left >= have:
        raise BadInputError(
            f"The model has {have} layers; {left} can't stay while some go.",
            where="prune_depth",
            allowed=f"layers = 1 to {have - 1}, or a smaller keep",
        )
    return left


@torch.no_grad()
def block_influence(module: torch.nn.Module, inputs: Inputs) -> list[float]:
    """BI of every layer, 0 (it only passes on) to 2.

    Args:
        module: of a family of `families.py`.
        inputs: samples as the module takes them; positions whose `attention_mask` is 0 don't count.
    """
    sizes = sizes_of(module)
    sums = torch.zeros(sizes.layers, dtype=torch.float64)
    tokens = torch.zeros(sizes.layers, dtype=torch.float64)
    mask: torch.Tensor | None = None

    def hook(index: int) -> Any:
        def note(_block: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            before = arguments[0] if arguments else named["hidden_states"]
            cosines = torch.nn.functional.cosine_similarity(before.double(), hidden_states(output).double(), dim=-1)
            counted = cosines[mask.bool()] if mask is not None and mask.shape == cosines.shape else cosines
            sums[index] += counted.sum()
            tokens[index] += counted.numel()

        return note

    blocks = [module.get_submodule(sizes.block(index)) for index in range(sizes.layers)]
    handles = [block.register_forward_hook(hook(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        for sample in inputs:
            mask = sample.get("attention_mask")
            call(module, sample)
    finally:
        for handle in handles:
            handle.remove()
    return (1 - sums / tokens).tolist()


def choose_layers(model: Model, keep: int, inputs: Inputs, *, iterative: bool) -> tuple[tuple[int, ...], list[float]]:
    """The layers that stay, in order, and the influence of each of the model's layers: of a removed one when it was
    removed, of the others at the end.

    Args:
        iterative: measure again after each removal.
    """
    influence = block_influence(model.module, inputs)
    left = list(range(len(influence)))
    if not iterative:
        order = sorted(left, key=lambda index: (influence[index], -index))
        return tuple(sorted(order[len(order) - keep :])), influence
    while len(left) > keep:
        weakest = min(left, key=lambda index: (influence[index], -index))
        left.remove(weakest)
        measured = block_influence(cut_depth(model, left).module, inputs)
        for index, value in zip(left, measured, strict=True):
            influence[index] = value
    return tuple(left), influence

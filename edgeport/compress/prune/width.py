"""Width pruning by activation scores (Minitron, https://arxiv.org/abs/2407.14679, section 2.2).

A channel's score is the mean of |activation| over a sequence, and the L2 norm of these over the samples. Inner channels
of an MLP are scored where they enter its last layer, heads by the norm of what each gives to the layer behind
attention, channels of the hidden state by what all norms give, summed. Every layer keeps equally many, so that one
config describes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from typing import Any

import torch

from edgeport.compress.chain import call
from edgeport.compress.prune.cut import Kept
from edgeport.compress.prune.families import Sizes, family_of, sizes_of
from edgeport.errors import BadInputError
from edgeport.model.types import Model
from edgeport.restructuring import PruneWidth

Inputs = Sequence[Mapping[str, torch.Tensor]]
Scores = dict[str, torch.Tensor]


def first_parts(model: Model, step: PruneWidth) -> dict[str, Kept]:
    """How many parts stay, as if the first ones did: the shapes that any scores lead to.

    Raises:
        BadInputError: the shares are impossible for this model.
    """
    sizes, family = sizes_of(model.module), family_of(model.module)
    kept: dict[str, Kept] = {}
    ffn, hidden = (_rounded(size * share, step.multiple, size) for size, share in _shares(sizes, step))
    heads, pairs = _heads(sizes, step.heads)
    if step.hidden < 1:
        kept["hidden"] = tuple(range(hidden))
    if not family.free_heads and hidden != heads * sizes.head_dim:
        raise BadInputError(
            f"Its heads are the hidden size divided by their number: {hidden} channels and {heads} heads would make "
            f"heads of {hidden / heads:g} instead of {sizes.head_dim} channels.",
            where="heads and hidden of prune_width",
            allowed=f"equal shares of both, in steps of 1/{sizes.heads}, or 1 for both",
            next_step="Prune ffn or layers instead, or give heads and hidden the same share.",
        )
    for layer in range(sizes.layers):
        if step.ffn < 1:
            kept[f"ffn.{layer}"] = tuple(range(ffn))
        if step.heads < 1:
            kept[f"heads.{layer}"] = tuple(_query_heads(sizes, range(pairs), heads // pairs))
            kept[f"kv_heads.{layer}"] = tuple(range(pairs))
    if heads == sizes.heads and ffn == sizes.ffn and hidden == sizes.hidden:
        raise BadInputError(
            "The shares remove nothing of a model this small.",
            where="prune_width",
            allowed=f"shares of {sizes.ffn} inner channels, {sizes.heads} heads, {sizes.hidden} hidden channels, "
            f"rounded to multiples of {step.multiple}",
        )
    return kept


def _shares(sizes: Sizes, step: PruneWidth) -> tuple[tuple[int, float], tuple[int, float]]:
    return (sizes.ffn, step.ffn), (sizes.hidden, step.hidden)


def _rounded(wanted: float, multiple: int, most: int) -> int:
    """The closest multiple, at least one of it and no more than there are."""
    return most if wanted >= most else min(max(round(wanted / multiple), 1) * multiple, most)


def _heads(sizes: Sizes, share: float) -> tuple[int, int]:
    """Heads of queries and of keys and values that stay: whole groups, or of one group equally many queries.

    Raises:
        BadInputError: neither makes that share.
    """
    if share == 1:
        return sizes.heads, sizes.kv_heads
    heads, pairs = sizes.heads * share, sizes.kv_heads * share
    if abs(pairs - round(pairs)) < 1e-6 and round(pairs) >= 1:
        return round(pairs) * (sizes.heads // sizes.kv_heads), round(pairs)
    each = heads / sizes.kv_heads
    if abs(each - round(each)) < 1e-6 and round(each) >= 1:
        return round(each) * sizes.kv_heads, sizes.kv_heads
    group = sizes.heads // sizes.kv_heads
    possible = {Fraction(n, size) for size in (sizes.kv_heads, group) for n in range(1, size)}
    raise BadInputError(
        f"{share:g} of {sizes.heads} heads in {sizes.kv_heads} groups is no whole number of groups, nor of heads "
        "in each group.",
        where="heads of prune_width",
        allowed=", ".join(str(share) for share in sorted(possible)) or "1: there is one head",
    )


def _query_heads(sizes: Sizes, groups: Sequence[int], each: int) -> list[int]:
    """The first `each` query heads of some groups."""
    size = sizes.heads // sizes.kv_heads
    return [group * size + index for group in groups for index in range(each)]


@torch.no_grad()
def width_scores(module: torch.nn.Module, inputs: Inputs) -> Scores:
    """Scores of "hidden" (hidden,), and of "ffn.L" (ffn,) and "heads.L" (heads,) of every layer L."""
    sizes, family = sizes_of(module), family_of(module)
    squares: Scores = {}

    def add(name: str, values: torch.Tensor) -> None:
        """values: (..., channels) of one sample."""
        mean = values.abs().reshape(-1, values.shape[-1]).double().mean(0)
        squares[name] = squares.get(name, torch.zeros(())) + mean.square()

    def entering(name: str, view: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return lambda _layer, arguments: add(name, view(arguments[0]))

    def per_head(value: torch.Tensor) -> torch.Tensor:
        heads = value.reshape(*value.shape[:-1], sizes.heads, sizes.head_dim)
        return heads.square().sum(-1).sqrt()

    with ExitStack() as stack:
        for layer in range(sizes.layers):
            block = sizes.block(layer)
            down, output = (module.get_submodule(f"{block}.{name}") for name in (family.down, family.output))
            stack.callback(down.register_forward_pre_hook(entering(f"ffn.{layer}", lambda value: value)).remove)
            stack.callback(output.register_forward_pre_hook(entering(f"heads.{layer}", per_head)).remove)
        norms = _norms(module, sizes.hidden)
        for name in norms:

            def leaving(_layer: Any, _arguments: Any, value: torch.Tensor, name: str = name) -> None:
                add(f"norm.{name}", value)

            stack.callback(module.get_submodule(name).register_forward_hook(leaving).remove)
        for sample in inputs:
            call(module, sample)
    scores = {name: value.sqrt().float() for name, value in squares.items()}
    per_norm = [scores.pop(f"norm.{name}") for name in norms if f"norm.{name}" in scores]
    scores["hidden"] = torch.stack(per_norm).sum(0)
    return scores


def _norms(module: torch.nn.Module, hidden: int) -> list[str]:
    """Layers that normalise the hidden state."""
    found = []
    for name, child in module.named_modules():
        weight = getattr(child, "weight", None)
        if "Norm" in type(child).__name__ and isinstance(weight, torch.Tensor) and tuple(weight.shape) == (hidden,):
            found.append(name)
    return found


def choose_parts(model: Model, step: PruneWidth, inputs: Inputs) -> tuple[dict[str, Kept], dict[str, float]]:
    """The parts that stay, by name as in `Cut.kept`, and the share of the summed score that went with the others.

    Raises:
        BadInputError: the shares are impossible for this model.
    """
    sizes = sizes_of(model.module)
    counts = {name: len(part) for name, part in first_parts(model, step).items()}
    scores = width_scores(model.module, inputs)
    kept: dict[str, Kept] = {}
    lost: dict[str, float] = {}
    for name, count in counts.items():
        if name.startswith("kv_heads."):
            continue
        score = scores[name]
        if name.startswith("heads."):
            pairs = counts[f"kv_{name}"]
            kept[name], kept[f"kv_{name}"] = _choose_heads(score, sizes, pairs, count // pairs)
        else:
            kept[name] = _largest(score, count)
        total = float(score.sum())
        lost[name] = 1 - float(score[list(kept[name])].sum()) / total if total > 0 else 0.0
    return kept, lost


def _largest(score: torch.Tensor, count: int) -> Kept:
    """Indices of the largest scores, ascending; of equal ones the first."""
    return tuple(sorted(torch.sort(score, descending=True, stable=True).indices[:count].tolist()))


def _choose_heads(score: torch.Tensor, sizes: Sizes, pairs: int, each: int) -> tuple[Kept, Kept]:
    """Query heads, and heads of keys and values, that stay."""
    size = sizes.heads // sizes.kv_heads
    groups = score.reshape(sizes.kv_heads, size)
    chosen = _largest(groups.sum(1), pairs)
    heads = [group * size + head for group in chosen for head in _largest(groups[group], each)]
    return tuple(heads), chosen

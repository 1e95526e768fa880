"""Rotate the residual stream of a pre-norm network, offline: outliers spread over all channels.

QuaRot (https://arxiv.org/abs/2404.00456, section 4; the rotations that need no operation at run time). With x the
residual stream, as a row, and Q orthogonal:

1. the weight of every norm on the stream goes into the Linears behind it, so that `norm(x Q) = norm(x) Q`;
2. whatever writes into the stream (embeddings, attention and MLP outputs) writes x Q;
3. whatever reads it (q, k, v, gate, up, fc1, the head) first undoes Q;
4. the values of each attention head, and the columns of the output Linear that read them, are rotated as well.

A LayerNorm also takes the mean away, which commutes with a Q that keeps the constant vector
(`hadamard.mean_preserving`): it stays a LayerNorm, its weight 1 and its bias 0.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from edgeport.compress.prepare.fold import fuse_norm, mix_heads, parameters_of
from edgeport.compress.prepare.graph import Graph, in_float64, largest_change, outputs_of, read_graph, working_copy
from edgeport.compress.prepare.hadamard import mean_preserving, randomised
from edgeport.compress.prepare.pair import Pair
from edgeport.errors import BadInputError

TOLERANCE = 1e-4
"""Largest change of an output, relative to its largest value: the rotated weights are rounded to float32."""


@dataclass(frozen=True)
class Stream:
    """The residual stream.

    Attributes:
        writers: layers (module names) and bare parameters (parameter names) whose sum it is.
        norms: the normalisations that read it, with the Linears behind them.
        centred: at least one of them takes the mean away.
    """

    writers: tuple[str, ...]
    norms: tuple[Pair, ...]
    centred: bool


def _refuse(what: str, where: str | None = None, next_step: str = "Leave the rotation out of the recipe.") -> NoReturn:
    raise BadInputError(f"The model can't be rotated: {what}.", where=where, next_step=next_step)


def residual_stream(module: nn.Module, graph: Graph) -> Stream:
    """Find the stream: it begins at an embedding, and all that is added to it on the way to a norm belongs to it.

    Raises:
        BadInputError: there is none that can be rotated, and why.
    """
    layers = dict(module.named_modules())

    def begins(source: str) -> bool:
        return source not in graph.norms and not isinstance(layers.get(source), nn.Linear)

    writers: set[str] = {s for name in graph.norms for s in graph.sources[name] if begins(s)}
    norms: set[str] = set()
    while found := {n for n in graph.norms if n not in norms and writers & set(graph.sources[n])}:
        norms |= found
        writers.update(source for name in found for source in graph.sources[name])
    if not norms:
        _refuse("no normalisation reads a sum that begins with an embedding")
    for writer in sorted(writers):
        if writer in graph.norms:
            _refuse("a normalisation writes into the residual stream (post-norm)", where=writer)
        if writer in layers and not isinstance(layers[writer], (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)):
            _refuse(f"a {type(layers[writer]).__name__} writes into the residual stream", where=writer)
    pairs = {pair.weight: pair for pair in graph.pairs if pair.kind == "norm"}
    for name in sorted(norms):
        if graph.norms[name].weight not in pairs:
            _refuse("this normalisation on the residual stream feeds more than Linears", where=name)
    ordered = tuple(pairs[norm.weight] for name, norm in graph.norms.items() if name in norms)
    return Stream(tuple(sorted(writers)), ordered, any(graph.norms[name].centred for name in norms))


def tied_heads(module: nn.Module) -> dict[str, nn.Linear]:
    """Linears, by module name, whose weight is also an embedding's."""
    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and id(layer.weight) in embeddings
    }


def untie_heads(module: nn.Module) -> None:
    """Give every tied head a weight of its own, in place; a Hugging Face module is told, so that it stays so."""
    heads = tied_heads(module)
    for head in heads.values():
        head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    if not heads:
        return
    own = [f"{name}.weight" for name in heads]
    holder: Any  # torch would have attributes be tensors or modules
    for prefix, holder in module.named_modules():
        config: Any = getattr(holder, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
        tied = getattr(holder, "all_tied_weights_keys", {})
        if any(f"{prefix}.{target}".lstrip(".") in own for target in tied):
            holder.all_tied_weights_keys = {
                target: source for target, source in tied.items() if f"{prefix}.{target}".lstrip(".") not in own
            }


@torch.no_grad()
def _rotate_stream(module: nn.Module, stream: Stream, rotation: torch.Tensor) -> None:
    parameters, layers = parameters_of(module), dict(module.named_modules())
    last: list[torch.Tensor] = []  # rotated along the last dimension: x Q
    first: list[torch.Tensor] = []  # along the first: Qᵀ W
    for writer in stream.writers:
        layer = layers.get(writer)
        if layer is None:
            last.append(parameters[writer])
        elif isinstance(layer, nn.Embedding):
            last.append(layer.weight)
        else:
            first.append(parameters[f"{writer}.weight"])
            if f"{writer}.bias" in parameters:
                last.append(parameters[f"{writer}.bias"])
    last += [parameters[name] for pair in stream.norms for name in pair.consumers]
    for tensor in {id(tensor): tensor for tensor in last}.values():
        tensor.copy_(tensor.to(torch.float64) @ rotation)
    for tensor in {id(tensor): tensor for tensor in first}.values():
        tensor.copy_((rotation.T @ tensor.to(torch.float64).flatten(1)).reshape(tensor.shape))


def rotate_heads(module: nn.Module, pairs: Sequence[Pair], *, seed: int = 0) -> None:
    """Rotate the values of every attention head, in place: the part that post-norm networks (BERT) allow too.

    Args:
        module: a copy: the caller's own.
        pairs: `Graph.pairs`; those without heads are passed over.
        seed: of the random signs.
    """
    for pair in pairs:
        if pair.head_dim is not None:
            mix_heads(module, pair, randomised(pair.head_dim, seed))


def rotate(
    module: nn.Module,
    example: Mapping[str, torch.Tensor],
    outputs: Sequence[str] = (),
    *,
    seed: int = 0,
    untie: bool = False,
) -> nn.Module:
    """A rotated copy that computes the same function. The module is not changed.

    Args:
        module: takes `example` as keyword arguments, in float32.
        example: one value for each input; a few tokens are enough, all of them attended to.
        outputs: names of the outputs that must be kept (`Model.outputs`); all when empty.
        seed: of the random signs; the same seed gives the same weights.
        untie: give a head that shares the embedding's weight one of its own, which costs its bytes. A shared
            weight can't be rotated: the head must take the final norm's weight, the embedding must not.

    Raises:
        BadInputError: the model's structure does not allow it, or the head is tied and `untie` is not set.
    """
    heads = tied_heads(module)
    if heads and not untie:
        size = sum(head.weight.numel() for head in heads.values())
        _refuse(
            f"its head shares the embedding's weight, and one of its own has {size:,} more weights to store",
            where=", ".join(heads),
            next_step="Set `untie = true` for the rotation, or leave it out of the recipe.",
        )
    rotated = copy.deepcopy(module).eval()
    untie_heads(rotated)
    graph = read_graph(rotated, example, outputs)
    stream = residual_stream(rotated, graph)
    for pair in stream.norms:
        fuse_norm(rotated, pair)
    size = stream.norms[0].channels
    _rotate_stream(rotated, stream, mean_preserving(size, seed) if stream.centred else randomised(size, seed))
    rotate_heads(rotated, graph.pairs, seed=seed)
    inputs = in_float64(example)
    before = outputs_of(working_copy(module), inputs, outputs)
    change = largest_change(before, outputs_of(working_copy(rotated), inputs, outputs))
    if change > TOLERANCE:
        _refuse(f"its outputs would change by {change:.2g} of their size")
    return rotated

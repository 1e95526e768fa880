"""A cut: which parts of a module stay, and the smaller module of the same class that they make.

The smaller module is built from a smaller config and filled with rows and columns of the original's weights, so it is
what `from_pretrained` builds, by construction. A cut is all that has to be stored beside the original.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from edgeport.compress.prune.families import Family, Sizes, family_of, sizes_of
from edgeport.errors import BadInputError
from edgeport.model.fold import linearize
from edgeport.model.inputs import select_outputs
from edgeport.model.types import Model

PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")
"""Fields of configs that say something of each layer."""

Kept = tuple[int, ...]
Picks = dict[str, list[tuple[int, torch.Tensor]]]
"""For a parameter: (axis, indices that stay), each axis once."""


@dataclass(frozen=True)
class Cut:
    """What stays, as indices in ascending order.

    Attributes:
        method: of the step that chose it.
        kept: "layers" for depth. For width "hidden", and "ffn.L" (inner channels), "heads.L" and "kv_heads.L" of layer
            L; what is not named stays whole. For channels "out.NAME", "in.NAME" and "through.NAME" of each layer
            (edgeport.compress.prune.narrow). For lowrank the rank of each layer, for sparse weights how many numbers
            are left of each, both by name.
    """

    method: str
    kept: Mapping[str, Kept]


def cut_depth(model: Model, layers: Sequence[int]) -> Model:
    """A model with some of its layers, in their order. The given one is not changed."""
    sizes = sizes_of(model.module)
    config = copy.deepcopy(_config(model))
    config.num_hidden_layers = len(layers)
    for field in PER_LAYER:
        value = getattr(config, field, None)
        if isinstance(value, list | tuple) and len(value) == sizes.layers:
            setattr(config, field, [value[index] for index in layers])
    places = {f"{sizes.block(old)}.": f"{sizes.block(new)}." for new, old in enumerate(layers)}
    state = {}
    for name, tensor in model.module.state_dict().items():
        if not name.startswith(f"{sizes.prefix}."):
            state[name] = tensor
            continue
        head = ".".join(name.split(".")[: sizes.prefix.count(".") + 2]) + "."
        if head in places:
            state[places[head] + name.removeprefix(head)] = tensor
    return _rebuilt(model, config, state)


def cut_width(model: Model, kept: Mapping[str, Kept]) -> Model:
    """A model with some of its channels and heads. The given one is not changed.

    RMS norms over fewer channels see another mean: their weights are scaled by the root of what the number of channels
    shrank by, so that the result is the original with the removed channels masked.

    Args:
        kept: see `Cut.kept`.

    Raises:
        BadInputError: the outputs would have other shapes, or the sizes are impossible.
    """
    module, family, sizes = model.module, family_of(model.module), sizes_of(model.module)
    config = copy.deepcopy(_config(model))
    hidden = kept.get("hidden")
    heads = len(kept.get("heads.0", range(sizes.heads)))
    if family.free_heads:
        config.head_dim = sizes.head_dim
    if hidden is not None:
        config.hidden_size = len(hidden)
    if "ffn.0" in kept or getattr(config, family.ffn_field, None) is None:
        setattr(config, family.ffn_field, len(kept.get("ffn.0", range(sizes.ffn))))
    config.num_attention_heads = heads
    if family.kv_field is not None:
        setattr(config, family.kv_field, len(kept.get("kv_heads.0", range(sizes.kv_heads))))
    picks: Picks = {}
    for layer in range(sizes.layers):
        _pick_block(picks, family, sizes, layer, kept)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    state = dict(module.state_dict())
    smaller = skeleton(model, config)
    if hidden is not None:
        index = torch.tensor(hidden)
        for name, tensor in smaller.state_dict().items():
            claimed = {axis for axis, _ in picks.get(name, [])}
            for axis, (before, after) in enumerate(zip(shapes[name], tensor.shape, strict=True)):
                if before != after and axis not in claimed:
                    picks.setdefault(name, []).append((axis, index))
    for name, axes in picks.items():
        for axis, index in axes if name in state else ():
            state[name] = state[name].index_select(axis, index)
    if hidden is not None:
        _rescale(state, module, family, sizes.hidden, len(hidden))
    return _rebuilt(model, config, state, smaller)


def _pick_block(picks: Picks, family: Family, sizes: Sizes, layer: int, kept: Mapping[str, Kept]) -> None:
    """The rows and columns of one block's layers that stay."""
    block = sizes.block(layer)

    def rows(name: str, index: torch.Tensor) -> None:
        for leaf in ("weight", "bias"):
            picks.setdefault(f"{block}.{name}.{leaf}", []).append((0, index))

    def columns(name: str, index: torch.Tensor) -> None:
        picks.setdefault(f"{block}.{name}.weight", []).append((1, index))

    channels = kept.get(f"ffn.{layer}")
    if channels is not None:
        index = torch.tensor(channels)
        joined = family.gated and len(family.up) == 1
        for name in family.up:
            rows(name, torch.cat([index, index + sizes.ffn]) if joined else index)
        columns(family.down, index)
    heads = kept.get(f"heads.{layer}")
    if heads is not None:
        query = _channels(heads, sizes.head_dim)
        pairs = _channels(kept.get(f"kv_heads.{layer}", heads), sizes.head_dim)
        if family.query == family.key:
            start = sizes.heads * sizes.head_dim
            rows(family.query, torch.cat([query, pairs + start, pairs + start + sizes.kv_heads * sizes.head_dim]))
        else:
            for name, index in ((family.query, query), (family.key, pairs), (family.value, pairs)):
                rows(name, index)
        columns(family.output, query)


def _channels(heads: Sequence[int], width: int) -> torch.Tensor:
    return (torch.tensor(heads)[:, None] * width + torch.arange(width)).reshape(-1)


def _rescale(state: dict[str, torch.Tensor], module: torch.nn.Module, family: Family, before: int, after: int) -> None:
    """Keep RMS norms over fewer channels, and Gemma's scaled embedding, at the size that they had, in place."""
    factor = (before / after) ** 0.5
    norms = [
        name
        for name, child in module.named_modules()
        if type(child).__name__.endswith("RMSNorm") and tuple(child.get_parameter("weight").shape) == (before,)
    ]
    # Gemma's norms multiply by 1 + weight.
    one = 1.0 if family.scaled_embedding else 0.0
    for name in norms:
        state[f"{name}.weight"] = (state[f"{name}.weight"] + one) * factor - one
    if family.scaled_embedding:
        _rescale_embedding(state, module, norms, factor)


def _rescale_embedding(
    state: dict[str, torch.Tensor], module: torch.nn.Module, norms: Sequence[str], factor: float
) -> None:
    """Gemma multiplies embeddings by the root of the hidden size, which is now smaller. A tied head takes the scaled
    table too: the norm before it, which is the last one, makes up for it."""
    embeddings: Any = module.get_input_embeddings()  # type: ignore[operator]
    parameters = dict(module.named_parameters(remove_duplicate=False))
    names = [name for name, parameter in parameters.items() if parameter is embeddings.weight]
    for name in names:
        state[name] = state[name] * factor
    if len(names) > 1:
        final = f"{norms[-1]}.weight"
        state[final] = (state[final] + 1.0) / factor - 1.0


def _config(model: Model) -> Any:
    return model.module.config


def skeleton(model: Model, config: Any) -> torch.nn.Module:
    """A module of the same class and head, with random weights.

    Raises:
        BadInputError: the config is impossible.
    """
    cls: Any = type(model.module)
    try:
        with torch.random.fork_rng(devices=[]):
            module = cls(config)
            if getattr(module, "pooler", None) is not None and getattr(model.module, "pooler", None) is None:
                module = cls(config, add_pooling_layer=False)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise BadInputError(
            f"{cls.__name__} can't be built that small: {str(error).splitlines()[0]}",
            where="prune_width, prune_depth",
            next_step="Choose other shares.",
        ) from error
    linearize(module)
    made: torch.nn.Module = module.to(torch.float32).eval().requires_grad_(False)
    return made


def _rebuilt(
    model: Model, config: Any, state: Mapping[str, torch.Tensor], module: torch.nn.Module | None = None
) -> Model:
    """The model around the smaller module.

    Raises:
        BadInputError: the weights don't fit it, or the outputs that are compared would have other shapes.
    """
    module = skeleton(model, config) if module is None else module
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted != found:
        name = min(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        raise BadInputError(
            f"{type(module).__name__} is built in another way than its family: {name} is "
            f"{found.get(name, 'missing')} after pruning, {wanted.get(name, 'unknown')} in the smaller model.",
            where="prune_width, prune_depth",
            next_step="Leave the step out for this model.",
        )
    module.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    names = tuple(spec.name for spec in model.outputs)
    with torch.no_grad():
        outputs = select_outputs(module(**model.example), names)
    for spec in model.outputs:
        if tuple(outputs[spec.name].shape) != spec.fixed_shape():
            raise BadInputError(
                f"The output {spec.name!r} would be {tuple(outputs[spec.name].shape)} instead of "
                f"{spec.fixed_shape()}: what reads it, and the comparison with the original, need the original's.",
                where="hidden of prune_width",
                allowed="hidden below 1 for models with a head of their own (classifiers, language models)",
                next_step="Leave hidden at 1; prune ffn, heads or layers.",
            )
    return replace(model, module=module)

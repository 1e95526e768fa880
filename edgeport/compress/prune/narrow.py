"""Narrow a conv net: of every set of competing channels the same share stays, and all layers are cut to fit."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from edgeport.compress.chain import call
from edgeport.compress.prune.channels import Bundle, bundle_scores, find_bundles, is_mixing
from edgeport.compress.prune.cut import Kept
from edgeport.errors import BadInputError
from edgeport.model.inputs import select_outputs
from edgeport.model.types import Model
from edgeport.restructuring import PruneChannels

OUT, IN, THROUGH = "out.", "in.", "through."
"""How a cut names the rows of a writing layer, the columns of a reading one, and the channels of one that passes on."""


def choose_channels(
    model: Model, step: PruneChannels, inputs: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[dict[str, Kept], dict[str, float]]:
    """The channels that stay of every layer, and of each writing layer the share of the score that goes.

    Args:
        inputs: samples to score on; without any the first channels stay, which has the same shapes.

    Raises:
        BadInputError: no channel can go.
    """
    bundles = find_bundles(model, _excluded(model, step))
    scores = bundle_scores(model, bundles, inputs) if inputs else [0.0] * len(bundles)
    rivals: dict[tuple[str, ...], list[int]] = {}
    for index, bundle in enumerate(bundles):
        rivals.setdefault(bundle.layers, []).append(index)
    gone: list[Bundle] = []
    lost: dict[str, float] = {}
    for layers, members in rivals.items():
        left = min(max(round(len(members) * step.keep / step.multiple), 1) * step.multiple, len(members))
        order = sorted(members, key=lambda index: (-scores[index], index))
        out = order[left:]
        gone += [bundles[index] for index in out]
        total = sum(scores[index] for index in members)
        if out:
            lost |= dict.fromkeys(layers, sum(scores[index] for index in out) / total if total > 0 else 0.0)
    if not gone:
        raise BadInputError(
            f"No channel of {model.name} can go: all reach an output, are mixed outside of layers, or are fewer than "
            f"{step.multiple}.",
            where="prune_channels",
            allowed="conv nets whose layers have channels to spare; `multiple` rounds what stays",
            next_step="Leave the step out, lower `keep` or `multiple`, or take prune_width for transformers.",
        )
    return _kept(model, gone), lost


def _excluded(model: Model, step: PruneChannels) -> list[str]:
    names = [name for name, layer in model.module.named_modules() if is_mixing(layer)]
    for pattern in step.exclude:
        if not fnmatch.filter(names, pattern):
            raise BadInputError(
                f"The pattern {pattern!r} matches no convolution and no Linear layer.",
                where="exclude of prune_channels",
                allowed=f"patterns of layer names such as {', '.join(names[:3])}",
            )
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in step.exclude)]


def _kept(model: Model, gone: Sequence[Bundle]) -> dict[str, Kept]:
    """What is left of every layer when these bundles go."""
    out: dict[str, set[int]] = {}
    for bundle in gone:
        for kind, places in ((OUT, bundle.writers), (IN, bundle.readers), (THROUGH, bundle.carriers)):
            for name, channel in places:
                out.setdefault(f"{kind}{name}", set()).add(channel)
    kept = {}
    for key, channels in out.items():
        kind, _, name = key.partition(".")
        weight = model.module.get_submodule(name).get_parameter("weight")
        size = weight.shape[1 if f"{kind}." == IN else 0]
        kept[key] = tuple(channel for channel in range(size) if channel not in channels)
    return kept


def cut_channels(model: Model, kept: Mapping[str, Kept]) -> Model:
    """A model with some of its channels. The given one is not changed.

    Raises:
        BadInputError: the module does something with its channels that no layer shows.
    """
    module = copy.deepcopy(model.module)
    for key, channels in kept.items():
        kind, _, name = key.partition(".")
        _cut_layer(module.get_submodule(name), f"{kind}.", torch.tensor(channels))
    try:
        with torch.no_grad():
            outputs = select_outputs(call(module, model.example), [spec.name for spec in model.outputs])
    except (RuntimeError, IndexError, ValueError) as error:
        raise BadInputError(
            f"{model.name} counts on its number of channels outside of its layers: {str(error).splitlines()[0]}",
            where="prune_channels",
            next_step="Name the layers in `exclude`, or leave the step out.",
        ) from error
    assert all(tuple(outputs[spec.name].shape) == spec.fixed_shape() for spec in model.outputs)
    return replace(model, module=module)


def _cut_layer(layer: Any, kind: str, index: torch.Tensor) -> None:
    """Leave some rows, columns or channels of a layer, in place."""
    axis = 1 if kind == IN else 0
    for name, value in layer.named_parameters(recurse=False):
        if axis == 0 or name == "weight":
            setattr(layer, name, torch.nn.Parameter(value.detach().index_select(axis, index), requires_grad=False))
    for name, value in layer.named_buffers(recurse=False):
        if axis == 0 and value.ndim == 1:
            setattr(layer, name, value.index_select(0, index))
    count = len(index)
    if isinstance(layer, torch.nn.Linear):
        setattr(layer, "in_features" if kind == IN else "out_features", count)
    elif isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d):
        if kind != OUT:
            layer.in_channels = count
        if kind != IN:
            layer.out_channels = count
        if kind == THROUGH:
            layer.groups = count
    else:
        layer.num_features = count

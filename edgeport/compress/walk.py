"""Change the Linear layers of a model one block after the other, each on the inputs that the changed ones make."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence

import torch

from edgeport.compress.chain import call, find_chains
from edgeport.compress.sequential import capture, hand_on
from edgeport.compress.statistics import Moments, observed
from edgeport.errors import BadInputError
from edgeport.model.compressed import tied_names
from edgeport.model.types import Model

Inputs = Sequence[Mapping[str, torch.Tensor]]


def block_layers(model: Model, exclude: Sequence[str], step: str) -> list[str]:
    """Linear layers inside the model's blocks; all of them where it is no chain of blocks. Tied ones are left out.

    Args:
        exclude: glob patterns of weight names.
        step: what asks, for messages.

    Raises:
        BadInputError: a pattern matches nothing, or no layer is left.
    """
    linear = [name for name, child in model.module.named_modules() if isinstance(child, torch.nn.Linear)]
    weights = {f"{name}.weight": name for name in linear}
    for pattern in exclude:
        if not fnmatch.filter(weights, pattern):
            raise BadInputError(
                f"The pattern {pattern!r} matches no weight of a Linear layer.",
                where=f"exclude of {step}",
                allowed=f"patterns of weight names such as {', '.join(list(weights)[:3])}",
            )
    tied = {name for group in tied_names(model.module) for name in group}
    blocks = tuple(f"{name}." for chain in find_chains(model.module, model.example) for name in chain)
    found = [
        name
        for weight, name in weights.items()
        if weight not in tied
        and (not blocks or name.startswith(blocks))
        and not any(fnmatch.fnmatchcase(weight, pattern) for pattern in exclude)
    ]
    if not found:
        raise BadInputError(
            f"{model.name} has no Linear layer that {step} could change.",
            where=step,
            allowed="models with Linear layers whose weights are not shared",
            next_step="Leave the step out.",
        )
    return found


@torch.no_grad()
def walk(module: torch.nn.Module, layers: Sequence[str], inputs: Inputs, visit: Callable[[str, Moments], None]) -> None:
    """Call `visit` with each layer's name and the moments of its inputs; it may replace the layer, in place.

    Layers outside of any chain of blocks come last.

    Raises:
        BadInputError: an activation is not finite, or no sample reaches a layer.
    """
    left = dict.fromkeys(layers)

    def visit_all(moments: Mapping[str, Moments]) -> None:
        for name in [name for name in left if name in moments]:
            del left[name]
            visit(name, moments[name])

    for chain in find_chains(module, inputs[0]):
        calls = capture(module, module.get_submodule(chain[0]), inputs)
        for name in chain:
            block = module.get_submodule(name)
            inside = {layer: module.get_submodule(layer) for layer in left if layer.startswith(f"{name}.")}
            with observed(inside) as moments:
                for one in calls:
                    block(*one.arguments, **one.named)
            visit_all(moments)
            hand_on(block, calls)
    with observed({layer: module.get_submodule(layer) for layer in left}) as moments:
        for sample in inputs if left else ():
            call(module, sample)
    visit_all(moments)
    if left:
        raise BadInputError(
            "No calibration input reaches the layer.",
            where=next(iter(left)),
            next_step="Exclude it in the recipe.",
        )

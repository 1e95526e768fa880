"""Feature maps of a conv net towards the teacher's: at each resolution those of the last convolution that has it.

Where both have equally many channels, the squared error relative to the teacher's (FitNets, Romero et al. 2015,
https://arxiv.org/abs/1412.6550). Else attention transfer (Zagoruyko & Komodakis 2017, https://arxiv.org/abs/1612.03928,
eq. 2): with Q = sum_c F_c^2 over the picture as a vector, || Q_s / |Q_s| - Q_t / |Q_t| ||^2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from edgeport.compress.chain import call
from edgeport.compress.distill.hidden import relative_error
from edgeport.errors import BadInputError


def last_by_size(module: torch.nn.Module, example: Mapping[str, torch.Tensor]) -> dict[tuple[int, ...], str]:
    """For each size of a picture (height, width) above 1 x 1, the convolution that gives it last."""
    found: dict[tuple[int, ...], str] = {}

    def note(name: str) -> Any:
        def hook(_layer: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            size = tuple(output.shape[2:])
            if max(size) > 1:
                found[size] = name

        return hook

    convolutions = {name: child for name, child in module.named_modules() if isinstance(child, torch.nn.Conv2d)}
    handles = [child.register_forward_hook(note(name)) for name, child in convolutions.items()]
    try:
        with torch.no_grad():
            call(module, example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def feature_pairs(
    student: torch.nn.Module, teacher: torch.nn.Module, example: Mapping[str, torch.Tensor]
) -> list[tuple[str, str]]:
    """(student's layer, teacher's layer) for each size that both have, the largest first.

    Raises:
        BadInputError: they have none in common.
    """
    own, other = (last_by_size(module, example) for module in (student, teacher))
    common = sorted(own.keys() & other.keys(), reverse=True)
    if not common:
        raise BadInputError(
            "Student and teacher have no feature maps of equal size.",
            where="features of distill",
            allowed="conv nets that scale a picture down by the same steps",
            next_step="Leave features out.",
        )
    return [(own[size], other[size]) for size in common]


def attention_map(features: torch.Tensor) -> torch.Tensor:
    """Where a map is strong: (batch, height * width), of length 1 for each picture."""
    return torch.nn.functional.normalize(features.float().square().sum(1).flatten(1), dim=1)


def feature_loss(
    student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], pairs: Sequence[tuple[str, str]]
) -> torch.Tensor:
    """Mean over the pairs, a scalar.

    Args:
        student, teacher: (batch, channels, height, width) by the name of the layer.
    """
    total = torch.zeros(())
    for own, other in pairs:
        one, two = student[own], teacher[other]
        if one.shape == two.shape:
            total = total + relative_error(one, two, None)
        else:
            total = total + (attention_map(one) - attention_map(two)).square().sum(1).mean()
    return total / len(pairs)

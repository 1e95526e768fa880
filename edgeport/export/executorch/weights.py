"""Read the compressed weights back out of the shipped .pte file."""

from __future__ import annotations

from dataclasses import replace

import torch

from edgeport.errors import BadInputError
from edgeport.export.artifact import Artifact
from edgeport.export.executorch.pte import read_program, stored_weights
from edgeport.quantized import QuantizedTensor


def same_weight(left: QuantizedTensor, right: QuantizedTensor) -> bool:
    """Equal codes, in any shape, and equal scales."""
    return (
        left.bits == right.bits
        and left.scale.shape == right.scale.shape
        and torch.equal(left.scale, right.scale)
        and torch.equal(left.codes.reshape(left.rows, -1), right.codes.reshape(right.rows, -1))
    )


def read_weights(artifact: Artifact) -> dict[str, QuantizedTensor]:
    """The codes and scales that the file holds for each compressed parameter, in the parameter's shape.

    A weight that the file holds in several places (an embedding tied to a head) must be the same in each.

    Raises:
        BadInputError: the file is damaged, lacks a weight, or holds two versions of it.
    """
    stored = dict(stored_weights(read_program(artifact.path)))
    result = {}
    for name, places in artifact.weights.items():
        copies = [stored.get(place) for place in places.split(" + ")]
        first = copies[0]
        if first is None or any(copy is None or not same_weight(first, copy) for copy in copies):
            raise BadInputError(
                "The file does not hold the weight where it was written, or holds it in two versions.",
                where=f"{artifact.entry}: {name} at {places}",
                next_step="Export again: the file was changed after the export.",
            )
        shape = artifact.facts["weight_shapes"][name]
        result[name] = replace(first, codes=first.codes.reshape(shape))
    return result

"""What is explained: a shipped file, and what was recorded when it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from edgeport.explain.document import Group
from edgeport.explain.groups import layer_group

if TYPE_CHECKING:
    import numpy as np

    from edgeport.compress.apply import LayerRecord
    from edgeport.compress.restructure import StepRecord
    from edgeport.export.artifact import Artifact
    from edgeport.recipe import Recipe

    Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Shipped:
    """One bundle, as far as explaining it needs.

    Attributes:
        parameters: values in the original's parameters.
        layers: what compression did to each weight.
        steps: what pruning and the like did before.
        samples: golden inputs, one mapping a call.
    """

    artifact: Artifact
    task: str
    recipe: Recipe
    parameters: int
    layers: tuple[LayerRecord, ...]
    steps: tuple[StepRecord, ...]
    samples: tuple[Arrays, ...]

    @cached_property
    def groups(self) -> dict[str, Group]:
        """The group of each weight that compression knows, by its parameter's name."""
        return {layer.name: layer_group(layer.name, layer.kinds) for layer in self.layers}

    @cached_property
    def records(self) -> dict[str, LayerRecord]:
        """The record of each weight, by its parameter's name."""
        return {layer.name: layer for layer in self.layers}


def module_of(parameter: str) -> str:
    """The layer that a parameter belongs to."""
    return parameter.rpartition(".")[0]

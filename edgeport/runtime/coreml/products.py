"""The products with weights that a Core ML program makes, counted while the reference evaluator runs it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgeport.export.artifact import Artifact
from edgeport.mlpackage.package import load_package
from edgeport.runtime.coreml.evaluate import Evaluator, Values
from edgeport.runtime.coreml.features import function_features, prepare_input
from edgeport.runtime.coreml.plan import Step


class _Counter(Evaluator):
    """An evaluator that counts."""

    operations = 0

    def _apply(self, step: Step, arguments: Values, values: Values, state: Any) -> tuple[Any, ...]:
        results = super()._apply(step, arguments, values, state)
        kind, names = step.operation.type, step.arguments
        if kind in ("linear", "conv") and names["weight"] in self._constants:
            self.operations += 2 * results[0].numel() * math.prod(arguments["weight"].shape[1:])
        elif kind == "matmul" and (names["x"] in self._constants or names["y"] in self._constants):
            x = arguments["x"]
            shared = (
                x.shape[-2]
                if arguments.get("transpose_x") is not None and bool(arguments["transpose_x"])
                else x.shape[-1]
            )
            self.operations += 2 * results[0].numel() * shared
        return results


def coreml_products(artifact: Artifact, inputs: Mapping[str, np.ndarray]) -> int:
    """Operations of the products with weights in one call, 2 for a multiply-add.

    Raises:
        BadInputError: the package is damaged, or the inputs don't fit.
        MeasurementError: the program has an operator that the evaluator does not know.
    """
    package = load_package(artifact.path)
    counter = _Counter(package)
    expected = function_features(package, counter.function.name).inputs
    counter.run({name: prepare_input(name, inputs[name], expected[name]) for name in expected})
    return counter.operations

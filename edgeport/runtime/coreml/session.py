"""CoreMLReferenceSession: a saved .mlpackage behind the interface that every runtime offers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from edgeport.errors import BadInputError
from edgeport.export.artifact import Artifact
from edgeport.mlpackage.package import load_package
from edgeport.runtime.coreml.evaluate import Evaluator, Policy
from edgeport.runtime.coreml.features import function_features, prepare_input


class CoreMLReferenceSession:
    """Runs a Core ML package in edgeport's evaluator: the program's arithmetic, not Apple's kernels.

    Attributes:
        name: "coreml-reference".
        vendor_kernels: False; its time says nothing about a device.
        policy: "declared" rounds to float16 where the program does, "fp32" rounds nowhere.
        labels: class labels of a classifier, in the order of its probabilities.
    """

    name = "coreml-reference"
    vendor_kernels = False

    def __init__(self, artifact: Artifact, policy: Policy | None = None, *, function: str | None = None) -> None:
        """Load the package at `artifact.path`.

        Args:
            policy: None takes the types that the program declares.
            function: of a multifunction package; None takes its default.

        Raises:
            BadInputError: the package is missing, damaged, or leads outside its folder.
            MeasurementError: the program has an operator that the evaluator does not know.
        """
        package = load_package(artifact.path)
        self.policy: Policy = policy or "declared"
        self._evaluator = Evaluator(package, function=function, policy=self.policy)
        self._features = function_features(package, self._evaluator.function.name)
        self.labels = self._evaluator.labels
        self._renamed: Mapping[str, str] = artifact.facts.get("renamed_inputs", {})

    def new_state(self) -> dict[str, torch.Tensor]:
        """A state to carry between runs of a stateful model, zeros at first; empty for other models."""
        return self._evaluator.new_state()

    def run(
        self, inputs: Mapping[str, np.ndarray], state: dict[str, torch.Tensor] | None = None
    ) -> dict[str, np.ndarray]:
        """Run once.

        Args:
            inputs: every input by the model's name or the file's. Integers are cast within range, floats are rounded
                to the type that the package takes. A picture is uint8 (H, W, 3) in RGB order, or (1, 3, H, W) with
                values 0 to 255.
            state: from `new_state`, updated in place; None starts from zeros.

        Returns:
            Every output by name: floats as float32 (float16 where the package says so), a classifier's label as
            an array of rank 0 and its probabilities as one array in the order of `labels`.

        Raises:
            BadInputError: an input is missing, unknown, or does not fit the package's description.
            MeasurementError: an operator can't be evaluated on these inputs.
        """
        expected = self._features.inputs
        inputs = {self._renamed.get(name, name): array for name, array in inputs.items()}
        if set(inputs) != set(expected):
            raise BadInputError(
                f"The inputs don't fit the model: missing {sorted(set(expected) - set(inputs))}, "
                f"unknown {sorted(set(inputs) - set(expected))}.",
                allowed=sorted(expected),
            )
        tensors = {name: prepare_input(name, array, expected[name]) for name, array in inputs.items()}
        results = self._evaluator.run(tensors, state)
        return {name: self._output(name, results[name]) for name in self._features.outputs}

    def _output(self, name: str, value: Any) -> np.ndarray:
        array = value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        return np.array(array, dtype=self._features.outputs[name])  # a copy: values may share the state's memory

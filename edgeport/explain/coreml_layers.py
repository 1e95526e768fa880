"""The layers of a shipped Core ML package, in edgeport's evaluator: the program's arithmetic, not Apple's kernels."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgeport.explain.document import Missing
from edgeport.explain.shipped import Shipped
from edgeport.explain.watch import Place, Value, Watched, layers_of, of_kind
from edgeport.mlpackage.package import Package, load_package
from edgeport.mlpackage.program import Operation, Reference, Variable
from edgeport.runtime.coreml.decoder import CoreMLReferenceTokens
from edgeport.runtime.coreml.evaluate import Evaluator
from edgeport.runtime.coreml.session import CoreMLReferenceSession

if TYPE_CHECKING:
    from edgeport.export.artifact import Artifact

    Arrays = Mapping[str, np.ndarray]

STATEMENT = (
    "Values inside the shipped package, computed by edgeport's evaluator of Core ML programs with the program's own "
    "rounding to float16, against the float original in torch. Apple's kernels were not run."
)
LOOKUPS = ("gather",)
PRODUCTS = ("conv", "conv_transpose", "einsum", "linear", "matmul")


class _Seeing(Evaluator):
    """An evaluator that keeps a copy of some values."""

    def __init__(self, package: Package, wanted: Collection[str]) -> None:
        super().__init__(package)
        self.wanted = frozenset(wanted)
        self.values: dict[str, np.ndarray] = {}

    def _hold(self, value: Any, variable: Variable, operation: Operation | None) -> Any:
        held = super()._hold(value, variable, operation)
        if variable.name in self.wanted and isinstance(held, torch.Tensor):
            self.values[variable.name] = held.clone().numpy()
        return held


@contextmanager
def watch_coreml(shipped: Shipped, artifact: Artifact) -> Iterator[Watched]:
    """The package with its layers' values visible.

    Args:
        artifact: the package; the shipped one, or the one inside an ExecuTorch program.
    """
    package = load_package(artifact.path)
    alone = CoreMLReferenceSession(artifact)
    places, missing = _places(alone._evaluator, shipped)
    wanted = {value.name for place in places for value in (place.output, place.input) if value is not None}
    seeing = _Seeing(package, wanted)
    change = [0.0]

    if artifact.context is not None:
        tokens, plain = CoreMLReferenceTokens(artifact), CoreMLReferenceTokens(artifact)
        tokens._session._evaluator = seeing

        def run(sample: Arrays) -> Arrays:
            ids = next(iter(sample.values()))[0].astype(np.int64)
            for one in (tokens, plain):
                one.rewind()
            change.append(_largest(tokens.feed(ids) - plain.feed(ids)))
            return seeing.values

    else:
        session = CoreMLReferenceSession(artifact)
        session._evaluator = seeing

        def run(sample: Arrays) -> Arrays:
            found, expected = session.run(sample), alone.run(sample)
            floats = [name for name, value in expected.items() if np.issubdtype(value.dtype, np.floating)]
            change.append(max((_largest(found[name] - expected[name]) for name in floats), default=0.0))
            return seeing.values

    yield Watched("shipped graph", STATEMENT, tuple(places), tuple(missing), run, lambda: max(change))


def _largest(difference: np.ndarray) -> float:
    return float(np.abs(difference).max(initial=0.0))


def _places(evaluator: Evaluator, shipped: Shipped) -> tuple[list[Place], list[Missing]]:
    """Where the layers of a program are, in its order, and those that are not found."""
    from edgeport.explain.package_bytes import constant_parameters

    operations = list(evaluator.function.body.walk())
    known = constant_parameters(operations, shipped.artifact.weights, tuple(shipped.groups))
    users = layers_of(shipped)
    uses: dict[tuple[str, bool], int] = {}
    places = []
    for operation in operations:
        if operation.type not in LOOKUPS + PRODUCTS:
            continue
        lookup = operation.type in LOOKUPS
        names = {key: one.name for key, (one, *_) in operation.inputs.items() if isinstance(one, Reference)}
        key = next((key for key, name in names.items() if name in known), None)
        if key is None or known[names[key]] not in users:
            continue
        parameter = known[names[key]]
        layers = of_kind(users[parameter], shipped.records[parameter].kinds, lookup=lookup)
        index = uses.get((parameter, lookup), 0)
        uses[parameter, lookup] = index + 1
        if not layers:
            continue
        given = names.get("x" if key != "x" else "y")
        value = None if lookup or given is None else Value(given)
        layer, call = layers[min(index, len(layers) - 1)], max(0, index - len(layers) + 1)
        places.append(Place(layer, parameter, call, Value(operation.outputs[0].name), value, not lookup))
    found = {place.parameter for place in places}
    why = "no operator of the program reads its weight under a name that the original has"
    return places, [Missing(layer=layers[0], why=why) for name, layers in users.items() if name not in found]

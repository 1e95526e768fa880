"""Errors layer by layer, through whatever the runtime shows of the shipped file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgeport.errors import MeasurementError
from edgeport.explain.document import LayerErrors
from edgeport.explain.watch import Watch, Watched, compare_layers

if TYPE_CHECKING:
    from edgeport.explain.shipped import Shipped
    from edgeport.model.types import Model

DELEGATED = "an ExecuTorch delegate hands out no values of its inside"
TWO_FILES = "an encoder-decoder is two files that call each other"
ORT_FORMAT = "an ORT-format file takes no further outputs"
GROWING = "a cache that grows by concatenation is fed by the session alone"


def layer_errors(shipped: Shipped, model: Model, watch: Watch) -> LayerErrors:
    """Every layer of the shipped file against the original's.

    Args:
        model: the original, without a cache.

    Raises:
        MeasurementError: the layers can't be compared; `what` says why.
    """
    if (why := incomparable(shipped)) is not None:
        raise MeasurementError(why)
    if not shipped.samples:
        raise MeasurementError("The bundle has no golden inputs.")
    with _watched(shipped, model) as file:
        return compare_layers(shipped, model, file, watch)


def incomparable(shipped: Shipped) -> str | None:
    """Why the layers of the file are not those of the original any more; None where they are."""
    if shipped.steps:
        methods = ", ".join(step.method for step in shipped.steps)
        return f"The recipe made another model of it ({methods}): its layers are not the original's."
    if any(step.method == "rotate" for step in shipped.recipe.prepare):
        return "The recipe rotated the model: its layers compute in another basis than the original's."
    return None


@contextmanager
def _watched(shipped: Shipped, model: Model) -> Iterator[Watched]:
    artifact = shipped.artifact
    if artifact.runtime == "executorch" and artifact.delegate == "coreml":
        from edgeport.explain.coreml_layers import watch_coreml
        from edgeport.export.executorch.shell import unwrap_package

        with (
            tempfile.TemporaryDirectory() as folder,
            watch_coreml(shipped, unwrap_package(artifact, Path(folder))) as f,
        ):
            yield f
        return
    if artifact.runtime == "coreml":
        from edgeport.explain.coreml_layers import watch_coreml

        with watch_coreml(shipped, artifact) as file:
            yield file
        return
    why = _hidden(shipped)
    if why is None:
        from edgeport.explain.onnx_layers import watch_onnx

        with watch_onnx(shipped, model.module.state_dict()) as file:
            yield file
        return
    from edgeport.explain.logical import logical_form, weights_of

    weights = weights_of(shipped)
    if not weights:
        raise MeasurementError(f"Not possible here: {why}, and no weight of the file is compressed.")
    yield logical_form(shipped, model, weights, why)


def _hidden(shipped: Shipped) -> str | None:
    """Why values inside the file can't be seen; None where they can."""
    artifact = shipped.artifact
    if artifact.runtime == "executorch":
        return DELEGATED
    if artifact.encoder is not None:
        return TWO_FILES
    if artifact.path.suffix == ".ort":
        return ORT_FORMAT
    return GROWING if artifact.facts.get("attention") == "standard" else None

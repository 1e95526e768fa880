"""The layers of a shipped ONNX file: where their outputs and inputs are, and a session that shows them.

The session runs the very bytes of the shipped file with a message appended that names more outputs ("parsing the
concatenation of two encoded messages gives the same result as merging them", protobuf's encoding specification). What
ONNX Runtime would fuse when it loads the file could be kept apart by an output in its middle. So outputs are taken
behind clamps and roundings, which are fused with a layer, and the file's own outputs are compared with and without.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgeport.explain.onnx_places import find_places
from edgeport.explain.shipped import Shipped
from edgeport.explain.watch import Watched
from edgeport.model.types import TensorSpec
from edgeport.runtime.onnx_decoder import OnnxRuntimeTokens
from edgeport.runtime.onnxruntime import OnnxRuntimeSession

if TYPE_CHECKING:
    import torch

    from edgeport.export.artifact import Artifact

    Arrays = Mapping[str, np.ndarray]
    Shown = tuple[Callable[[Arrays], Arrays], Callable[[], float]]

STATEMENT = (
    "Values inside the shipped file, computed by ONNX Runtime's own kernels in a copy of its bytes that names them as "
    "outputs, against the float original in torch."
)


@contextmanager
def watch_onnx(shipped: Shipped, state: Mapping[str, torch.Tensor]) -> Iterator[Watched]:
    """The shipped file with its layers' values visible.

    Args:
        state: the original's parameters, by which float weights are known again.
    """
    artifact = shipped.artifact
    program = ir.load(artifact.path)
    places, missing = find_places(program.graph, shipped, state)
    own = {spec.name for spec in artifact.outputs}
    wanted = {value.name for place in places for value in (place.output, place.input) if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        copy = _copy(artifact, Path(folder), sorted(wanted - own))
        run, change = _decoder(artifact, copy) if artifact.context is not None else _plain(artifact, copy)
        yield Watched("shipped graph", STATEMENT, tuple(places), tuple(missing), run, change)


def _copy(artifact: Artifact, folder: Path, names: Sequence[str]) -> Artifact:
    """The file with more outputs, in another folder; data files beside it come along."""
    import onnx

    target = folder / artifact.entry
    shutil.copyfile(artifact.path, target)
    more = onnx.ModelProto()
    more.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    with target.open("ab") as file:
        file.write(more.SerializeToString())
    for data in artifact.path.parent.glob(f"{artifact.path.name}.data*"):
        # No symbolic link: ONNX Runtime refuses data that lie outside of the model's folder.
        try:
            os.link(data, folder / data.name)
        except OSError:  # another file system
            shutil.copyfile(data, folder / data.name)
    outputs = (*artifact.outputs, *(TensorSpec(name, "float32", ()) for name in names))
    return replace(artifact, root=folder, outputs=outputs)


def _plain(artifact: Artifact, copy: Artifact) -> Shown:
    shown, alone = OnnxRuntimeSession(copy), OnnxRuntimeSession(artifact)
    change = [0.0]

    def run(sample: Arrays) -> Arrays:
        values, expected = shown.run(sample), alone.run(sample)
        change.append(max(_largest(values[name] - expected[name]) for name in expected))
        return values

    return run, lambda: max(change)


class _Shown(OnnxRuntimeTokens):
    """A decoder that shows what its file names as outputs beside scores and cache."""

    def __init__(self, artifact: Artifact, own: set[str]) -> None:
        super().__init__(artifact)
        self.shown = [spec.name for spec in artifact.outputs if spec.name not in own]
        for name in self.shown:
            self._binding.bind_output(name, "cpu")

    def values(self) -> dict[str, np.ndarray]:
        """What the last call computed, by name. The binding gives outputs in the order in which they were bound."""
        found = self._binding.get_outputs()[-len(self.shown) :]
        return {name: value.numpy() for name, value in zip(self.shown, found, strict=True)}


def _decoder(artifact: Artifact, copy: Artifact) -> Shown:
    """A whole text in one call; the last scores are the file's own output."""
    own = {spec.name for spec in artifact.outputs}
    shown, alone = _Shown(copy, own), OnnxRuntimeTokens(artifact)
    change = [0.0]

    def run(sample: Arrays) -> Arrays:
        ids = next(iter(sample.values()))[0].astype(np.int64)
        for tokens in (shown, alone):
            tokens.rewind()
        scores, expected = shown.feed(ids), alone.feed(ids)
        change.append(_largest(scores - expected))
        return {**shown.values(), "logits": scores[None, None]}

    return run, lambda: max(change)


def _largest(difference: np.ndarray) -> float:
    return float(np.abs(difference).max(initial=0.0))

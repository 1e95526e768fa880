"""Size on disk: the bytes that an app must carry to run the model."""

from __future__ import annotations

from edgeport.export.artifact import Artifact
from edgeport.storage import tree_size
from edgeport.validate.evidence import Size


def model_bytes(artifact: Artifact) -> int:
    """Bytes of the files or folder that the runtime loads, with external data that goes by their names.

    An alternative form of the same model beside it (an ORT-format file) is not counted: one of them ships.
    """
    beside = [path for entry in artifact.paths for path in entry.parent.glob(f"{entry.name}*") if path != entry]
    return sum(tree_size(path) for path in (*artifact.paths, *beside))


def measure_size(artifact: Artifact, baseline_bytes: int | None, predicted_bytes: int | None = None) -> Size:
    """The artifact's size.

    Args:
        baseline_bytes: of the fp32 artifact of the same runtime, where there is one.
        predicted_bytes: what the plan promised.
    """
    size = model_bytes(artifact)
    ratio = size / baseline_bytes if baseline_bytes else None
    return Size(bytes=size, baseline_bytes=baseline_bytes, ratio=ratio, predicted_bytes=predicted_bytes)

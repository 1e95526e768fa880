"""Real inputs and the uncompressed torch model's outputs on them, as a folder of inputs, outputs and record.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edgeport.progress import Progress
from edgeport.storage import canonical_json

if TYPE_CHECKING:
    import numpy as np

    from edgeport.data.samples import SampleRecord
    from edgeport.model.types import Model


def write_reference(
    out: Path, model: Model, inputs: Sequence[Mapping[str, np.ndarray]], record: SampleRecord, progress: Progress
) -> None:
    """Run the model on `inputs` and write both into the folder `out`, with where the inputs are from."""
    from edgeport.runtime.torch import TorchSession
    from edgeport.vectors import save_vectors

    session = TorchSession(model)
    outputs = []
    for index, call in enumerate(inputs):
        outputs.append(session.run(call))
        progress.update(index + 1, len(inputs), "torch, float32")
    save_vectors(out / "inputs.safetensors", inputs)
    save_vectors(out / "outputs.safetensors", outputs)
    (out / "record.json").write_text(canonical_json({**asdict(record), "samples": len(inputs)}))

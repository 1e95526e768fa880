"""Golden vectors: a few inputs with the outputs they must give, for a device to check itself with.

Three safetensors files in the form of edgeport.vectors, each tensor named "<sample>/<tensor name>":
`inputs`, `outputs` (of the uncompressed torch model: what the artifact should come close to) and,
where the artifact was run, `outputs_artifact` (of the shipped file: what the same runtime on another
processor should give almost exactly).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from edgeport.errors import BadInputError
from edgeport.vectors import load_vectors, save_vectors

if TYPE_CHECKING:
    import numpy as np

    Sample = Mapping[str, np.ndarray]

INPUTS = "inputs.safetensors"
OUTPUTS = "outputs.safetensors"
ARTIFACT_OUTPUTS = "outputs_artifact.safetensors"

TOKENIZER = "tokenizer.json"
"""Texts and the ids that must come of them, as JSON (`edgeport.validate.tokenizer`)."""

MOST_SAMPLES = 4
MOST_BYTES = 32 * 1024 * 1024
"""A language model's logits are tens of megabytes a sample: the vectors must not outgrow the model."""


@dataclass(frozen=True)
class Golden:
    """Golden vectors, one mapping of named arrays a sample.

    Attributes:
        inputs: what goes in, as the model takes it.
        outputs: of the uncompressed torch model.
        artifact_outputs: of the shipped file in its runtime here; empty where it was not run.
    """

    inputs: tuple[Sample, ...]
    outputs: tuple[Sample, ...]
    artifact_outputs: tuple[Sample, ...] = ()

    def first(self) -> Golden:
        """The first samples that fit in `MOST_SAMPLES` and `MOST_BYTES`; one at least."""
        kinds = [kind for kind in (self.inputs, self.outputs, self.artifact_outputs) if kind]
        sizes = [sum(array.nbytes for sample in row for array in sample.values()) for row in zip(*kinds, strict=True)]
        fitting = sum(total <= MOST_BYTES for total in accumulate(sizes[:MOST_SAMPLES]))
        count = max(1, fitting)
        return Golden(self.inputs[:count], self.outputs[:count], self.artifact_outputs[:count])

    def nbytes(self) -> int:
        """Bytes of all values."""
        samples = (*self.inputs, *self.outputs, *self.artifact_outputs)
        return sum(array.nbytes for sample in samples for array in sample.values())


def _load(path: Path) -> tuple[Sample, ...]:
    from safetensors import SafetensorError

    try:
        return tuple(load_vectors(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInputError(f"The golden vectors can't be read: {error}.", where=path) from error


def save_golden(golden: Golden, folder: Path) -> None:
    """Write the vectors into an existing folder."""
    save_vectors(folder / INPUTS, golden.inputs)
    save_vectors(folder / OUTPUTS, golden.outputs)
    if golden.artifact_outputs:
        save_vectors(folder / ARTIFACT_OUTPUTS, golden.artifact_outputs)


def load_golden(folder: Path) -> Golden:
    """Read the vectors of a folder.

    Raises:
        BadInputError: a file is missing or damaged, or the files hold different numbers of samples.
    """
    measured = folder / ARTIFACT_OUTPUTS
    golden = Golden(_load(folder / INPUTS), _load(folder / OUTPUTS), _load(measured) if measured.is_file() else ())
    if len(golden.inputs) != len(golden.outputs) or len(golden.artifact_outputs) not in (0, len(golden.inputs)):
        raise BadInputError("The golden inputs and outputs hold different numbers of samples.", where=folder)
    return golden

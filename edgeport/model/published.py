"""A Model around an image classifier with published weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from edgeport.model.fold import fold_norms
from edgeport.model.inputs import BATCH, make_example, output_specs
from edgeport.model.types import ImagePreprocessing, Model, Source, TensorSpec
from edgeport.storage import hash_file


def published_classifier(
    module: torch.nn.Module,
    path: Path,
    image: ImagePreprocessing,
    *,
    name: str,
    reference: str,
    labels: Path | None,
    hashes: Mapping[str, str] | None,
) -> Model:
    """A zoo model that takes `pixel_values` (batch, 3, height, width), its batch norms folded.

    Args:
        module: holds the weights; it becomes the Model's own and is changed in place.
        path: the file they came from.
        labels: a JSON list of the classes' names.
        hashes: sha256 by file name where they are already known.
    """
    module.eval().requires_grad_(False)
    inputs = (TensorSpec("pixel_values", "float32", (BATCH, 3, *image.size)),)
    example = make_example(inputs)
    fold_norms(module, example)
    files = [path] if labels is None else [path, labels]
    known = hashes or {}
    return Model(
        name=name,
        module=module,
        source=Source("zoo", reference, {file.name: known.get(file.name) or hash_file(file) for file in files}),
        task="image-classification",
        modality="image",
        inputs=inputs,
        outputs=output_specs(module, inputs, default="logits"),
        example=example,
        huggingface=False,
        image=image,
        labels=() if labels is None else tuple(json.loads(labels.read_text())),
    )

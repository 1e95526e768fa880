"""Seeded random inputs, for models that no real data fits. Evidence made with them says so."""

from __future__ import annotations

import numpy as np

from edgeport.model.inputs import vocabulary_size
from edgeport.model.types import Axis, Model, TensorSpec


def synthetic_inputs(
    model: Model, *, count: int, seed: int, split: str, sequence: int | None = None
) -> list[dict[str, np.ndarray]]:
    """Random values with the example's own range: floats with its mean and deviation, integers up to its largest.

    Token ids cover the whole vocabulary; masks are 1 and segments 0. Without `sequence`, text lengths vary
    between a quarter of the example's length and all of it.

    Returns:
        For each call the named input arrays, with the batch size of the example.
    """
    # Other numbers for each split, so that nothing is tuned on what it is measured on.
    generator = np.random.default_rng([seed, 0 if split == "parity" else 1])
    vocabulary = vocabulary_size(model.module) if model.huggingface else None
    calls = []
    for _ in range(count):
        sizes: dict[str, int] = {}
        for axis in (size for spec in model.inputs for size in spec.shape if isinstance(size, Axis)):
            if axis.name not in sizes:
                sizes[axis.name] = _size(axis, sequence, generator)
        calls.append({spec.name: _value(model, spec, sizes, vocabulary, generator) for spec in model.inputs})
    return calls


def _size(axis: Axis, sequence: int | None, generator: np.random.Generator) -> int:
    if axis.name in ("sequence", "samples") and sequence is not None:
        return sequence
    if axis.name == "sequence":
        return int(generator.integers(max(axis.minimum, axis.example // 4), axis.example + 1))
    return axis.example


def _value(
    model: Model, spec: TensorSpec, sizes: dict[str, int], vocabulary: int | None, generator: np.random.Generator
) -> np.ndarray:
    shape = tuple(sizes[size.name] if isinstance(size, Axis) else size for size in spec.shape)
    dtype = np.dtype(spec.dtype)
    if spec.name.endswith("attention_mask"):
        return np.ones(shape, dtype)
    if spec.name == "token_type_ids":
        return np.zeros(shape, dtype)
    example = model.example[spec.name].numpy()
    if dtype.kind == "f":
        deviation = float(example.std()) or 1.0
        return generator.normal(float(example.mean()), deviation, shape).astype(dtype)
    if dtype.kind == "b":
        return generator.integers(0, 2, shape).astype(dtype)
    tokens = vocabulary if spec.name.endswith("input_ids") and vocabulary else int(example.max()) + 1
    return generator.integers(0, tokens, shape).astype(dtype)

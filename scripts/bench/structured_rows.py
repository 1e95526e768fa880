"""Rows of the bench of structured compression: which model, cut how, for which targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ORT, EXECUTORCH, COREML = "linux-x86_64-ort", "raspberry-pi-5-executorch", "ios18-coreml"
RUNTIMES = {ORT: "ONNX Runtime", EXECUTORCH: "ExecuTorch", COREML: "Core ML"}
ALL = (ORT, EXECUTORCH, COREML)

Steps = tuple[Mapping[str, Any], ...]
ORIGINAL = "original"
PUBLISHED_L3 = "paraphrase-minilm-l3"
"""A reference of the bench's own: structured_published.py makes its folder."""


@dataclass(frozen=True)
class Row:
    """One row of a model's table.

    Attributes:
        model: the table; a name of the zoo.
        steps: `[[compress]]` of the recipe; empty for a checkpoint as it is.
        source: the checkpoint, where it is not the model's own: another row whose result is gone on from, or
            PUBLISHED_L3.
        targets: files to make; the first one's is asked the suites.
        against: rows that it is compared with, question by question.
    """

    model: str
    name: str
    steps: Steps = ()
    source: str | None = None
    targets: tuple[str, ...] = (ORT,)
    against: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """As the command line names it."""
        return f"{self.model} {self.name}"


SUITES: Mapping[str, tuple[str, ...]] = {
    "minilm": ("sentiment", "intents", "similarity", "smart-reply"),
    "smollm2": ("language",),
    "mobilenetv2": ("photos", "stamps"),
}
"""What is asked of a table's files. Encoders get classifiers fitted on the embeddings of the file itself."""

CALIBRATION: Mapping[str, Mapping[str, Any]] = {
    "smollm2": {"samples": 16},
    "mobilenetv2": {"card": "cutouts", "samples": 180},
}
"""What parts are chosen from, where not from the usual inputs: each layer taken out of a language model asks for all of
them again, and channels that are solved again need more pictures than the six of the default card."""

INT8 = {"method": "rtn", "linear": "int8", "embedding": "int8", "activations": ["dynamic_int8", "float"]}
CONV_INT8 = {
    "method": "rtn",
    "linear": "int8",
    "conv": "int8",
    "depthwise_conv": ["int8", "float"],
    "correct_bias": True,
}

HALF_DEPTH = {"method": "prune_depth", "layers": 3}
DEPTH = {"method": "prune_depth", "layers": 20}
WIDTH = {"method": "prune_width", "ffn": 0.555}
LOW_RANK = {"method": "lowrank", "keep": 0.68, "multiple": 8}
RESIDUAL = ["features.*.conv.1", "features.*.conv.2", "features.0.*", "features.18.*"]
"""Layers of MobileNetV2 that stay whole: without channels of its residual stream nothing is left of the model."""
CHANNELS = {"method": "prune_channels", "keep": 0.75, "exclude": RESIDUAL}

HEAL_ENCODER = {
    "method": "distill",
    "hidden": 0.5,
    "steps": 200,
    "batch": 16,
    "learning_rate": 4e-4,
    "checks": 5,
    "held_out": 48,
    "data": {"samples": 1600},
}
HEAL_DECODER = {
    "method": "distill",
    "steps": 440,
    "batch": 4,
    "learning_rate": 3e-4,
    "checks": 4,
    "held_out": 16,
    "precision": "mixed",
    "freeze": ["model.embed_tokens.weight"],
    "data": {"samples": 944},
}
HEAL_CONV = {
    "method": "distill",
    "features": 0.5,
    "steps": 400,
    "batch": 12,
    "learning_rate": 2e-5,
    "checks": 8,
    "patience": 8,  # what was solved is a sharp optimum: the first steps undo a part of it
    "data": {"card": "cutouts", "samples": 360},
}
"""Trainings on one core: 40 minutes at most each."""

ROWS = (
    Row("minilm", ORIGINAL, targets=ALL),
    Row("minilm", "3 layers, cut only", (HALF_DEPTH,), targets=ALL),
    Row("minilm", "low rank 50%, cut only", ({"method": "lowrank", "keep": 0.5},)),
    Row(
        "minilm",
        "3 layers, healed",
        (HALF_DEPTH, HEAL_ENCODER),
        targets=ALL,
        against=("published paraphrase-MiniLM-L3",),
    ),
    Row("minilm", "3 layers, healed, int8", (HALF_DEPTH, HEAL_ENCODER, INT8), against=("original, int8",)),
    Row("minilm", "published paraphrase-MiniLM-L3", source=PUBLISHED_L3),
    Row("minilm", "original, int8", (INT8,)),
    Row("smollm2", ORIGINAL, targets=ALL),
    Row("smollm2", "20 layers, cut only", (DEPTH,)),
    Row("smollm2", "MLPs 55%, cut only", (WIDTH,), against=("20 layers, cut only",)),
    Row("smollm2", "low rank 68%, cut only", (LOW_RANK,), against=("20 layers, cut only",)),
    Row(
        "smollm2",
        "20 layers, healed",
        (DEPTH, HEAL_DECODER),
        targets=ALL,
        against=("20 layers, cut only", "original, int8"),
    ),
    Row(
        "smollm2",
        "MLPs 55%, healed",
        (WIDTH, HEAL_DECODER),
        targets=ALL,
        against=("MLPs 55%, cut only", "20 layers, healed"),
    ),
    Row(
        "smollm2",
        "low rank 68%, healed",
        (LOW_RANK, HEAL_DECODER),
        targets=ALL,
        against=("low rank 68%, cut only", "20 layers, healed"),
    ),
    Row("smollm2", "20 layers, healed, int8", (INT8,), source="20 layers, healed", against=("original, int8",)),
    Row("smollm2", "original, int8", (INT8,)),
    Row("mobilenetv2", ORIGINAL, targets=ALL),
    Row("mobilenetv2", "inner channels 75%, cut only", ({**CHANNELS, "repair": False},)),
    Row(
        "mobilenetv2",
        "inner channels 75%, solved again",
        (CHANNELS,),
        against=("inner channels 75%, cut only",),
    ),
    Row(
        "mobilenetv2",
        "inner channels 75%, healed",
        (CHANNELS, HEAL_CONV),
        targets=ALL,
        against=("inner channels 75%, solved again", "original, int8"),
    ),
    Row(
        "mobilenetv2", "inner channels 75%, healed, int8", (CHANNELS, HEAL_CONV, CONV_INT8), against=("original, int8",)
    ),
    Row("mobilenetv2", "original, int8", (CONV_INT8,)),
)

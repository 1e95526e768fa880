"""Our rows of the quality bench: which methods in which formats on which target. Adding a row is adding a line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import quality_table
from quality_bench import LANGUAGE, SAMPLES, Bench, Made

from edgeport.compress import apply_recipe
from edgeport.export.artifact import LoweringSettings
from edgeport.export.dispatch import lower
from edgeport.formats import WeightFormat
from edgeport.recipe import Recipe, load_recipe
from edgeport.runtime.session import open_session
from edgeport.runtime.torch import TorchSession
from edgeport.schema import parse_mapping
from edgeport.target import load_target

if TYPE_CHECKING:
    from edgeport.compress.apply import LayerRecord
    from edgeport.model.types import Model

ORT, COREML = "linux-x86_64-ort", "ios18-coreml"
RUNTIMES = {ORT: quality_table.ORT, COREML: quality_table.EVALUATOR}
PRECISION: dict[str, Literal["fp32", "fp16"]] = {ORT: "fp32", COREML: "fp16"}

METHODS: dict[str, list[dict[str, Any]]] = {
    "rtn": [{"method": "rtn"}],
    "hqq": [{"method": "hqq"}],
    "gptq": [{"method": "gptq"}],
    "gptq+bias": [{"method": "gptq", "correct_bias": True}],
    "awq+gptq": [{"method": "awq"}, {"method": "gptq"}],
    "rotate+gptq": [{"method": "rotate"}, {"method": "gptq"}],
    "gptq+brecq": [{"method": "gptq"}, {"method": "brecq"}],
    "awq+gptq+brecq": [{"method": "awq"}, {"method": "gptq"}, {"method": "brecq"}],
}
QUANTIZES = ("rtn", "hqq", "gptq")
MIXED = {
    ORT: [
        *("int8", "int8_g16", "int8_g32", "int8_g64", "uint8_g32"),
        *("uint4_g16", "uint4_g32", "uint4_g64", "int4_g32", "int4_g64", "int4_g128", "uint2_g32"),
    ],
    COREML: ["int8", "int8_g32", "lut8", "lut6", "lut6_g16", "lut4_g16", "lut4_g8", "lut3_g8"],
}
"""What mixed precision chooses from."""
WIDE = {ORT: 8.1, COREML: 8.15}
"""Above so many bits a weight narrower forms are no choice: they have no chance, and palettes take long to measure."""
CONV = {ORT: ["int8"], COREML: ["int8", "lut8", "lut6", "lut6_g16", "lut4_g8"]}
"""The same for convolutions. A small one may stay in float: it costs few bytes, and some are worth many."""


@dataclass(frozen=True)
class Ours:
    """One of our rows.

    Attributes:
        weights: the form, in words.
    """

    name: str
    target: str
    weights: str
    recipe: Recipe


@dataclass(frozen=True)
class Line:
    """A line of the table: each of `methods` with weights in `form`.

    Attributes:
        form: a weight format, or bits a weight for mixed precision.
        fallback: formats for weights that don't fit the first.
        activations: integer activations too, where the target has kernels.
        kinds: of models.
        float_tables: embeddings, a head tied to them, and convolutions stay in float, as peers' files have them.
    """

    target: str
    methods: str
    form: str | float
    fallback: tuple[str, ...] = ("int8",)
    activations: Literal["dynamic_int8", "static_int8", "float"] = "float"
    kinds: str = "text image audio language"
    float_tables: bool = False


TRANSFORMERS = "text audio language"
LINES = (
    Line(ORT, "rtn gptq", "int8", activations="dynamic_int8"),
    Line(ORT, "gptq", "int8", activations="static_int8"),
    Line(ORT, "rtn gptq", "int8"),
    Line(ORT, "rtn gptq", "int8_g32", kinds=TRANSFORMERS),
    Line(ORT, "gptq", "int8_g16", kinds="audio language", float_tables=True),
    Line(ORT, "gptq", "uint4_g32", kinds="audio", float_tables=True),
    Line(ORT, "gptq+brecq", 5.25, kinds="audio"),
    Line(ORT, "gptq", 8.75),
    Line(ORT, "gptq", 8.25, kinds="audio"),
    Line(ORT, "gptq", 8.5, kinds="language"),
    Line(ORT, "gptq", 8.11, kinds="language"),
    Line(ORT, "gptq awq+gptq", 8.1, kinds=TRANSFORMERS),
    Line(ORT, "gptq+bias", "int8", kinds="image"),
    Line(ORT, "gptq+bias", 8.2, kinds="image"),
    Line(ORT, "gptq awq+gptq", 6.0, kinds=TRANSFORMERS),
    Line(ORT, "gptq awq+gptq", 5.0, kinds=TRANSFORMERS),
    Line(ORT, "gptq awq+gptq rotate+gptq awq+gptq+brecq", 4.5, kinds=TRANSFORMERS),
    Line(ORT, "rtn hqq gptq awq+gptq gptq+brecq", "uint4_g32", kinds=TRANSFORMERS),
    Line(ORT, "gptq", "int4_g32", kinds=TRANSFORMERS),
    Line(ORT, "awq+gptq", 4.0, kinds=TRANSFORMERS),
    Line(ORT, "awq+gptq", 3.0, kinds=TRANSFORMERS),
    Line(COREML, "rtn gptq", "int8"),
    Line(COREML, "rtn", "int4", kinds="image"),
    Line(COREML, "gptq", "int4_g32", kinds=TRANSFORMERS),
    Line(COREML, "gptq+bias", "int8", kinds="image"),
    Line(COREML, "gptq+bias", "lut8", kinds="image"),
    Line(COREML, "gptq", "lut6", kinds="text image language"),
    Line(COREML, "gptq+bias", "lut6", kinds="image"),
    Line(COREML, "gptq", "lut6_g16", ("lut6",), kinds="text language"),
    Line(COREML, "gptq", "lut4_g16", ("lut4",), kinds="text image language"),
    Line(COREML, "gptq", "lut3_g16", ("lut3",), kinds="text language"),
    Line(COREML, "gptq", 8.2, kinds="image"),
    Line(COREML, "gptq", 8.12, kinds="audio"),
    Line(COREML, "gptq", 8.0, kinds=TRANSFORMERS),
    Line(COREML, "gptq+bias", 8.0, kinds="image"),
    Line(COREML, "gptq+bias", 6.0, kinds="image"),
    Line(COREML, "gptq", 6.1, kinds=TRANSFORMERS),
    Line(COREML, "gptq", 4.5),
)
RECIPES = ("int8", "int8-static", "int8-accurate", "int4", "mixed")
"""Those that come with edgeport, as they are."""
SUFFIX = {"float": "", "dynamic_int8": " a8", "static_int8": " static"}
WORDS = {"int8": "int8 per channel symmetric", "int4": "int4 per channel symmetric"}


def in_words(form: str | float) -> str:
    """A format as the table says it."""
    if isinstance(form, float):
        return "mixed"
    scheme, _, group = form.partition("_g")
    if scheme.startswith("lut"):
        return f"{scheme[3:]}-bit palette" + (f" every {group} channels" if group else "")
    if not group:
        return WORDS[form]
    return f"{scheme.removeprefix('u')} g{group} " + ("asymmetric" if scheme.startswith("u") else "symmetric")


def recipe_of(line: Line, method: str, name: str) -> Recipe:
    """The recipe that a line stands for."""
    if isinstance(line.form, float):
        least = 8 if line.form > WIDE[line.target] else 0
        forms = [name for name in MIXED[line.target] if WeightFormat.parse(name).bits >= least]
        conv = [name for name in CONV[line.target] if WeightFormat.parse(name).bits >= least] + ["float"]
    else:
        forms = [line.form, *line.fallback]
        conv = CONV[line.target] if line.target == ORT else forms
    step: dict[str, Any] = {"linear": forms, "embedding": forms, "conv": conv, "depthwise_conv": conv}
    if line.float_tables:
        step |= dict.fromkeys(("embedding", "conv", "depthwise_conv"), "float")
    step["activations"] = ["float"] if line.activations == "float" else [line.activations, "float"]
    if isinstance(line.form, float):
        step["bits_per_weight"] = line.form
    steps = [one | (step if one["method"] in QUANTIZES else {}) for one in METHODS[method]]
    value = {"name": "bench", "summary": name, "compress": steps, "gate": {}}
    return parse_mapping(Recipe, {**value, "calibration": {"samples": SAMPLES}}, name)


def our_rows(model: Model) -> Iterator[Ours]:
    """The rows that apply to a model."""
    kind = "language" if model.task == LANGUAGE else model.modality
    for name in RECIPES:
        yield Ours(f"recipe {name}", ORT, "as the recipe says", load_recipe(name))
    for line in LINES:
        for method in line.methods.split() if kind in line.kinds.split() else ():
            form = f"mixed {line.form:g}" if isinstance(line.form, float) else line.form
            name = f"{method} {form}" + SUFFIX[line.activations] + " coreml" * (line.target == COREML)
            name += ", tables float" * line.float_tables
            weights = in_words(line.form) + "; embeddings float" * line.float_tables
            yield Ours(name, line.target, weights, recipe_of(line, method, name))


def average_bits(records: tuple[LayerRecord, ...]) -> float:
    """Bits a weight of the weights stored as codes."""
    codes = [record for record in records if record.sha256 is not None]
    return 8 * sum(record.bytes_after for record in codes) / (sum(record.bytes_before for record in codes) / 4)


def make_ours(bench: Bench, row: Ours, folder: Path, *, simulate: bool) -> tuple[Made, dict[str, Any]]:
    """The file, and what only it can say of itself.

    Args:
        simulate: make no file; PyTorch runs the dequantised weights.
    """
    start = time.perf_counter()
    target = load_target(row.target)
    compressed, records = apply_recipe(bench.model, row.recipe, target)
    bits = average_bits(records)
    if simulate:
        parameters = sum(parameter.numel() for parameter in compressed.module.parameters())
        size = 4 * parameters + sum(record.bytes_after - record.bytes_before for record in records)
        made = Made(bench.ask(TorchSession(compressed).run), size, bits, "PyTorch", simulated=True)
    else:
        artifact = lower(compressed, target, LoweringSettings(PRECISION[row.target], "dynamic"), folder)
        paths = [artifact.path] if artifact.path.is_file() else [p for p in artifact.path.rglob("*") if p.is_file()]
        size = sum(path.stat().st_size for path in paths)
        file = artifact.path if row.target == ORT else None
        made = Made(bench.ask(open_session(artifact).run), size, bits, RUNTIMES[row.target], file)
    codes = [record for record in records if record.sha256 is not None]
    found = {record.activation for record in codes if record.kinds != ("embedding",)} - {"float"}
    return made, {
        "activations": "float" if simulate or not found else " and ".join(sorted(found)).replace("_", " "),
        "calibration": f"{len(bench.calibration)} samples" if row.recipe.calibrates else "none",
        "seconds": time.perf_counter() - start,
    }

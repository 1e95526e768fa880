"""Where the bytes went: from the float32 weights, by layer group, to the file on disk, to the last byte.

Deterministic: follows from the manifest, and stands until `edgeport explain` has read the file itself. What is neither
a weight nor a scale (graph, names, padding) is the difference between the file's size and the sum of the rest, so the
parts always sum to the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeport.explain.document import Group as GroupName
from edgeport.explain.groups import GROUPS, layer_group
from edgeport.formats import WeightFormat

FLOAT_WIDTH = {"fp32": 4, "fp16": 2}
"""Bytes of a weight that is not quantized."""


@dataclass(frozen=True)
class Group:
    """Bytes of one layer group.

    Attributes:
        before: in float32.
        weights: in the file, packed codes or floats.
        scales: in the file, scales of the codes.
    """

    name: GroupName
    before: int
    weights: int
    scales: int

    @property
    def label(self) -> str:
        """The group's name for people."""
        return GROUPS[self.name]

    @property
    def after(self) -> int:
        """In the file."""
        return self.weights + self.scales


@dataclass(frozen=True)
class Waterfall:
    """All groups, and what else is in the file. `sum(group.after) + overhead == file`.

    Attributes:
        groups: those with any bytes.
        removed: (method, bytes in float32) of what each step took out of the model before its weights were compressed.
        overhead: graph, names, alignment; negative when lowering folded, shared or dropped weights.
        file: bytes of what the runtime loads: the entry, with external data that goes by its name.
        beside: (path, bytes) of what else is in the model folder, such as the same model in ORT format.
    """

    groups: tuple[Group, ...]
    overhead: int
    file: int
    beside: tuple[tuple[str, int], ...]
    removed: tuple[tuple[str, int], ...] = ()

    @property
    def before(self) -> int:
        """All weights of the original in float32."""
        return sum(group.before for group in self.groups) + sum(count for _, count in self.removed)

    @property
    def scales(self) -> int:
        """All scales."""
        return sum(group.scales for group in self.groups)


def left_out(manifest: Mapping[str, Any]) -> frozenset[str]:
    """Weights that lowering left out of the file, as no output depends on them."""
    return frozenset(manifest["facts"].get("unused_weights", ()))


def layer_bytes(layer: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of a recorded layer: `before` in float32, `weights` and `scales` in the file, `after` their sum.

    Args:
        layer: a `LayerEntry` of the manifest, as JSON values.
    """
    count = math.prod(layer["shape"])
    form = WeightFormat.parse(layer["format"])
    if layer["name"] in left_out(manifest):
        weights, scales = 0, 0
    elif form.quantized:
        weights = (count * form.bits + 7) // 8
        scales = int(layer["bytes_after"]) - weights
    else:
        # A weight with zeros is recorded as float32 numbers and a mask of one bit a place.
        mask = (count + 7) // 8 if layer["bytes_after"] < count * 4 else 0
        numbers = (int(layer["bytes_after"]) - mask) // 4
        weights, scales = numbers * FLOAT_WIDTH[manifest["settings"]["precision"]] + mask, 0
    return {"before": count * 4, "weights": weights, "scales": scales, "after": weights + scales}


def make_waterfall(manifest: Mapping[str, Any]) -> Waterfall:
    """The waterfall of a bundle.

    Args:
        manifest: `Manifest.to_json()`; its steps, layers, parameters, files, entry and precision are read.
    """
    before = dict.fromkeys(GROUPS, 0)
    weights = dict.fromkeys(GROUPS, 0)
    scales = dict.fromkeys(GROUPS, 0)
    recorded = 0
    for layer in manifest["layers"]:
        group = layer_group(layer["name"], tuple(layer["kinds"]))
        sizes = layer_bytes(layer, manifest)
        before[group] += sizes["before"]
        weights[group] += sizes["weights"]
        scales[group] += sizes["scales"]
        recorded += math.prod(layer["shape"])
    # Norms, biases and everything else that no recipe compresses.
    steps = manifest.get("steps") or []
    rest = (steps[-1]["parameters_after"] if steps else manifest["parameters"]) - recorded
    before["other"] += rest * 4
    weights["other"] += rest * FLOAT_WIDTH[manifest["settings"]["precision"]]

    sizes_on_disk = {name: file["bytes"] for name, file in sorted(manifest["files"].items())}
    total = sum(size for name, size in sizes_on_disk.items() if name.startswith(manifest["entry"]))
    beside = tuple(
        (name, size)
        for name, size in sizes_on_disk.items()
        if name.startswith("model/") and not name.startswith(manifest["entry"])
    )
    groups = tuple(Group(name, before[name], weights[name], scales[name]) for name in GROUPS if before[name])
    overhead = total - sum(group.after for group in groups)
    removed = tuple(
        (step["method"], 4 * (step["parameters_before"] - step["parameters_after"]))
        for step in steps
        if step["parameters_before"] != step["parameters_after"]
    )
    return Waterfall(groups=groups, overhead=overhead, file=total, beside=beside, removed=removed)

"""What lands where: docs/targets.md, made from the targets' files and the recipes' methods.

python scripts/target_table.py            print it
python scripts/target_table.py --write    put it into docs/targets.md (a test compares the two)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from edgeport.distilling import Distill  # noqa: E402
from edgeport.formats import LAYER_KINDS, LayerKind, Scheme, WeightFormat  # noqa: E402
from edgeport.recipe import Brecq, Qat, Qera, Quantize, Step  # noqa: E402
from edgeport.restructuring import (  # noqa: E402
    LowRank,
    PruneChannels,
    PruneDepth,
    PruneVocabulary,
    PruneWidth,
    Restructure,
    Sparsify,
)
from edgeport.target import Target, load_target, target_names  # noqa: E402

DOCS = ROOT / "docs" / "targets.md"
SCHEMES: dict[Scheme, str] = {
    "int": "symmetric integers",
    "uint": "integers with zero points",
    "lut": "palettes",
}

AFTER: dict[type, str] = {
    Brecq: "other codes and scales, block by block",
    Qera: "two thin 8-bit layers beside each Linear one",
    Qat: "other codes and scales, norms and biases",
}
"""What the methods that follow quantizing make."""

SMALLER: dict[type, str] = {
    PruneVocabulary: "fewer tokens, in the tables and the tokenizer",
    PruneDepth: "fewer layers",
    PruneChannels: "fewer channels of a conv net",
    PruneWidth: "fewer inner channels, heads, hidden channels",
    LowRank: "two thin layers for a wide one",
    Sparsify: "zeros, stored as a mask and the other numbers",
    Distill: "the same shapes, trained towards a teacher",
}
"""What the methods that come before quantizing make."""


def compact(formats: tuple[str, ...]) -> str:
    """Format names with their group sizes together: int4_g16, int4_g32 as int4_g16/32."""
    groups: dict[str, list[str]] = {}
    for name in formats:
        base, _, size = name.partition("_g")
        groups.setdefault(base, []).append(size)
    words = []
    for base, sizes in groups.items():
        words += [base] if "" in sizes else []
        grouped = [size for size in sizes if size]
        words += [f"{base}_g{'/'.join(grouped)}"] if grouped else []
    return ", ".join(words) or "-"


def formats_table(targets: list[Target]) -> list[str]:
    """One line a target and layer kind: the weight and activation formats it takes."""
    lines = ["| target | layers | weights | activations beside integer weights |", "| --- | --- | --- | --- |"]
    for target in targets:
        same: dict[tuple[tuple[str, ...], tuple[str, ...]], list[LayerKind]] = {}
        for kind in LAYER_KINDS:
            same.setdefault((target.weight_formats(kind), target.activation_formats(kind)), []).append(kind)
        for (weights, activations), kinds in same.items():
            names = ", ".join(kind.replace("_", " ") for kind in kinds)
            beside = ", ".join(activations) if set(weights) != {"float"} else "-"
            lines.append(f"| {target.name} | {names} | {compact(weights)} | {beside} |")
    return lines


def lands(target: Target, scheme: Scheme) -> str:
    """The widths of a scheme that a target stores in some layer."""
    found = {
        WeightFormat.parse(name).bits
        for kind in LAYER_KINDS
        for name in target.weight_formats(kind)
        if WeightFormat.parse(name).scheme == scheme
    }
    return ", ".join(str(bits) for bits in sorted(found)) or "refused"


def methods_table(targets: list[Target]) -> list[str]:
    """One line a method: the bits that each target stores of what it makes."""
    lines = [
        "| method | makes | " + " | ".join(target.name for target in targets) + " |",
        "| --- | --- | " + " | ".join("---" for _ in targets) + " |",
    ]
    for cls in get_args(get_args(Step)[0]):
        method, *others = get_args(cls.model_fields["method"].annotation)
        if issubclass(cls, get_args(Restructure)):
            takes = [cls is not Sparsify or target.weights.sparse for target in targets]
            cells = " | ".join("yes" if taken else "refused" for taken in takes)
            lines.append(f"| {', '.join([method, *others])} | {SMALLER[cls]} | {cells} |")
            continue
        if not issubclass(cls, Quantize):
            takes = [any(lands(target, scheme) != "refused" for scheme in SCHEMES) for target in targets]
            if cls is Qera:
                takes = ["int8" in target.weight_formats("linear") for target in targets]
            cells = " | ".join("yes" if taken else "refused" for taken in takes)
            lines.append(f"| {method} | {AFTER.get(cls, 'the same function, easier to round')} | {cells} |")
            continue
        for scheme, words in SCHEMES.items():
            cells = " | ".join(lands(target, scheme) for target in targets)
            lines.append(f"| {method} | {words} | {cells} |")
    return lines


def document() -> str:
    """The whole page."""
    targets = [load_target(name) for name in target_names()]
    scales = [
        "| target | scales of whole channels | scales of groups | negative scales | float arithmetic |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {t.name} | {t.scales.per_channel} | {t.scales.grouped} | {'taken' if t.scales.signed else 'no'} "
            f"| {', '.join(t.precisions)} |"
            for t in targets
        ),
    ]
    memory = ["| target | memory of the device | caches |", "| --- | --- | --- |"]
    for target in targets:
        ram = "not stated" if target.device.ram_gb is None else f"{target.device.ram_gb:g} GB"
        memory.append(f"| {target.name} | {ram} | {', '.join(target.kv_cache) if target.cache else 'none'} |")
    parts = [
        "# What lands where",
        "Made by `python scripts/target_table.py --write` from `targets/*.toml` and the methods that recipes know; "
        "a test fails when it is stale. What a target does not list is refused before anything starts (exit code 3).",
        "## Methods: bits that each target stores",
        *["\n".join(methods_table(targets))],
        "A palette (`lutB`) is fitted by k-means; `gptq` weighs it by the inputs, rounds to it with compensation and "
        "fits its entries anew.",
        "## Weight formats",
        "`intB`: symmetric, one scale a channel; `uintB`: with zero points; `_gG`: one scale every G weights; `lutB`: "
        "palette of 2^B values, `lutB_gG`: one palette every G channels.",
        "\n".join(formats_table(targets)),
        "## Scales",
        "Every method searches among the scales that the target can store.",
        "\n".join(scales),
        "## Memory and caches",
        "An export whose planned memory exceeds the device's is refused. What a language model's cache keeps keys and "
        "values as is the recipe's `kv_cache` in `[lower]`.",
        "\n".join(memory),
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n\n".join(parts)) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        DOCS.write_text(document())
    else:
        print(document())

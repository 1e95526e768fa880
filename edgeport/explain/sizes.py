"""The byte waterfall of a bundle, read from the shipped file: from the original's float32 weights to the last byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgeport.errors import BadInputError
from edgeport.explain.document import Bytes, Cell, Group, ModelFile, Part, Step, StoredTensor
from edgeport.explain.groups import GROUPS
from edgeport.explain.shipped import Shipped
from edgeport.explain.spans import Span
from edgeport.storage import list_files

if TYPE_CHECKING:
    import torch

PARTS: dict[Part, str] = {
    "codes": "Codes",
    "floats": "Floats",
    "scales": "Scales",
    "zero_points": "Zero points",
    "palettes": "Palettes",
    "masks": "Masks of zeros",
    "graph": "Operators, names, shapes",
    "metadata": "Metadata",
    "alignment": "Padding",
}
"""Their names for people, in the order in which they are told."""

VALUES: tuple[Part, ...] = ("codes", "floats")
"""What stands for the weights themselves; the other parts come on top of them."""


def read_bytes(shipped: Shipped, state: Mapping[str, torch.Tensor] | None = None) -> Bytes:
    """Where the bytes of the shipped file lie.

    Args:
        state: the original's parameters, by whose values float weights are known again that the file does not name.

    Raises:
        BadInputError: the file is missing, damaged, or stores what is no part of it.
    """
    folder = shipped.artifact.root
    files = _spans(shipped)
    if state is not None:
        from edgeport.explain.nameless import name_spans

        files = {file: name_spans(folder / file, spans, shipped, state) for file, spans in files.items()}
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in list_files(folder)}
    cells: Counter[tuple[Group, Part]] = Counter()
    tensors = []
    for file, spans in files.items():
        if sum(span.size for span in spans) != sizes[file]:
            raise BadInputError("The file was changed while it was read.", where=folder / file)
        for span in spans:
            group = _group(span, shipped.groups)
            cells[group, span.part] += span.size
            if span.name:
                tensors.append(
                    StoredTensor(
                        name=span.name,
                        parameter=span.parameter,
                        group=group,
                        part=span.part,
                        bytes=span.size,
                        file=file,
                    )
                )
    before = _before(shipped)
    return Bytes(
        file=sum(sizes[name] for name in files),
        files=tuple(ModelFile(path=name, bytes=sizes[name]) for name in files),
        original=shipped.parameters * 4,
        before=before,
        steps=_steps(shipped, before, cells),
        cells=tuple(
            Cell(group=group, part=part, bytes=cells[group, part])
            for group in GROUPS
            for part in PARTS
            if cells[group, part]
        ),
        tensors=tuple(sorted(tensors, key=lambda item: (-item.bytes, item.file, item.name, item.part))),
        beside=tuple(ModelFile(path=name, bytes=size) for name, size in sizes.items() if name not in files),
        notes=_notes(shipped, files, known=state is not None),
    )


def _group(span: Span, groups: Mapping[str, Group]) -> Group:
    """Bias and norm of a layer share its name in some files, but have no group of their own: only weights have."""
    if not span.name or span.part == "graph":
        return "file"
    return groups.get(span.parameter or "", "other")


def _spans(shipped: Shipped) -> dict[str, list[Span]]:
    """Every byte of what the runtime loads, by path below the artifact's root."""
    artifact, parameters = shipped.artifact, tuple(shipped.groups)
    found: dict[str, list[Span]] = {}
    for path in artifact.paths:
        name = path.relative_to(artifact.root).as_posix()
        if path.suffix == ".mlpackage":
            from edgeport.explain.package_bytes import package_spans

            inside = package_spans(path, artifact.weights, parameters)
            found |= {f"{name}/{inner}": spans for inner, spans in inside.items()}
        elif path.suffix == ".pte":
            from edgeport.explain.pte_bytes import pte_spans

            found[name] = pte_spans(path, artifact.weights, parameters)
        elif path.suffix == ".ort":
            from edgeport.explain.ort_bytes import ort_spans

            found[name] = ort_spans(path, parameters)
        else:
            from edgeport.explain.onnx_bytes import onnx_spans

            beside = onnx_spans(path, parameters)
            found |= {
                path.with_name(inner).relative_to(artifact.root).as_posix(): spans for inner, spans in beside.items()
            }
    return found


def _notes(shipped: Shipped, files: Mapping[str, list[Span]], *, known: bool) -> tuple[str, ...]:
    """What the files don't tell."""
    notes = []
    if any(file.endswith(".ort") for file in files):
        notes.append("Padding in an ORT-format file is told with its operators, names and shapes.")
    nameless = sum(
        span.size for spans in files.values() for span in spans if span.part in VALUES and span.parameter is None
    )
    if nameless:
        weights = (
            "" if known else ", and float weights that the exporter turned or joined (with the original they are found)"
        )
        notes.append(f"{nameless:,} bytes of floats belong to no layer's weight: norms, biases, tables{weights}.")
    return tuple(notes)


def _before(shipped: Shipped) -> dict[Group, int]:
    """Bytes of each group in float32, after what pruning took out."""
    before: Counter[Group] = Counter()
    for layer in shipped.layers:
        before[shipped.groups[layer.name]] += layer.bytes_before
    left = shipped.steps[-1].parameters_after if shipped.steps else shipped.parameters
    before["other"] += 4 * left - sum(layer.bytes_before for layer in shipped.layers)
    return {group: before[group] for group in GROUPS if before[group]}


def _steps(shipped: Shipped, before: Mapping[Group, int], cells: Mapping[tuple[Group, Part], int]) -> tuple[Step, ...]:
    """From the original to the file: what was taken out, how each group's values are stored, what comes on top."""
    steps = [
        Step(label=step.method, change=4 * (step.parameters_after - step.parameters_before)) for step in shipped.steps
    ]
    for group, label in GROUPS.items():
        stored = sum(cells.get((group, part), 0) for part in VALUES)
        steps.append(Step(label=label, change=stored - before.get(group, 0)))
    for part, label in PARTS.items():
        if part not in VALUES:
            steps.append(Step(label=label, change=sum(count for (_, kind), count in cells.items() if kind == part)))
    return tuple(step for step in steps if step.change)

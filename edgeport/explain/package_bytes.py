"""Where the bytes of a Core ML package lie: the program, and the blobs of its weight files.

Constants of a few numbers stand in the program itself; they are told as part of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgeport.explain.document import Part
from edgeport.explain.spans import Span, cover
from edgeport.mlpackage.blob import HEADER, RECORD
from edgeport.mlpackage.constants import is_constant
from edgeport.mlpackage.package import MODEL_PATH, load_package
from edgeport.mlpackage.program import Argument, Literal, Operation, Reference, parse_function
from edgeport.storage import list_files

PARTS: dict[str, Part] = {
    "data": "codes",
    "quantized_data": "codes",
    "indices": "codes",
    "indices_nonzero_data": "codes",
    "nonzero_data": "codes",
    "scale": "scales",
    "offset": "zero_points",
    "zero_point": "zero_points",
    "lut": "palettes",
    "mask": "masks",
    "data_mask": "masks",
    "indices_mask": "masks",
}
"""What the parameters of constexpr operators say, where they are no floating-point weights."""


def package_spans(path: Path, weights: Mapping[str, str], parameters: tuple[str, ...]) -> dict[str, list[Span]]:
    """Every byte of a .mlpackage folder, by POSIX path below it.

    Args:
        weights: for each compressed parameter, the name of the constant that stores it.
        parameters: names of all of the model's weights, to know float ones again by.

    Raises:
        BadInputError: the package is damaged.
    """
    package = load_package(path)
    blobs: dict[str, list[Span]] = {}
    for function in sorted(package.spec.mlProgram.functions):
        operations = [item for item in parse_function(package, function).body.walk() if is_constant(item)]
        known = constant_parameters(operations, weights, parameters)
        for operation in operations:
            for key, arguments in operation.inputs.items():
                for argument in arguments:
                    for name, span in _blob(package.model_file.parent, operation, key, argument, known):
                        blobs.setdefault(name, []).append(span)
    found = {}
    for file in list_files(path):
        relative = file.relative_to(path).as_posix()
        if file == package.model_file:
            found[relative] = cover([], 0, file.stat().st_size, "graph")
        elif relative in (beside := _below(path, package.model_file.parent, blobs)):
            spans = [Span(0, HEADER.size, "metadata"), *beside[relative]]
            found[relative] = cover(spans, 0, file.stat().st_size, "alignment")
        else:
            found[relative] = cover([], 0, file.stat().st_size, "metadata")
    return found


def _below(root: Path, folder: Path, blobs: Mapping[str, list[Span]]) -> dict[str, list[Span]]:
    prefix = folder.relative_to(root).as_posix()
    return {f"{prefix}/{name}": spans for name, spans in blobs.items()}


def constant_parameters(
    operations: list[Operation], weights: Mapping[str, str], parameters: tuple[str, ...]
) -> dict[str, str]:
    """The parameter of each constant: those that are listed, those that are named after one, and what they build on.

    Args:
        operations: of a program; those that are no constants are passed over.
    """
    known = {constant: parameter for parameter, constant in weights.items()}
    plain = {"p_" + parameter.replace(".", "_").lower(): parameter for parameter in parameters}
    for operation in reversed([item for item in operations if is_constant(item)]):
        name = operation.outputs[0].name
        lower = name.lower()
        for start in (lower, lower.removesuffix("_to_fp16"), lower.removesuffix("_cast_fp16")):
            if name not in known and start in plain:
                known[name] = plain[start]
        if name in known:
            for arguments in operation.inputs.values():
                for argument in arguments:
                    if isinstance(argument, Reference):
                        known.setdefault(argument.name, known[name])
    return known


def _blob(
    folder: Path, operation: Operation, key: str, argument: Argument, known: Mapping[str, str]
) -> list[tuple[str, Span]]:
    """(weight file, span) of what one argument stores in a file: its record, and its data."""
    if not isinstance(argument, Literal) or argument._proto.WhichOneof("value") != "blobFileValue":
        return []
    place = argument._proto.blobFileValue
    file = place.fileName.removeprefix(MODEL_PATH)
    record = int(place.offset)
    with (folder / file).open("rb") as stream:
        stream.seek(record)
        _, _, size, start, _ = RECORD.unpack(stream.read(RECORD.size))
    name = operation.outputs[0].name
    floats = argument.type is not None and argument.type.element.is_float
    part = PARTS.get(key, "floats" if floats else "graph")
    if part == "codes" and floats:
        part = "floats"
    return [
        (file, Span(record, record + RECORD.size, "metadata")),
        (file, Span(start, start + size, part, name, known.get(name))),
    ]

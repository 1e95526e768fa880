"""Read the compressed weights that an ONNX file really holds, back into their logical form.

Nothing is remembered from the writing: the layout, the width of the codes and the scales are taken from
the operators that consume each initializer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from edgeport.errors import BadInputError
from edgeport.export.artifact import Artifact
from edgeport.export.onnx.packing import unpack
from edgeport.quantized import QuantizedTensor, ScaleDtype, digest

StoredWeight = QuantizedTensor

_SCALE_DTYPES: Mapping[ir.DataType, ScaleDtype] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}


def _array(value: ir.Value | None, what: str) -> np.ndarray:
    if value is None or value.const_value is None:
        raise BadInputError(f"The file stores no {what}.")
    array: np.ndarray = value.const_value.numpy()
    return array


def _initializer(graph: ir.Graph, stored: str) -> tuple[ir.Value, slice]:
    """The initializer that holds a weight's codes, "NAME" or "NAME[START:STOP]", and the rows that are the weight's.

    Raises:
        BadInputError: there is none.
    """
    found = re.fullmatch(r"(.*)\[(\d+):(\d+)\]", stored)
    name, rows = (stored, slice(None)) if found is None else (found[1], slice(int(found[2]), int(found[3])))
    value = graph.initializers.get(name)
    if value is None:
        raise BadInputError("The file lacks a weight's codes.", where=name)
    return value, rows


def _cut(tensor: QuantizedTensor, rows: slice) -> QuantizedTensor:
    """Some rows of a weight."""
    if rows == slice(None):
        return tensor
    zero = None if tensor.zero_point is None else tensor.zero_point[rows].clone()
    return replace(tensor, codes=tensor.codes[rows].clone(), scale=tensor.scale[rows].clone(), zero_point=zero)


def _through(value: ir.Value | None, *op_types: str) -> ir.Value | None:
    """The value that these operators pass on, through any number of them."""
    while value is not None and value.const_value is None:
        producer = value.producer()
        if producer is None or producer.op_type not in op_types:
            break
        value = producer.inputs[0]
    return value


def _logical(
    codes: np.ndarray,
    scale: ir.Value | None,
    zero_point: np.ndarray | None = None,
    *,
    bits: int,
    group_size: int | None,
) -> StoredWeight:
    """Codes in the weight's own shape, with the scales that the operator multiplies by."""
    scale = _through(scale, "Cast")
    scales = _array(scale, "scale")
    assert scale is not None
    assert scale.dtype is not None
    rows = codes.shape[0]
    size = group_size or codes.size // rows
    return QuantizedTensor(
        codes=torch.from_numpy(np.array(codes, order="C")),
        scale=torch.from_numpy(np.array(scales, np.float32).reshape(rows, -1)),
        zero_point=None if zero_point is None else torch.from_numpy(zero_point),
        bits=bits,
        group_size=size,
        axis=0,
        scale_dtype=_SCALE_DTYPES[scale.dtype],
    )


def _from_integer_matmul(node: ir.Node, codes: np.ndarray) -> StoredWeight:
    if len(node.inputs) > 5 and node.inputs[5] is not None:
        raise BadInputError("The file stores a zero point where a symmetric weight was written.", where=node.name)
    return _logical(codes.T, node.inputs[3], bits=8, group_size=None)


def _from_dequantize(node: ir.Node, codes: np.ndarray) -> StoredWeight:
    """The codes between rounded activations: (N, ...) along axis 0, or a Linear's (K, N) along axis 1."""
    if len(node.inputs) > 2 and _array(node.inputs[2], "zero point").any():
        raise BadInputError("The file stores a zero point where a symmetric weight was written.", where=node.name)
    axis = node.attributes.get_int("axis", 1)
    return _logical(np.moveaxis(codes, axis, 0), node.inputs[1], bits=8, group_size=None)


def _factor(value: ir.Value) -> ir.Value:
    """What a Cast's output is multiplied by, through the Gather and Unsqueeze of an embedding's scales."""
    for product, index in value.uses():
        if product.op_type != "Mul":
            continue
        factor = _through(product.inputs[1 - index], "Unsqueeze", "Gather", "Cast")
        if factor is not None and factor.const_value is not None:
            return factor
    raise BadInputError("Codes are used without their scales.", where=value.name)


def _from_cast(node: ir.Node, codes: np.ndarray) -> StoredWeight:
    """Cast(codes) * scale, with a scale of shape (N, 1, ...)."""
    return _logical(codes, _factor(node.outputs[0]), bits=8, group_size=None)


def _from_gather(node: ir.Node, codes: np.ndarray) -> StoredWeight:
    """Cast(Gather(codes, ids)) * Gather(scale, ids)."""
    cast = next((user for user, _ in node.outputs[0].uses() if user.op_type == "Cast"), None)
    if cast is None or node.attributes.get_int("axis", 0) != 0:
        raise BadInputError("An embedding's codes are not used as codes.", where=node.name)
    return _from_cast(cast, codes)


def _from_blocks(node: ir.Node, codes: np.ndarray) -> StoredWeight:
    """MatMulNBits or GatherBlockQuantized: packed codes, each minus a zero point or half the range."""
    bits, group_size = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size")
    rows, columns = codes.shape[0], codes.size // codes.shape[0] * 8 // bits
    zero_point = None
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        zero_point = unpack(_array(node.inputs[3], "zero point").reshape(rows, -1), bits, columns // group_size)
    return _logical(
        unpack(codes.reshape(rows, -1), bits, columns), node.inputs[2], zero_point, bits=bits, group_size=group_size
    )


def _next(value: ir.Value, op_type: str) -> ir.Node:
    """The only operator of this kind that reads a value."""
    users = [user for user, _ in value.uses() if user.op_type == op_type]
    if len(users) != 1:
        raise BadInputError(f"Codes are not read by one {op_type}.", where=value.name)
    return users[0]


def _from_float_blocks(node: ir.Node, codes: np.ndarray) -> StoredWeight:
    """(Cast(codes) - zero point) * scale, where the codes are 8-bit blocks (N, K/G, G)."""
    shape = _array(node.inputs[1], "shape")
    difference = _next(_next(node.outputs[0], "Cast").outputs[0], "Sub")
    scale = _through(_next(difference.outputs[0], "Mul").inputs[1], "Unsqueeze", "Cast")
    zero = _array(_through(difference.inputs[1], "Cast", "Unsqueeze"), "zero point")
    if zero.ndim == 0 and zero != 128:
        raise BadInputError(f"The file's codes are shifted by {zero}, which is not half of 8 bits.", where=node.name)
    rows = codes.shape[0]
    return _logical(
        unpack(codes, 8, codes.shape[1]),
        scale,
        None if zero.ndim == 0 else unpack(zero, 8, codes.size // rows // int(shape[2])),
        bits=8,
        group_size=int(shape[2]),
    )


def _from_reshape(node: ir.Node, codes: np.ndarray) -> StoredWeight:
    """The rows of codes that a Linear layer reads as blocks."""
    for user, index in node.outputs[0].uses():
        if (user.op_type, index) == ("MatMulNBits", 1):
            return _from_blocks(user, codes)
    return _from_float_blocks(node, codes)


# In order of preference: beside an integer matmul, a Gather only says that a tied embedding reads the same codes.
_READERS: dict[tuple[str, int], Callable[[ir.Node, np.ndarray], StoredWeight]] = {
    ("MatMulIntegerToFloat", 1): _from_integer_matmul,
    ("DequantizeLinear", 0): _from_dequantize,
    ("Cast", 0): _from_cast,
    ("Reshape", 0): _from_reshape,
    ("GatherBlockQuantized", 0): _from_blocks,
    ("Gather", 0): _from_gather,
}


def _read(path: Path, stored: Mapping[str, str]) -> dict[str, StoredWeight]:
    """The compressed weights of one file, given under which name it stores each."""
    try:
        program = ir.load(path)
    except Exception as error:
        raise BadInputError(f"The ONNX file can't be read: {error}.", where=path.name) from error
    found: dict[str, StoredWeight] = {}
    for parameter, name in stored.items():
        value, rows = _initializer(program.graph, name)
        codes = _array(value, f"initializer {name!r}")
        users = {(user.op_type, index): user for user, index in value.uses()}
        kind = next((kind for kind in _READERS if kind in users), None)
        if kind is None:
            raise BadInputError("No operator of the file uses a compressed weight.", where=name)
        found[parameter] = _cut(_READERS[kind](users[kind], codes), rows)
    return found


def read_weights(artifact: Artifact) -> dict[str, StoredWeight]:
    """Every compressed weight of the artifact: codes in the weight's shape, scale (N, K/g) float32.

    A weight that an encoder's file and its decoder's both hold must be the same in both.

    Raises:
        BadInputError: a file can't be read, a weight that the artifact lists is not in it, or two files differ.
    """
    places: dict[Path, dict[str, str]] = {path: {} for path in artifact.paths}
    beside = "" if artifact.encoder is None else f"{artifact.encoder.entry}:"
    for parameter, several in artifact.weights.items():
        for place in several.split(" + "):
            other = bool(beside) and place.startswith(beside)
            path = artifact.paths[0] if other else artifact.path
            places[path][parameter] = place.removeprefix(beside)
    found: dict[str, StoredWeight] = {}
    for path, stored in places.items():
        for parameter, weight in _read(path, stored).items():
            if digest(found.setdefault(parameter, weight)) != digest(weight):
                raise BadInputError(
                    "The encoder's file and the decoder's hold two versions of a weight.", where=parameter
                )
    return {parameter: found[parameter] for parameter in artifact.weights}

"""Write the logical codes, scales, zero points and palettes as Core ML's constexpr operators.

coremltools' converter makes a constant of every parameter of the exported program. For compressed ones it makes
here, instead, the constexpr operator with exactly our numbers. (It can do so itself from buffers named `_COREML_/...`,
but searches the codes again from the float weight: a palette's takes the memory of weight times entries, 12 GB for
256 of them and MiniLM's embedding, and 8-bit codes that all fit 4 bits are stored so.)

============ ================================ ====================================================
form         iOS 17                           iOS 18
============ ================================ ====================================================
symmetric    8 bits, one scale a channel      4 or 8 bits, one scale a channel or a group
zero points  8 bits, one a channel            4 or 8 bits, one a channel or a group
palettes     one of 1, 2, 4, 6 or 8 bits      one, or one every some channels; 3 bits as well
============ ================================ ====================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch

from edgeport.errors import TargetRefusesError
from edgeport.export.coreml.sparse import sparse_arrays
from edgeport.packing import pack_bits
from edgeport.quantized import QuantizedTensor, round_scale

Deployment = Literal["iOS17", "iOS18"]

INTEGER_BITS: Mapping[Deployment, tuple[int, ...]] = {"iOS17": (8,), "iOS18": (4, 8)}
PALETTE_BITS: Mapping[Deployment, tuple[int, ...]] = {"iOS17": (1, 2, 4, 6, 8), "iOS18": (1, 2, 3, 4, 6, 8)}


def _objection(tensor: QuantizedTensor, deployment: Deployment, precision: str) -> tuple[str, str] | None:
    """Why the system version has no dense form for a tensor, and what it takes; None when it has."""
    kernel = int(np.prod(tensor.codes.shape[2:], dtype=np.int64))
    palette = tensor.palette
    offered = (INTEGER_BITS if palette is None else PALETTE_BITS)[deployment]
    if tensor.axis != 0:
        return f"The scales run along axis {tensor.axis}.", "axis 0"
    if tensor.bits not in offered:
        kind = "integers" if palette is None else "palette indices"
        return f"{deployment} stores no {kind} of {tensor.bits} bits.", f"{', '.join(map(str, offered))} bits"
    if palette is not None and bool((tensor.scale != 1).any()):
        return "A palette has scales beside it.", "scales of 1: put them into the palette's values"
    if palette is not None and len(palette) > 1 and deployment == "iOS17":
        return f"iOS17 stores one palette a weight, not {len(palette)}.", "lutB without a group size, or iOS18"
    if palette is None and not tensor.per_channel and deployment == "iOS17":
        return "iOS17 stores one scale a channel.", "int8 or uint8 without a group size, or iOS18"
    if palette is None and not tensor.per_channel and tensor.group_size % kernel:
        return (
            f"A group of {tensor.group_size} weights cuts a filter's kernel of {kernel}.",
            f"multiples of {kernel}, or no group size",
        )
    stored = tensor.scale if palette is None else palette
    if precision == "fp16" and not torch.equal(round_scale(stored, "float16"), stored):
        return f"{'Scales' if palette is None else 'Palettes'} that float16 can't hold.", "values of float16"
    return None


def check_forms(quantized: Mapping[str, QuantizedTensor], deployment: Deployment, precision: str) -> None:
    """Refuse what the system version can't store densely.

    Raises:
        TargetRefusesError: naming the first such weight, and what would be taken.
    """
    for name, tensor in quantized.items():
        objection = _objection(tensor, deployment, precision)
        if objection is not None:
            what, allowed = objection
            raise TargetRefusesError(what, where=f"layer {name}", allowed=allowed)


def scale_shape(tensor: QuantizedTensor) -> tuple[int, ...]:
    """The scale with the weight's rank: (N, groups, 1, ...), where a group is some of the second axis with all that
    follows."""
    return (*tensor.scale.shape, *[1] * (tensor.codes.ndim - 2))


def live_inputs(program: torch.export.ExportedProgram) -> set[str]:
    """Names of the program's inputs, parameters among them, that some output depends on."""
    waiting = [node for node in program.graph.nodes if node.op == "output"]
    seen = set(waiting)
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node not in seen:
                seen.add(node)
                waiting.append(node)
    return {node.name for node in seen if node.op == "placeholder"}


def readers(program: torch.export.ExportedProgram, quantized: Collection[str]) -> dict[str, tuple[str, ...]]:
    """For every compressed weight that an output depends on, the program's inputs that stand for it.

    A tied weight has several names: they share one storage, and the program may read any of them.
    """
    live = live_inputs(program)
    state = program.state_dict
    users: dict[tuple[int, torch.Size], list[str]] = {}
    for name, target in program.graph_signature.inputs_to_parameters.items():
        if name in live:
            users.setdefault((state[target].data_ptr(), state[target].shape), []).append(name)
    found = {
        name: tuple(users.get((state[name].data_ptr(), state[name].shape), ())) for name in quantized if name in state
    }
    return {name: inputs for name, inputs in found.items() if inputs}


def stored_arrays(tensor: QuantizedTensor, deployment: Deployment) -> tuple[str, dict[str, Any]]:
    """The constexpr operator of a form that `check_forms` let through, and its parameters as coremltools takes them.

    Codes with zero points are stored unsigned, both moved up by half the range.
    """
    types = import_module("coremltools.converters.mil.mil.types")
    codes = tensor.codes.numpy()

    def integers(values: np.ndarray, prefix: str) -> np.ndarray:
        kind: type = types.nptype_from_builtin(types.string_to_builtin(f"{prefix}{tensor.bits}"))
        return values.astype(kind)

    if tensor.palette is not None and deployment == "iOS17":
        return "constexpr_lut_to_dense", {
            "indices": pack_bits(codes.reshape(-1), tensor.bits),
            "lut": tensor.palette[0].numpy(),
            "shape": np.array(codes.shape, np.uint32),
        }
    if tensor.palette is not None:
        shape = (len(tensor.palette), *[1] * (codes.ndim - 1), 2**tensor.bits, 1)
        lut = tensor.palette.numpy().reshape(shape)
        return "constexpr_lut_to_dense", {"indices": integers(codes, "uint"), "lut": lut}
    half = 0 if tensor.zero_point is None else 2 ** (tensor.bits - 1)
    prefix = "int" if tensor.zero_point is None else "uint"
    data = integers(codes.astype(np.int16) + half, prefix)
    scale = tensor.scale.numpy().reshape(scale_shape(tensor))
    zero = None if tensor.zero_point is None else integers(tensor.zero_point.numpy().astype(np.int16) + half, prefix)
    if deployment == "iOS17":
        zero = np.zeros(len(scale), np.int8) if zero is None else zero.reshape(-1)
        return "constexpr_affine_dequantize", {
            "quantized_data": data,
            "scale": scale.reshape(-1),
            "zero_point": zero,
            "axis": np.int32(0),
        }
    offset = {} if zero is None else {"offset": zero.reshape(scale.shape)}
    return "constexpr_blockwise_shift_scale", {"data": data, "scale": scale, **offset}


@contextlib.contextmanager
def compressed_constants(
    tensors: Mapping[str, QuantizedTensor | torch.Tensor], deployment: Deployment
) -> Iterator[None]:
    """Let coremltools write these instead of the floats of the exported program's inputs.

    Args:
        tensors: by the name of the program's input; one that stands under several names is written once. A plain
            tensor is written sparse.
    """
    converter: Any = import_module("coremltools.converters.mil.frontend.torch.converter").TorchConverter
    builder: Any = import_module("coremltools.converters.mil").Builder
    original = converter._add_const
    made: dict[int, Any] = {}

    def add_const(self: Any, name: str, value: Any) -> None:
        tensor = tensors.get(name)
        if tensor is None:
            original(self, name, value)
            return
        if id(tensor) not in made:
            if isinstance(tensor, QuantizedTensor):
                operator, parameters = stored_arrays(tensor, deployment)
            else:
                operator, parameters = sparse_arrays(tensor, deployment)
            made[id(tensor)] = getattr(builder, operator)(**parameters, name=name)
        self.context.add(made[id(tensor)], torch_name=name)

    converter._add_const = add_const
    try:
        yield
    finally:
        converter._add_const = original

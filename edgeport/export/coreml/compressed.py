"""Hand the logical codes and scales to coremltools, which writes them as constexpr operators.

coremltools' converter reads buffers named `_COREML_/<parameter>/...` beside a parameter and stores that
parameter as integers: the codes are `round(weight / scale)`, which gives ours back exactly because the weight
in the program is `scale * code`. The buffers go into the exported program's state, not into the module.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from edgeport.errors import TargetRefusesError
from edgeport.quantized import QuantizedTensor

QUANTIZATION = 3  # coremltools' CompressionType.QUANTIZATION


def scale_shape(tensor: QuantizedTensor) -> tuple[int, ...]:
    """The scale with the weight's rank: (N, 1, ...), or (N, K / group size) for a matrix cut into groups."""
    if tensor.per_channel:
        return (tensor.rows, *[1] * (tensor.codes.ndim - 1))
    return tuple(tensor.scale.shape)


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


def attach(program: torch.export.ExportedProgram, quantized: Mapping[str, QuantizedTensor]) -> dict[str, str]:
    """Add the buffers for every compressed weight that an output depends on to the program's state.

    Returns:
        For each such weight, the name of the program's input that stands for it (the first, when tied).

    Raises:
        TargetRefusesError: a form that Core ML's constexpr operators don't have.
    """
    live = live_inputs(program)
    state = program.state_dict
    # A tied weight has several names: they share one storage, and the program may read any of them.
    users: dict[tuple[int, torch.Size], list[tuple[str, str]]] = {}
    for name, target in program.graph_signature.inputs_to_parameters.items():
        if name in live:
            users.setdefault((state[target].data_ptr(), state[target].shape), []).append((name, target))
    names = {}
    for name, tensor in quantized.items():
        if tensor.axis != 0 or not tensor.symmetric or not (tensor.per_channel or tensor.codes.ndim == 2):
            raise TargetRefusesError(
                "Core ML takes symmetric codes, one scale an output channel or one scale a group of a matrix's row.",
                where=f"layer {name}",
            )
        readers = users.get((state[name].data_ptr(), state[name].shape), []) if name in state else []
        for _, target in readers:
            _add_buffers(state, target, tensor)
        if readers:
            names[name] = readers[0][0]
    return names


def _add_buffers(state: dict[str, torch.Tensor], target: str, tensor: QuantizedTensor) -> None:
    prefix, _, leaf = target.rpartition(".")
    start = f"{prefix}._COREML_/{leaf}" if prefix else f"_COREML_/{leaf}"
    state[f"{start}/compression_type"] = torch.tensor([QUANTIZATION])
    state[f"{start}/quantization_n_bits"] = torch.tensor(tensor.bits)
    state[f"{start}/quantization_scale"] = tensor.scale.reshape(scale_shape(tensor))

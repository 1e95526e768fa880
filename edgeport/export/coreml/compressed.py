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


def attach(program: torch.export.ExportedProgram, quantized: Mapping[str, QuantizedTensor]) -> dict[str, str]:
    """Add the buffers for every compressed weight to the program's state.

    Returns:
        For each compressed parameter, the name of the program's input that stands for it.

    Raises:
        TargetRefusesError: a form that Core ML's constexpr operators don't have, or a weight the program
            does not read.
    """
    inputs = {target: name for name, target in program.graph_signature.inputs_to_parameters.items()}
    # A tied weight has several names, and the program may keep any of them.
    by_storage = {
        (program.state_dict[target].data_ptr(), program.state_dict[target].shape): target for target in inputs
    }
    names = {}
    for name, tensor in quantized.items():
        if tensor.axis != 0 or not tensor.symmetric or not (tensor.per_channel or tensor.codes.ndim == 2):
            raise TargetRefusesError(
                "Core ML takes symmetric codes, one scale an output channel or one scale a group of a matrix's row.",
                where=f"layer {name}",
            )
        weight = program.state_dict.get(name)
        target = None if weight is None else by_storage.get((weight.data_ptr(), weight.shape))
        if target is None:
            raise TargetRefusesError(
                "The compressed weight is not used by the exported program.",
                where=f"layer {name}",
                next_step="Leave it out with `exclude` in the recipe.",
            )
        prefix, _, leaf = target.rpartition(".")
        start = f"{prefix}." if prefix else ""
        buffers = {
            "compression_type": torch.tensor([QUANTIZATION]),
            "quantization_n_bits": torch.tensor(tensor.bits),
            "quantization_scale": tensor.scale.reshape(scale_shape(tensor)),
        }
        for key, value in buffers.items():
            program.state_dict[f"{start}_COREML_/{leaf}/{key}"] = value
        names[name] = inputs[target]
    return names

"""What float16 can't hold: constants made harmless before the conversion, arithmetic that stays in float32.

- Attention masks add the least float32, -3.4e38, which float16 turns into -inf: a row that is masked
  everywhere then gives NaN. Half the least float16 masks as well (exp of it is 0) and survives a sum of two.
- `clamp(min=1e-9)` before a division guards against 0; in float16 the guard itself is 0. It becomes the least
  normal number, 6.1e-5 (smaller ones are flushed to 0 by some processors).
- Positions count in whole numbers, which float16 holds up to 2048 only, and angles made of them (rotary
  embeddings) lose every digit long before: what ends in a sine, a cosine or an integer is computed in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch

aten = torch.ops.aten

LARGEST = float(torch.finfo(torch.float16).max)
LEAST_NORMAL = float(torch.finfo(torch.float16).tiny)
MASK = LARGEST / 2
GUARDS = {aten.clamp.default: 1, aten.clamp_min.default: 1}
"""Operators with a lower bound, and the bound's position among the arguments."""


def _within(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value) and abs(value) > LARGEST:
        return math.copysign(MASK, value)
    return value


def _tame_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, or a copy without finite values beyond float16."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return tensor
    beyond = torch.isfinite(tensor) & (tensor.abs() > LARGEST)
    return torch.where(beyond, torch.sign(tensor) * MASK, tensor) if bool(beyond.any()) else tensor


def tame_constants(program: torch.export.ExportedProgram) -> int:
    """Change such constants in the program (never in the module that it came from); returns how many."""
    count = 0
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        arguments = tuple(_within(argument) for argument in node.args)
        position = GUARDS.get(node.target)
        if position is not None and len(arguments) > position:
            bound = arguments[position]
            if isinstance(bound, int | float) and 0 < bound < LEAST_NORMAL:
                arguments = (*arguments[:position], LEAST_NORMAL, *arguments[position + 1 :])
        keywords = {key: _within(value) for key, value in node.kwargs.items()}
        if arguments != node.args or keywords != dict(node.kwargs):
            node.args, node.kwargs = arguments, keywords
            count += 1
    for store in (program.state_dict, program.constants):
        for name, value in list(store.items()):
            if isinstance(value, torch.Tensor):
                tamed = _tame_tensor(value.detach())
                if tamed.shape == value.shape and tamed.data_ptr() != value.data_ptr():
                    store[name] = tamed
                    count += 1
    return count


# A value that passes only through these on its way is a position, an angle or an index, not an activation.
PASSING = frozenset(
    {"abs", "add", "clip", "concat", "exp", "expand_dims", "log", "matmul", "maximum", "minimum", "mul", "real_div"}
    | {"reshape", "select", "slice_by_index", "split", "squeeze", "sub", "tile", "transpose"}
)
EXACT = frozenset({"cos", "sin", "floor", "ceil", "round"})


def _ends_exact(operation: Any) -> bool:
    to_integer = operation.op_type == "cast" and "int" in str(operation.dtype.val)
    return operation.op_type in EXACT or to_integer


def takes_float16(operation: Any) -> bool:
    """Whether a MIL operation may compute in float16 (coremltools' `op_selector`): positions and angles may not."""
    if _ends_exact(operation):
        return False
    waiting, seen = [operation], set()
    while waiting:
        current = waiting.pop()
        if current.op_type not in PASSING:
            continue
        for output in current.outputs:
            for reader in output.child_ops:
                if _ends_exact(reader):
                    return False
                if id(reader) not in seen:
                    seen.add(id(reader))
                    waiting.append(reader)
    return True

"""Bring the fixed roundings of a traced program into the form that XNNPACK's partitioner takes, in place.

A chain of convolutions stays in integers where nothing but one rounding stands between two of them. A trace has a
rounding on each side of what is between: a clamp that the grid already makes, or a padding with zeros, which XNNPACK
takes between a rounding and a convolution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeport.activations import ActivationGrid

if TYPE_CHECKING:
    import torch


OPEN_ENDS: dict[str, tuple[float | None, float | None]] = {
    "relu": (0.0, None),
    "relu6": (0.0, 6.0),
    "hardtanh": (-1.0, 1.0),
    "clamp": (None, None),
}
"""Clamps, and the bounds they have where their arguments name none."""


def _grid(node: Any) -> ActivationGrid | None:
    """The grid that a `dequantize_per_tensor` of fixed scale stands for."""
    import torch

    if getattr(node, "target", None) is not torch.ops.quantized_decomposed.dequantize_per_tensor.default:
        return None
    scale, zero_point = node.args[1:3]
    return ActivationGrid(scale, zero_point)


def _clamp(node: torch.fx.Node) -> tuple[float, float] | None:
    """The bounds of a clamp with constant ends."""
    name = str(getattr(node.target, "__name__", "")).partition(".")[0].rstrip("_")
    if name not in OPEN_ENDS:
        return None
    ends: list[Any] = [*node.args[1:3], *OPEN_ENDS[name][len(node.args) - 1 :]]
    if not all(isinstance(end, int | float | None) for end in ends):
        return None
    low, high = ends
    return -float("inf") if low is None else float(low), float("inf") if high is None else float(high)


def _pads_zeros(node: Any) -> bool:
    import torch

    if node.target is torch.ops.aten.constant_pad_nd.default:
        return len(node.args) < 3 or node.args[2] == 0
    if node.target is torch.ops.aten.pad.default:
        return len(node.args) < 3 or (node.args[2] == "constant" and (len(node.args) < 4 or not node.args[3]))
    return False


def simplify_roundings(program: torch.export.ExportedProgram) -> None:
    """Drop clamps of tensors that lie within their bounds, and roundings of what is on the same grid already."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        bounds, grid = _clamp(node), _grid(node.args[0]) if node.args else None
        if bounds is not None and grid is not None and grid.within(*bounds):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in list(graph.nodes):
        grid = _grid(node)
        if grid is None:
            continue
        codes = node.args[0]
        source = before = codes.args[0]
        while _pads_zeros(before):
            before = before.args[0]
        if _grid(before) == grid:
            if source is before:
                # The same codes: each reader keeps a rounding of its own, as the partitioner likes it.
                node.replace_input_with(codes, before.args[0])
            else:
                node.replace_all_uses_with(source)
    graph.eliminate_dead_code()
    program.graph_module.recompile()

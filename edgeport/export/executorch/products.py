"""The products with weights that a .pte file's delegates make, read out of the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgeport.export.executorch.pte import read_program, xnnpack_payloads

FULLY_CONNECTED, CONVOLUTIONS = "XNNFullyConnected", ("XNNConv2d", "XNNDepthwiseConv2d")


def xnnpack_products(path: Any) -> int:
    """Operations of the products with weights at the largest shapes that the file takes, 2 for a multiply-add.

    Raises:
        BadInputError: the file is missing, or no ExecuTorch program.
    """
    return sum(_graph_operations(payload.graph) for payload in xnnpack_payloads(read_program(path)))


def _graph_operations(graph: Mapping[str, Any]) -> int:
    tensors = {}
    for entry in graph["xvalues"]:
        value = entry["xvalue_union"]
        tensor = value.get("tensor_value", value)
        tensors[tensor["id_out"]] = tensor
    total = 0
    for entry in graph["xnodes"]:
        kind, node = entry["xnode_union_type"], entry["xnode_union"]
        if kind != FULLY_CONNECTED and kind not in CONVOLUTIONS:
            continue
        kernel = tensors[node["filter_id"]]
        if not kernel["constant_buffer_idx"]:
            continue
        # Kernels lie as (N, H, W, C), those of depthwise convolutions as (1, H, W, N).
        dims = kernel["dims"]
        each = math.prod(dims[1:3]) if kind == CONVOLUTIONS[1] else math.prod(dims[1:])
        total += 2 * math.prod(tensors[node["output_id"]]["dims"]) * each
    return total

"""Repairs of executorch 1.4.1's XNNPACK lowering, each with what goes wrong without it.

Layout of quantized convolutions: XNNPACK convolves in NHWC, and executorch's
`ChannelsLastTaggedReshapePass` puts transpositions where a convolution meets a tensor in NCHW. With a
dynamically quantized input it looks for the place by following first arguments upwards, past the
quantization and through whatever computed the tensor (a padding, a reshape, a product), and transposes
there: everything in between then runs in the wrong layout. Lowering succeeds, and the result is wrong
(EfficientNet-Lite0: cosine 0.02) or the runtime stops at a shape. Repaired after version 1.4.1
(https://github.com/pytorch/executorch/pull/21637); until then, here.

Pooling without a stride: the partitioner reads the stride argument of `max_pool2d`, which
`torch.nn.functional.max_pool2d(x, 2)` leaves out, and stops with an IndexError.

GELU by a tanh (Gemma, SigLIP): the serializer leaves the argument out (backends/xnnpack/operators/op_gelu.py), and
XNNPACK computes the exact GELU instead, which differs by up to 5e-4.

Bounds of open sizes: transformers' patch of `eval_upper_bound` plans no size above 1024 or four times the traced one,
whatever the program's own constraints say, because interval arithmetic over quotients can explode. A decoder that
reads 1500 states of Whisper's encoder then stops in the runtime. Sums and products of constrained sizes are bounded
exactly, and their bounds are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def bounded_layout_search() -> Iterator[None]:
    """Make the pass transpose exactly the tensor that is quantized, inside the block."""
    from executorch.backends.xnnpack._passes.channels_last_tagged_reshape_pass import ChannelsLastTaggedReshapePass

    original = ChannelsLastTaggedReshapePass.input_to_nhwc
    setattr(ChannelsLastTaggedReshapePass, "input_to_nhwc", _bounded(original))  # noqa: B010  # as mypy wants it
    try:
        yield
    finally:
        setattr(ChannelsLastTaggedReshapePass, "input_to_nhwc", original)  # noqa: B010


@contextmanager
def kept_bounds() -> Iterator[None]:
    """Plan sums and products of constrained sizes by their constraints. To be entered inside transformers' patches."""
    from executorch.exir import sym_util
    from executorch.exir.passes import sym_shape_eval_pass

    capped = {module: module.eval_upper_bound for module in (sym_util, sym_shape_eval_pass)}
    for module, function in capped.items():
        module.eval_upper_bound = _exact_where_plain(function)
    try:
        yield
    finally:
        for module, function in capped.items():
            module.eval_upper_bound = function


def _exact_where_plain(capped: Callable[[Any], int]) -> Callable[[Any], int]:
    import sympy
    from torch.utils._sympy.functions import Max
    from torch.utils._sympy.value_ranges import bound_sympy

    plain = (sympy.Symbol, sympy.Integer, sympy.Add, sympy.Mul, Max)

    def eval_upper_bound(size: Any) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if all(isinstance(part, plain) for part in sympy.preorder_traversal(expression)):
            upper = bound_sympy(expression, size.node.shape_env.var_to_range).upper
            if isinstance(upper, sympy.Integer):
                return int(upper)
        return capped(size)

    return eval_upper_bound


def _bounded(original: Callable[..., None]) -> Callable[..., None]:
    import torch
    from executorch.backends.xnnpack.utils.quant_utils import is_dequant, is_dynamic_qdq
    from executorch.exir.dialects._ops import ops

    def input_to_nhwc(self: Any, graph_module: Any, input_node: Any, target_node: Any) -> None:
        dynamic = is_dequant(input_node) and is_dynamic_qdq(input_node)
        if not dynamic or self.is_nhwc_node(input_node):
            original(self, graph_module, input_node, target_node)
            return
        quantize = input_node.args[0]
        source = quantize.args[0]
        transposed = source.meta.get(self.PARTNER_NODE)
        if transposed is None:
            with graph_module.graph.inserting_after(source):
                transposed = graph_module.graph.call_function(
                    ops.edge.aten._to_copy.default, (source,), {"memory_format": torch.channels_last}
                )
            self.mark_as_nhwc_node(transposed)
            self.make_partners(source, transposed)
        # The scale comes through a getitem from the operator that chose it, which reads the tensor too.
        for user in (quantize, quantize.args[1].args[0]):
            user.replace_input_with(source, transposed)

    return input_to_nhwc


def complete_pooling(program: torch.export.ExportedProgram) -> None:
    """Write out the stride of every max_pool2d, which is the kernel size where it is left out."""
    import torch

    for node in program.graph.nodes:
        if node.target is torch.ops.aten.max_pool2d.default and (len(node.args) < 3 or not node.args[2]):
            kernel = list(node.args[1])
            pair = kernel * 2 if len(kernel) == 1 else kernel
            node.args = (node.args[0], pair, pair, *node.args[3:])


def written_gelu(program: torch.export.ExportedProgram) -> None:
    """Write out every GELU by a tanh: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))); Hendrycks & Gimpel, 2016."""
    import torch

    aten = torch.ops.aten
    factor = math.sqrt(2 / math.pi)
    for node in list(program.graph.nodes):
        if node.target is not aten.gelu.default or node.kwargs.get("approximate") != "tanh":
            continue

        def call(target: Any, *args: Any, like: torch.fx.Node = node) -> torch.fx.Node:
            made: torch.fx.Node = program.graph.call_function(target, args)
            made.meta = dict(like.meta)
            return made

        x = node.args[0]
        with program.graph.inserting_before(node):
            slope = call(aten.add.Tensor, call(aten.mul.Tensor, call(aten.mul.Tensor, x, x), 0.044715 * factor), factor)
            share = call(aten.tanh.default, call(aten.mul.Tensor, x, slope))
            half = call(aten.mul.Tensor, x, 0.5)
            result = call(aten.add.Tensor, half, call(aten.mul.Tensor, half, share))
        node.replace_all_uses_with(result)
        program.graph.erase_node(node)

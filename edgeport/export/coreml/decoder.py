"""Trace a decoder language model for Core ML, with its cache as two states of the model.

The interface is the one of Apple's published decoders (iOS 18):

    inputIds (1, S) int32, causalMask (1, 1, 1, T) float16 -> logits (1, 1, V) float32 of the last token
    states keyCache, valueCache (layers, 1, kv_heads, context, head_dim) float16

S new tokens, T tokens in all, the new ones the last of them. Of causalMask the length alone is read: it is how a shape
reaches the program, and every size in it then follows from the shapes of the inputs (Core ML's GPU and Neural Engine
run no shapes that depend on values). Which tokens see which follows from their positions. A text is cut short by giving
a smaller T: what lies behind it is never read, and written over later.

Attention is iOS 18's fused operator; a soft cap, which it does not know, takes matrix products. Layers with a window
hide by their mask what lies before it.
"""

from __future__ import annotations

import contextlib
import copy
import math
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from edgeport.errors import TargetRefusesError, first_line
from edgeport.export.artifact import LoweringSettings
from edgeport.export.coreml.float16 import MASK as HIDDEN
from edgeport.export.coreml.library import quiet
from edgeport.export.coreml.norms import safe_norms
from edgeport.export.coreml.patches import forward_replaced, plain_attention
from edgeport.export.coreml.states import conversions, read, write
from edgeport.export.coreml.trace import decompose
from edgeport.model.decoder import TASK, Call, StepCache, attending, with_tables
from edgeport.model.types import AttentionLayer, Axis, Decoder, Model, TensorSpec

IDS, MASK, LOGITS = "inputIds", "causalMask", "logits"
KEYS, VALUES = "keyCache", "valueCache"
TRACED_TOKENS, TRACED_TOTAL = 2, 4
UNCACHED = f"without a cache (`--task {TASK}`)"


def file_specs(decoder: Decoder) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The program's inputs and outputs; its states are no part of them."""
    sequence, total = (Axis(name, 1, decoder.context, 1) for name in ("sequence", "total_sequence"))
    inputs = (TensorSpec(IDS, "int32", (1, sequence)), TensorSpec(MASK, "float16", (1, 1, 1, total)))
    return inputs, (TensorSpec(LOGITS, "float32", (1, 1, decoder.vocabulary)),)


def input_types(ct: ModuleType, decoder: Decoder) -> list[Any]:
    """coremltools' description of the inputs."""
    types = []
    for spec in file_specs(decoder)[0]:
        shape = [
            ct.RangeDim(lower_bound=size.minimum, upper_bound=size.maximum, default=size.example)
            if isinstance(size, Axis)
            else size
            for size in spec.shape
        ]
        types.append(ct.TensorType(name=spec.name, shape=shape, dtype=np.dtype(spec.dtype).type))
    return types


def cache_shape(decoder: Decoder) -> tuple[int, int, int, int, int]:
    """Of each of the two states."""
    first = decoder.layers[0]
    return len(decoder.layers), 1, first.kv_heads, decoder.context, first.head_dim


def check_settings(settings: LoweringSettings, deployment: str) -> None:
    """Refuse what a model with a cache can't be lowered with.

    Raises:
        TargetRefusesError: a system version without states, or enumerated sizes.
    """
    if deployment == "iOS17":
        raise TargetRefusesError(
            "Core ML keeps states, and so a cache, from iOS 18 on.",
            where="minimum_deployment_target",
            allowed="iOS18",
            next_step=f"Export {UNCACHED}, or for an iOS 18 target.",
        )
    if settings.enumerated:
        raise TargetRefusesError(
            "A model with a cache takes any number of tokens a call, and can't enumerate them: with each token the "
            "text grows by one.",
            where="--enumerate",
            next_step=f"Leave it out, or export {UNCACHED}.",
        )


def facts(decoder: Decoder) -> dict[str, Any]:
    """What a reader of the evidence wants to know of the cache."""
    return {"context": decoder.context, "cache_bytes": decoder.cached_values * decoder.context * 2}


class _Step:
    """One call: where its tokens stand, what they see, and the states as the layers so far left them."""

    def __init__(self, module: Any, count: Any, total: Any) -> None:
        self.keys, self.values, self.places = module.keyCache, module.valueCache, module.edgeport_places
        self.count, self.total, self.start = count, total, total - count
        self._masks: dict[tuple[int | None, int], torch.Tensor] = {}

    def rows(self, table: torch.Tensor) -> torch.Tensor:
        """The rows of a table over positions that belong to the new tokens."""
        return table.narrow(0, self.start, self.count)

    def mask(self, window: int | None, groups: int) -> torch.Tensor:
        """(1, 1, groups * S, T), added to the scores; made once for all layers that have it."""
        if (window, groups) not in self._masks:
            ahead = self.places[: self.total][None] - self.rows(self.places)[:, None]  # (S, T): 0 is the token itself
            hidden = ahead > 0 if window is None else torch.logical_or(ahead > 0, ahead <= -window)
            mask = hidden.to(torch.float32) * -HIDDEN  # coremltools gives a choice between two numbers no shape
            self._masks[window, groups] = mask.repeat(groups, 1)[None, None]
        return self._masks[window, groups]

    def attend(self, call: Call) -> torch.Tensor:
        """Attention over the cache; (1, S, heads, head_dim). Query heads that share a key stand under each other."""
        layer = call.layer
        self.keys = write(self.keys, call.key, call.index, self.start)
        self.values = write(self.values, call.value, call.index, self.start)
        keys = read(self.keys, call.index, self.total)
        values = read(self.values, call.index, self.total)
        groups = layer.heads // layer.kv_heads
        # All layers that see the whole cache share one mask.
        window = layer.window if layer.window is not None and layer.window < self.keys.shape[3] else None
        query = call.query.reshape(1, layer.kv_heads, groups * self.count, layer.head_dim)
        answer = _attention(layer, query, keys, values, self.mask(window, groups))
        return answer.reshape(1, layer.heads, self.count, layer.head_dim).transpose(1, 2)


def _attention(
    layer: AttentionLayer, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    if layer.softcap is None:
        # iOS 18's fused operator scales by 1 / sqrt(head_dim), and can't be told otherwise.
        factor = layer.scale * math.sqrt(layer.head_dim)
        if not math.isclose(factor, 1.0, rel_tol=1e-6):
            query = query * factor
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    scores = torch.matmul(query * layer.scale, keys.transpose(2, 3))
    scores = torch.tanh(scores / layer.softcap) * layer.softcap
    return torch.matmul((scores + mask).softmax(-1), values)


def _traced(module: Any, decoder: Decoder) -> torch.export.ExportedProgram:
    """Export `module`, a copy that is changed here."""
    step: list[_Step] = []
    with_tables(module, decoder.context, lambda table, _positions: step[-1].rows(table)[None])
    module.register_buffer("edgeport_places", torch.arange(decoder.context, dtype=torch.int32))
    for name in (KEYS, VALUES):
        module.register_buffer(name, torch.zeros(cache_shape(decoder)))
    original = module.forward

    def forward(inputIds: torch.Tensor, causalMask: torch.Tensor) -> torch.Tensor:
        count, total = inputIds.shape[1], causalMask.shape[3]
        torch._check(total >= count)  # type: ignore[no-untyped-call]
        step.append(_Step(module, count, total))
        with attending(module, lambda call: step[-1].attend(call)):
            result = original(
                input_ids=inputIds,
                position_ids=step[-1].rows(module.edgeport_places)[None],
                past_key_values=StepCache(),
                use_cache=True,
                logits_to_keep=1,
            )
        module.keyCache.copy_(step[-1].keys)
        module.valueCache.copy_(step[-1].values)
        logits: torch.Tensor = result.logits
        return logits

    example = (torch.ones(1, TRACED_TOKENS, dtype=torch.int32), torch.zeros(1, 1, 1, TRACED_TOTAL))
    dynamic = torch.export.Dim.AUTO(min=1, max=decoder.context)
    with forward_replaced(module, forward), plain_attention(), torch.no_grad():
        return torch.export.export(module, example, dynamic_shapes=({1: dynamic}, {3: dynamic}), strict=False)


RESHAPES = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default)


def _write_sizes(program: torch.export.ExportedProgram) -> None:
    """Give reshapes the sizes that they leave to be found, -1, where they are numbers.

    coremltools finds them again only while a size that varies is one symbol: from the second layer on the number of
    heads would vary too.
    """
    for node in program.graph.nodes:
        if node.target in RESHAPES and -1 in node.args[1]:
            found = node.meta["val"].shape
            sizes = [
                int(have) if size == -1 and is_concrete_int(have) else size
                for size, have in zip(node.args[1], found, strict=True)
            ]
            node.args = (node.args[0], sizes)


def export_decoder(model: Model, *, half: bool) -> tuple[torch.export.ExportedProgram, list[str]]:
    """Trace a model that keeps a cache.

    Args:
        half: arithmetic will be float16: RMSNorms take their safe form.

    Returns:
        The program, and the names of the norms in their safe form.

    Raises:
        TargetRefusesError: the layers' caches differ in shape, or torch.export can't trace the model.
    """
    decoder = model.decoder
    assert decoder is not None
    shapes = sorted({(layer.kv_heads, layer.head_dim) for layer in decoder.layers})
    if len(shapes) > 1:
        raise TargetRefusesError(
            f"The layers keep caches of different shapes: {shapes} (heads, width).",
            where=f"model {model.name}",
            allowed="one shape for all layers",
            next_step=f"Export it {UNCACHED}.",
        )
    shared = {id(tensor): tensor for tensor in (*model.module.parameters(), *model.module.buffers())}
    module = copy.deepcopy(model.module, memo=shared)
    with quiet(), contextlib.ExitStack() as stack:
        norms = stack.enter_context(safe_norms(module)) if half else []
        try:
            program = _traced(module, decoder)
        except Exception as error:
            raise TargetRefusesError(
                f"torch.export can't trace the model with a cache: {first_line(error)}",
                where=f"model {model.name}",
                next_step=f"Export it {UNCACHED}.",
            ) from error
    with conversions():
        program = decompose(program, model)
    _write_sizes(program)
    return program, list(norms)

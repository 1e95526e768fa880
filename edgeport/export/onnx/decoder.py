"""Trace a decoder language model for ONNX Runtime, with its cache as inputs and outputs.

The names and shapes are those of onnxruntime-genai's models, so that it runs the same file:

    input_ids (1, S), attention_mask (1, T) of ones, past_key_values.N.key and .value (1, kv_heads, P, head_dim)
    logits (1, 1, V), present.N.key and .value (1, kv_heads, P', head_dim)

S new tokens, T tokens in all. P is T - S, or any P = P' >= T where past and present are one buffer. A layer whose
window is shorter than the context keeps the latest tokens only, in one buffer of any P >= the window. A cache in int8
holds the codes of keys and values; in int4 two codes lie in a byte (uint8, head_dim / 2).
Attention, tables of positions and rotations stand as operators of the domain `edgeport` until `attention.py`
replaces them.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgeport.export.onnx.trace import PLACEHOLDERS
from edgeport.formats import CacheFormat
from edgeport.model.decoder import Call, StepCache, attending, rotating, with_tables
from edgeport.model.types import AttentionLayer, Axis, Decoder, Model, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

IDS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
PAST = "past_key_values."
TRACED_TOKENS, TRACED_PAST = 3, 4
SLACK = 128
"""Places that a cache with a window has beyond the window: the operator makes room for so many tokens at once."""
STORED: dict[CacheFormat, tuple[str, int]] = {"float": ("float32", 1), "int8": ("int8", 1), "int4": ("uint8", 2)}
"""A cache's dtype, and the values that one element holds."""


def past_names(layers: int) -> list[str]:
    """The cache's inputs, in the file's order."""
    return [f"{PAST}{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def present_names(layers: int) -> list[str]:
    """The cache's outputs, in the file's order."""
    return [f"present.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def drops(layer: AttentionLayer, decoder: Decoder) -> bool:
    """The layer's cache is shorter than the context: what its window does not see any more is dropped.

    The kernel drops codes of 4 bits only where heads are a multiple of 32 wide (ONNX Runtime 1.31).
    """
    dropping = decoder.forgets and (decoder.cache != "int4" or layer.head_dim % 32 == 0)
    return dropping and layer.window is not None and layer.window + SLACK < decoder.context


def _kept(layer: AttentionLayer, decoder: Decoder) -> Axis:
    """The places that a layer's cache has."""
    if layer.window is None or not drops(layer, decoder):
        return Axis("past_sequence", 0, decoder.context, 1)
    return Axis(f"past_window_{layer.window}", 0, layer.window + SLACK, 1)


def windows_of(decoder: Decoder) -> dict[str, int]:
    """The windows of those inputs of the cache that drop tokens, by name."""
    found = {}
    for at, name in enumerate(past_names(len(decoder.layers))):
        layer = decoder.layers[at // 2]
        if layer.window is not None and drops(layer, decoder):
            found[name] = layer.window
    return found


def cache_specs(decoder: Decoder) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The cache as inputs and outputs of the file, at most `Axis.maximum` long each."""
    inputs, outputs = [], []
    count = len(decoder.layers)
    for at, (past, present) in enumerate(zip(past_names(count), present_names(count), strict=True)):
        layer = decoder.layers[at // 2]
        axis = _kept(layer, decoder)
        dtype, share = STORED[decoder.cache]
        kept = replace(axis, name=axis.name.replace("past", "present"))
        inputs.append(TensorSpec(past, dtype, (1, layer.kv_heads, axis, layer.head_dim // share)))
        outputs.append(TensorSpec(present, dtype, (1, layer.kv_heads, kept, layer.head_dim // share)))
    return inputs, outputs


def spec_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor with every axis at its longest."""
    sizes = [size.maximum if isinstance(size, Axis) else size for size in spec.shape]
    return prod(sizes) * np.dtype(spec.dtype).itemsize


def file_model(model: Model) -> Model:
    """The model with the inputs and outputs that its file has. `position_ids` is left out where no layer needs it."""
    decoder = model.decoder
    assert decoder is not None
    held = decoder.context
    total = Axis("total_sequence", 0, held, 1)
    sequence = model.inputs[0].shape[1]
    past, present = cache_specs(decoder)
    inputs = (
        TensorSpec(IDS, "int64", (1, sequence)),
        TensorSpec(MASK, "int64", (1, total)),
        TensorSpec(POSITIONS, "int64", (1, sequence)),
        *past,
    )
    outputs = (TensorSpec(LOGITS, "float32", (1, 1, decoder.vocabulary)), *present)
    return replace(model, inputs=inputs, outputs=outputs)


class _Decoder(torch.nn.Module):
    """The module with a cache that comes in and goes out."""

    def __init__(self, module: torch.nn.Module, decoder: Decoder) -> None:
        super().__init__()
        self.module, self.decoder = module, decoder

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """See the module's docstring for the shapes."""
        present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def attend(call: Call) -> torch.Tensor:
            pair = past[2 * call.index], past[2 * call.index + 1]
            answer, key, value = cached_attention(call, self.decoder, pair, mask)
            present[call.index] = (key, value)
            return answer

        with attending(self.module, attend):
            result = self.module(
                input_ids=ids, position_ids=positions, past_key_values=StepCache(), use_cache=True, logits_to_keep=1
            )
        return (result.logits, *(tensor for index in sorted(present) for tensor in present[index]))


def cached_attention(
    call: Call,
    decoder: Decoder,
    past: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The placeholder of one layer's attention: what it answers, (1, S, heads, head_dim), and the cache after it.

    Args:
        bias: (1, heads, S, T), added to the scores.
    """
    batch, _, length, width = call.query.shape
    kept = past[0]
    held = (batch, call.layer.kv_heads, mask.shape[1], kept.shape[3])
    added = () if bias is None else (bias,)
    answer, key, value = torch.onnx.ops.symbolic_multi_out(
        f"{PLACEHOLDERS}::CachedAttention",
        (call.query, call.key, call.value, *past, mask, *added),
        _attributes(call, decoder),
        dtypes=(call.query.dtype, kept.dtype, kept.dtype),
        shapes=((batch, length, call.layer.heads, width), held, held),
        version=1,
    )
    return answer, key, value


def _attributes(call: Call, decoder: Decoder) -> dict[str, Any]:
    layer = call.layer
    found: dict[str, Any] = {"num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "scale": layer.scale}
    if layer.window is not None:
        found["local_window_size"] = layer.window
        if drops(layer, decoder):
            found["sliding_window_cache"] = 1
    if layer.softcap is not None:
        found["softcap"] = layer.softcap
    return found


def _look_up(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    shape = (*positions.shape, table.shape[-1])
    found: torch.Tensor = torch.onnx.ops.symbolic(
        f"{PLACEHOLDERS}::Table", (table, positions), {}, dtype=table.dtype, shape=shape, version=1
    )
    return found


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned: torch.Tensor = torch.onnx.ops.symbolic(
        f"{PLACEHOLDERS}::Rotary", (x, cos, sin), {}, dtype=x.dtype, shape=x.shape, version=1
    )
    return turned


def _traced_past(spec: TensorSpec) -> torch.Tensor:
    sizes = [TRACED_PAST if isinstance(size, Axis) else size for size in spec.shape]
    return torch.zeros(sizes, dtype=getattr(torch, spec.dtype))


def export_decoder(module: torch.nn.Module, model: Model, opset: int) -> ir.Model:
    """Trace `module`, a copy that is changed here, with the inputs and outputs of `file_model(model)`."""
    decoder = model.decoder
    assert decoder is not None
    tables = with_tables(module, decoder.context, _look_up)
    names = file_model(model)
    total = TRACED_PAST + TRACED_TOKENS
    example = (
        torch.ones(1, TRACED_TOKENS, dtype=torch.int64),
        torch.ones(1, total, dtype=torch.int64),
        torch.arange(TRACED_PAST, total)[None],
        *(_traced_past(spec) for spec in cache_specs(decoder)[0]),
    )
    dynamic = torch.export.Dim.DYNAMIC
    caches = tuple({2: dynamic} for _ in range(2 * len(decoder.layers)))

    def traced() -> ir.Model:
        with torch.no_grad():
            program = torch.onnx.export(
                _Decoder(module, decoder).eval(),
                example,
                input_names=[spec.name for spec in names.inputs],
                output_names=[spec.name for spec in names.outputs],
                opset_version=opset,
                dynamic_shapes=({1: dynamic}, {1: dynamic}, {1: dynamic}, caches),
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        graph: ir.Model = program.model
        return graph

    if not all(table.halves for table in tables):
        return traced()
    with rotating(module, _rotate):
        return traced()

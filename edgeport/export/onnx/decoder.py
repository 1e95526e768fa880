"""Trace a decoder language model for ONNX Runtime, with its cache as inputs and outputs.

The names and shapes are those of onnxruntime-genai's models, so that it runs the same file:

    input_ids (1, S), attention_mask (1, T) of ones, past_key_values.N.key and .value (1, kv_heads, P, head_dim)
    logits (1, 1, V), present.N.key and .value (1, kv_heads, P', head_dim)

S new tokens, T tokens in all. P is T - S, or any P = P' >= T where past and present are one buffer.
Attention, tables of positions and rotations stand as operators of the domain `edgeport` until `attention.py`
replaces them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from edgeport.export.onnx.trace import PLACEHOLDERS
from edgeport.model.decoder import Call, StepCache, attending, rotating, with_tables
from edgeport.model.types import Axis, Decoder, Model, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

IDS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
TRACED_TOKENS, TRACED_PAST = 3, 4


def past_names(layers: int) -> list[str]:
    """The cache's inputs, in the file's order."""
    return [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def present_names(layers: int) -> list[str]:
    """The cache's outputs, in the file's order."""
    return [f"present.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def file_model(model: Model) -> Model:
    """The model with the inputs and outputs that its file has. `position_ids` is left out where no layer needs it."""
    decoder = model.decoder
    assert decoder is not None
    held = decoder.context
    total, past, present = (Axis(name, 0, held, 1) for name in ("total_sequence", "past_sequence", "present_sequence"))
    sequence = model.inputs[0].shape[1]

    def caches(names: list[str], length: Axis) -> list[TensorSpec]:
        shapes = [(1, layer.kv_heads, length, layer.head_dim) for layer in decoder.layers for _ in range(2)]
        return [TensorSpec(name, "float32", shape) for name, shape in zip(names, shapes, strict=True)]

    count = len(decoder.layers)
    inputs = (
        TensorSpec(IDS, "int64", (1, sequence)),
        TensorSpec(MASK, "int64", (1, total)),
        TensorSpec(POSITIONS, "int64", (1, sequence)),
        *caches(past_names(count), past),
    )
    outputs = (TensorSpec(LOGITS, "float32", (1, 1, decoder.vocabulary)), *caches(present_names(count), present))
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
            answer, key, value = cached_attention(call, pair, mask)
            present[call.index] = (key, value)
            return answer

        with attending(self.module, attend):
            result = self.module(
                input_ids=ids, position_ids=positions, past_key_values=StepCache(), use_cache=True, logits_to_keep=1
            )
        return (result.logits, *(tensor for index in sorted(present) for tensor in present[index]))


def cached_attention(
    call: Call, past: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The placeholder of one layer's attention: what it answers, (1, S, heads, head_dim), and the cache after it.

    Args:
        bias: (1, heads, S, T), added to the scores.
    """
    batch, _, length, width = call.query.shape
    held = (batch, call.layer.kv_heads, mask.shape[1], width)
    added = () if bias is None else (bias,)
    answer, key, value = torch.onnx.ops.symbolic_multi_out(
        f"{PLACEHOLDERS}::CachedAttention",
        (call.query, call.key, call.value, *past, mask, *added),
        _attributes(call),
        dtypes=(call.query.dtype,) * 3,
        shapes=((batch, length, call.layer.heads, width), held, held),
        version=1,
    )
    return answer, key, value


def _attributes(call: Call) -> dict[str, Any]:
    layer = call.layer
    found: dict[str, Any] = {"num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "scale": layer.scale}
    if layer.window is not None:
        found["local_window_size"] = layer.window
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
        *(torch.zeros(1, layer.kv_heads, TRACED_PAST, layer.head_dim) for layer in decoder.layers for _ in range(2)),
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

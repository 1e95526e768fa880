"""Trace an encoder-decoder for ONNX Runtime as two files: the encoder, and the decoder with its cache.

    encoder.onnx   the model's input -> present.N.encoder.key and .value (1, heads, T, head_dim)
    decoder.onnx   input_ids (1, S), attention_mask (1, L) of ones, past_key_values.N.decoder.key and .value
                   (1, heads, P, head_dim), past_key_values.N.encoder.key and .value as the encoder gave them
                   -> logits (1, 1, V), present.N.decoder.key and .value

T states, S new tokens, L tokens in all; past and present of the decoder may be one buffer, as in `decoder.py`. Keys and
values of the states leave the encoder's file: the decoder's layers multiply them out of the states once, and the states
themselves stay inside. The names are those of Hugging Face's ONNX exports.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from edgeport.export.onnx.decoder import IDS, LOGITS, MASK, TRACED_PAST, TRACED_TOKENS, cached_attention
from edgeport.export.onnx.trace import PLACEHOLDERS
from edgeport.model.decoder import Call, attending
from edgeport.model.encoder_decoder import (
    bias_tables,
    cross_pairs,
    decode,
    encode,
    last_token_scored,
    look_positions_up,
    most_states,
)
from edgeport.model.types import Axis, Decoder, Model, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

ENCODER_FILE, DECODER_FILE = "encoder.onnx", "decoder.onnx"
TRACED_STATES = 5


def _names(first: str, which: str, layers: int) -> list[str]:
    return [f"{first}.{layer}.{which}.{part}" for layer in range(layers) for part in ("key", "value")]


def encoder_file(model: Model) -> Model:
    """The model with the inputs and outputs of the encoder's file."""
    decoder = model.decoder
    assert decoder is not None
    states = most_states(model)
    length = states if states.varies else states.example
    outputs = [
        TensorSpec(name, "float32", (1, layer.kv_heads, length, layer.head_dim))
        for name, layer in zip(_names("present", "encoder", len(decoder.cross)), _twice(decoder.cross), strict=True)
    ]
    return replace(model, inputs=model.inputs[:1], outputs=tuple(outputs))


def decoder_file(model: Model) -> Model:
    """The model with the inputs and outputs of the decoder's file."""
    decoder = model.decoder
    assert decoder is not None
    held, count = decoder.context, len(decoder.layers)
    total, past, present = (Axis(name, 0, held, 1) for name in ("total_sequence", "past_sequence", "present_sequence"))

    def caches(names: list[str], length: Axis) -> list[TensorSpec]:
        return [
            TensorSpec(name, "float32", (1, layer.kv_heads, length, layer.head_dim))
            for name, layer in zip(names, _twice(decoder.layers), strict=True)
        ]

    states = [
        replace(spec, name=spec.name.replace("present", "past_key_values")) for spec in encoder_file(model).outputs
    ]
    inputs = (
        TensorSpec(IDS, "int64", (1, replace(_tokens(model), name="sequence"))),
        TensorSpec(MASK, "int64", (1, total)),
        *caches(_names("past_key_values", "decoder", count), past),
        *states,
    )
    outputs = (
        TensorSpec(LOGITS, "float32", (1, 1, decoder.vocabulary)),
        *caches(_names("present", "decoder", count), present),
    )
    return replace(model, inputs=inputs, outputs=outputs)


def _twice(layers: tuple[Any, ...]) -> list[Any]:
    return [layer for layer in layers for _ in range(2)]


def _tokens(model: Model) -> Axis:
    (axis,) = (size for size in model.inputs[1].shape if isinstance(size, Axis))
    return axis


class _Encoder(torch.nn.Module):
    """The encoder, and what the decoder's layers make of its states."""

    def __init__(self, module: Any, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, source: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys and values by layer."""
        pairs = cross_pairs(self.module, encode(self.module, self.name, source))
        return tuple(tensor for pair in pairs for tensor in pair)


class _Decoder(torch.nn.Module):
    """The decoder with a cache that comes in and goes out."""

    def __init__(self, module: Any, decoder: Decoder, tables: list[torch.Tensor | None]) -> None:
        super().__init__()
        self.module, self.decoder = module, decoder
        self.kinds = list({id(table): table for table in tables if table is not None}.values())
        self.table_of = [None if table is None else self._kind(table) for table in tables]
        for index, table in enumerate(self.kinds):
            self.register_buffer(f"bias_{index}", table)

    def _kind(self, table: torch.Tensor) -> int:
        return next(index for index, other in enumerate(self.kinds) if other is table)

    def _biases(self, count: Any, total: Any) -> list[torch.Tensor]:
        """What is added to scores, (1, heads, S, L), of every table."""
        distance = (torch.arange(total - count, total)[:, None] - torch.arange(total)[None]).clamp_min(0)
        return [self.get_buffer(f"bias_{i}")[distance].permute(2, 0, 1)[None] for i in range(len(self.kinds))]

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, *caches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the module's docstring for the shapes."""
        count = len(self.decoder.layers)
        past, states = caches[: 2 * count], caches[2 * count :]
        biases = self._biases(ids.shape[1], mask.shape[1])
        present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def attend(call: Call) -> torch.Tensor:
            if not call.causal:
                return _cross_attention(call)
            table = self.table_of[call.index]
            bias = None if table is None else biases[table]
            pair = past[2 * call.index], past[2 * call.index + 1]
            answer, key, value = cached_attention(call, self.decoder, pair, mask, bias)
            present[call.index] = (key, value)
            return answer

        pairs = [(states[2 * index], states[2 * index + 1]) for index in range(count)]
        with attending(self.module, attend), last_token_scored(self.module):
            logits = decode(self.module, ids, mask.shape[1] - ids.shape[1], pairs)
        return (logits, *(tensor for index in sorted(present) for tensor in present[index]))


def _cross_attention(call: Call) -> torch.Tensor:
    batch, _, length, width = call.query.shape
    answer: torch.Tensor = torch.onnx.ops.symbolic(
        f"{PLACEHOLDERS}::CrossAttention",
        (call.query, call.key, call.value),
        {"num_heads": call.layer.heads, "scale": call.layer.scale},
        dtype=call.query.dtype,
        shape=(batch, length, call.layer.heads, width),
        version=1,
    )
    return answer


def _export(
    module: torch.nn.Module, example: tuple[torch.Tensor, ...], names: Model, shapes: Any, opset: int
) -> ir.Model:
    with torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            example,
            input_names=[spec.name for spec in names.inputs],
            output_names=[spec.name for spec in names.outputs],
            opset_version=opset,
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    graph: ir.Model = program.model
    return graph


def export_encoder(module: torch.nn.Module, model: Model, opset: int) -> ir.Model:
    """Trace the encoder with the inputs and outputs of `encoder_file(model)`."""
    (source,) = encoder_file(model).inputs
    varying = {
        index: torch.export.Dim.AUTO(min=size.minimum, max=size.maximum)
        for index, size in enumerate(source.shape)
        if isinstance(size, Axis) and size.varies
    }
    example = (model.example[source.name],)
    return _export(_Encoder(module, source.name), example, encoder_file(model), (varying,), opset)


def export_decoder(module: torch.nn.Module, model: Model, opset: int) -> ir.Model:
    """Trace the decoder with the inputs and outputs of `decoder_file(model)`."""
    decoder = model.decoder
    assert decoder is not None
    dynamic, states = torch.export.Dim.DYNAMIC, most_states(model)
    length = TRACED_STATES if states.varies else states.example
    past = [torch.zeros(1, layer.kv_heads, TRACED_PAST, layer.head_dim) for layer in _twice(decoder.layers)]
    cross = [torch.zeros(1, layer.kv_heads, length, layer.head_dim) for layer in _twice(decoder.cross)]
    ids, mask = (torch.ones(1, size, dtype=torch.int64) for size in (TRACED_TOKENS, TRACED_PAST + TRACED_TOKENS))
    shapes = [{2: dynamic}] * len(past) + [{2: dynamic} if states.varies else {}] * len(cross)
    look_positions_up(module)
    wrapped = _Decoder(module, decoder, bias_tables(model.module, decoder))
    example = (ids, mask, *past, *cross)
    return _export(wrapped, example, decoder_file(model), ({1: dynamic}, {1: dynamic}, tuple(shapes)), opset)

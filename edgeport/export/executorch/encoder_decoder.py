"""Trace an encoder-decoder for ExecuTorch: one program with two methods, as its own runner loads it.

    encoder(source) -> states (1, T, W)
    text_decoder(tokens (1, S) int64, states, input_pos (1,) int64) -> logits (1, V) of the last token

That is what ExecuTorch's runner for speech calls (extension/asr/runner/seq2seq_runner.cpp), which hands the one tensor
that the encoder gave in at every token. Here it holds, of each of the T states, the keys and values of all layers side
by side, W numbers. The decoder copies them into buffers (1, T, heads, head_dim): all where `input_pos` is 0, else those
of the first state once more, which changes nothing and costs next to nothing; a branch would cut the program into
pieces. Inputs are read where they lie: a copy of the states at every token would cost more than the token.

Keys and values of the text lie in buffers as in `decoder.py`. Attention is `llama::custom_sdpa` over either, with as
many new tokens as there are states at most. What T5 adds to scores differs from head to head, which custom_sdpa's mask
can't: there, attention to the text is matrix products over a copy of what is in sight.
"""

from __future__ import annotations

from typing import Any

import torch

from edgeport.errors import TargetRefusesError, first_line
from edgeport.export.executorch.cache import most_tokens
from edgeport.export.executorch.decoder import (
    HIDDEN_SCORE,
    LOGITS,
    POSITION,
    TOKENS,
    TRACED_TOKENS,
    constant_methods,
)
from edgeport.export.executorch.fewer_delegates import averaging_row, means_as_products, tidy
from edgeport.export.executorch.native import with_native_weights
from edgeport.export.executorch.quiet import load_attention
from edgeport.export.executorch.repairs import written_gelu
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
from edgeport.model.types import AttentionLayer, Axis, Model, TensorSpec

ENCODER, DECODER, STATES = "encoder", "text_decoder", "states"


def encoder_specs(model: Model) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The encoder's inputs and outputs."""
    return model.inputs[:1], (_states(model),)


def decoder_specs(model: Model) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The decoder's inputs and outputs."""
    decoder = model.decoder
    assert decoder is not None
    sequence = Axis("sequence", 1, most_tokens(decoder), 1)
    inputs = (TensorSpec(TOKENS, "int64", (1, sequence)), _states(model), TensorSpec(POSITION, "int64", (1,)))
    return inputs, (TensorSpec(LOGITS, "float32", (1, decoder.vocabulary)),)


def _states(model: Model) -> TensorSpec:
    states, decoder = most_states(model), model.decoder
    assert decoder is not None
    width = sum(2 * layer.kv_heads * layer.head_dim for layer in decoder.cross)
    return TensorSpec(STATES, "float32", (1, states if states.varies else states.example, width))


def constants(model: Model) -> dict[str, Any]:
    """What the program says of itself; the names are those of ExecuTorch's runners."""
    decoder = model.decoder
    assert decoder is not None
    start = {"decoder_start_token_id": decoder.start[0]} if decoder.start else {}
    return {**constant_methods(model), **start}


def facts(model: Model) -> dict[str, Any]:
    """What a reader of the evidence wants to know of the caches."""
    decoder = model.decoder
    assert decoder is not None
    states = most_states(model).maximum
    return {
        "context": decoder.context,
        "most_tokens_a_call": most_tokens(decoder),
        "cache_bytes": decoder.cached_values * decoder.context * 4,
        "cross_cache_bytes": sum(2 * layer.kv_heads * layer.head_dim for layer in decoder.cross) * states * 4,
    }


class _Encoder(torch.nn.Module):
    def __init__(self, module: Any, name: str) -> None:
        super().__init__()
        self.model, self.name = module, name
        self.register_buffer("average", averaging_row(int(module.get_output_embeddings().weight.shape[1])))

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        """Keys and values of the states, layer by layer, (1, T, W)."""
        average = self.get_buffer("average")
        with means_as_products({average.shape[1]: average}):
            pairs = cross_pairs(self.model, encode(self.model, self.name, source))
        return torch.cat([tensor.transpose(1, 2).flatten(2) for pair in pairs for tensor in pair], -1)


def _check(holds: Any) -> None:
    torch._check(holds)  # type: ignore[no-untyped-call]


class _Decoder(torch.nn.Module):
    """The decoder with its caches as buffers."""

    def __init__(self, model: Model, module: Any, tables: list[torch.Tensor | None]) -> None:
        super().__init__()
        decoder = model.decoder
        assert decoder is not None
        self.model, self.decoder, self.most = module, decoder, most_states(model).maximum
        self.biased = [table is not None for table in tables]
        self.width = int(module.get_output_embeddings().weight.shape[1])
        self.register_buffer("average", averaging_row(self.width))
        for index, (layer, cross, table) in enumerate(zip(decoder.layers, decoder.cross, tables, strict=True)):
            for name, length, each in (("own", decoder.context, layer), ("cross", self.most, cross)):
                for part in ("keys", "values"):
                    shape = (1, length, each.kv_heads, each.head_dim)
                    self.register_buffer(f"{name}_{part}_{index}", torch.zeros(shape))
            if table is not None:
                self.register_buffer(f"bias_{index}", table)

    def _read_states(self, states: torch.Tensor, start: torch.Tensor) -> None:
        """Keys and values of the states into their buffers: of all at the first token, of one at every other."""
        count: Any = (1 + (start == 0).to(torch.int64) * (states.shape[1] - 1)).item()
        _check(count >= 1)
        _check(count <= states.shape[1])
        rows, at = states.narrow(1, 0, count), 0
        for index, layer in enumerate(self.decoder.cross):
            width = layer.kv_heads * layer.head_dim
            for part in ("keys", "values"):
                new = rows[..., at : at + width].reshape(1, count, layer.kv_heads, layer.head_dim)
                torch.ops.llama.update_cache(new, self.get_buffer(f"cross_{part}_{index}"), 0)
                at += width

    def forward(self, tokens: torch.Tensor, states: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        """See the module's docstring for the shapes."""
        count, position = tokens.shape[1], input_pos[0]
        start = position.item()
        _check(start >= 0)
        _check(start + count <= self.decoder.context)
        sight: list[tuple[Any, torch.Tensor, torch.Tensor]] = []

        def in_sight() -> tuple[Any, torch.Tensor, torch.Tensor]:
            """How many tokens there are, the distance of each to each new one, and what hides those to come."""
            if not sight:
                length = (position + count).item()
                _check(length >= count)
                _check(length <= self.decoder.context)
                distance = torch.arange(count)[:, None] + position - torch.arange(length)[None]
                sight.append((length, distance.clamp_min(0), (distance < 0).to(torch.float32) * HIDDEN_SCORE))
            return sight[0]

        def attend(call: Call) -> torch.Tensor:
            query, name = call.query.transpose(1, 2), "own" if call.causal else "cross"
            keys, values = (self.get_buffer(f"{name}_{part}_{call.index}") for part in ("keys", "values"))
            sdpa = torch.ops.llama.custom_sdpa
            if not call.causal:
                # Beyond its position argument plus S it reads nothing.
                found: torch.Tensor = sdpa(
                    query, keys, values, states.shape[1] - count, None, 0.0, False, call.layer.scale
                )
                return found
            torch.ops.llama.update_cache(call.key.transpose(1, 2), keys, start)
            torch.ops.llama.update_cache(call.value.transpose(1, 2), values, start)
            if not self.biased[call.index]:
                plain: torch.Tensor = sdpa(query, keys, values, start, None, 0.0, True, call.layer.scale)
                return plain
            length, distance, hidden = in_sight()
            added = torch.nn.functional.embedding(distance, self.get_buffer(f"bias_{call.index}"))
            near_keys, near_values = (cache.narrow(1, 0, length) for cache in (keys, values))
            return _biased(call.layer, query, near_keys, near_values, added.permute(2, 0, 1) + hidden)

        with means_as_products({self.width: self.get_buffer("average")}):
            self._read_states(states, input_pos[0])
            # Attention reads the buffers themselves.
            given = [(self.get_buffer(f"cross_keys_{i}").transpose(1, 2),) * 2 for i in range(len(self.decoder.cross))]
            with attending(self.model, attend), last_token_scored(self.model):
                return decode(self.model, tokens, position, given)[:, -1]


def _biased(
    layer: AttentionLayer, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, added: torch.Tensor
) -> torch.Tensor:
    """softmax(scale q k^T + added) v; query (1, S, heads, head_dim), added (heads, S, L). In the query's shape."""
    scores = torch.matmul(query[0].permute(1, 0, 2) * layer.scale, keys[0].permute(1, 2, 0))
    answer = torch.matmul((scores + added).softmax(-1), values[0].permute(1, 0, 2))
    return answer.permute(1, 0, 2)[None]


def example_inputs(model: Model) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """A first call of the encoder and of the decoder."""
    decoder, states = model.decoder, _states(model)
    assert decoder is not None
    source = model.example[model.inputs[0].name].contiguous()
    tokens = torch.arange(min(TRACED_TOKENS, decoder.context))[None] % decoder.vocabulary
    return (source,), (tokens, torch.zeros(states.fixed_shape()), torch.zeros(1, dtype=torch.int64))


def export_both(model: Model) -> dict[str, torch.export.ExportedProgram]:
    """Trace the two methods, with the model's compressed weights in native form.

    Raises:
        TargetRefusesError: torch.export can't trace one of them.
    """
    load_attention()
    decoder, states = model.decoder, most_states(model)
    assert decoder is not None
    module: Any = with_native_weights(model)
    # Plain matrix products run a third faster on XNNPACK than torch's decomposed fused attention.
    module.set_attn_implementation("eager")
    look_positions_up(module)
    dim = torch.export.Dim.AUTO
    varying = {1: dim(min=states.minimum, max=states.maximum)} if states.varies else None
    tokens = {1: dim(min=1, max=most_tokens(decoder))}
    parts: dict[str, tuple[torch.nn.Module, Any]] = {
        ENCODER: (_Encoder(module, model.inputs[0].name), (varying,)),
        DECODER: (_Decoder(model, module, bias_tables(model.module, decoder)), (tokens, varying, None)),
    }
    programs = {}
    for (name, (part, shapes)), example in zip(parts.items(), example_inputs(model), strict=True):
        try:
            with torch.no_grad():
                program = torch.export.export(part.eval(), example, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise TargetRefusesError(
                f"torch.export can't trace the model's {name}: {first_line(error)}",
                where=f"model {model.name}",
                next_step=f"Export it without a cache (`--task {model.task.removesuffix('-with-past')}`).",
            ) from error
        tidy(program)
        written_gelu(program)
        programs[name] = program
    return programs

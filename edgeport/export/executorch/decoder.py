"""Trace a decoder language model for ExecuTorch, with its cache inside the program.

The program is what ExecuTorch's LLM runner loads (extension/llm/runner):

    forward(tokens (1, S) int64, input_pos (1,) int64) -> logits (1, V) of the last token

S new tokens, at most `most_tokens(decoder)` a call, the first of them at position `input_pos`. Keys and values lie in
buffers (1, context, kv_heads, head_dim) that the program writes in place; what lies behind the new tokens is never
read, so a text is cut short by giving a smaller `input_pos`. Constant methods tell the runner the sizes.

Attention is `llama::custom_sdpa` over the cache, where it lies. It knows neither windows nor soft caps:

- a window that is shorter than the context: `custom_sdpa` with a mask over a ring of places, which holds the window and
  as many tokens as a call may bring; where the context is hardly longer, over a copy of the tokens in sight;
- a soft cap: matrix products over the same.

A cache in int8 holds codes, a scale and a zero point for each token of each head, as ExecuTorch's own llama does;
attention over it is `llama::custom_quantized_sdpa`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from edgeport.errors import TargetRefusesError, first_line
from edgeport.export.executorch.cache import SLACK, buffer_bytes, buffers, most_tokens, ring
from edgeport.export.executorch.fewer_delegates import (
    averaging_row,
    half_turn,
    means_as_products,
    rotate,
    tidy,
    turns_halves,
)
from edgeport.export.executorch.native import with_native_weights
from edgeport.export.executorch.quiet import load_attention
from edgeport.export.executorch.repairs import written_gelu
from edgeport.model.decoder import TASK, Call, RotaryTables, StepCache, attending, end_tokens, rotating, with_tables
from edgeport.model.types import AttentionLayer, Axis, Decoder, Model, TensorSpec

TOKENS, POSITION, LOGITS = "tokens", "input_pos", "logits"
TRACED_TOKENS = 3
HIDDEN_SCORE = -1e9
"""Added to the scores of tokens out of sight. Finite: custom_sdpa takes the largest score of a block from each."""


def file_specs(decoder: Decoder) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The program's inputs and outputs."""
    sequence = Axis("sequence", 1, most_tokens(decoder), 1)
    inputs = (TensorSpec(TOKENS, "int64", (1, sequence)), TensorSpec(POSITION, "int64", (1,)))
    return inputs, (TensorSpec(LOGITS, "float32", (1, decoder.vocabulary)),)


def example_inputs(decoder: Decoder) -> tuple[torch.Tensor, torch.Tensor]:
    """A first call."""
    tokens = torch.arange(min(TRACED_TOKENS, decoder.context))[None] % decoder.vocabulary
    return tokens, torch.zeros(1, dtype=torch.int64)


def constant_methods(model: Model) -> dict[str, Any]:
    """What the program says of itself; the names are those of ExecuTorch's runner (constants.h)."""
    decoder = model.decoder
    assert decoder is not None
    config: Any = model.module.config
    stop = sorted(end_tokens(model))
    begin = getattr(config, "bos_token_id", None)
    return {
        "get_max_seq_len": most_tokens(decoder),
        "get_max_context_len": decoder.context,
        "get_vocab_size": decoder.vocabulary,
        "get_n_layers": len(decoder.layers),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        **({} if begin is None else {"get_bos_id": int(begin)}),
        **({"get_eos_ids": stop} if stop else {}),
    }


def facts(decoder: Decoder) -> dict[str, Any]:
    """What a reader of the evidence wants to know of the cache."""
    return {
        "context": decoder.context,
        "most_tokens_a_call": most_tokens(decoder),
        "cache_bytes": buffer_bytes(buffers(decoder)),
        **({"forgets": SLACK} if any(ring(layer, decoder) for layer in decoder.layers) else {}),
    }


@dataclass(frozen=True)
class _Sight:
    """Tokens of the cache that some token of a call sees: `length` of them from `first` on, both symbols of the trace.

    Attributes:
        mask: (S, length) float32, added to the scores.
    """

    first: Any
    length: Any
    mask: torch.Tensor


@dataclass(frozen=True)
class _Ring:
    """A layer's places in a call.

    Attributes:
        indices: (1, S) int64, of the call's tokens.
        behind: places less S.
        mask: (S, places) float32, added to the scores.
    """

    indices: torch.Tensor
    behind: Any
    mask: torch.Tensor


def _check(holds: Any) -> None:
    torch._check(holds)  # type: ignore[no-untyped-call]


class _Step:
    """One call: `count` tokens from `start` on, both symbols of the trace."""

    def __init__(self, position: torch.Tensor, count: Any, decoder: Decoder) -> None:
        self.position, self.count, self.decoder = position[0], count, decoder
        self.start = self.position.item()
        _check(self.start >= 0)
        _check(self.start + count <= decoder.context)
        self._sights: dict[int | None, _Sight] = {}
        self._rings: dict[tuple[int, int], _Ring] = {}

    def ring(self, window: int, places: int) -> _Ring:
        """Where the call's tokens go and what they see there. Made once a call, for all layers that have it."""
        if (window, places) not in self._rings:
            queries = torch.arange(self.count) + self.position
            # What a place holds is the latest token that belongs there, below 0: none yet.
            last = self.position + self.count - 1
            held = last - (last - torch.arange(places)) % places
            distance = queries[:, None] - held[None]
            hidden = (distance < 0) | (distance >= window) | (held < 0)[None]
            mask = hidden.to(torch.float32) * HIDDEN_SCORE
            self._rings[window, places] = _Ring((queries % places)[None], places - self.count, mask)
        return self._rings[window, places]

    def sight(self, window: int | None) -> _Sight:
        """What is seen through a window (None: everything before). Made once a call, for all layers that have it."""
        if window not in self._sights:
            self._sights[window] = self._look(window)
        return self._sights[window]

    def _look(self, window: int | None) -> _Sight:
        context = self.decoder.context
        seen = context if window is None else window
        first = torch.clamp_min(self.position + 1 - seen, 0)
        start, length = first.item(), (self.position + self.count - first).item()
        # Memory is planned for the largest length.
        _check(length >= self.count)
        _check(length <= min(context, seen - 1 + most_tokens(self.decoder)))
        _check(start >= 0)
        _check(start + length <= context)
        keys, queries = torch.arange(length)[None] + first, torch.arange(self.count)[:, None] + self.position
        hidden = (keys > queries) | (keys <= queries - seen)
        return _Sight(start, length, hidden.to(torch.float32) * HIDDEN_SCORE)


class _Decoder(torch.nn.Module):
    """The module with its cache as buffers."""

    def __init__(self, module: Any, decoder: Decoder, tables: list[RotaryTables]) -> None:
        super().__init__()
        self.model, self.decoder = module, decoder
        hidden = module.get_input_embeddings().weight.shape[1]
        self.widths = sorted({hidden, *(layer.head_dim for layer in decoder.layers)})
        for width in self.widths:
            self.register_buffer(f"average_{width}", averaging_row(width))
        rotary = {table.shape[-1] for each in tables for table in each.buffers()}
        turning = all(turns_halves(module, layer, width) for layer in decoder.layers for width in rotary)
        self.turning = sorted(rotary) if turning else []
        for width in self.turning:
            self.register_buffer(f"turn_{width}", half_turn(width))
        for buffer in buffers(decoder):
            self.register_buffer(buffer.name, torch.zeros(buffer.shape, dtype=getattr(torch, buffer.dtype)))

    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        """See the module's docstring for the shapes."""
        count = tokens.shape[1]
        step = _Step(input_pos, count, self.decoder)

        def attend(call: Call) -> torch.Tensor:
            query, key, value = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
            places = ring(call.layer, self.decoder)
            near = None if places is None or call.layer.window is None else step.ring(call.layer.window, places)
            caches = []
            for name, new in ((f"keys_{call.index}", key), (f"values_{call.index}", value)):
                parts = ("",) if self.decoder.cache == "float" else ("", "_scale", "_zero")
                held = [self.get_buffer(name + part) for part in parts]
                _put(step, held, [new] if len(parts) == 1 else list(per_token(new)), near)
                caches.append(held)
            return _attention(call.layer, step, query, caches[0], caches[1], near)

        # All layers get the same tables. The keys are kept with the values: an id is a tensor's while it lives.
        spread: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def for_heads(table: torch.Tensor) -> torch.Tensor:
            if id(table) not in spread:
                spread[id(table)] = (table, table.unsqueeze(2))
            return spread[id(table)][1]

        def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            return rotate(x, for_heads(cos), for_heads(sin), self.get_buffer(f"turn_{cos.shape[-1]}"))

        with ExitStack() as stack:
            stack.enter_context(attending(self.model, attend))
            stack.enter_context(means_as_products({w: self.get_buffer(f"average_{w}") for w in self.widths}))
            if self.turning:
                stack.enter_context(rotating(self.model, turn))
            positions = (torch.arange(count) + input_pos)[None]
            result = self.model(
                input_ids=tokens, position_ids=positions, past_key_values=StepCache(), use_cache=True, logits_to_keep=1
            )
        logits: torch.Tensor = result.logits[:, -1]
        return logits


def _put(step: _Step, buffers: list[torch.Tensor], new: list[torch.Tensor], near: _Ring | None) -> None:
    """Write what is new of the tokens behind what the buffers hold, or into a ring."""
    for buffer, rows in zip(buffers, new, strict=True):
        if near is None:
            torch.ops.llama.update_cache(rows, buffer, step.start)
        else:
            torch.ops.llama.update_cache_with_indices(rows, buffer, 0, near.indices)


def _attention(
    layer: AttentionLayer,
    step: _Step,
    query: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    near: _Ring | None,
) -> torch.Tensor:
    """Attention of (1, S, heads, head_dim) over a cache, of floats or of codes, scales and zero points; in the query's
    shape."""
    context = step.decoder.context
    window = layer.window if layer.window is not None and layer.window < context else None
    if window is None and layer.softcap is None:
        return _custom_sdpa(query, keys, values, step.start, None, layer.scale)
    if near is not None:
        behind, mask = near.behind, near.mask
    else:
        sight = step.sight(window)
        keys, values = ([x.narrow(1, sight.first, sight.length) for x in cache] for cache in (keys, values))
        behind, mask = sight.length - step.count, sight.mask
    if layer.softcap is not None:
        return _softcapped(layer, query, as_floats(keys), as_floats(values), mask)
    # It cuts what lies behind its second position argument plus S: nothing of what is given.
    return _custom_sdpa(query, keys, values, behind, mask, layer.scale)


def _custom_sdpa(
    query: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    behind: Any,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """ExecuTorch's attention after `behind` tokens; causal unless there is a mask. Over integers it rounds the query,
    too."""
    causal = mask is None
    if len(keys) == 1:
        answer: torch.Tensor = torch.ops.llama.custom_sdpa(query, keys[0], values[0], behind, mask, 0.0, causal, scale)
        return answer
    codes, step, zero = per_token(query)
    (key, key_scale, key_zero), (value, value_scale, value_zero) = keys, values
    rest = (zero, step, key_zero, key_scale, value_zero, value_scale)
    rounded: torch.Tensor = torch.ops.llama.custom_quantized_sdpa(
        codes, key, value, behind, mask, 0.0, causal, scale, *rest
    )
    return rounded


def per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int8, scales float32 and zero points int8 of the vectors in the last axis: asymmetric, as the kernels of
    `quantized_decomposed` choose them."""
    ops = torch.ops.quantized_decomposed
    scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = ops.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    return codes, scale.to(torch.float32), zero.to(torch.int8)


def as_floats(cache: list[torch.Tensor]) -> torch.Tensor:
    """A cache's numbers, of floats as they are."""
    if len(cache) == 1:
        return cache[0]
    codes, scale, zero = cache
    return (codes.to(torch.float32) - zero.to(torch.float32)) * scale


def _softcapped(
    layer: AttentionLayer, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """softmax(c tanh(scale q k^T / c) + mask) v, query heads that share a key side by side in one product."""
    assert layer.softcap is not None
    count, groups = query.shape[1], layer.heads // layer.kv_heads
    # (kv_heads, groups * S, head_dim)
    rows = query[0].permute(1, 0, 2).reshape(layer.kv_heads, groups * count, layer.head_dim)
    scores = torch.matmul(rows * layer.scale, keys[0].permute(1, 2, 0))
    scores = torch.tanh(scores / layer.softcap) * layer.softcap
    shares = (scores.reshape(layer.kv_heads, groups, count, -1) + mask).softmax(-1)
    answer = torch.matmul(shares.reshape(layer.kv_heads, groups * count, -1), values[0].permute(1, 0, 2))
    return answer.reshape(layer.heads, count, layer.head_dim).permute(1, 0, 2)[None]


def _look_up(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.embedding(positions, table)


def export_decoder(model: Model) -> torch.export.ExportedProgram:
    """Trace a model that keeps a cache, with its compressed weights in native form.

    Raises:
        TargetRefusesError: torch.export can't trace it, or only for one number of tokens.
    """
    load_attention()
    decoder = model.decoder
    assert decoder is not None
    module = with_native_weights(model)
    tables = with_tables(module, decoder.context, _look_up)
    sequence = torch.export.Dim.AUTO(min=1, max=most_tokens(decoder))
    try:
        with torch.no_grad():
            program = torch.export.export(
                _Decoder(module, decoder, tables).eval(),
                example_inputs(decoder),
                dynamic_shapes=({1: sequence}, None),
                strict=False,
            )
    except Exception as error:
        raise TargetRefusesError(
            f"torch.export can't trace the model with a cache: {first_line(error)}",
            where=f"model {model.name}",
            next_step=f"Export it without one (`--task {TASK}`), or try another runtime.",
        ) from error
    if all(
        isinstance(size, int) for node in program.graph.nodes if node.name == TOKENS for size in node.meta["val"].shape
    ):
        raise TargetRefusesError(
            "The model only works with one number of tokens a call.",
            where=f"model {model.name}",
            next_step=f"Export it without a cache (`--task {TASK}`).",
        )
    tidy(program)
    written_gelu(program)
    return program

"""Decoder language models as a device runs them: a few tokens a call, keys and values of the earlier ones kept.

Every decoder of transformers reaches its attention through `AttentionInterface` and its cache through
`Cache.update`. So one attention function and one cache class of our own serve all families: the cache hands new keys
and values through, and the function gets them together with the layer they belong to. Each backend brings what
attention over a cache is there (an ONNX operator, ExecuTorch's custom_sdpa, Core ML's state).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from edgeport.errors import BadInputError
from edgeport.model import tokenizer
from edgeport.model.types import SCORED, AttentionLayer, Axis, Decoder, Model, TensorSpec

INTERFACE = "edgeport"
"""Name under which the attention function is registered with transformers."""
TASK, CACHED_TASK = "text-generation", "text-generation-with-past"
LONGEST_CONTEXT = 2048
"""Tokens that a cache holds unless more are asked for: positions beyond cost memory that few prompts use."""
EXAMPLE_TOKENS = 96
TOLERANCE = 1e-4
"""Largest relative error of the attention that was observed against the model's own, in float32."""

Attend = Callable[["Call"], torch.Tensor]


@dataclass(frozen=True)
class Call:
    """One layer's attention in a forward.

    Attributes:
        index: the layer's number.
        query: (B, heads, S, head_dim), with positions already rotated in.
        key, value: (B, kv_heads, S, head_dim), of the new tokens alone; of an encoder's states in attention to those.
        bias: (1, heads, S, S), added to the scores; None for none.
        causal: attention to earlier tokens, not to an encoder's states.
    """

    index: int
    layer: AttentionLayer
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None = None
    causal: bool = True


@dataclass
class _Hook:
    attend: list[Attend] = field(default_factory=list)


_HOOK = _Hook()


class StepCache:
    """Stands for transformers' Cache: hands the new keys and values through.

    Args:
        start: tokens before the new ones, a number or a tensor without dimensions, for models that count positions
            from it. Others are told by `position_ids`.
    """

    is_compileable = False
    # Asked for when masks are made, layer by layer: there is no layer, and no mask is made.
    is_sliding = is_linear = is_dummy = ()

    def __init__(self, start: Any = 0) -> None:
        self.start = start

    def update(
        self, key: torch.Tensor, value: torch.Tensor, *_layer: object, **_more: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values as they are."""
        return key, value

    def get_seq_length(self, *_layer: object) -> Any:
        """Tokens before the new ones."""
        return self.start


def _dispatch(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls for attention; answers (B, S, heads, head_dim)."""
    width, bias = query.shape[-1], more.get("position_bias")
    layer = AttentionLayer(
        heads=query.shape[1],
        kv_heads=key.shape[1],
        head_dim=width,
        scale=float(width**-0.5 if scaling is None else scaling),
        window=more.get("sliding_window"),
        softcap=more.get("softcap"),
        biased=bias is not None,
    )
    causal = bool(getattr(module, "is_causal", True))
    return _HOOK.attend[-1](Call(int(module.layer_idx), layer, query, key, value, bias, causal)), None


@contextmanager
def attending(module: torch.nn.Module, attend: Attend) -> Iterator[None]:
    """Inside the block the module's attention is `attend`, and it makes no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(INTERFACE, _dispatch)
    # The decoder of an encoder-decoder may have a config of its own.
    found = (getattr(part, "config", None) for part in module.modules())
    configs: list[Any] = list({id(c): c for c in found if hasattr(c, "_attn_implementation")}.values())
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = INTERFACE
    _HOOK.attend.append(attend)
    try:
        yield
    finally:
        _HOOK.attend.pop()
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def causal_attention(call: Call) -> torch.Tensor:
    """Attention of a text to itself, with the layer's window, soft cap and bias; (B, S, heads, head_dim)."""
    layer, length = call.layer, call.query.shape[2]
    groups = layer.heads // layer.kv_heads
    key, value = call.key.repeat_interleave(groups, 1), call.value.repeat_interleave(groups, 1)
    scores = call.query @ key.transpose(2, 3) * layer.scale
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    if call.bias is not None:
        scores = scores + call.bias
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    seen = (distance >= 0) & (distance < (layer.window or length))
    answer: torch.Tensor = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)
    return answer


def _observe(module: torch.nn.Module, ids: torch.Tensor) -> tuple[AttentionLayer, ...] | None:
    """The module's attention layers; None where it does not come by way of the interface."""
    found: dict[int, AttentionLayer] = {}

    def attend(call: Call) -> torch.Tensor:
        found[call.index] = call.layer
        return causal_attention(call)

    with torch.no_grad():
        expected = module(input_ids=ids, use_cache=False).logits
        with attending(module, attend):
            positions = torch.arange(ids.shape[1])[None]
            answer = module(input_ids=ids, position_ids=positions, past_key_values=StepCache(), use_cache=True).logits
    if sorted(found) != list(range(len(found))) or not found:
        return None
    if float((answer - expected).norm()) > TOLERANCE * float(expected.norm()):
        return None
    return tuple(found[index] for index in range(len(found)))


def end_tokens(model: Model) -> frozenset[int]:
    """The tokens that end a text, as generation_config.json or the config names them."""
    otherwise = getattr(model.module.config, "eos_token_id", None)
    return tokenizer.end_tokens(model.assets.get("generation_config.json"), otherwise)


def is_causal_lm(model: Model) -> bool:
    """A transformers decoder with a language head."""
    if not model.huggingface or model.modality != "text":
        return False
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config: Any = model.module.config
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    names = (names,) if isinstance(names, str) else names
    return not config.is_encoder_decoder and type(model.module).__name__ in names


def held_tokens(context: int | None, longest: int) -> int:
    """Tokens that a cache is made for, of a model that counts to `longest`.

    Raises:
        BadInputError: that many can't be held.
    """
    held = min(LONGEST_CONTEXT, longest) if context is None else context
    if not 2 <= held <= longest:
        raise BadInputError(f"The model can't hold {held} tokens.", where="--context", allowed=f"2 to {longest}")
    return held


def for_generation(model: Model, context: int | None = None) -> Model:
    """A language model with a cache of keys and values: what `lower` then makes takes tokens a few at a time.

    A decoder's input is one text, `input_ids` (1, S); its output the scores of the text's last `SCORED` positions,
    (1, min(S, SCORED), V). For encoder-decoders see `edgeport.model.encoder_decoder.with_encoder`.

    Args:
        context: tokens that the cache holds; None takes what the model can count, at most `LONGEST_CONTEXT`.

    Raises:
        BadInputError: the model is no such decoder, keeps something else than keys and values of every token, or can't
            count so far.
    """
    from edgeport.model.encoder_decoder import is_encoder_decoder, with_encoder

    if is_encoder_decoder(model):
        return with_encoder(model, context)
    if not is_causal_lm(model):
        raise BadInputError(
            f"The model {model.name!r} is no decoder language model, so it has no cache.",
            where="--task",
            allowed=TASK if model.task == TASK else model.task,
        )
    longest = next(size.maximum for size in model.inputs[0].shape if isinstance(size, Axis) and size.name == "sequence")
    held = held_tokens(context, longest)
    ids = model.example["input_ids"][:, : min(48, longest)]
    layers = _observe(model.module, ids)
    if layers is None:
        raise BadInputError(
            f"{type(model.module).__name__} does not attend in a way that edgeport can give a cache.",
            where=model.name,
            next_step=f"Export it without a cache (--task {TASK}): it then scores whole texts.",
        )
    vocabulary = int(model.outputs[0].fixed_shape()[-1])
    example = min(EXAMPLE_TOKENS, held)
    sequence = Axis("sequence", 1, held, example)
    scored = Axis("scored", 1, min(SCORED, held), min(SCORED, example))
    return replace(
        model,
        task=CACHED_TASK,
        inputs=(TensorSpec("input_ids", "int64", (1, sequence)),),
        outputs=(TensorSpec("logits", "float32", (1, scored, vocabulary)),),
        example={"input_ids": ids[:1].repeat(1, -(-example // ids.shape[1]))[:, :example]},
        decoder=Decoder(layers, held, vocabulary),
    )


class RotaryTables(torch.nn.Module):
    """A rotary embedding whose cosines and sines are looked up, exactly as the model computes them.

    `look_up(table, position_ids)` makes (1, S, width) of a table (context, width).

    Raises:
        BadInputError: the model turns short texts by other angles than long ones (longrope, dynamic NTK) and
            the context is a long one: a cache can't change what it holds when it grows.
    """

    def __init__(
        self, rotary: torch.nn.Module, context: int, look_up: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.look_up = look_up
        kinds = sorted({str(kind) for kind in getattr(rotary, "layer_types", None) or ()})
        self.kinds = kinds if kinds and f"{kinds[0]}_inv_freq" in dict(rotary.named_buffers()) else [""]
        positions = torch.arange(context)[None]
        with torch.no_grad():
            for kind in self.kinds:
                named = [kind] if kind else []
                short, _ = rotary(torch.zeros(1, 1, 1), positions[:, :2], *named)
                cos, sin = rotary(torch.zeros(1, 1, 1), positions, *named)
                if not torch.equal(cos[:, :2], short):
                    raise BadInputError(
                        f"The model's rotary positions change when a text grows to {context} tokens.",
                        where="--context",
                        allowed="a context below the length at which they change (original_max_position_embeddings)",
                    )
                self.register_buffer(f"{kind}_cos", cos[0].clone())
                self.register_buffer(f"{kind}_sin", sin[0].clone())

    def forward(
        self, _states: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the positions, (1, S, width) each."""
        kind = layer_type if layer_type in self.kinds else self.kinds[0]
        return (
            self.look_up(self.get_buffer(f"{kind}_cos"), position_ids),
            self.look_up(self.get_buffer(f"{kind}_sin"), position_ids),
        )

    @property
    def halves(self) -> bool:
        """Each table says the same of both halves of a head, as `rotate_half` has it."""
        tables = list(self.buffers())
        width = tables[0].shape[-1]
        return width % 2 == 0 and all(torch.equal(t[:, : width // 2], t[:, width // 2 :]) for t in tables)


def with_tables(
    module: torch.nn.Module, context: int, look_up: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> list[RotaryTables]:
    """Replace the module's rotary embeddings, in place, by tables over `context` positions."""
    found = []
    for name, layer in list(module.named_modules()):
        if type(layer).__name__.endswith("RotaryEmbedding"):
            parent, _, attribute = name.rpartition(".")
            tables = RotaryTables(layer, context, look_up)
            setattr(module.get_submodule(parent), attribute, tables)
            found.append(tables)
    return found


@contextmanager
def rotating(
    module: torch.nn.Module, rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Inside the block the model's `apply_rotary_pos_emb` calls `rotate(x, cos, sin)` for queries and for keys.

    x is (B, heads, S, width). Models that rotate in a function of another name keep theirs.
    """
    source: Any = sys.modules[type(module).__module__]
    original = getattr(source, "apply_rotary_pos_emb", None)
    if original is None:
        yield
        return

    def patched(
        query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_more: object, **_named: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rotate(query, cos, sin), rotate(key, cos, sin)

    source.apply_rotary_pos_emb = patched
    try:
        yield
    finally:
        source.apply_rotary_pos_emb = original

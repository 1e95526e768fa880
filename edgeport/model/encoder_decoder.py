"""Encoder-decoders as a device runs them: the encoder once, then a decoder with a cache, a few tokens a call.

A decoder's layer has two attentions: to the text so far, as in any decoder (`edgeport.model.decoder`), and to the
encoder's states, whose keys and values are the same at every token. transformers keeps both in an
`EncoderDecoderCache`; ours hands new keys and values of the text through, and those of the states in or out.

T5 adds to each score a number that depends on the head and on the distance of the two tokens. It becomes a table by
distance, looked up at the model's own module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from edgeport.errors import BadInputError
from edgeport.model.decoder import TOLERANCE, Call, StepCache, attending, causal_attention, held_tokens
from edgeport.model.types import SCORED, AttentionLayer, Axis, Decoder, Model, TensorSpec

CACHED_SUFFIX = "-with-past"
TARGET_IDS = "decoder_input_ids"
OBSERVED_TOKENS = 24

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, (B, heads, T, head_dim) each."""


class _Given:
    """Keys and values as a layer of transformers' cache has them."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = keys, values


class _CrossCache:
    """Stands for the cache of attention to the states: gives what it was made with, or keeps what it is given."""

    is_compileable = False

    def __init__(self, given: Pairs) -> None:
        self.layers = [_Given(*pair) for pair in given]
        self.found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_more: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values as they are."""
        self.found[layer] = (key, value)
        return key, value

    def get_seq_length(self, *_layer: object) -> int:
        """Nothing is kept from call to call."""
        return 0


def _both(start: Any, cross: _CrossCache) -> Any:
    """transformers' cache of the two attentions: its decoders ask for the very class."""
    from transformers import EncoderDecoderCache

    cache: Any = EncoderDecoderCache.__new__(EncoderDecoderCache)
    cache.self_attention_cache, cache.cross_attention_cache = StepCache(start), cross
    cache.is_updated = dict.fromkeys(range(len(cross.layers)), True)
    return cache


def is_encoder_decoder(model: Model) -> bool:
    """A transformers encoder-decoder that writes texts."""
    if not model.huggingface or not any(spec.name == TARGET_IDS for spec in model.inputs):
        return False
    from transformers.models.auto import modeling_auto as auto

    kinds = (
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    )
    config: Any = model.module.config
    return any(type(model.module).__name__ == kind.get(config.model_type) for kind in kinds)


def look_positions_up(module: torch.nn.Module) -> None:
    """Let Whisper's table of positions be read as an embedding, in place: it indexes its weight as no layer does."""
    for layer in module.modules():
        if type(layer).__name__.endswith("WhisperPositionalEmbedding"):
            layer.forward = _looking_up(layer)


def _looking_up(layer: Any) -> Any:
    def forward(_ids: torch.Tensor, past_key_values_length: Any = 0, position_ids: Any = None) -> torch.Tensor:
        return torch.nn.functional.embedding(position_ids, layer.weight)

    return forward


def encode(module: Any, name: str, source: torch.Tensor) -> torch.Tensor:
    """The encoder's states (1, T, width) of its input called `name`."""
    states: torch.Tensor = module.get_encoder()(**{name: source}).last_hidden_state
    return states


def _decode(module: Any, ids: torch.Tensor, states: torch.Tensor, cache: Any) -> torch.Tensor:
    from transformers.modeling_outputs import BaseModelOutput

    outputs: Any = BaseModelOutput(last_hidden_state=states)
    result = module(encoder_outputs=outputs, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
    logits: torch.Tensor = result.logits
    return logits


def decode(module: Any, ids: torch.Tensor, start: Any, cross: Pairs) -> torch.Tensor:
    """Scores (1, S, V) of new tokens, `start` tokens being before them. Call it inside `attending`."""
    width = module.get_input_embeddings().weight.shape[1] if hasattr(module, "get_input_embeddings") else 1
    # The states themselves are not read any more; that there are some is.
    return _decode(module, ids, torch.zeros(1, 1, width), _both(start, _CrossCache(cross)))


def cross_pairs(module: Any, states: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the encoder's states, by layer."""
    cross = _CrossCache(())
    # What the decoder makes of them does not matter.
    with attending(module, lambda call: call.query.transpose(1, 2)):
        _decode(module, torch.zeros(1, 1, dtype=torch.int64), states, _both(0, cross))
    return [cross.found[index] for index in range(len(cross.found))]


@contextmanager
def last_token_scored(module: Any) -> Iterator[None]:
    """Inside the block the head scores the last token only: (1, 1, V)."""
    hook = module.get_output_embeddings().register_forward_pre_hook(lambda _, states: (states[0][:, -1:],))
    try:
        yield
    finally:
        hook.remove()


def attend_states(call: Call) -> torch.Tensor:
    """Attention to all of an encoder's states; (B, S, heads, head_dim)."""
    scores = call.query @ call.key.transpose(2, 3) * call.layer.scale
    return (scores.softmax(-1) @ call.value).transpose(1, 2)


def _observe(
    module: Any, name: str, source: torch.Tensor, ids: torch.Tensor
) -> tuple[tuple[AttentionLayer, ...], tuple[AttentionLayer, ...], int] | None:
    """The decoder's layers: attention to the text and to the states; and how many states there are.

    None where they do not come by way of the interface.
    """
    own: dict[int, AttentionLayer] = {}
    cross: dict[int, AttentionLayer] = {}

    def attend(call: Call) -> torch.Tensor:
        if call.causal:
            own[call.index] = call.layer
            return causal_attention(call)
        cross[call.index] = replace(call.layer, biased=call.bias is not None and bool(call.bias.any()))
        return attend_states(call)

    with torch.no_grad():
        expected = module(**{name: source}, decoder_input_ids=ids, use_cache=False).logits
        states = encode(module, name, source)
        pairs = cross_pairs(module, states)
        with attending(module, attend):
            answer = decode(module, ids, 0, pairs)
    numbers = list(range(len(pairs)))
    if not pairs or sorted(own) != numbers or sorted(cross) != numbers or any(layer.biased for layer in cross.values()):
        return None
    if float((answer - expected).norm()) > TOLERANCE * float(expected.norm()):
        return None
    return tuple(own[index] for index in numbers), tuple(cross[index] for index in numbers), int(states.shape[1])


def with_encoder(model: Model, context: int | None = None) -> Model:
    """An encoder-decoder whose decoder keeps a cache.

    Its inputs are one text or recording and the tokens written for it, `decoder_input_ids` (1, S); its output the
    scores of the last `SCORED` of these, (1, min(S, SCORED), V).

    Args:
        context: tokens that the decoder's cache holds; None takes what the model can count, at most `LONGEST_CONTEXT`.

    Raises:
        BadInputError: the decoder attends in a way that can't be given a cache, or can't count so far.
    """
    module: Any = model.module
    target = next(spec for spec in model.inputs if spec.name == TARGET_IDS)
    (axis,) = (size for size in target.shape if isinstance(size, Axis) and size.name != "batch")
    held = held_tokens(context, axis.maximum)
    source = replace(model.inputs[0], shape=(1, *model.inputs[0].shape[1:]))
    example = model.example[source.name][:1]
    ids = model.example[TARGET_IDS][:1]
    found = _observe(module, source.name, example, ids[:, : min(OBSERVED_TOKENS, held)])
    if found is None:
        raise BadInputError(
            f"{type(module).__name__} does not attend in a way that edgeport can give a cache.",
            where=model.name,
            next_step=f"Export it without a cache (--task {model.task}): it then scores whole texts.",
        )
    layers, cross, states = found
    varies = any(isinstance(size, Axis) and size.varies for size in source.shape)
    vocabulary = int(model.outputs[0].fixed_shape()[-1])
    length = min(axis.example, held)
    scored = Axis("scored", 1, min(SCORED, held), min(SCORED, length))
    settings = module.generation_config
    begin = settings.decoder_start_token_id
    start = (module.config.decoder_start_token_id if begin is None else begin, settings.forced_bos_token_id)
    return replace(
        model,
        task=model.task.removesuffix(CACHED_SUFFIX) + CACHED_SUFFIX,
        inputs=(source, TensorSpec(TARGET_IDS, "int64", (1, Axis(axis.name, 1, held, length)))),
        outputs=(TensorSpec("logits", "float32", (1, scored, vocabulary)),),
        example={source.name: example, TARGET_IDS: ids[:, :length]},
        decoder=Decoder(
            layers,
            held,
            vocabulary,
            cross=cross,
            states=None if varies else states,
            start=tuple(int(token) for token in start if token is not None),
        ),
    )


def most_states(model: Model) -> Axis:
    """The encoder's states: how many there may be."""
    decoder = model.decoder
    assert decoder is not None
    if decoder.states is not None:
        return Axis("states", decoder.states, decoder.states, decoder.states)
    (axis,) = (size for size in model.inputs[0].shape if isinstance(size, Axis))
    return replace(axis, name="states")


def bias_tables(module: Any, decoder: Decoder) -> list[torch.Tensor | None]:
    """What each layer adds to scores, by distance: (context, heads) float32, entry d for a key d tokens before a query.

    Layers that add the same share one table; None for a layer that adds nothing.

    Raises:
        BadInputError: what is added does not follow from the distance.
    """
    if not any(layer.biased for layer in decoder.layers):
        return [None] * len(decoder.layers)
    length = decoder.context
    found: dict[int, torch.Tensor] = {}

    def attend(call: Call) -> torch.Tensor:
        if call.causal and call.bias is not None:
            found[call.index] = call.bias[0]
        return torch.zeros(1, call.query.shape[2], call.layer.heads, call.layer.head_dim)

    nothing = [(torch.zeros(1, layer.kv_heads, 1, layer.head_dim),) * 2 for layer in decoder.cross]
    with torch.no_grad(), attending(module, attend), last_token_scored(module):
        decode(module, torch.zeros(1, length, dtype=torch.int64), 0, nothing)
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    before = distance >= 0
    tables: list[torch.Tensor | None] = []
    for index, layer in enumerate(decoder.layers):
        if not layer.biased:
            tables.append(None)
            continue
        table = found[index][:, -1].flip(-1).T.contiguous()
        if not torch.equal(table[distance.clamp_min(0)].permute(2, 0, 1)[:, before], found[index][:, before]):
            raise BadInputError("The model adds something to its scores that does not follow from tokens' distance.")
        tables.append(next((other for other in tables if other is not None and torch.equal(other, table)), table))
    return tables

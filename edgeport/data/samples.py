"""`samples`: real inputs for a model where there are any, seeded random ones where not, and a record of which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeport.data.audio import RATE, SPEECH_FRAME, cut, read_recording, standardize, whisper_features, window_starts
from edgeport.data.cards import Card, Split, load_card
from edgeport.data.images import label_of, open_image, preprocess_image, split_pictures
from edgeport.data.synthetic import synthetic_inputs
from edgeport.data.text import open_tokenizer, read_texts, text_between
from edgeport.errors import BadInputError
from edgeport.model.inputs import select_outputs, vocabulary_size
from edgeport.model.types import Axis, Model, TensorSpec
from edgeport.packages import Progress
from edgeport.storage import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

CARDS = {"text": "web-excerpts", "image": "imagenet-photos", "audio": "conversation"}
WHISPER_PROMPT = ("<|startoftranscript|>", "<|notimestamps|>")

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class SampleRecord:
    """Which inputs a measurement used; the fields of `edgeport.validate.evidence.DataRecord`.

    Attributes:
        name: the data card, or "synthetic".
        real: real data; False for random tensors.
        sha256: of each data file, by its path in the package.
        slice: which samples, in words.
        licence: SPDX expression.
        samples: how many.
    """

    name: str
    real: bool
    sha256: dict[str, str]
    slice: str
    licence: str | None
    samples: int


@dataclass(frozen=True)
class Samples:
    """Inputs for a model.

    Attributes:
        inputs: for each call the named input arrays, batch 1.
        record: what they are.
        labels: the true class of each sample, for labelled pictures; empty otherwise.
    """

    inputs: list[Arrays]
    record: SampleRecord
    labels: tuple[int, ...] = ()


class _NoRealDataError(Exception):
    """Real data does not fit this model; the text says why."""


def samples(
    model: Model,
    *,
    count: int,
    split: Split,
    seed: int = 0,
    sequence: int | None = None,
    card: Card | None = None,
    progress: Progress | None = None,
) -> Samples:
    """Inputs for a model, `count` of them or as many as the data has.

    Text lengths vary as the texts do, up to the example length of the model's sequence axis; `sequence` makes
    every input exactly that long, with padding that the attention mask marks 0 (and decoder inputs as long as
    their example). The same arguments give the same samples.

    Args:
        split: "parity" to measure on, "calibration" to tune on; they never overlap.
        seed: which of the slice's samples, and the numbers of random inputs.
        sequence: tokens (text) or samples (raw audio) of every input.
        card: the data; None takes the one that comes with edgeport for the model's modality.

    Raises:
        BadInputError: the data can't be fetched or read, is of another kind than the model's inputs, or
            `sequence` is not in the model's range.
    """
    if count < 1:
        raise BadInputError("At least one sample is needed.", where="--samples")
    check_sequence(model, sequence)
    if card is not None and card.kind != model.modality:
        raise BadInputError(f"The data is {card.kind}, the model takes {model.modality}.", where=card.name)
    makers = {"text": _text_samples, "image": _image_samples, "audio": _audio_samples}
    try:
        if model.modality not in makers:
            raise _NoRealDataError("no real data is known for its inputs")
        data = card or load_card(CARDS[model.modality])
        return makers[model.modality](model, data, count, split, seed, sequence, progress)
    except _NoRealDataError as reason:
        inputs = synthetic_inputs(model, count=count, seed=seed, split=split, sequence=sequence)
        words = f"random inputs, seed {seed}: {reason}"
        return Samples(inputs, SampleRecord("synthetic", False, {}, words, None, count))


def check_sequence(model: Model, sequence: int | None) -> None:
    """Raise BadInputError when the model's varying input axis can't have this size."""
    axis = sequence_axis(model)
    if sequence is None or axis is None:
        return
    if not axis.minimum <= sequence <= axis.maximum:
        raise BadInputError(
            f"The model can't take a {axis.name} of {sequence}.",
            where="--sequence",
            allowed=f"{axis.minimum} to {axis.maximum}",
        )


def sequence_axis(model: Model) -> Axis | None:
    """The axis that the first input varies along, other than the batch."""
    axes = [size for size in model.inputs[0].shape if isinstance(size, Axis) and size.name != "batch"]
    return axes[0] if axes else None


def _choose(total: int, count: int, seed: int) -> list[int]:
    """`count` of `total` indices in a seeded order."""
    return [int(index) for index in np.random.default_rng(seed).permutation(total)[:count]]


def _record(card: Card, split: Split, count: int, detail: str) -> SampleRecord:
    part = card.slice(split)
    words = f"{split} slice, {card.unit} {part.start} to {part.stop}; {detail}"
    return SampleRecord(card.name, True, dict(card.package.members), words, card.licence, count)


def _pad(values: Sequence[int], length: int | None, fill: int) -> np.ndarray:
    """int64 (1, length) with `fill` behind the values, or (1, len(values))."""
    row = list(values) + [fill] * ((length or 0) - len(values))
    return np.asarray([row], np.int64)


def _tokenizer_file(model: Model) -> Path:
    if "tokenizer.json" not in model.assets:
        raise _NoRealDataError("the model comes without a tokenizer.json")
    return model.assets["tokenizer.json"]


def _check_vocabulary(model: Model, tokenizer: Tokenizer) -> None:
    known = vocabulary_size(model.module)
    if known is not None and tokenizer.get_vocab_size(with_added_tokens=True) > known:
        raise _NoRealDataError(f"the tokenizer knows more tokens than the model's {known}")


def _decoder_spec(model: Model) -> TensorSpec | None:
    return next((spec for spec in model.inputs if spec.name == "decoder_input_ids"), None)


def _decoder_length(spec: TensorSpec) -> int:
    return spec.fixed_shape()[1]


def _text_samples(
    model: Model, card: Card, count: int, split: Split, seed: int, sequence: int | None, progress: Progress | None
) -> Samples:
    """Tokens of real texts; a decoder is fed the same text behind its start token."""
    axis = sequence_axis(model)
    if axis is None or model.inputs[0].name != "input_ids":
        raise _NoRealDataError("its text inputs have no sequence axis")
    length = sequence or axis.example
    tokenizer = open_tokenizer(_tokenizer_file(model), length)
    _check_vocabulary(model, tokenizer)
    texts = read_texts(card, card.fetch(progress), split)
    chosen = [texts[index] for index in _choose(len(texts), count, seed)]
    config: Any = getattr(model.module, "config", None)
    padding = int(getattr(config, "pad_token_id", None) or 0)
    decoder = _decoder_spec(model)
    inputs = []
    for encoding in tokenizer.encode_batch(chosen):
        arrays = {
            "input_ids": _pad(encoding.ids, sequence, padding),
            "attention_mask": _pad(encoding.attention_mask, sequence, 0),
            "token_type_ids": _pad(encoding.type_ids, sequence, 0),
        }
        if decoder is not None:
            start = int(getattr(config, "decoder_start_token_id", None) or 0)
            ids = [start, *encoding.ids][: _decoder_length(decoder)]
            arrays["decoder_input_ids"] = _pad(ids, _decoder_length(decoder) if sequence else None, padding)
        inputs.append({spec.name: arrays[spec.name] for spec in model.inputs})
    detail = f"{len(inputs)} texts, seed {seed}, cut to {length} tokens" + (" and padded to them" if sequence else "")
    return Samples(inputs, _record(card, split, len(inputs), detail))


def _image_samples(
    model: Model, card: Card, count: int, split: Split, seed: int, sequence: int | None, progress: Progress | None
) -> Samples:
    """Photographs, and when more are asked for than there are, their mirror images."""
    if model.image is None:
        raise _NoRealDataError("the model does not say how pictures are prepared")
    inputs, chosen, detail = prepared_pictures(model, split_pictures(card, card.fetch(progress), split), count, seed)
    labels = [label_of(card, path) for path in chosen]
    known = tuple(label for label in labels if label is not None)
    return Samples(inputs, _record(card, split, len(inputs), detail), known if len(known) == len(labels) else ())


def prepared_pictures(
    model: Model, files: Sequence[Path], count: int, seed: int
) -> tuple[list[Arrays], list[Path], str]:
    """Pictures as a model takes them, in a seeded order, and mirrored ones where there are too few.

    Returns:
        The inputs, the file of each, and what they are in words.
    """
    assert model.image is not None
    order = [files[index] for index in _choose(len(files), len(files), seed)]
    chosen = (order * 2)[:count]
    inputs = []
    for index, path in enumerate(chosen):
        values = preprocess_image(open_image(path), model.image)
        values = np.ascontiguousarray(values[..., ::-1]) if index >= len(order) else values
        inputs.append({model.inputs[0].name: values})
    words = f"{min(count, len(order))} pictures, seed {seed}"
    if len(inputs) > len(order):
        words += f", and mirror images of {len(inputs) - len(order)}"
    return inputs, chosen, words


def _audio_samples(
    model: Model, card: Card, count: int, split: Split, seed: int, sequence: int | None, progress: Progress | None
) -> Samples:
    """Windows of a recording: raw for wav2vec 2.0, features and the words spoken for Whisper; for a model that hands a
    state on, frames with the state that the frames before them leave."""
    assert card.audio is not None
    spec = model.inputs[0]
    if [each.name for each in model.inputs] == ["input_values", "state"]:
        return _frame_samples(model, card, count, split, seed, progress)
    axis = sequence_axis(model)
    if spec.name == "input_values" and axis is not None:
        size = sequence or axis.example
    elif spec.name == "input_features":
        _, _, frames = spec.fixed_shape()
        size = min(round(card.audio.window_seconds * RATE), frames * 160)
    else:
        raise _NoRealDataError("no way is known to prepare speech for its inputs")
    starts = window_starts(card, split, size / RATE)
    if not starts:
        raise _NoRealDataError(f"a window of {size / RATE:.1f} s does not fit the slice")
    files = {path.name: path for path in card.fetch(progress)}
    recording = read_recording(files[card.audio.recording.rpartition("/")[2]])
    chosen = [starts[index] for index in _choose(len(starts), count, seed)]
    inputs = []
    for start in chosen:
        window = cut(recording, start, size)
        if spec.name == "input_values":
            inputs.append({spec.name: (standardize(window) if _standardizes(model) else window)[None]})
            continue
        _, bins, frames = spec.fixed_shape()
        arrays = {spec.name: whisper_features(window, bins=bins, frames=frames)[None]}
        decoder = _decoder_spec(model)
        if decoder is not None:
            transcript = files[card.audio.transcript.rpartition("/")[2]] if card.audio.transcript else None
            words = text_between(transcript, start, start + size / RATE) if transcript else ""
            arrays["decoder_input_ids"] = _whisper_tokens(model, decoder, words, fixed=sequence is not None)
        inputs.append(arrays)
    detail = f"{len(inputs)} windows of {size / RATE:.1f} s, seed {seed}"
    return Samples(inputs, _record(card, split, len(inputs), detail))


def _frame_samples(model: Model, card: Card, count: int, split: Split, seed: int, progress: Progress | None) -> Samples:
    """Frames of a recording, each with the state that the model has after those before it in the slice."""
    import torch

    assert card.audio is not None
    sound, state = model.inputs
    part = card.slice(split)
    files = {path.name: path for path in card.fetch(progress)}
    recording = read_recording(files[card.audio.recording.rpartition("/")[2]])
    _, size = sound.fixed_shape()
    held = np.zeros(state.fixed_shape(), np.float32)
    calls = []
    for begin in range(part.start * RATE, part.stop * RATE - size + 1, SPEECH_FRAME):
        call = {sound.name: recording[None, begin : begin + size].copy(), state.name: held}
        calls.append(call)
        with torch.inference_mode():
            result = model.module(**{name: torch.from_numpy(value) for name, value in call.items()})
        held = select_outputs(result, tuple(spec.name for spec in model.outputs))[model.outputs[1].name].numpy()
    chosen = [calls[index] for index in _choose(len(calls), count, seed)]
    return Samples(chosen, _record(card, split, len(chosen), f"{len(chosen)} frames of {len(calls)}, seed {seed}"))


def _standardizes(model: Model) -> bool:
    path = model.assets.get("preprocessor_config.json")
    return path is None or bool(read_json(path).get("do_normalize", True))


def _prompt(tokenizer: Tokenizer) -> list[int]:
    found = [number for token in WHISPER_PROMPT if (number := tokenizer.token_to_id(token)) is not None]
    return found if len(found) == len(WHISPER_PROMPT) else []


def prompt_tokens(model: Model) -> tuple[int, ...]:
    """The tokens that a transcript begins with; none where the model takes no speech or knows no such tokens."""
    if model.modality != "audio" or "tokenizer.json" not in model.assets:
        return ()
    return tuple(_prompt(open_tokenizer(model.assets["tokenizer.json"], len(WHISPER_PROMPT))))


def _whisper_tokens(model: Model, decoder: TensorSpec, words: str, *, fixed: bool) -> np.ndarray:
    """Whisper's prompt and the words spoken, as one would force them; int64 (1, tokens)."""
    length = _decoder_length(decoder)
    tokenizer = open_tokenizer(_tokenizer_file(model), length)
    _check_vocabulary(model, tokenizer)
    prompt = _prompt(tokenizer)
    if not prompt:
        raise _NoRealDataError("its tokenizer lacks Whisper's prompt tokens")
    ids = [*prompt, *tokenizer.encode(" " + words, add_special_tokens=False).ids][:length]
    config: Any = model.module.config
    return _pad(ids, length if fixed else None, int(config.eos_token_id))

"""What a module takes and gives: input specs, one example, and output specs seen by running it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from edgeport.errors import BadInputError
from edgeport.model.types import Axis, Modality, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_BATCH = 8
EXAMPLE_SEQUENCE = 128
EXAMPLE_DECODER_SEQUENCE = 32
UNBOUNDED_SEQUENCE = 512  # for relative positions (T5), which have no longest sequence of their own
LONGEST_SEQUENCE = 8192
AUDIO_SECONDS = 30

# ModelOutput fields that are not what the model is for.
SIDE_OUTPUTS = frozenset({"loss", "extract_features", "encoder_last_hidden_state"})

BATCH = Axis("batch", 1, MAX_BATCH, 1)


def huggingface_inputs(module: PreTrainedModel) -> tuple[Modality, tuple[TensorSpec, ...]]:
    """The inputs of a transformers model, after its main input, its `forward` and its config.

    Text: input_ids, attention_mask and, where the model tells segments apart, token_type_ids; int64 (batch, sequence).
    Pictures: pixel_values; float32 (batch, channels, height, width). Audio: input_values; float32 (batch, samples),
    or input_features; float32 (batch, mel bins, frames). Encoder-decoders also take decoder_input_ids.

    Raises:
        BadInputError: the model takes something else.
    """
    main = str(module.main_input_name)
    parameters = inspect.signature(module.forward).parameters
    config: Any = module.config
    if main == "input_ids" and "pixel_values" not in parameters and "input_features" not in parameters:
        return "text", _text_inputs(module, parameters)
    if main == "pixel_values" and not config.is_encoder_decoder and "input_ids" not in parameters:
        height, width = image_size(config)
        return "image", (TensorSpec(main, "float32", (BATCH, int(getattr(config, "num_channels", 3)), height, width)),)
    if main == "input_values" and hasattr(config, "conv_stride") and hasattr(config, "conv_kernel"):
        return "audio", (TensorSpec(main, "float32", (BATCH, _samples_axis(config))),)
    if main == "input_values" and hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return "audio", (TensorSpec(main, "float32", (BATCH, int(config.max_length), int(config.num_mel_bins))),)
    if main == "input_features" and hasattr(config, "max_source_positions") and config.model_type == "whisper":
        frames = 2 * int(config.max_source_positions)  # the second convolution of the encoder halves them
        features = TensorSpec(main, "float32", (BATCH, int(config.num_mel_bins), frames))
        if "decoder_input_ids" not in parameters:
            return "audio", (features,)
        longest = int(config.max_target_positions)
        return "audio", (features, TensorSpec("decoder_input_ids", "int64", (BATCH, _decoder_axis(longest))))
    raise BadInputError(
        f"edgeport does not know how to feed {type(module).__name__} (main input {main!r}).",
        allowed="models of one modality: text, pictures, raw audio, or Whisper's features",
        next_step="Wrap it in a torch module of your own and name it as `package.module:factory` with example inputs.",
    )


def _text_inputs(module: PreTrainedModel, parameters: Mapping[str, inspect.Parameter]) -> tuple[TensorSpec, ...]:
    longest = longest_sequence(module)
    sequence = Axis("sequence", 1, longest, min(EXAMPLE_SEQUENCE, longest))
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in parameters and int(getattr(module.config, "type_vocab_size", None) or 0) > 1:
        names.append("token_type_ids")
    specs = [TensorSpec(name, "int64", (BATCH, sequence)) for name in names if name in parameters]
    if "decoder_input_ids" in parameters:
        specs.append(TensorSpec("decoder_input_ids", "int64", (BATCH, _decoder_axis(longest))))
    return tuple(specs)


def _decoder_axis(longest: int) -> Axis:
    return Axis("decoder_sequence", 1, longest, min(EXAMPLE_DECODER_SEQUENCE, longest))


def _samples_axis(config: Any) -> Axis:
    """Raw audio at 16 kHz: from the receptive field of one output frame up to 30 seconds; the example is one second."""
    field, stride = 1, 1
    for kernel, step in zip(config.conv_kernel, config.conv_stride, strict=True):
        field += (int(kernel) - 1) * stride
        stride *= int(step)
    rate = 16_000
    # Two frames at least: a group norm over a single frame has no variance.
    least = field + stride
    return Axis("samples", least, max(AUDIO_SECONDS * rate, least), max(rate, least))


def longest_sequence(module: PreTrainedModel) -> int:
    """The most positions the model can count, tokens."""
    config: Any = module.config
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest <= 0:
        return UNBOUNDED_SEQUENCE
    for name, child in module.named_modules():
        # RoBERTa counts positions from padding_idx + 1, so the table is that much longer than a sequence.
        if name.endswith("position_embeddings") and getattr(child, "padding_idx", None) is not None:
            return min(longest - int(child.padding_idx) - 1, LONGEST_SEQUENCE)
    return min(longest, LONGEST_SEQUENCE)


def image_size(config: Any) -> tuple[int, int]:
    """Height and width a vision model was trained with, pixels; 224 x 224 where the config has none."""
    size = getattr(config, "image_size", None) or 224
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping):
        return int(size["height"]), int(size["width"])
    return int(size[0]), int(size[1])


def vocabulary_size(module: torch.nn.Module) -> int | None:
    """Token ids that the module's input embedding holds, or None when it has none to ask for."""
    getter = getattr(module, "get_input_embeddings", None)
    if getter is None:
        return None
    try:
        embedding = getter()
    except NotImplementedError:  # transformers' answer for speech and vision models
        return None
    if not isinstance(embedding, torch.nn.Embedding):
        decoder = getattr(getattr(module, "config", None), "vocab_size", None)
        return int(decoder) if decoder else None
    return int(embedding.num_embeddings)


def make_example(
    specs: tuple[TensorSpec, ...],
    *,
    vocabulary: int | None = None,
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """One seeded random value for each input.

    Token ids are uniform over the vocabulary, masks end with an eighth of padding (a mask of only ones is
    optimised away by tracing), segments are 0, floats are standard normal.

    Args:
        sizes: sizes of axes by name, in place of their example sizes.
    """
    generator = torch.Generator().manual_seed(seed)
    example = {}
    for spec in specs:
        shape = tuple(
            (sizes or {}).get(size.name, size.example) if isinstance(size, Axis) else size for size in spec.shape
        )
        if spec.name.endswith("attention_mask"):
            value = torch.ones(shape, dtype=torch.int64)
            value[..., shape[-1] - shape[-1] // 8 :] = 0
        elif spec.name == "token_type_ids":
            value = torch.zeros(shape, dtype=torch.int64)
        elif spec.dtype.startswith("float"):
            value = torch.randn(shape, generator=generator)
        else:
            value = torch.randint(0, vocabulary or 2, shape, generator=generator)
        example[spec.name] = value.to(getattr(torch, spec.dtype))
    return example


def named_outputs(result: Any, *, default: str = "output") -> dict[str, torch.Tensor]:
    """The float tensors that a module returned, by name.

    A ModelOutput or dict has names of its own (caches, losses and hidden states are left out); a tensor is
    called `default`; a tuple's members `default_0`, `default_1`, ...
    """
    named: dict[str, Any]
    if isinstance(result, torch.Tensor):
        named = {default: result}
    elif isinstance(result, Mapping):
        named = {str(name): value for name, value in result.items() if name not in SIDE_OUTPUTS}
    elif isinstance(result, (tuple, list)):
        named = {f"{default}_{index}": value for index, value in enumerate(result)}
    else:
        raise BadInputError(
            f"The module returns {type(result).__name__}.", allowed="a tensor, or a tuple or dict of tensors"
        )
    floats = {
        name: value for name, value in named.items() if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    if not floats:
        raise BadInputError("The module returns no float tensor.", allowed="a tensor, or a tuple or dict of tensors")
    return floats


def select_outputs(result: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """A module's answer as named tensors, in the order of `names`.

    Args:
        result: a ModelOutput or another mapping (looked up by name), a tuple or list (by position), or a tensor.

    Raises:
        BadInputError: the module gives no such output.
    """
    if isinstance(result, torch.Tensor):
        result = (result,)
    if isinstance(result, Mapping):
        found = {name: result[name] for name in names if name in result}
    else:
        found = dict(zip(names, result, strict=False))
    missing = [name for name in names if not isinstance(found.get(name), torch.Tensor)]
    if missing:
        raise BadInputError("The module gives no such output tensor.", where=missing[0], allowed=sorted(found))
    return found


def output_specs(
    module: torch.nn.Module, inputs: tuple[TensorSpec, ...], *, vocabulary: int | None = None, default: str = "output"
) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes of the outputs, seen by running the module once and once more for each axis.

    A dimension that follows an axis one to one carries that axis; one that follows it otherwise (the frames
    that wav2vec 2.0 makes of samples) carries an axis of its own, named after the output.
    """

    def shapes(sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            return named_outputs(module(**make_example(inputs, vocabulary=vocabulary, sizes=sizes)), default=default)

    base = shapes({})
    axes = {size.name: size for spec in inputs for size in spec.shape if isinstance(size, Axis)}
    found: dict[tuple[str, int], Axis] = {}
    for axis in axes.values():
        other = axis.example - 1 if axis.example > axis.minimum else axis.example + 1
        if other > axis.maximum:
            continue
        if other - axis.example == -1 and axis.example > 1000:
            other = axis.example // 2  # one sample of audio more or less changes no frame count
        for name, tensor in shapes({axis.name: other}).items():
            for index, (before, after) in enumerate(zip(base[name].shape, tensor.shape, strict=True)):
                if before != after:
                    found[name, index] = _follow(axis, f"{name}_{index}", int(before), one_to_one=after == other)
    return tuple(
        TensorSpec(
            name,
            str(tensor.dtype).removeprefix("torch."),
            tuple(found.get((name, index), int(size)) for index, size in enumerate(tensor.shape)),
        )
        for name, tensor in base.items()
    )


def _follow(axis: Axis, name: str, size: int, *, one_to_one: bool) -> Axis:
    if one_to_one and size == axis.example:
        return axis
    return Axis(name, 1, math.ceil(size * axis.maximum / axis.example), size)

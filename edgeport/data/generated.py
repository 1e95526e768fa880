"""Texts that a language model wrote itself, to calibrate and to train on where no data fits it.

LLM-QAT (Liu et al. 2023, https://arxiv.org/abs/2305.17888, section 2.1): the first token is drawn from the whole
vocabulary, a few follow greedily so that a text finds a subject, and the rest are drawn from the model's own
distribution so that texts differ and cover what the model knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from edgeport.data.samples import SampleRecord, Samples, sequence_axis
from edgeport.errors import BadInputError
from edgeport.model.inputs import select_outputs

if TYPE_CHECKING:
    import torch

    from edgeport.model.types import Model

GREEDY = (3, 4, 5)
"""How many tokens follow the first greedily; texts take turns, as in the paper."""

BATCH = 16
"""Texts written together."""

INPUTS = ("input_ids", "attention_mask", "position_ids")


def check_generates(model: Model, *, where: str = "[calibration] source") -> None:
    """Refuse a model that writes no texts.

    Args:
        where: the option that asks for them.

    Raises:
        BadInputError: saying what it lacks.
    """
    names = [spec.name for spec in model.inputs]
    writes = model.huggingface and model.task.startswith("text-generation") and names[0] == "input_ids"
    if not writes or "logits" not in {spec.name for spec in model.outputs} or not set(names) <= set(INPUTS):
        raise BadInputError(
            f"The model {model.name} ({model.task}) does not write texts that it could be tuned on.",
            where=where,
            allowed='"generated" for causal language models of transformers, "data" for every model',
        )


def _write(module: torch.nn.Module, first: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    """Token ids (B, length) that continue the first ones (B, 1)."""
    import torch

    ids, cache = first, None
    greedy = torch.tensor([GREEDY[index % len(GREEDY)] for index in range(len(first))])
    while ids.shape[1] < length:
        # Only the newest token: the cache has what came before.
        output = module(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = select_outputs(output, ("logits",))["logits"][:, -1].float()
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        likeliest = logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, torch.where((ids.shape[1] <= greedy)[:, None], likeliest, drawn)], 1)
    return ids


def generated_samples(
    model: Model, *, count: int, seed: int = 0, progress: Callable[[int, int, str], None] | None = None
) -> Samples:
    """Texts as inputs of the model, batch 1, each as long as the example of its sequence axis.

    The same model, count and seed give the same texts. A text goes on behind an end-of-text token, as the packed
    texts do that such models are trained on.

    Args:
        model: a causal language model in float.
        progress: called with (texts written, texts in all, what they are).

    Raises:
        BadInputError: the model writes no texts, or its logits are not finite.
    """
    import torch

    check_generates(model)
    axis = sequence_axis(model)
    length = model.inputs[0].fixed_shape()[1] if axis is None else axis.example
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(model.module.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    texts: list[np.ndarray] = []
    with torch.no_grad():
        while len(texts) < count:
            size = min(BATCH, count - len(texts))
            first = torch.randint(0, vocabulary, (size, 1), generator=generator)
            try:
                texts += list(_write(model.module, first, length, generator).numpy())
            except RuntimeError as error:  # torch.multinomial's check
                if "probability tensor" not in str(error):
                    raise
                raise BadInputError(
                    "The model's logits are not finite, so it can't write texts.",
                    where="[calibration] source",
                    next_step="Check the checkpoint.",
                ) from error
            if progress is not None:
                progress(len(texts), count, "texts written by the model")
    inputs = []
    for text in texts:
        arrays = {
            "input_ids": text[None],
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length, dtype=np.int64)[None],
        }
        inputs.append({spec.name: arrays[spec.name] for spec in model.inputs})
    words = (
        f"{count} texts of {length} tokens that the float model wrote, seed {seed}: a random first token, "
        f"{GREEDY[0]} to {GREEDY[-1]} greedy ones, the rest sampled (LLM-QAT)"
    )
    return Samples(inputs, SampleRecord("generated", False, {}, words, None, count))

"""What a model's outputs mean for its task: which positions are padding, which numbers are class scores.

Tasks carry optimum's names ("text-generation", "feature-extraction", ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, np.ndarray]

SENTENCE_EMBEDDING = "sentence_embedding"
_EMBEDDING_TASKS = ("feature-extraction", "sentence-similarity")
_SCORING_TASKS = (
    "automatic-speech-recognition",
    "fill-mask",
    "image-segmentation",
    "image-text-to-text",
    "image-to-text",
    "multiple-choice",
    "next-sentence-prediction",
    "object-detection",
    "question-answering",
    "semantic-segmentation",
    "text-generation",
    "text2text-generation",
)
_SCORES = ("logits", "logits_per_image", "logits_per_text", "start_logits", "end_logits")
_SPANS = ("start_logits", "end_logits")


def scores_classes(task: str) -> bool:
    """The task's outputs are scores over classes or tokens."""
    name = task.removesuffix("-with-past")
    return name.endswith("-classification") or name in _SCORING_TASKS


def valid_positions(name: str, shape: tuple[int, ...], inputs: Arrays) -> np.ndarray | None:
    """Which (batch, sequence) positions of an output stand for real tokens.

    Args:
        name: of the output; `encoder_...` outputs of encoder-decoders follow the encoder's mask.
        shape: of the output.
        inputs: the call's inputs, with `attention_mask` (B, S) and `decoder_attention_mask` where there are any.

    Returns:
        Bool array (B, S), or None when every position counts.
    """
    decoded = any(key.startswith("decoder_input") for key in inputs) and not name.startswith("encoder_")
    mask = inputs.get("decoder_attention_mask" if decoded else "attention_mask")
    if mask is None or mask.ndim != 2 or tuple(shape[:2]) != mask.shape:
        return None
    valid: np.ndarray = mask != 0
    return valid


def sentence_embedding(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean of the token vectors without padding, scaled to length 1: what sentence-transformers returns.

    Args:
        hidden: float array (B, S, H).
        mask: (B, S), 0 on padding; at least one real token a row.

    Returns:
        float32 array (B, H).
    """
    import numpy as np

    valid = (mask != 0)[..., None]
    # Not a product with the mask: what stands on padding may be NaN.
    mean = np.where(valid, hidden.astype(np.float64), 0.0).sum(axis=1) / valid.sum(axis=1)
    norm = np.linalg.norm(mean, axis=-1, keepdims=True)
    embedding: np.ndarray = (mean / np.where(norm > 0, norm, 1.0)).astype(np.float32)
    return embedding


def with_derived(outputs: Arrays, inputs: Arrays, task: str) -> dict[str, np.ndarray]:
    """The outputs, and `sentence_embedding` where the task asks for embeddings of texts."""
    found = dict(outputs)
    hidden, mask = outputs.get("last_hidden_state"), inputs.get("attention_mask")
    if task not in _EMBEDDING_TASKS or hidden is None or mask is None or SENTENCE_EMBEDDING in found:
        return found
    if hidden.ndim == 3 and hidden.shape[:2] == mask.shape and bool((mask != 0).any(axis=1).all()):
        found[SENTENCE_EMBEDDING] = sentence_embedding(hidden, mask)
    return found


def class_scores(
    name: str, value: np.ndarray, valid: np.ndarray | None, task: str, *, only_output: bool
) -> np.ndarray | None:
    """An output as scores of shape (positions, classes), padding left out; None when it is no such thing.

    Classes are on the last axis, except for semantic segmentation (B, C, H, W). In extractive question
    answering the positions of the text are the classes.
    """
    import numpy as np

    if not scores_classes(task) or not (name in _SCORES or only_output) or value.ndim < 2:
        return None
    if name in _SPANS:
        # One row a text: only its own tokens can be the answer, and rows may differ in length.
        scores = value if valid is None else np.where(valid, value, -np.inf)
    elif value.ndim == 4 and "segmentation" in task:
        scores = np.moveaxis(value, 1, -1).reshape(-1, value.shape[1])
    else:
        scores = (value if valid is None else value[valid]).reshape(-1, value.shape[-1])
    return scores if scores.shape[-1] > 1 else None

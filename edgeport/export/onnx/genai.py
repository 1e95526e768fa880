"""genai_config.json: what onnxruntime-genai must know to run our decoder file as it is.

Source: onnxruntime-genai, src/config.h, 0.18. The file's inputs and outputs carry its names (`decoder.py`); "decoder"
is its model type for a language model of any family.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from edgeport.errors import BadInputError
from edgeport.model.types import Model

GENAI_CONFIG = "genai_config.json"


def genai_config(model: Model, filename: str, stop: Collection[int], *, grows: bool = False) -> str | None:
    """The config's text; None for layers of different widths, which onnxruntime-genai does not know.

    Args:
        filename: of the ONNX file, in the config's folder: one outside of it is refused there.
        stop: tokens that end a text.
        grows: the cache comes out of each call longer, not written in place.

    Raises:
        BadInputError: the model has no cache.
    """
    decoder = model.decoder
    if decoder is None:
        raise BadInputError("The model has no cache.", where=model.name)
    if len({(layer.heads, layer.kv_heads, layer.head_dim) for layer in decoder.layers}) > 1:
        return None
    layer, config = decoder.layers[0], model.module.config
    settings: Any = config
    end = sorted(stop)
    value = {
        "model": {
            "type": "decoder",
            "bos_token_id": settings.bos_token_id if isinstance(settings.bos_token_id, int) else 0,
            "eos_token_id": end,
            "pad_token_id": settings.pad_token_id if isinstance(settings.pad_token_id, int) else (end or [0])[0],
            "vocab_size": decoder.vocabulary,
            "context_length": decoder.context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": filename,
                "head_size": layer.head_dim,
                "hidden_size": int(settings.hidden_size),
                "num_attention_heads": layer.heads,
                "num_key_value_heads": layer.kv_heads,
                "num_hidden_layers": len(decoder.layers),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": decoder.context,
            "past_present_share_buffer": not grows,
            "num_beams": 1,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
    return json.dumps(value, indent=2) + "\n"

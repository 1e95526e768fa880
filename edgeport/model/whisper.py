"""Whisper out of a CTranslate2 file, as transformers' WhisperForConditionalGeneration.

Radford et al. 2022 (https://arxiv.org/abs/2212.04356). CTranslate2 fuses the projections: self-attention holds
query, key and value in one matrix, cross-attention key and value; the key has no bias, which is stored as zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeport.errors import BadInputError
from edgeport.model.build import build_huggingface
from edgeport.model.ctranslate2 import read_ctranslate2
from edgeport.model.types import Model
from edgeport.storage import cache_root, canonical_json, hash_file, write_text

HEAD_WIDTH = 64  # of every Whisper size
ENGLISH_VOCABULARY = 51864  # multilingual models have one token more before the special ones


def load_whisper(path: Path, *, name: str, reference: str, hashes: Mapping[str, str] | None = None) -> Model:
    """A Whisper model out of a folder with model.bin and tokenizer.json.

    Args:
        path: the folder.
        hashes: sha256 by file name where they are already known.

    Raises:
        BadInputError: a file is missing or damaged, or the tensors are not those of a Whisper model.
    """
    spec, variables = read_ctranslate2(path / "model.bin")
    if spec != "WhisperSpec":
        raise BadInputError(f"The CTranslate2 file holds a {spec}.", where=path / "model.bin", allowed="WhisperSpec")
    module = _module(variables, path / "model.bin")
    known = hashes or {}
    read = [path / "model.bin", path / "tokenizer.json"]
    return build_huggingface(
        module,
        name=name,
        reference=reference,
        kind="zoo",
        task="automatic-speech-recognition",
        files={file.name: known.get(file.name) or hash_file(file) for file in read},
        assets={
            "tokenizer.json": path / "tokenizer.json",
            "preprocessor_config.json": _preprocessor(module.config),
            "generation_config.json": _generation(module.config),
        },
        licence=None,
        note=None,
    )


def _module(variables: Mapping[str, np.ndarray], where: Path) -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    try:
        module = WhisperForConditionalGeneration(WhisperConfig(**_sizes(variables))).eval()
        state = to_huggingface(variables)
    except KeyError as error:
        raise BadInputError(f"The file lacks Whisper's tensor {error}.", where=where) from error
    # The output projection is the token embedding; transformers ties it.
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise BadInputError(f"The file is no Whisper model: {error}", where=where) from error
    module.tie_weights()
    return module


def _sizes(variables: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The config's sizes, read off the tensors."""
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    end = 50256 if vocabulary == ENGLISH_VOCABULARY else 50257
    heads = width // HEAD_WIDTH
    layers = {
        part: sum(name.startswith(f"{part}/layer_") and name.endswith("/ffn/linear_0/bias") for name in variables)
        for part in ("encoder", "decoder")
    }
    feed_forward = variables["encoder/layer_0/ffn/linear_0/weight"].shape[0]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "num_mel_bins": variables["encoder/conv1/weight"].shape[1],
        "max_source_positions": variables["encoder/position_encodings/encodings"].shape[0],
        "max_target_positions": variables["decoder/position_encodings/encodings"].shape[0],
        "encoder_layers": layers["encoder"],
        "decoder_layers": layers["decoder"],
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": feed_forward,
        "decoder_ffn_dim": feed_forward,
        "eos_token_id": end,
        "bos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": end + 1,
        "begin_suppress_tokens": None,
        "architectures": ["WhisperForConditionalGeneration"],
    }


def to_huggingface(variables: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Every tensor under transformers' name, float32, with the fused projections taken apart.

    Raises:
        KeyError: a tensor is missing; the error's argument is its CTranslate2 name.
    """
    state: dict[str, torch.Tensor] = {}

    def put(target: str, source: str, index: int = 0, parts: int = 1) -> None:
        """Part `index` of a tensor that stacks `parts` of them along its first axis."""
        value = np.split(variables[source], parts)[index]
        state[f"model.{target}"] = torch.from_numpy(value.astype(np.float32))

    def put_linear(target: str, source: str, index: int = 0, parts: int = 1, *, bias: bool = True) -> None:
        put(f"{target}.weight", f"{source}/weight", index, parts)
        if bias:
            put(f"{target}.bias", f"{source}/bias", index, parts)

    def put_norm(target: str, source: str) -> None:
        put(f"{target}.weight", f"{source}/gamma")
        put(f"{target}.bias", f"{source}/beta")

    for convolution in ("conv1", "conv2"):
        put_linear(f"encoder.{convolution}", f"encoder/{convolution}")
    put("decoder.embed_tokens.weight", "decoder/embeddings/weight")
    for part in ("encoder", "decoder"):
        put(f"{part}.embed_positions.weight", f"{part}/position_encodings/encodings")
        put_norm(f"{part}.layer_norm", f"{part}/layer_norm")
        index = 0
        while f"{part}/layer_{index}/ffn/linear_0/weight" in variables:
            ours, theirs = f"{part}.layers.{index}", f"{part}/layer_{index}"
            for place, projection in enumerate(("q_proj", "k_proj", "v_proj")):
                fused = f"{theirs}/self_attention/linear_0"
                put_linear(f"{ours}.self_attn.{projection}", fused, place, 3, bias=projection != "k_proj")
            put_linear(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            put_norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            if part == "decoder":
                put_linear(f"{ours}.encoder_attn.q_proj", f"{theirs}/attention/linear_0")
                for place, projection in enumerate(("k_proj", "v_proj")):
                    fused = f"{theirs}/attention/linear_1"
                    put_linear(f"{ours}.encoder_attn.{projection}", fused, place, 2, bias=projection != "k_proj")
                put_linear(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
                put_norm(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
            put_linear(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            put_linear(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
            put_norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            index += 1
    return state


def _preprocessor(config: Any) -> Path:
    """A preprocessor_config.json for the features that the model takes, in the cache."""
    from transformers import WhisperFeatureExtractor

    return _cached(
        f"{config.num_mel_bins}-bins/preprocessor_config.json",
        WhisperFeatureExtractor(feature_size=config.num_mel_bins).to_json_string(),
    )


def _generation(config: Any) -> Path:
    """A generation_config.json with the tokens that begin and end a text, in the cache."""
    tokens = {
        "decoder_start_token_id": config.decoder_start_token_id,
        "eos_token_id": config.eos_token_id,
        "is_multilingual": config.vocab_size > ENGLISH_VOCABULARY,
    }
    return _cached(f"{config.vocab_size}-tokens/generation_config.json", canonical_json(tokens))


def _cached(name: str, text: str) -> Path:
    path = cache_root() / "whisper" / name
    if not path.is_file() or path.read_text() != text:
        write_text(path, text)
    return path

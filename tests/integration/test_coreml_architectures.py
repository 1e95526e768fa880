"""Tiny random models of many architectures through Core ML: the evaluator has every operator that their programs need,
and the saved package's outputs are torch's.

`operators` are those that a family brings along, so that a converter that stops to emit one is noticed. The decoders'
ten families with their states are in test_coreml_decoder.py; test_architectures.py takes five through all runtimes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgeport.export.artifact import LoweringSettings
from edgeport.export.dispatch import lower
from edgeport.mlpackage.constants import is_constant
from edgeport.mlpackage.package import load_package
from edgeport.mlpackage.program import parse_function
from edgeport.model.build import build_huggingface
from edgeport.runtime.coreml.evaluate import CONTROL
from edgeport.runtime.coreml.ops import OPERATORS
from edgeport.runtime.session import open_session
from edgeport.runtime.torch import TorchSession
from edgeport.target import load_target

TARGET = load_target("ios18-coreml")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.2,
}
TEXT = {**SMALL, "vocab_size": 96, "max_position_embeddings": 64}
PICTURE = {**SMALL, "image_size": 32, "patch_size": 8}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PAIR: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "init_std": 0.2,
    "decoder_start_token_id": 1,
    **ENDS,
}
SOUND = {
    **SMALL,
    "vocab_size": 32,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
STAGES = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4]}
DEBERTA = {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
CELLS = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 8, 8, 16, 16, 32]}

# (class, model type, config, operators that it brings along); the first ones stand for the rest when time is short.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "deberta": ("DebertaV2Model", "deberta-v2", {**TEXT, **DEBERTA}, {"gather_along_axis", "logical_not"}),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "segformer",
        {"image_size": 64, "decoder_hidden_size": 16, "initializer_range": 0.2, **STAGES},
        {"upsample_bilinear", "conv"},
    ),
    "opt": (
        "OPTForCausalLM",
        "opt",
        {
            "vocab_size": 96,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "init_std": 0.2,
        },
        {"cumsum", "softmax"},
    ),
    "hubert": ("HubertForCTC", "hubert", SOUND, {"instance_norm"}),
    "yolos": (
        "YolosForObjectDetection",
        "yolos",
        {**PICTURE, "image_size": [32, 32], "num_detection_tokens": 4},
        {"gather_nd", "sigmoid"},
    ),
    "roberta": ("RobertaForTokenClassification", "roberta", {**TEXT, "max_position_embeddings": 70}, {"not_equal"}),
    "albert": ("AlbertModel", "albert", {**TEXT, "embedding_size": 16}, {"gather"}),
    "mpnet": ("MPNetModel", "mpnet", {**TEXT, "max_position_embeddings": 70}, {"matmul"}),
    "modernbert": (
        "ModernBertModel",
        "modernbert",
        {**TEXT, **ENDS, "cls_token_id": 1, "sep_token_id": 2},
        {"concat"},
    ),
    "bart": ("BartForConditionalGeneration", "bart", {**PAIR, "max_position_embeddings": 64}, {"linear"}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "whisper",
        {**PAIR, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32},
        {"conv", "gelu"},
    ),
    "swin": (
        "SwinForImageClassification",
        "swin",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        {"reduce_mean"},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "convnext",
        {"image_size": 32, "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "initializer_range": 0.2},
        {"layer_norm"},
    ),
    "resnet": (
        "ResNetForImageClassification",
        "resnet",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
        {"max_pool"},
    ),
    "mobilevit": (
        "MobileViTForImageClassification",
        "mobilevit",
        {"image_size": 64, "num_attention_heads": 4, "initializer_range": 0.2, **CELLS},
        {"silu"},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "gpt_neox", TEXT, {"split"}),
    "bloom": (
        "BloomForCausalLM",
        "bloom",
        {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
        {"tanh"},
    ),
}
OFTEN = 2


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if i < OFTEN else pytest.mark.slow) for i, name in enumerate(ARCHITECTURES)]
)
def test_the_saved_package_gives_what_torch_gives(name: str, tmp_path: Path) -> None:
    import transformers

    kind, family, options, brings = ARCHITECTURES[name]
    torch.manual_seed(0)
    make: Callable[..., Any] = getattr(transformers, kind)
    module = make(transformers.AutoConfig.for_model(family, **options))
    names = {"name": name, "reference": name, "kind": "factory", "task": None}
    model = build_huggingface(module, **names, files={}, assets={}, licence=None, note=None)
    artifact = lower(model, TARGET, LoweringSettings("fp32", "fixed"), tmp_path)
    body = parse_function(load_package(artifact.path), None).body
    found = {operation.type for operation in body.walk() if not is_constant(operation)}
    assert brings <= found <= {*OPERATORS, *CONTROL}
    inputs = {key: value.numpy() for key, value in model.example.items()}
    expected, got = TorchSession(model).run(inputs), open_session(artifact).run(inputs)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert np.linalg.norm(got[key] - value) < 3e-6 * np.linalg.norm(value), key

#!/usr/bin/env python
"""ExecuTorch's own export of a Llama-like model, for `scripts/bench/llm.py`: its example's Transformer, not ours.

    python scripts/bench/peer_executorch.py build/peers/executorch-llama [--model zoo:smollm2] [--context 2048]

As the example's documentation has it for XNNPACK: custom_sdpa and a cache in place, 8-bit activations and 4-bit
weights in groups of 32 (8da4w), the embedding in 8 bits. Writes model.pte and facts.json, in 13 minutes of one core.

Source: executorch 1.4.1, examples/models/llama.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from edgeport.export.executorch.faster import code_made_when_run, delegates_built_once
from edgeport.model.load import load_model

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
"""Modules of transformers' Llama, and what the example calls them."""


def renamed(name: str) -> str:
    for theirs, example in NAMES.items():
        name = name.replace(theirs, example)
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="zoo:smollm2")
    parser.add_argument("--context", type=int, default=2048)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    module = load_model(arguments.model).module
    config = module.config
    with tempfile.TemporaryDirectory() as scratch:
        weights, settings = Path(scratch) / "model.pth", Path(scratch) / "params.json"
        torch.save({renamed(name): tensor.clone() for name, tensor in module.state_dict().items()}, weights)
        del module
        params = {
            "dim": config.hidden_size,
            "hidden_dim": config.intermediate_size,
            "n_heads": config.num_attention_heads,
            "n_kv_heads": config.num_key_value_heads,
            "n_layers": config.num_hidden_layers,
            "norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_parameters["rope_theta"],
            "vocab_size": config.vocab_size,
            "use_scaled_rope": False,
            "use_hf_rope": True,
        }
        settings.write_text(json.dumps(params))
        export(weights, settings, arguments.out, arguments.context)
    # Its longest call is one shorter than its context.
    facts = {"context": arguments.context, "most_tokens": arguments.context - 1, "vocabulary": config.vocab_size}
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    facts["cache_bytes"] = values * arguments.context * 4
    (arguments.out / "facts.json").write_text(json.dumps(facts))


def export(weights: Path, settings: Path, out: Path, context: int) -> None:
    from executorch.examples.models.llama.export_llama_lib import export_llama
    from executorch.extension.llm.export import builder
    from executorch.extension.llm.export.config.llm_config import LlmConfig, ModelType

    lower = builder.to_edge_transform_and_lower

    def quicker(*given: Any, **named: Any) -> Any:
        with code_made_when_run(), delegates_built_once():
            return lower(*given, **named)

    wanted = LlmConfig()
    wanted.base.model_class = ModelType.smollm2
    wanted.base.checkpoint, wanted.base.params = str(weights), str(settings)
    wanted.model.use_kv_cache = wanted.model.use_sdpa_with_kv_cache = wanted.model.enable_dynamic_shape = True
    wanted.export.max_seq_length = wanted.export.max_context_length = context
    wanted.export.output_name = str(out / "model.pte")
    wanted.quantization.qmode, wanted.quantization.group_size = "8da4w", 32
    wanted.quantization.embedding_quantize = "8,0"
    wanted.backend.xnnpack.enabled = wanted.backend.xnnpack.extended_ops = True
    sys.setrecursionlimit(4096)
    builder.to_edge_transform_and_lower = quicker  # the same file in half the time
    export_llama(wanted)


if __name__ == "__main__":
    main()

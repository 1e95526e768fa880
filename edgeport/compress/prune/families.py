"""Where the families of transformers keep the parts that structured pruning removes.

Names only: every shape is checked against the module that the pruned config makes, so a family whose layers
are not what this table says is refused instead of cut wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from edgeport.errors import BadInputError


@dataclass(frozen=True)
class Family:
    """Names within one block, and of the config's fields.

    Attributes:
        blocks: how the name of the list of blocks ends.
        query, key, value: layers; one name for all three where their rows follow each other in one weight.
        output: the layer behind attention.
        up: the layers that make the MLP's inner channels; rows of gate and up follow each other in one weight where
            `gated` and there is one name.
        down: the layer that takes them back.
        ffn_field: of the inner channels.
        kv_field: of the heads of keys and values; None where every head has its own.
        free_heads: the config can say a head's size, so that heads and hidden channels are pruned apart.
        scaled_embedding: the embedding is multiplied by the root of the hidden size (Gemma).
    """

    blocks: str
    query: str
    key: str
    value: str
    output: str
    up: tuple[str, ...]
    down: str
    ffn_field: str = "intermediate_size"
    kv_field: str | None = None
    free_heads: bool = False
    gated: bool = False
    scaled_embedding: bool = False


_LLAMA = Family(
    "layers",
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    kv_field="num_key_value_heads",
    free_heads=True,
    gated=True,
)
_GEMMA = Family(**{**vars(_LLAMA), "scaled_embedding": True})
_BERT = Family(
    "encoder.layer",
    *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    up=("intermediate.dense",),
    down="output.dense",
)

FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _GEMMA),
    "phi": Family(
        "layers",
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"),
        up=("mlp.fc1",),
        down="mlp.fc2",
        kv_field="num_key_value_heads",
        free_heads=True,
    ),
    "phi3": Family(
        "layers",
        *("self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.o_proj"),
        up=("mlp.gate_up_proj",),
        down="mlp.down_proj",
        kv_field="num_key_value_heads",
        free_heads=True,
        gated=True,
    ),
    "gpt2": Family(
        "h",
        *("attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj"),
        up=("mlp.c_fc",),
        down="mlp.c_proj",
        ffn_field="n_inner",
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
    "distilbert": Family(
        "transformer.layer",
        *("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        up=("ffn.lin1",),
        down="ffn.lin2",
        ffn_field="hidden_dim",
    ),
    "vit": Family(
        "layers",
        *("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"),
        up=("mlp.fc1",),
        down="mlp.fc2",
    ),
}
"""By `model_type` of the config."""


@dataclass(frozen=True)
class Sizes:
    """What of a module can be pruned.

    Attributes:
        prefix: name of the list of blocks.
        kv_heads: heads of keys and values.
    """

    prefix: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    def block(self, index: int) -> str:
        """The name of a block."""
        return f"{self.prefix}.{index}"


def family_of(module: torch.nn.Module) -> Family:
    """The family of a transformers module.

    Raises:
        BadInputError: it belongs to none that can be pruned.
    """
    config: Any = getattr(module, "config", None)
    found = FAMILIES.get(str(getattr(config, "model_type", "")))
    if found is None:
        raise BadInputError(
            f"edgeport does not know where {type(module).__name__} keeps its layers, and can't prune them.",
            where="prune_depth, prune_width",
            allowed=f"models of the types {', '.join(sorted(FAMILIES))}",
            next_step="Leave the step out, or take lowrank, which needs Linear layers only.",
        )
    return found


def sizes_of(module: torch.nn.Module) -> Sizes:
    """The sizes of a module, read off its weights.

    Raises:
        BadInputError: the module is of no family, or not built as its family is.
    """
    family, config = family_of(module), _config(module)
    count = int(config.num_hidden_layers)
    prefix = next(
        (
            name
            for name, child in module.named_modules()
            if isinstance(child, torch.nn.ModuleList)
            and f".{name}".endswith(f".{family.blocks}")
            and len(child) == count
        ),
        None,
    )
    if prefix is None:
        raise BadInputError(
            f"{type(module).__name__} has no list of {count} blocks called {family.blocks}.",
            where="prune_depth, prune_width",
            allowed="models as transformers builds them",
        )
    down, output = (
        module.get_submodule(f"{prefix}.0.{name}").get_parameter("weight") for name in (family.down, family.output)
    )
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, family.kv_field) or heads) if family.kv_field else heads
    return Sizes(
        prefix=prefix,
        layers=count,
        hidden=int(down.shape[0]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=int(output.shape[1]) // heads,
        ffn=int(down.shape[1]),
    )


def _config(module: torch.nn.Module) -> Any:
    return module.config

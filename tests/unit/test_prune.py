"""Structured pruning: the smaller model is the original with the removed parts masked, for every family."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from edgeport.compress.chain import call
from edgeport.compress.prune.cut import cut_depth, cut_width, skeleton
from edgeport.compress.prune.depth import block_influence, choose_layers
from edgeport.compress.prune.families import family_of, sizes_of
from edgeport.compress.prune.width import choose_parts, first_parts, width_scores
from edgeport.errors import BadInputError
from edgeport.model.build import build_huggingface
from edgeport.model.types import Model
from edgeport.restructuring import PruneDepth, PruneWidth

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": 60, "max_position_embeddings": 32, "initializer_range": 0.2}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SMALL, **TEXT, **IDS, "num_key_value_heads": 2, "rms_norm_eps": 1e-12}


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**GROUPED))


def _qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**GROUPED, tie_word_embeddings=True))


def _qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=16))


def _gemma() -> Any:
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**{**GROUPED, "num_key_value_heads": 1}, head_dim=16))


def _gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=16, sliding_window=8))


def _gemma3() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"] * 2
    return Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, head_dim=16, sliding_window=8, layer_types=kinds))


def _phi() -> Any:
    from transformers import PhiConfig, PhiForCausalLM

    return PhiForCausalLM(PhiConfig(**SMALL, **TEXT, **IDS))


def _phi3() -> Any:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**GROUPED))


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    names = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32, "vocab_size": 60, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**names, **IDS))


def _bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SMALL, **TEXT, num_labels=5))


def _distilbert() -> Any:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    sizes = {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48}
    return DistilBertForSequenceClassification(DistilBertConfig(**sizes, **TEXT, num_labels=5))


def _vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"image_size": 32, "patch_size": 8, "num_labels": 5, "initializer_range": 0.2}
    return ViTForImageClassification(ViTConfig(**SMALL, **sizes))


MAKERS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi": _phi,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "bert": _bert,
    "distilbert": _distilbert,
    "vit": _vit,
}


def build(module: Any) -> Model:
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "norm" in name.lower() or name.endswith("bias"):
                value.add_(torch.rand_like(value))  # trained models have norms and biases of unlike size
    return build_huggingface(
        module,
        name="tiny",
        reference="tiny",
        kind="huggingface",
        task=None,
        files={},
        assets={},
        licence=None,
        note=None,
    )


@pytest.fixture(scope="module")
def tiny() -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(family: str) -> Model:
        if family not in made:
            torch.manual_seed(0)
            made[family] = build(MAKERS[family]())
        return made[family]

    return get


def samples(model: Model, count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    if model.modality == "image":
        return [{"pixel_values": torch.randn(1, 3, 32, 32, generator=generator)} for _ in range(count)]
    found = []
    for length in range(12, 12 + count):
        sample = {"input_ids": torch.randint(3, 60, (1, length), generator=generator)}
        for spec in model.inputs[1:]:
            sample[spec.name] = torch.ones(1, length, dtype=torch.int64) * (spec.name == "attention_mask")
        found.append(sample)
    return found


def logits(module: torch.nn.Module, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return call(module, sample).logits


def close(left: torch.Tensor, right: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert float((left - right).norm()) <= tolerance * float(right.norm()), float((left - right).norm() / right.norm())


@pytest.mark.parametrize("family", MAKERS)
def test_a_model_without_layers_is_the_original_whose_layers_pass_on(family: str, tiny: Callable[[str], Model]) -> None:
    model = tiny(family)
    pruned = cut_depth(model, (0, 3))
    assert pruned.module.config.num_hidden_layers == 2
    masked = copy.deepcopy(model.module)
    for index in (1, 2):
        block = masked.get_submodule(sizes_of(model.module).block(index))
        block.register_forward_hook(lambda _m, args, kw, out: _like(out, args[0]), with_kwargs=True)
    for sample in samples(model):
        close(logits(pruned.module, sample), logits(masked, sample), 1e-6)


def _like(output: Any, state: torch.Tensor) -> Any:
    return (state, *output[1:]) if isinstance(output, tuple) else state


def _masked(model: Model, kept: dict[str, tuple[int, ...]]) -> torch.nn.Module:
    """The original whose removed channels and heads are set to zero where they are read."""
    module, family, sizes = copy.deepcopy(model.module), family_of(model.module), sizes_of(model.module)

    def masking(mask: torch.Tensor) -> Any:
        return lambda _layer, arguments: (arguments[0] * mask, *arguments[1:])

    for layer in range(sizes.layers):
        block = sizes.block(layer)
        if f"ffn.{layer}" in kept:
            mask = torch.zeros(sizes.ffn)
            mask[list(kept[f"ffn.{layer}"])] = 1
            module.get_submodule(f"{block}.{family.down}").register_forward_pre_hook(masking(mask))
        if f"heads.{layer}" in kept:
            heads = torch.zeros(sizes.heads)
            heads[list(kept[f"heads.{layer}"])] = 1
            mask = heads.repeat_interleave(sizes.head_dim)
            module.get_submodule(f"{block}.{family.output}").register_forward_pre_hook(masking(mask))
    return module


@pytest.mark.parametrize("family", MAKERS)
def test_a_narrower_model_is_the_original_with_the_rest_masked(family: str, tiny: Callable[[str], Model]) -> None:
    model = tiny(family)
    free = family_of(model.module).free_heads
    step = PruneWidth(method="prune_width", ffn=0.5, heads=0.5 if free else 1.0)
    kept, lost = choose_parts(model, step, samples(model))
    pruned = cut_width(model, kept)
    config = pruned.module.config
    assert getattr(config, family_of(model.module).ffn_field) == sizes_of(model.module).ffn // 2
    assert config.num_attention_heads == (2 if free else 4)
    assert set(lost) == {name for name in kept if not name.startswith("kv_")}
    assert all(0 < value <= 0.5 for value in lost.values())
    masked = _masked(model, kept)
    for sample in samples(model):
        close(logits(pruned.module, sample), logits(masked, sample))
    # What config.json says of it builds the same shapes again.
    said = type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
    built = skeleton(model, said).state_dict()
    assert {name: value.shape for name, value in built.items()} == {
        name: value.shape for name, value in pruned.module.state_dict().items()
    }


def _masked_hidden(model: Model, hidden: tuple[int, ...], kept: dict[str, tuple[int, ...]]) -> torch.nn.Module:
    """The original whose hidden state is zero in the removed channels, wherever something is written into it."""
    module = _masked(model, kept)
    before = sizes_of(model.module).hidden
    mask = torch.zeros(before)
    mask[list(hidden)] = 1

    def layer_norm(layer: Any, arguments: Any, _output: Any) -> torch.Tensor:
        # Mean and variance are those of the channels that are there.
        index = torch.tensor(hidden)
        inside = torch.nn.functional.layer_norm(
            arguments[0][..., index], (len(hidden),), layer.weight[index], layer.bias[index], layer.eps
        )
        return torch.zeros_like(arguments[0]).index_copy(-1, index, inside)

    for child in module.modules():
        shape = tuple(getattr(child, "weight", torch.zeros(())).shape)
        if isinstance(child, torch.nn.LayerNorm):
            child.register_forward_hook(layer_norm)
        elif shape and (shape == (before,) or shape[0] == before or isinstance(child, torch.nn.Embedding)):
            if isinstance(child, torch.nn.Conv2d):
                child.register_forward_hook(lambda _l, _i, output: output * mask[:, None, None])
            elif isinstance(child, torch.nn.Linear) and _inner(child, model, module):
                continue
            else:
                child.register_forward_hook(lambda _l, _i, output: output * mask)
        if type(child).__name__ in ("ViTEmbeddings",):
            child.register_forward_hook(lambda _l, _i, output: output * mask)
    return module


def _inner(child: torch.nn.Module, model: Model, module: torch.nn.Module) -> bool:
    """A projection to queries, keys or values, whose outputs are no hidden channels."""
    family, sizes = family_of(model.module), sizes_of(model.module)
    names = {
        f"{sizes.block(layer)}.{name}"
        for layer in range(sizes.layers)
        for name in (family.query, family.key, family.value, *family.up)
    }
    return any(module.get_submodule(name) is child for name in names)


@pytest.mark.parametrize("family", MAKERS)
def test_a_model_of_fewer_hidden_channels_is_the_original_with_the_rest_masked(
    family: str, tiny: Callable[[str], Model]
) -> None:
    model = tiny(family)
    free = family_of(model.module).free_heads
    step = PruneWidth(method="prune_width", hidden=0.5, heads=1.0 if free else 0.5, multiple=1)
    kept, _ = choose_parts(model, step, samples(model))
    pruned = cut_width(model, kept)
    assert pruned.module.config.hidden_size == 16
    masked = _masked_hidden(model, kept["hidden"], kept)
    for sample in samples(model):
        close(logits(pruned.module, sample), logits(masked, sample), 1e-4)
    names = {id(p) for p in pruned.module.parameters()}
    assert len(names) == len({id(p) for p in model.module.parameters()})  # tied weights stay tied


def test_influence_is_what_the_paper_says(tiny: Callable[[str], Model]) -> None:
    model = tiny("llama")
    found = block_influence(model.module, samples(model))
    cosines: list[list[float]] = [[] for _ in range(4)]
    with torch.no_grad():
        for sample in samples(model):
            states = model.module.model(**sample, output_hidden_states=True, use_cache=False).hidden_states
            last: list[torch.Tensor] = []
            handle = model.module.model.norm.register_forward_pre_hook(lambda _l, args, last=last: last.append(args[0]))
            model.module(**sample, use_cache=False)
            handle.remove()
            # The last state of the list is behind the final norm.
            for layer, (before, after) in enumerate(zip(states, [*states[1:-1], last[0]], strict=False)):
                for token in range(before.shape[1]):
                    left, right = before[0, token].double(), after[0, token].double()
                    cosines[layer].append(float(left @ right / left.norm() / right.norm()))
    assert found == pytest.approx([1 - sum(values) / len(values) for values in cosines], rel=1e-6)


def test_the_iterative_variant_measures_again_after_each_removal() -> None:
    torch.manual_seed(0)
    module = _llama()
    with torch.no_grad():
        for index, scale in ((0, 1.0), (1, 0.02), (2, 0.1), (3, 1.0)):
            layer = module.model.layers[index]
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    model = build(module)
    once, influence = choose_layers(model, 2, samples(model), iterative=False)
    again, measured = choose_layers(model, 2, samples(model), iterative=True)
    assert once == again == (0, 3)
    assert min(influence) == influence[1] == measured[1]
    # Layer 2 was measured again without layer 1 in front of it.
    assert measured[2] == pytest.approx(block_influence(cut_depth(model, (0, 2, 3)).module, samples(model))[1])
    assert measured[2] != influence[2]


def test_scores_are_minitrons(tiny: Callable[[str], Model]) -> None:
    model = tiny("bert")
    scores = width_scores(model.module, samples(model))
    layer = model.module.bert.encoder.layer[1]
    seen: list[torch.Tensor] = []
    handle = layer.intermediate.register_forward_hook(lambda _l, _i, output: seen.append(output[0]))
    for sample in samples(model):
        logits(model.module, sample)
    handle.remove()
    for channel in range(0, 48, 7):
        per_sample = [float(value[:, channel].abs().mean()) for value in seen]
        assert float(scores["ffn.1"][channel]) == pytest.approx(sum(v * v for v in per_sample) ** 0.5, rel=1e-5)


def test_groups_of_heads_stay_together(tiny: Callable[[str], Model]) -> None:
    kept, _ = choose_parts(tiny("llama"), PruneWidth(method="prune_width", heads=0.5), samples(tiny("llama")))
    assert kept["heads.0"] in ((0, 1), (2, 3))
    assert kept["kv_heads.0"] == (kept["heads.0"][0] // 2,)
    shared, _ = choose_parts(tiny("gemma"), PruneWidth(method="prune_width", heads=0.75), samples(tiny("gemma")))
    assert len(shared["heads.0"]) == 3
    assert shared["kv_heads.0"] == (0,)


@pytest.mark.parametrize(
    ("family", "share", "words"),
    [
        ("llama", {"heads": 0.3}, "no whole number of groups"),
        ("bert", {"heads": 0.5}, "equal shares of both"),
        ("bert", {"hidden": 0.6}, "equal shares of both"),
        ("llama", {"ffn": 0.95, "multiple": 48}, "remove nothing"),
    ],
)
def test_impossible_shares(family: str, share: dict[str, float], words: str, tiny: Callable[[str], Model]) -> None:
    step = PruneWidth(method="prune_width", **share)
    with pytest.raises(BadInputError) as caught:
        first_parts(tiny(family), step)
    assert words in str(caught.value) + str(caught.value.allowed)


def test_the_hidden_size_of_an_encoder_without_a_head_stays() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = build(BertModel(BertConfig(**SMALL, **TEXT)))
    step = PruneWidth(method="prune_width", hidden=0.5, heads=0.5)
    with pytest.raises(BadInputError, match="last_hidden_state"):
        cut_width(model, first_parts(model, step))


def test_too_many_layers(tiny: Callable[[str], Model]) -> None:
    from edgeport.compress.prune.depth import layers_left

    with pytest.raises(BadInputError, match="4 layers"):
        layers_left(tiny("llama"), PruneDepth(method="prune_depth", layers=4))
    assert layers_left(tiny("llama"), PruneDepth(method="prune_depth", keep=0.6)) == 2
    with pytest.raises(BadInputError, match="4 can't stay"):
        layers_left(tiny("llama"), PruneDepth(method="prune_depth", keep=0.99))

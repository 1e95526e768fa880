"""Texts that a model writes for its own calibration, against a forward of the whole text for every token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig

from edgeport.compress.calibrate import calibration_samples
from edgeport.data.generated import BATCH, GREEDY, check_generates, generated_samples
from edgeport.errors import BadInputError
from edgeport.model.build import build_huggingface
from edgeport.model.types import Model
from edgeport.recipe import Recipe
from edgeport.schema import parse_mapping

SIZES = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(
    **SIZES, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=12, initializer_range=0.3
)
GPT2 = GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=12, initializer_range=0.3)


def built(module: torch.nn.Module, task: str) -> Model:
    return build_huggingface(
        module.eval(),
        name="tiny",
        reference="tiny",
        kind="factory",
        task=task,
        files={},
        assets={},
        licence=None,
        note=None,
    )


def writer(config: LlamaConfig | GPT2Config = LLAMA) -> Model:
    torch.manual_seed(0)
    return built(AutoModelForCausalLM.from_config(config), "text-generation")


def slowly(module: torch.nn.Module, count: int, length: int, seed: int) -> torch.Tensor:
    """The same texts without a cache: the paper's rule, a whole forward a token."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for start in range(0, count, BATCH):
        size = min(BATCH, count - start)
        ids = torch.randint(0, 48, (size, 1), generator=generator)
        for place in range(1, length):
            with torch.no_grad():
                chances = module(input_ids=ids).logits[:, -1].softmax(-1)
            drawn = torch.multinomial(chances, 1, generator=generator)
            for row in range(size):
                if place <= GREEDY[row % 3]:
                    drawn[row, 0] = chances[row].argmax()
            ids = torch.cat([ids, drawn], 1)
        texts.append(ids)
    return torch.cat(texts)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_texts_are_those_of_the_papers_rule(config: LlamaConfig | GPT2Config):
    model = writer(config)
    found = generated_samples(model, count=20, seed=3)
    assert len(found.inputs) == 20
    texts = np.concatenate([sample["input_ids"] for sample in found.inputs])
    assert np.array_equal(texts, slowly(model.module, 20, 12, seed=3).numpy())
    for sample in found.inputs:
        assert set(sample) == {spec.name for spec in model.inputs}
        assert all(value.shape == (1, 12) and value.dtype == np.int64 for value in sample.values())
        assert bool(sample["attention_mask"].all())


def test_texts_are_drawn_as_the_model_says():
    # 16 texts with one beginning each: the share of each token behind the greedy ones is its mean probability.
    model = writer()
    texts = torch.from_numpy(
        np.concatenate(
            [s["input_ids"] for seed in range(40) for s in generated_samples(model, count=16, seed=seed).inputs]
        )
    )
    with torch.no_grad():
        expected = model.module(input_ids=texts).logits[:, GREEDY[-1] : -1].softmax(-1)
    behind = texts[:, GREEDY[-1] + 1 :]
    seen = torch.bincount(behind.flatten(), minlength=48) / behind.numel()
    mean = expected.mean((0, 1))
    spread = (expected * (1 - expected)).sum((0, 1)).sqrt() / behind.numel()
    assert float(((seen - mean).abs() / spread.clamp_min(1e-4)).max()) < 4.5
    # Greedy throughout would be far from it.
    likeliest = torch.bincount(expected.argmax(-1).flatten(), minlength=48) / behind.numel()
    assert float(((likeliest - mean).abs() / spread.clamp_min(1e-4)).max()) > 9


def test_the_seed_decides():
    model = writer()
    one, two, other = (generated_samples(model, count=4, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(one.inputs, two.inputs, strict=True))
    assert any(
        not np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(one.inputs, other.inputs, strict=True)
    )
    assert (one.record.name, one.record.real, one.record.samples) == ("generated", False, 4)
    assert "seed 0" in one.record.slice


def asked(samples: int) -> Recipe:
    step = {"method": "gptq", "linear": "int4"}
    calibration = {"samples": samples, "source": "generated"}
    values = {"name": "x", "summary": "x", "compress": [step], "calibration": calibration, "gate": {}}
    return parse_mapping(Recipe, values, "test")


def test_a_recipe_asks_for_them():
    model = writer()
    found = calibration_samples(model, asked(24))
    assert len(found.inputs) == 24
    assert np.array_equal(found.inputs[7]["input_ids"], generated_samples(model, count=24).inputs[7]["input_ids"])
    with pytest.raises(BadInputError, match="too short"):
        calibration_samples(model, asked(3))


def test_a_model_that_writes_nothing_is_refused():
    torch.manual_seed(0)
    encoder = built(AutoModel.from_config(BertConfig(**SIZES, intermediate_size=48)), "feature-extraction")
    with pytest.raises(BadInputError, match="does not write texts") as error:
        check_generates(encoder)
    assert error.value.where == "[calibration] source"
    with pytest.raises(BadInputError, match="does not write texts"):
        calibration_samples(encoder, asked(64))


def test_logits_that_are_not_finite_are_one_error():
    model = writer()
    with torch.no_grad():
        model.module.model.layers[0].mlp.up_proj.weight.fill_(float("inf"))
    with pytest.raises(BadInputError, match="not finite"):
        generated_samples(model, count=2)

"""The products with weights that a shipped file makes, against sums of its layers' shapes by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgeport.compress import apply_recipe
from edgeport.compress.lowrank.svd import outline_factors
from edgeport.compress.prune.cut import cut_depth
from edgeport.export.artifact import LoweringSettings
from edgeport.export.dispatch import lower
from edgeport.model.decoder import for_generation
from edgeport.model.load import load_model
from edgeport.model.types import Model, Source, TensorSpec
from edgeport.recipe import load_recipe
from edgeport.target import load_target
from edgeport.validate.products import count_products

ORT, EXECUTORCH, COREML = "linux-x86_64-ort", "android-arm64-executorch", "ios18-coreml"
TARGETS = [
    ORT,
    pytest.param(EXECUTORCH, marks=pytest.mark.skipif("not __import__('importlib').util.find_spec('executorch')")),
    pytest.param(COREML, marks=pytest.mark.skipif("not __import__('importlib').util.find_spec('coremltools')")),
]


class Net(nn.Module):
    """Every kind of product: a convolution, a depthwise one, one of 1 x 1, a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 13, 1)
        self.head = nn.Linear(13, 5)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.pointwise(torch.relu(self.depthwise(torch.relu(self.stem(pixel_values)))))
        logits: torch.Tensor = self.head(hidden.mean((2, 3)))
        return logits


def net() -> Model:
    torch.manual_seed(0)
    return Model(
        name="net",
        module=Net().eval(),
        source=Source("factory", "tiny", {}),
        task="other",
        modality="other",
        inputs=(TensorSpec("pixel_values", "float32", (1, 3, 16, 16)),),
        outputs=(TensorSpec("logits", "float32", (1, 5)),),
        example={"pixel_values": torch.randn(1, 3, 16, 16)},
        huggingface=False,
    )


def settings(target: str) -> LoweringSettings:
    return LoweringSettings("fp16" if target == COREML else "fp32", "dynamic" if target != COREML else "fixed")


@pytest.mark.parametrize("target", TARGETS)
def test_a_conv_net_by_hand(target: str, tmp_path: Path) -> None:
    artifact = lower(net(), load_target(target), settings(target), tmp_path)
    found = count_products(artifact, net(), {"pixel_values": np.ones((1, 3, 16, 16), np.float32)})
    assert found is not None
    assert found.file == found.model == 2 * (8 * 64 * 27 + 8 * 64 * 9 + 13 * 64 * 8 + 13 * 5)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", ["fp32", "int8"])
def test_a_shorter_encoder_in_every_runtime(
    form: str, target: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = cut_depth(load_model(str(tiny_model("bert"))), [1])
    recipe = load_recipe(form)
    compressed = apply_recipe(model, recipe, load_target(target))[0]
    artifact = lower(compressed, load_target(target), settings(target), tmp_path)
    sample = {name: value.numpy() for name, value in model.example.items()}
    found = count_products(artifact, compressed, sample)
    assert found is not None
    texts, tokens = found.input_shapes["input_ids"]
    # One layer: four 64 x 64 and two 64 x 128 for each token; pooler and head for the first one alone.
    assert found.model == 2 * texts * (tokens * (4 * 64 * 64 + 2 * 64 * 128) + 64 * 64 + 64 * 5)
    # ONNX Runtime's integer products take two columns more, which subtract the zero points of the activations.
    more = 2 * (tokens * (4 * 64 + 128 + 64) + 64 + 5) if (form, target) == ("int8", ORT) else 0
    assert found.file == found.model + 2 * texts * more


@pytest.mark.parametrize("target", TARGETS)
def test_a_decoder_with_factored_layers_is_counted_at_a_token(
    target: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = outline_factors(load_model(str(tiny_model("llama"))), {"model.layers.0.mlp.up_proj": 8})
    model = for_generation(plain, 32)
    artifact = lower(model, load_target(target), replace(settings(target), shapes="dynamic"), tmp_path)
    found = count_products(artifact, model, {"input_ids": np.ones((1, 9), np.int64)})
    assert found is not None
    tokens = found.input_shapes["input_ids"][1]
    assert tokens == (1 if target != EXECUTORCH else artifact.inputs[0].shape[1].maximum)  # type: ignore[union-attr]
    attention, mlp = 2 * 64 * 64 + 2 * 64 * 32, 64 * 128
    layers = 2 * attention + 5 * mlp + 8 * (64 + 128)
    assert found.model == 2 * (tokens * layers + 64 * 320)
    # On ExecuTorch means (5 norms) and halves of a rotation (6 heads a layer) are products with constants.
    more = tokens * (5 * 64 + 2 * 6 * 16 * 16) if target == EXECUTORCH else 0
    assert found.file == found.model + 2 * more

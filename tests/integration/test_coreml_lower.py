"""Lowering tiny random models to .mlpackage: weights bit for bit, numbers against torch through the evaluator.

The evaluator reads the saved package; the reference is the torch module that holds the dequantised weights.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgeport.compress import apply_recipe
from edgeport.errors import BadInputError, TargetRefusesError
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.export.coreml.lower import lower
from edgeport.export.coreml.weights import read_weights
from edgeport.mlpackage.package import load_package
from edgeport.model.fold import remove_parametrizations
from edgeport.model.inputs import named_outputs
from edgeport.model.types import Axis, ImagePreprocessing, Model, Source, TensorSpec
from edgeport.recipe import load_recipe
from edgeport.runtime.coreml.session import CoreMLReferenceSession
from edgeport.storage import hash_tree
from edgeport.target import load_target

BATCH = Axis("batch", 1, 4, 1)
SEQUENCE = Axis("sequence", 1, 64, 16)
DECODER = Axis("decoder_sequence", 1, 32, 8)
HALF = 2e-3
"""Relative L2 difference that float16 arithmetic makes in two layers; float32's is below 1e-5."""


def a_model(
    name: str, module: nn.Module, inputs: dict[str, tuple], outputs: dict[str, tuple], *, huggingface: bool, **fields
) -> Model:
    generator = torch.Generator().manual_seed(5)
    specs, example = [], {}
    for key, (dtype, shape) in inputs.items():
        spec = TensorSpec(key, dtype, shape)
        size = spec.fixed_shape()
        if key == "attention_mask":
            value = torch.ones(size, dtype=torch.int64)
            value[..., -3:] = 0
        elif dtype == "int64":
            value = torch.randint(0, 2 if key == "token_type_ids" else 96, size, generator=generator)
        else:
            value = torch.randn(size, generator=generator)
        specs.append(spec)
        example[key] = value
    return Model(
        name=name,
        module=module.eval(),
        source=Source("factory", name, {}),
        task="feature-extraction",
        modality=fields.pop("modality", "text"),
        inputs=tuple(specs),
        outputs=tuple(TensorSpec(key, "float32", shape) for key, shape in outputs.items()),
        example=example,
        huggingface=huggingface,
        **fields,
    )


def bert() -> Model:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    ids = ("int64", (BATCH, SEQUENCE))
    inputs = {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids}
    outputs = {"last_hidden_state": (BATCH, SEQUENCE, 32), "pooler_output": (BATCH, 32)}
    return a_model("bert", BertModel(config), inputs, outputs, huggingface=True)


def llama(embedding_scale: float = 1.0) -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    module = LlamaForCausalLM(config)
    with torch.no_grad():
        module.model.embed_tokens.weight.mul_(embedding_scale)
    ids = ("int64", (BATCH, SEQUENCE))
    inputs = {"input_ids": ids, "attention_mask": ids}
    return a_model("llama", module, inputs, {"logits": (BATCH, SEQUENCE, 96)}, huggingface=True)


def vit() -> Model:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=5,
        initializer_range=0.2,
    )
    inputs = {"pixel_values": ("float32", (BATCH, 3, 32, 32))}
    module = ViTForImageClassification(config)
    return a_model("vit", module, inputs, {"logits": (BATCH, 5)}, huggingface=True, modality="image")


def t5() -> Model:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    inputs = {
        "input_ids": ("int64", (BATCH, SEQUENCE)),
        "attention_mask": ("int64", (BATCH, SEQUENCE)),
        "decoder_input_ids": ("int64", (BATCH, DECODER)),
    }
    module = T5ForConditionalGeneration(config)
    return a_model("t5", module, inputs, {"logits": (BATCH, DECODER, 96)}, huggingface=True)


def whisper() -> Model:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=96,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        init_std=0.1,
    )
    inputs = {"input_features": ("float32", (BATCH, 16, 64)), "decoder_input_ids": ("int64", (BATCH, DECODER))}
    module = WhisperForConditionalGeneration(config)
    outputs = {"logits": (BATCH, DECODER, 96)}
    return a_model("whisper", module, inputs, outputs, huggingface=True, modality="audio")


class ConvNet(nn.Module):
    """Plain, depthwise, grouped and pointwise convolutions; batch norms left unfolded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False)
        self.grouped, self.pointwise = nn.Conv2d(16, 32, 3, groups=2), nn.Conv2d(32, 24, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, image):
        x = F.relu6(self.norm(self.stem(image)))
        x = F.silu(self.pointwise(self.grouped(self.depthwise(x))))
        return self.head(x.mean((2, 3)))


def convnet() -> Model:
    torch.manual_seed(0)
    module = ConvNet()
    for _ in range(3):
        module(torch.randn(8, 3, 32, 32))
    return a_model(
        "convnet",
        module,
        {"image": ("float32", (BATCH, 3, 32, 32))},
        {"logits": (BATCH, 5)},
        huggingface=False,
        modality="image",
        image=ImagePreprocessing((32, 32), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1 / 255),
        labels=("crane", "dog", "crane", "ant", "bee"),
    )


def compressed(model: Model, target: str, recipe: str) -> Model:
    return apply_recipe(model, load_recipe(recipe), load_target(target))[0]


def converted(model: Model, target: str, settings: LoweringSettings, out: Path) -> Artifact:
    out.mkdir(exist_ok=True)
    return lower(model, load_target(target), settings, out)


def reference(model: Model, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        result = named_outputs(model.module(**inputs), default=model.outputs[0].name)
    return {spec.name: result[spec.name].numpy() for spec in model.outputs}


def arrays(inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in inputs.items()}


def relative_l2(measured: np.ndarray, expected: np.ndarray) -> float:
    assert measured.shape == expected.shape
    return float(np.linalg.norm(measured - expected) / np.linalg.norm(expected))


def check_outputs(model: Model, artifact: Artifact, inputs: dict[str, torch.Tensor], allowed: float) -> None:
    measured = CoreMLReferenceSession(artifact).run(arrays(inputs))
    for name, expected in reference(model, inputs).items():
        # What padding positions hold is nobody's business, and fused attention may differ there.
        keep = np.ones(expected.shape[:2], bool)
        if name == "last_hidden_state":
            keep = inputs["attention_mask"].numpy() != 0
        error = relative_l2(measured[name][keep], expected[keep])
        assert error < allowed, f"{name}: {error:.2e}"


def check_weights(model: Model, artifact: Artifact) -> None:
    stored = read_weights(artifact)
    assert sorted(stored) == sorted(model.quantized)
    for name, logical in model.quantized.items():
        assert torch.equal(stored[name].codes, logical.codes), name
        assert torch.equal(stored[name].scale, logical.scale), name
        assert (stored[name].bits, stored[name].group_size) == (logical.bits, logical.group_size), name


def check_size(model: Model, artifact: Artifact, precision: str) -> None:
    """weight.bin holds the packed codes and scales and the other parameters, and nothing else to speak of."""
    width, scale_width = (2, 2) if precision == "fp16" else (4, 4)
    packed = sum(q.codes.numel() * q.bits / 8 + q.scale.numel() * scale_width for q in model.quantized.values())
    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    others = [p for p in model.module.parameters() if names[id(p)] not in model.quantized]
    floats = sum(p.numel() * width for p in others)
    # Each blob has a record of 64 bytes and starts at a multiple of 64.
    most = packed + floats + 128 * (2 * len(model.quantized) + len(others)) + 4096
    assert packed < artifact.facts["weight_file_bytes"] < most


INT8_OPERATOR = {"ios17-coreml": "constexpr_affine_dequantize", "ios18-coreml": "constexpr_blockwise_shift_scale"}

CASES: list[tuple[Callable[[], Model], str, str, str]] = [
    (bert, "ios17-coreml", "int8", "fp16"),
    (llama, "ios18-coreml", "int4", "fp16"),
    (vit, "ios17-coreml", "int8", "fp32"),
    (t5, "ios18-coreml", "int8", "fp16"),
    (whisper, "ios17-coreml", "int8", "fp16"),
    (convnet, "ios18-coreml", "int8", "fp32"),
]


@pytest.mark.parametrize(("build", "target", "recipe", "precision"), CASES)
def test_compressed_model(build, target, recipe, precision, tmp_path):
    model = compressed(build(), target, recipe)
    artifact = converted(model, target, LoweringSettings(precision, "fixed"), tmp_path)
    check_weights(model, artifact)
    check_size(model, artifact, precision)
    check_outputs(model, artifact, dict(model.example), HALF if precision == "fp16" else 1e-5)
    # One constexpr a weight: a tied one is stored once, positions and other constants stay float.
    assert artifact.facts["operators"][INT8_OPERATOR[target]] == len(model.quantized)
    assert artifact.facts["compute_precision"] == precision
    assert artifact.facts["specification_version"] == {"ios17-coreml": 8, "ios18-coreml": 9}[target]
    assert [(spec.name, spec.shape) for spec in artifact.inputs] == [
        (spec.name, spec.fixed_shape()) for spec in model.inputs
    ]


@pytest.mark.parametrize(("build", "precision"), [(bert, "fp32"), (llama, "fp16")])
def test_shapes_that_vary(build, precision, tmp_path):
    model = build()
    artifact = converted(model, "ios18-coreml", LoweringSettings(precision, "dynamic"), tmp_path)
    assert artifact.inputs[0].shape == (BATCH, SEQUENCE)
    generator = torch.Generator().manual_seed(9)
    for batch, length in ((1, 16), (3, 7), (2, 64)):
        ids = torch.randint(0, 96, (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        inputs = {name: inputs[name] for name in model.example}
        check_outputs(model, artifact, inputs, HALF if precision == "fp16" else 1e-5)
    with pytest.raises(BadInputError):
        CoreMLReferenceSession(artifact).run(arrays({name: v.repeat(9, 1) for name, v in model.example.items()}))


def test_a_speech_encoder_of_any_length(tmp_path):
    """Group norm over sizes that vary, and a mask whose shape is a quotient of the input's."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=(32, 32),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        initializer_range=0.2,
    )
    module = Wav2Vec2ForCTC(config).eval()
    remove_parametrizations(module)
    inputs = {"input_values": ("float32", (BATCH, Axis("samples", 400, 4000, 1600)))}
    frames = {"logits": (BATCH, Axis("frames", 1, 400, 159), 32)}
    model = a_model("speech", module, inputs, frames, huggingface=True, modality="audio")
    artifact = converted(model, "ios18-coreml", LoweringSettings("fp32", "dynamic"), tmp_path)
    assert artifact.facts["operators"]["instance_norm"] == 1
    for batch, samples in ((1, 1600), (2, 3333)):
        wave = torch.randn(batch, samples, generator=torch.Generator().manual_seed(samples))
        check_outputs(model, artifact, {"input_values": wave}, 1e-5)


class Sums(nn.Module):
    """One tensor with a sequence axis: iOS 17 can enumerate its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(96, 32), nn.Linear(32, 7)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids).cumsum(1))


def test_enumerated_shapes(tmp_path):
    torch.manual_seed(0)
    inputs = {"input_ids": ("int64", (BATCH, SEQUENCE))}
    model = a_model("sums", Sums(), inputs, {"logits": (BATCH, SEQUENCE, 7)}, huggingface=False)
    artifact = converted(model, "ios17-coreml", LoweringSettings("fp32", "dynamic", enumerated=(16, 32, 48)), tmp_path)
    array = load_package(artifact.path).spec.description.input[0].type.multiArrayType
    assert [tuple(shape.shape) for shape in array.enumeratedShapes.shapes] == [(1, 16), (1, 32), (1, 48)]
    assert artifact.inputs[0].shape == (1, Axis("sequence", 16, 48, 16))
    for length in (16, 48):
        check_outputs(model, artifact, {"input_ids": torch.randint(0, 96, (1, length))}, 1e-5)
    with pytest.raises(BadInputError):
        CoreMLReferenceSession(artifact).run({"input_ids": np.zeros((1, 17), np.int64)})


def test_enumerated_shapes_of_several_inputs_need_ios18(tmp_path):
    settings = LoweringSettings("fp32", "dynamic", enumerated=(16, 32))
    with pytest.raises(TargetRefusesError, match="one input only; the model has 3"):
        converted(bert(), "ios17-coreml", settings, tmp_path)
    with pytest.raises(TargetRefusesError, match="can't have 128 entries"):
        converted(bert(), "ios18-coreml", replace(settings, enumerated=(16, 128)), tmp_path)


def test_picture_in_and_class_out(tmp_path):
    model = compressed(convnet(), "ios17-coreml", "int8")
    artifact = converted(model, "ios17-coreml", LoweringSettings("fp32", "fixed", image_input=True), tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32), dtype=np.uint8)
    session = CoreMLReferenceSession(artifact)
    measured = session.run({"image": picture})
    pixels = torch.from_numpy(picture).double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1) for v in (model.image.mean, model.image.std))
    logits = reference(model, {"image": ((pixels - mean) / std).float()})["logits"]
    assert relative_l2(measured["logits"], logits) < 1e-5
    probabilities = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(measured["classLabel_probs"].ravel(), probabilities.ravel(), rtol=1e-4)
    # Two classes share a name: their numbers tell them apart.
    labels = ["crane (0)", "dog", "crane (2)", "ant", "bee"]
    assert list(session.labels) == labels
    assert str(measured["classLabel"]) == labels[int(logits.argmax())]
    assert artifact.inputs == (TensorSpec("image", "uint8", (1, 3, 32, 32)),)


def test_class_names_must_fit(tmp_path):
    model = replace(convnet(), labels=("a", "b"))
    with pytest.raises(TargetRefusesError, match="2 class names for 5 classes"):
        converted(model, "ios17-coreml", LoweringSettings("fp32", "fixed", image_input=True), tmp_path)


def test_float16_survives_a_large_residual_stream(tmp_path):
    # Squares of these activations are beyond 65504: a norm that squares them in float16 gives infinity.
    model = llama(embedding_scale=5000.0)
    artifact = converted(model, "ios18-coreml", LoweringSettings("fp16", "fixed"), tmp_path)
    assert artifact.facts["safe_norms"] == 5
    expected = reference(model, dict(model.example))["logits"]
    assert np.abs(expected).max() < 60000
    measured = CoreMLReferenceSession(artifact).run(arrays(dict(model.example)))["logits"]
    assert relative_l2(measured, expected) < HALF


class Guarded(nn.Module):
    """What float16 breaks: a finite mask that becomes -inf in a wholly masked row, a guard that becomes 0."""

    def forward(self, scores, keep):
        masked = scores + (1.0 - keep) * torch.finfo(torch.float32).min
        return torch.softmax(masked, -1), F.normalize(scores * keep, dim=-1)


def test_float16_masks_and_guards(tmp_path):
    inputs = {"scores": ("float32", (4, 6)), "keep": ("float32", (4, 6))}
    model = a_model("guarded", Guarded(), inputs, {"weights": (4, 6), "unit": (4, 6)}, huggingface=False)
    keep = torch.ones(4, 6)
    keep[1], keep[2, 3:] = 0, 0
    inputs = {"scores": model.example["scores"], "keep": keep}
    artifact = converted(model, "ios18-coreml", LoweringSettings("fp16", "fixed"), tmp_path)
    assert artifact.facts["constants_brought_into_float16"] == 2
    measured = CoreMLReferenceSession(artifact).run(arrays(inputs))
    with torch.no_grad():
        weights, unit = (tensor.numpy() for tensor in model.module(**inputs))
    np.testing.assert_allclose(measured["weights"][[0, 2, 3]], weights[[0, 2, 3]], atol=2e-3)
    np.testing.assert_allclose(measured["unit"], unit, atol=2e-3)
    assert np.isfinite(measured["weights"]).all()


def test_only_the_outputs_named(tmp_path):
    model = compressed(bert(), "ios18-coreml", "int8")
    model = replace(model, outputs=model.outputs[:1])
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    attention = F.scaled_dot_product_attention
    artifact = converted(model, "ios18-coreml", LoweringSettings("fp16", "fixed"), tmp_path)
    description = load_package(artifact.path).spec.description
    assert [output.name for output in description.output] == ["last_hidden_state"]
    assert [i.name for i in description.input] == ["input_ids", "attention_mask", "token_type_ids"]
    assert artifact.facts["unused_weights"] == ["pooler.dense.weight"]
    assert sorted(read_weights(artifact)) == sorted(set(model.quantized) - {"pooler.dense.weight"})
    # Nothing that was changed for the conversion is still changed.
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
    assert list(model.module.state_dict()) == list(before)
    assert not any("forward" in vars(child) for child in model.module.modules())
    assert F.scaled_dot_product_attention is attention


class Reciprocal(nn.Module):
    """coremltools' own reciprocal adds 0.0001 to its input."""

    def forward(self, x):
        return x.reciprocal(), 1 / x


def test_reciprocal_is_exact(tmp_path):
    model = a_model("one_over", Reciprocal(), {"x": ("float32", (4,))}, {"a": (4,), "b": (4,)}, huggingface=False)
    artifact = converted(model, "ios18-coreml", LoweringSettings("fp32", "fixed"), tmp_path)
    x = np.array([0.001, 0.25, -3.0, 4.0], np.float32)
    for value in CoreMLReferenceSession(artifact).run({"x": x}).values():
        np.testing.assert_allclose(value, 1 / x, rtol=1e-6)


class Decomposes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return torch.linalg.svdvals(x)


def test_an_unknown_operator_is_named(tmp_path):
    model = a_model("svd", Decomposes(), {"x": ("float32", (4, 4))}, {"values": (4,)}, huggingface=False)
    with pytest.raises(TargetRefusesError, match=r"no form for the operator aten\._linalg_svd") as refusal:
        converted(model, "ios18-coreml", LoweringSettings("fp32", "fixed"), tmp_path)
    assert "svd" in str(refusal.value.where)
    assert list(tmp_path.iterdir()) == []


class FixesLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(16, 8))

    def forward(self, x):
        return x + self.positions


def test_a_dimension_that_the_code_fixes_cannot_vary(tmp_path):
    inputs = {"x": ("float32", (BATCH, SEQUENCE, 8))}
    model = a_model("fixes", FixesLength(), inputs, {"y": (BATCH, SEQUENCE, 8)}, huggingface=False)
    with pytest.raises(TargetRefusesError, match="fixes the 'sequence' dimension of 'x' to 16") as refusal:
        converted(model, "ios18-coreml", LoweringSettings("fp32", "dynamic"), tmp_path)
    assert "--shapes fixed" in str(refusal.value.next_step)


SCRIPT = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
spec = spec_from_file_location("coreml_lower_tests", sys.argv[1])
tests = module_from_spec(spec)
spec.loader.exec_module(tests)
model = tests.compressed(tests.bert(), "ios18-coreml", "int8")
tests.converted(model, "ios18-coreml", tests.LoweringSettings("fp16", "fixed"), Path(sys.argv[2]))
"""


def test_same_bytes_in_another_process(tmp_path):
    there, here = tmp_path / "a" / "there", tmp_path / "here"
    there.mkdir(parents=True)
    subprocess.run(
        [sys.executable, "-c", SCRIPT, __file__, str(there)],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "4242", "TZ": "Asia/Tokyo"},
        capture_output=True,
    )
    model = compressed(bert(), "ios18-coreml", "int8")
    converted(model, "ios18-coreml", LoweringSettings("fp16", "fixed"), here)
    assert hash_tree(here) == hash_tree(there)
    text = b"".join(path.read_bytes() for path in here.rglob("*") if path.is_file())
    assert str(tmp_path).encode() not in text
    assert os.path.dirname(torch.__file__).encode() not in text


def test_an_input_with_a_reserved_name_is_taken_by_either_name(tmp_path: Path) -> None:
    """coremltools renames an input called `state`: the artifact says how, and the session knows both names."""

    class Step(nn.Module):
        def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x + 2 * state)

    inputs = {"x": ("float32", (1, 4)), "state": ("float32", (1, 4))}
    model = a_model("step", Step(), inputs, {"y": (1, 4)}, huggingface=False)
    artifact = lower(model, load_target("ios18-coreml"), LoweringSettings("fp32", "fixed"), tmp_path)
    assert [spec.name for spec in artifact.inputs] == ["x", "state_workaround"]
    x, state = np.random.default_rng(0).normal(size=(2, 1, 4)).astype(np.float32)
    session = CoreMLReferenceSession(artifact)
    for name in ("state", "state_workaround"):
        np.testing.assert_allclose(session.run({"x": x, name: state})["y"], np.tanh(x + 2 * state), rtol=0, atol=1e-6)

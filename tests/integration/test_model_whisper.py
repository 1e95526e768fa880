"""Whisper from CTranslate2's format: a tiny model written in that format comes back with the same logits."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as T

from edgeport.errors import BadInputError
from edgeport.model.ctranslate2 import read_ctranslate2
from edgeport.model.whisper import load_whisper

DTYPES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def string(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def write_ctranslate2(path: Path, spec: str, variables: dict[str, np.ndarray], version: int = 6) -> None:
    parts = [struct.pack("<I", version), string(spec), struct.pack("<II", 3, len(variables))]
    for name, value in variables.items():
        parts += [string(name), struct.pack("<B", value.ndim), struct.pack(f"<{value.ndim}I", *value.shape)]
        parts += [struct.pack("<BI", DTYPES[value.dtype.name], value.nbytes), value.tobytes()]
    parts += [struct.pack("<I", 1), string("decoder/projection/weight"), string("decoder/embeddings/weight")]
    path.write_bytes(b"".join(parts))


def fuse(state: dict[str, torch.Tensor], prefix: str, projections: list[str], field: str) -> np.ndarray:
    """CTranslate2's fused projection; a bias that transformers does not have is zero."""
    width = state[f"{prefix}.q_proj.weight"].shape[0]
    parts = [state.get(f"{prefix}.{projection}.{field}", torch.zeros(width)) for projection in projections]
    return torch.cat(parts).numpy()


def to_ctranslate2(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The reverse mapping, written from transformers' side."""
    state = {name.removeprefix("model."): tensor for name, tensor in module.state_dict().items()}
    out: dict[str, np.ndarray] = {"decoder/embeddings/weight": state["decoder.embed_tokens.weight"].numpy()}

    def linear(target: str, source: str) -> None:
        for field in ("weight", "bias"):
            out[f"{target}/{field}"] = state[f"{source}.{field}"].numpy()

    def norm(target: str, source: str) -> None:
        out[f"{target}/gamma"] = state[f"{source}.weight"].numpy()
        out[f"{target}/beta"] = state[f"{source}.bias"].numpy()

    def attention(target: str, source: str, groups: list[list[str]]) -> None:
        for index, group in enumerate(groups):
            for field in ("weight", "bias"):
                out[f"{target}/linear_{index}/{field}"] = fuse(state, source, group, field)
        linear(f"{target}/linear_{len(groups)}", f"{source}.out_proj")
        norm(f"{target}/layer_norm", f"{source}_layer_norm")

    linear("encoder/conv1", "encoder.conv1")
    linear("encoder/conv2", "encoder.conv2")
    for part, layers in (("encoder", 2), ("decoder", 1)):
        out[f"{part}/position_encodings/encodings"] = state[f"{part}.embed_positions.weight"].numpy()
        norm(f"{part}/layer_norm", f"{part}.layer_norm")
        for index in range(layers):
            target, source = f"{part}/layer_{index}", f"{part}.layers.{index}"
            attention(f"{target}/self_attention", f"{source}.self_attn", [["q_proj", "k_proj", "v_proj"]])
            if part == "decoder":
                attention(f"{target}/attention", f"{source}.encoder_attn", [["q_proj"], ["k_proj", "v_proj"]])
            linear(f"{target}/ffn/linear_0", f"{source}.fc1")
            linear(f"{target}/ffn/linear_1", f"{source}.fc2")
            norm(f"{target}/ffn/layer_norm", f"{source}.final_layer_norm")
    return out


@pytest.fixture(scope="module")
def whisper() -> torch.nn.Module:
    torch.manual_seed(0)
    config = T.WhisperConfig(
        d_model=64, encoder_layers=2, decoder_layers=1, encoder_attention_heads=1, decoder_attention_heads=1,
        encoder_ffn_dim=96, decoder_ffn_dim=96, vocab_size=51864, max_source_positions=50, max_target_positions=24,
        num_mel_bins=80,
    )  # fmt: skip
    module = T.WhisperForConditionalGeneration(config).eval()
    for parameter in module.parameters():  # biases start at zero: their mapping must show
        parameter.data.normal_(std=0.05)
    module.proj_out.weight = module.model.decoder.embed_tokens.weight
    return module


@pytest.fixture
def folder(tmp_path: Path, own_cache: Path) -> Path:
    path = tmp_path / "whisper"
    path.mkdir()
    (path / "tokenizer.json").write_text("{}")
    return path


def test_the_same_logits_come_back(folder: Path, whisper: torch.nn.Module) -> None:
    write_ctranslate2(folder / "model.bin", "WhisperSpec", to_ctranslate2(whisper))
    model = load_whisper(folder, name="tiny", reference="zoo:tiny")
    assert model.task == "automatic-speech-recognition"
    assert [spec.fixed_shape() for spec in model.inputs] == [(1, 80, 100), (1, 24)]
    config = model.module.config
    assert (config.eos_token_id, config.decoder_start_token_id) == (50256, 50257)
    with torch.no_grad():
        expected, actual = whisper(**model.example).logits, model.module(**model.example).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_missing_tensor_and_another_spec_are_named(folder: Path, whisper: torch.nn.Module) -> None:
    variables = to_ctranslate2(whisper)
    write_ctranslate2(folder / "model.bin", "TransformerSpec", variables)
    with pytest.raises(BadInputError, match="holds a TransformerSpec"):
        load_whisper(folder, name="tiny", reference="zoo:tiny")
    del variables["decoder/layer_0/attention/linear_1/bias"]
    write_ctranslate2(folder / "model.bin", "WhisperSpec", variables)
    with pytest.raises(BadInputError, match="decoder/layer_0/attention/linear_1/bias"):
        load_whisper(folder, name="tiny", reference="zoo:tiny")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with pytest.raises(BadInputError, match="missing"):
        read_ctranslate2(path)
    values = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.asarray(3, np.int8)}
    write_ctranslate2(path, "WhisperSpec", values)
    spec, read = read_ctranslate2(path)
    assert spec == "WhisperSpec"
    assert {name: value.tolist() for name, value in read.items()} == {"a": [[0, 1, 2], [3, 4, 5]], "b": 3}
    whole = path.read_bytes()
    for keep in (0, 3, 20, 40):
        path.write_bytes(whole[:keep])
        with pytest.raises(BadInputError, match="truncated or damaged"):
            read_ctranslate2(path)
    write_ctranslate2(path, "WhisperSpec", values, version=5)
    with pytest.raises(BadInputError, match="format 5"):
        read_ctranslate2(path)

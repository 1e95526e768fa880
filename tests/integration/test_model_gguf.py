"""GGUF files made with llama.cpp's own writer: the weights and the tokenizer that went in come out."""

from __future__ import annotations

import logging
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers as T

from edgeport.errors import BadInputError
from edgeport.model.load import load_model

CONFIG = T.LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True,
)  # fmt: skip


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of a head's rows, which pairs neighbours for rotary embeddings."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, module: torch.nn.Module, kind: gguf.GGMLQuantizationType) -> dict[str, np.ndarray]:
    """Write a Llama as GGUF with a byte-level BPE vocabulary; the dequantised matrices, by transformers' name."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_dimension_count(CONFIG.hidden_size // CONFIG.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(CONFIG.vocab_size)
    letters = [chr(33 + index) for index in range(CONFIG.vocab_size - 5)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*letters, "Ġ", "ab", "cd", "<s>", "</s>"])
    writer.add_token_types([1] * (CONFIG.vocab_size - 2) + [3, 3])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(CONFIG.vocab_size - 2)
    writer.add_eos_token_id(CONFIG.vocab_size - 1)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.num_hidden_layers)
    expected = {}
    for name, tensor in module.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = CONFIG.num_attention_heads if "q_proj" in name else CONFIG.num_key_value_heads
            values = permute(values, heads)
        stem, _, leaf = name.rpartition(".")
        if values.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(f"{names.get_name(stem)}.{leaf}", packed, raw_dtype=kind)
            expected[name] = gguf.quants.dequantize(packed, kind)
        else:
            writer.add_tensor(f"{names.get_name(stem)}.{leaf}", values)
            expected[name] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture
def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    return T.LlamaForCausalLM(CONFIG).eval()


def test_a_float_file_gives_the_logits_of_the_model_it_was_made_from(
    tmp_path: Path, own_cache: Path, llama: torch.nn.Module
) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama, gguf.GGMLQuantizationType.F32)
    model = load_model(str(tmp_path / "tiny.gguf"))
    assert (model.name, model.task, model.source.kind, model.source.note) == ("tiny", "text-generation", "gguf", None)
    assert list(model.source.files) == ["tiny.gguf"]
    assert not hasattr(model.module.config, "quantization_config")
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(
            model.module(**model.example).logits, llama(**model.example).logits, rtol=1e-5, atol=1e-5
        )


def test_a_quantized_file_is_dequantised_exactly_and_says_so(
    tmp_path: Path, own_cache: Path, llama: torch.nn.Module
) -> None:
    expected = write_gguf(tmp_path / "tiny.Q4_0.gguf", llama, gguf.GGMLQuantizationType.Q4_0)
    model = load_model(str(tmp_path / "tiny.Q4_0.gguf"))
    assert model.source.note == "Dequantised from Q4_0: the fp32 reference is already rounded."
    state = model.module.state_dict()
    for name, values in expected.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            continue  # compared through the logits above: rows are in another order
        assert np.array_equal(state[name].numpy(), values), name


def test_the_tokenizer_in_the_file_becomes_an_asset(tmp_path: Path, own_cache: Path, llama: torch.nn.Module) -> None:
    from tokenizers import Tokenizer

    write_gguf(tmp_path / "tiny.gguf", llama, gguf.GGMLQuantizationType.F32)
    model = load_model(str(tmp_path / "tiny.gguf"))
    ids = Tokenizer.from_file(str(model.assets["tokenizer.json"])).encode("Bab!", add_special_tokens=False).ids
    assert ids == [ord("B") - 33, CONFIG.vocab_size - 4, 0]
    for path in model.assets.values():
        assert str(tmp_path).encode() not in path.read_bytes()


def test_the_conversion_is_kept_and_a_damaged_one_made_again(
    tmp_path: Path, own_cache: Path, llama: torch.nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama, gguf.GGMLQuantizationType.F32)
    lines: list[str] = []
    first = load_model(str(tmp_path / "tiny.gguf"), progress=lines.append)
    load_model(str(tmp_path / "tiny.gguf"), progress=lines.append)
    assert lines == ["dequantising tiny.gguf (once)"]
    weights = next((own_cache / "gguf").rglob("model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        again = load_model(str(tmp_path / "tiny.gguf"))
    assert "is damaged; converting again" in caplog.text
    for name, tensor in first.module.state_dict().items():
        assert torch.equal(tensor, again.module.state_dict()[name])


def test_missing_truncated_and_foreign_files_are_refused(
    tmp_path: Path, own_cache: Path, llama: torch.nn.Module
) -> None:
    path = tmp_path / "tiny.gguf"
    with pytest.raises(BadInputError, match="missing"):
        load_model(str(path))
    write_gguf(path, llama, gguf.GGMLQuantizationType.F32)
    whole = path.read_bytes()
    for keep in (len(whole) - 5000, 3000, 30):
        path.write_bytes(whole[:keep])
        with pytest.raises(BadInputError, match="truncated or damaged"):
            load_model(str(path))
    path.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(BadInputError, match="no GGUF file"):
        load_model(str(path))
    path.write_bytes(whole[:4] + b"\x63\0\0\0" + whole[8:])
    with pytest.raises(BadInputError, match="GGUF version 99"):
        load_model(str(path))
    assert not list((own_cache / "gguf").glob("*"))


def test_an_architecture_that_transformers_can_not_read_is_refused(tmp_path: Path, own_cache: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "no-such-architecture")
    writer.add_tensor("a", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadInputError, match="can't load the GGUF file"):
        load_model(str(tmp_path / "odd.gguf"))


def test_only_text_generation_is_offered(tmp_path: Path, llama: torch.nn.Module) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama, gguf.GGMLQuantizationType.F32)
    with pytest.raises(BadInputError, match="can't be loaded for 'image-classification'"):
        load_model(str(tmp_path / "tiny.gguf"), task="image-classification")

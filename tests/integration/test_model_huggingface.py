"""Hugging Face folders of tiny random models: what is loaded computes what was saved, and bad folders are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

from edgeport.errors import BadInputError
from edgeport.model.inputs import make_example, named_outputs, vocabulary_size
from edgeport.model.load import load_model
from edgeport.model.types import Axis, Model

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**SMALL, "vocab_size": 100}
WHISPER = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 100, "max_source_positions": 50,
    "max_target_positions": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
WAV2VEC2 = {
    **SMALL, "vocab_size": 32, "conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip

# class, config, task, modality, input names, output names
FAMILIES: dict[str, tuple[Any, Any, str, str, list[str], list[str]]] = {
    "bert": (T.BertModel, T.BertConfig(**TEXT), "feature-extraction", "text",
             ["input_ids", "attention_mask", "token_type_ids"], ["last_hidden_state", "pooler_output"]),
    "roberta-classifier": (T.RobertaForSequenceClassification,
                           T.RobertaConfig(**TEXT, max_position_embeddings=66, type_vocab_size=1, num_labels=3),
                           "text-classification", "text", ["input_ids", "attention_mask"], ["logits"]),
    "llama-gqa": (T.LlamaForCausalLM, T.LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=True),
                  "text-generation", "text", ["input_ids", "attention_mask"], ["logits"]),
    "t5": (T.T5ForConditionalGeneration,
           T.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100, decoder_start_token_id=0),
           "text2text-generation", "text", ["input_ids", "attention_mask", "decoder_input_ids"], ["logits"]),
    "bart": (T.BartForConditionalGeneration,
             T.BartConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                          decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=100,
                          max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
                          decoder_start_token_id=2, forced_eos_token_id=2),
             "text2text-generation", "text", ["input_ids", "attention_mask", "decoder_input_ids"], ["logits"]),
    "vit": (T.ViTForImageClassification, T.ViTConfig(**SMALL, image_size=32, patch_size=8, num_labels=5),
            "image-classification", "image", ["pixel_values"], ["logits"]),
    "mobilenet": (T.MobileNetV2ForImageClassification,
                  T.MobileNetV2Config(depth_multiplier=0.35, image_size=64, num_labels=5),
                  "image-classification", "image", ["pixel_values"], ["logits"]),
    "wav2vec2": (T.Wav2Vec2ForCTC, T.Wav2Vec2Config(**WAV2VEC2), "automatic-speech-recognition", "audio",
                 ["input_values"], ["logits"]),
    "whisper": (T.WhisperForConditionalGeneration, T.WhisperConfig(**WHISPER), "automatic-speech-recognition", "audio",
                ["input_features", "decoder_input_ids"], ["logits"]),
}  # fmt: skip


def randomize_norms(module: torch.nn.Module) -> None:
    """Statistics as after training: with the defaults, a fold that forgot them would go unseen."""
    for child in module.modules():
        if isinstance(child, torch.nn.BatchNorm2d):
            child.running_mean.normal_()
            child.running_var.uniform_(0.5, 2)
            child.weight.data.uniform_(0.5, 2)
            child.bias.data.normal_()


def save(family: str, folder: Path) -> torch.nn.Module:
    cls, config = FAMILIES[family][:2]
    torch.manual_seed(0)
    module = cls(config).eval()
    randomize_norms(module)
    module.save_pretrained(folder)
    return module  # type: ignore[no-any-return]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    save("bert", tmp_path / "bert")
    return tmp_path / "bert"


def edit(path: Path, **changes: Any) -> None:
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_with_head_task_inputs_and_the_saved_models_numbers(family: str, tmp_path: Path) -> None:
    original = save(family, tmp_path / family)
    _, _, task, modality, inputs, outputs = FAMILIES[family]
    model = load_model(str(tmp_path / family))
    assert (model.name, model.task, model.modality) == (family, task, modality)
    assert [spec.name for spec in model.inputs] == inputs
    assert [spec.name for spec in model.outputs] == outputs
    assert model.source.reference == family
    assert set(model.source.files) == {"config.json", "model.safetensors"} | (
        {"generation_config.json"} if (tmp_path / family / "generation_config.json").exists() else set()
    )
    with torch.no_grad():
        expected = named_outputs(original(**model.example))
        actual = named_outputs(model.module(**model.example))
    for name in outputs:
        # Folding batch norms and weight norms reorders sums; everything else is the same arithmetic.
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "t5", "wav2vec2", "whisper", "mobilenet"])
def test_output_specs_hold_at_other_sizes(family: str, tmp_path: Path) -> None:
    save(family, tmp_path / family)
    model = load_model(str(tmp_path / family))
    axes = {size.name: size for spec in model.inputs for size in spec.shape if isinstance(size, Axis)}
    sizes = {name: axis.example + 1 if axis.example < axis.maximum else axis.example - 1 for name, axis in axes.items()}
    example = make_example(model.inputs, vocabulary=vocabulary_size(model.module), sizes=sizes)
    with torch.no_grad():
        found = named_outputs(model.module(**example))
    for spec in model.outputs:
        assert len(spec.shape) == found[spec.name].dim()
        for size, actual in zip(spec.shape, found[spec.name].shape, strict=True):
            if isinstance(size, Axis) and size.name in sizes:
                assert actual == sizes[size.name]
            elif not isinstance(size, Axis):
                assert actual == size


def test_no_batch_norm_and_no_parametrization_is_left_for_the_backends(tmp_path: Path) -> None:
    save("mobilenet", tmp_path / "mobilenet")
    save("wav2vec2", tmp_path / "wav2vec2")
    modules = list(load_model(str(tmp_path / "mobilenet")).module.modules())
    assert not [m for m in modules if isinstance(m, torch.nn.BatchNorm2d)]
    names = [name for name, _ in load_model(str(tmp_path / "wav2vec2")).module.named_parameters()]
    assert not [name for name in names if "parametrizations" in name]
    assert any(name.endswith("pos_conv_embed.conv.weight") for name in names)


def test_positions_bound_the_sequence(tmp_path: Path) -> None:
    save("roberta-classifier", tmp_path / "roberta")
    model = load_model(str(tmp_path / "roberta"))
    axis = model.inputs[0].shape[1]
    assert isinstance(axis, Axis)
    assert axis.maximum == 64  # 66 rows, of which RoBERTa never uses the first padding_idx + 1 = 2
    ids = torch.full((1, axis.maximum), 7)
    model.module(input_ids=ids, attention_mask=torch.ones_like(ids))
    longer = torch.full((1, axis.maximum + 1), 7)
    with pytest.raises((IndexError, RuntimeError)):
        model.module(input_ids=longer, attention_mask=torch.ones_like(longer))


def test_the_pooler_that_a_headed_checkpoint_lacks_is_left_out(tmp_path: Path) -> None:
    T.BertForMaskedLM(T.BertConfig(**TEXT)).save_pretrained(tmp_path / "m")
    assert load_model(str(tmp_path / "m")).task == "fill-mask"
    model = load_model(str(tmp_path / "m"), task="feature-extraction")
    assert [spec.name for spec in model.outputs] == ["last_hidden_state"]


def test_a_head_that_would_be_random_is_refused(bert: Path) -> None:
    with pytest.raises(BadInputError, match="would be random") as caught:
        load_model(str(bert), task="text-classification")
    assert "classifier.weight" in (caught.value.where or "")


def test_class_names_come_along_unless_they_are_placeholders(tmp_path: Path) -> None:
    config = T.ViTConfig(
        **SMALL, image_size=32, patch_size=8, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1}
    )
    T.ViTForImageClassification(config).save_pretrained(tmp_path / "named")
    assert load_model(str(tmp_path / "named")).labels == ("cat", "dog")
    save("vit", tmp_path / "plain")
    assert load_model(str(tmp_path / "plain")).labels == ()


def test_a_vocabulary_file_alone_becomes_a_tokenizer(bert: Path, own_cache: Path) -> None:
    from tokenizers import Tokenizer

    (bert / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "##ness", "day"]))
    path = load_model(str(bert)).assets["tokenizer.json"]
    assert Tokenizer.from_file(str(path)).encode("Goodness day").ids == [2, 5, 6, 7, 3]
    before = path.read_bytes()
    assert load_model(str(bert)).assets["tokenizer.json"].read_bytes() == before
    (bert / "vocab.txt").unlink()
    assert "tokenizer.json" not in load_model(str(bert)).assets


def test_sharded_weights_load_and_a_missing_shard_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = T.BertModel(T.BertConfig(**TEXT)).eval()
    original.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 2
    model = load_model(str(tmp_path / "m"))
    with torch.no_grad():
        expected, actual = original(**model.example)[0], model.module(**model.example)[0]
    assert torch.equal(expected, actual)
    shards[1].unlink()
    with pytest.raises(BadInputError, match="missing") as caught:
        load_model(str(tmp_path / "m"))
    assert shards[1].name in (caught.value.where or "")


@pytest.mark.parametrize("keep", [0, 5, 1000, -100])
def test_truncated_weights_are_refused(bert: Path, keep: int) -> None:
    weights = bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(BadInputError, match="truncated or damaged"):
        load_model(str(bert))


def test_a_loaded_model_does_not_change_with_its_file(bert: Path) -> None:
    model = load_model(str(bert))
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    weights = bert / "model.safetensors"
    with weights.open("r+b") as file:  # in place, as a training run may save
        file.seek(weights.stat().st_size // 2)
        file.write(b"\xff" * 4096)
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_missing_weights_are_refused(bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    with pytest.raises(BadInputError, match="holds no weights"):
        load_model(str(bert))


def test_weights_of_another_shape_are_refused(bert: Path) -> None:
    edit(bert / "config.json", hidden_size=64)
    with pytest.raises(BadInputError, match="can't load the weights as BertModel"):
        load_model(str(bert))


def test_a_pickle_needs_the_flag(bert: Path) -> None:
    with torch.no_grad():
        expected = load_model(str(bert))
    state = T.BertModel.from_pretrained(bert).state_dict()
    (bert / "model.safetensors").unlink()
    torch.save(state, bert / "pytorch_model.bin")
    with pytest.raises(BadInputError, match="pickle") as caught:
        load_model(str(bert))
    assert "--allow-pickle" in (caught.value.next_step or "")
    model = load_model(str(bert), allow_pickle=True)
    assert "pytorch_model.bin" in model.source.files
    with torch.no_grad():
        assert torch.equal(model.module(**model.example)[0], expected.module(**model.example)[0])


class Opens:
    """Unpickling it makes a file: what a hostile checkpoint could do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_even_with_the_flag_a_pickle_can_not_run_code(bert: Path, tmp_path: Path) -> None:
    (bert / "model.safetensors").unlink()
    torch.save({"a": Opens(tmp_path / "ran")}, bert / "pytorch_model.bin")
    with pytest.raises(BadInputError, match="more than tensors"):
        load_model(str(bert), allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "no-such-model"}, "unknown to transformers"),
        ({"model_type": None}, "names no 'model_type'"),
        ({"architectures": ["NoSuchModel"]}, "unknown to transformers"),
        ({"architectures": ["os"]}, "unknown to transformers"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "own Python code"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
        ({"hidden_size": "wide"}, "config is wrong"),
    ],
)
def test_bad_configs_are_refused(bert: Path, changes: dict[str, Any], match: str) -> None:
    edit(bert / "config.json", **changes)
    with pytest.raises(BadInputError, match=match) as caught:
        load_model(str(bert))
    assert "config.json" in (caught.value.where or "")


def test_a_config_that_is_no_json_or_missing_is_refused(bert: Path) -> None:
    (bert / "config.json").write_text('{"model_type": "bert"')
    with pytest.raises(BadInputError, match="can't be read as JSON"):
        load_model(str(bert))
    (bert / "config.json").unlink()
    with pytest.raises(BadInputError, match="missing"):
        load_model(str(bert))


def test_unknown_tasks_list_the_known_ones(bert: Path) -> None:
    with pytest.raises(BadInputError, match="has no task 'dancing'") as caught:
        load_model(str(bert), task="dancing")
    assert "text-generation" in (caught.value.allowed or "")


def test_a_model_of_two_modalities_is_refused(tmp_path: Path) -> None:
    text = T.CLIPTextConfig(**TEXT).to_dict()
    vision = T.CLIPVisionConfig(**SMALL, image_size=32, patch_size=8).to_dict()
    T.CLIPModel(T.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path / "m")
    with pytest.raises(BadInputError, match="does not know how to feed CLIPModel"):
        load_model(str(tmp_path / "m"))


def test_a_hub_id_offline_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPORT_OFFLINE", "1")
    for reference in ("nobody/nothing", "hub:nobody/nothing"):
        with pytest.raises(BadInputError, match="hub repository 'nobody/nothing' is not in the local cache"):
            load_model(reference)


def test_a_hub_id_that_is_cached_needs_no_network(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout is huggingface_hub's own: refs/main names the snapshot's folder."""
    from huggingface_hub import constants

    monkeypatch.setenv("EDGEPORT_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    revision = "0" * 40
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(bert, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    model: Model = load_model("someone/tiny")
    assert (model.name, model.source.kind, model.source.note) == ("tiny", "hub", f"hub revision {revision}")

"""Tiny random models of real architectures, saved as a user would have them: Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from edgeport.model.types import Model


def _tokenizer(folder: Path, size: int) -> None:
    """A WordPiece tokenizer that knows letters and some words, as `tokenizer.json`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *"abcdefghijklmnopqrstuvwxyz",
        *("##" + c for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    words += ["the", "of", "and", "in", "to", "a", "is", "was", ".", ","]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    assert len(vocabulary) <= size
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]"})
    )


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def _byte_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer with a chat template, as decoders have it: 2 + 256 + some merges, below 320."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat is in the hat and the hat is on the cat, in and on"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>", "is_local": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "bos_token_id": 0}))


def _bert(folder: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        num_labels=5,
        # The default 0.02 gives logits so close to each other that argmax says nothing.
        initializer_range=0.1,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    _tokenizer(folder, 128)


def _llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _byte_tokenizer(folder)


def _t5(folder: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=320, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    _byte_tokenizer(folder)


def _vit(folder: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        num_labels=5,
        initializer_range=0.1,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    _image_processor(folder, 32)


def _mobilenet(folder: Path) -> None:
    import torch
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(image_size=64, depth_multiplier=0.35, num_labels=5)
    model = MobileNetV2ForImageClassification(config).eval()
    # Untrained statistics (mean 0, variance 1) let the activations die out: set them from random pictures.
    model.train()
    with torch.no_grad():
        for _ in range(8):
            model(torch.randn(8, 3, 64, 64))
    model.eval().save_pretrained(folder)
    _image_processor(folder, 64)


def _wav2vec2(folder: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        vocab_size=32,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        conv_dim=(32, 32, 32),
        conv_stride=(5, 4, 4),
        conv_kernel=(10, 8, 8),
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        initializer_range=0.1,
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)


def _image_processor(folder: Path, size: int) -> None:
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "ViTImageProcessor",
                "do_resize": True,
                "size": {"height": size, "width": size},
                "do_normalize": True,
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            }
        )
    )


MAKERS: dict[str, Callable[[Path], None]] = {
    "bert": _bert,
    "llama": _llama,
    "t5": _t5,
    "vit": _vit,
    "mobilenet": _mobilenet,
    "wav2vec2": _wav2vec2,
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random model: `tiny_model("bert")`. Made once a session, always with the same weights."""
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            import torch

            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("models") / f"tiny-{architecture}"
            folder.mkdir()
            MAKERS[architecture](folder)
            made[architecture] = folder
        return made[architecture]

    return get


WIDE, SLIDING, ENDS = {"head_dim": 16}, {"sliding_window": 8}, {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": SLIDING,
    "qwen2": {},
    "qwen3": WIDE,
    "gemma": WIDE,
    "gemma2": {**WIDE, **SLIDING},
    "gemma3_text": {**WIDE, **SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": ENDS,
    "gpt2": ENDS,
}
"""What a family's tiny model has beside the sizes that all have."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `decoder_family` runs for each; `@pytest.mark.often(...)` names those that are not slow."""
    if "decoder_family" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("often")
    often = DECODERS if marker is None else marker.args
    families = [pytest.param(name, marks=() if name in often else pytest.mark.slow) for name in DECODERS]
    metafunc.parametrize("decoder_family", families)


@pytest.fixture(scope="session")
def tiny_decoder() -> Callable[..., Model]:
    """Makes a family's random model, without a cache: `tiny_decoder("llama", vocabulary=97, positions=128)`.

    More keywords go into its config. The initial weights are large, so that errors are; the biases are not zero.
    """

    def build(family: str, *, vocabulary: int, positions: int, layers: int = 2, **own: Any) -> Model:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from edgeport.model.build import build_huggingface

        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": positions,
        }
        if family == "gpt2":
            sizes = {"n_embd": 64, "n_layer": layers, "n_head": 4, "n_positions": positions}
        options = {"vocab_size": vocabulary, "initializer_range": 0.2, **sizes, **DECODERS[family], **own}
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        names = {"name": family, "reference": family, "kind": "factory", "task": "text-generation"}
        return build_huggingface(module, **names, files={}, assets={}, licence=None, note=None)

    return build

"""A smaller vocabulary: texts of the kept tokens are cut as before, and get the original's scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgeport.compress.prune.trim import read_trimmed, write_trimmed
from edgeport.compress.prune.vocabulary import Derivation, choose_tokens, needed_ids, pruned_tokenizer, renumbered_ids
from edgeport.errors import BadInputError
from edgeport.model.build import build_huggingface
from edgeport.model.types import Model
from edgeport.restructuring import PruneVocabulary

TEXTS = [
    "the cat sat on the mat and the hat sat on the cat",
    "a long thing with other words than that: wonderful, thunderous, unbelievable weather",
    "the rain in spain stays mainly in the plain; the train again and again",
]
CORPUS = ["the cat sat on the mat", "the rain in the plain", "the cat and the rain"]


def byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=130, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {"bpe": byte_bpe, "wordpiece": wordpiece, "unigram": unigram}


def cut(kind: str, tokens: int) -> tuple[Tokenizer, Tokenizer, list[int]]:
    """The tokenizer, the one with fewer tokens, and the old ids of these."""
    whole = KINDS[kind]()
    raw = json.loads(whole.to_str())
    counts: dict[int, int] = {}
    for text in CORPUS:
        for index in whole.encode(text, add_special_tokens=False).ids:
            counts[index] = counts.get(index, 0) + 1
    kept = choose_tokens(raw, counts, tokens)
    return whole, Tokenizer.from_str(json.dumps(pruned_tokenizer(raw, kept))), kept


@pytest.mark.parametrize(("kind", "tokens"), [("bpe", 285), ("wordpiece", 90), ("unigram", 40)])
def test_texts_of_the_corpus_are_cut_as_before(kind: str, tokens: int) -> None:
    whole, small, kept = cut(kind, tokens)
    assert small.get_vocab_size() == len(kept) == tokens
    for text in CORPUS:
        before, after = whole.encode(text), small.encode(text)
        assert before.tokens == after.tokens
        assert before.ids == [kept[index] for index in after.ids]
        assert small.decode(after.ids) == whole.decode(before.ids)


def test_a_token_needs_the_parts_that_bpe_goes_through() -> None:
    merges = [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c"), ("abc", "d")]
    model = {"type": "BPE", "vocab": {}, "merges": [list(pair) for pair in merges]}
    vocabulary = ["a", "b", "c", "d", *("".join(pair) for pair in merges)]
    model["vocab"] = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    # "ab" has the lower rank: "abc" is made of "ab" and "c" although ("a", "bc") stands before ("ab", "c").
    assert Derivation({"model": model})("abcd") == {"a", "b", "c", "d", "ab", "abc", "abcd"}
    raw = {"model": model, "added_tokens": []}
    kept = choose_tokens(raw, {model["vocab"]["abcd"]: 3}, 7)
    assert kept == [model["vocab"][token] for token in ("a", "b", "c", "d", "ab", "abc", "abcd")]
    before = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges))
    after = Tokenizer.from_str(json.dumps({**json.loads(before.to_str()), **pruned_tokenizer(raw, kept)}))
    assert before.encode("abcdabcd").tokens == after.encode("abcdabcd").tokens == ["abcd", "abcd"]


@pytest.mark.parametrize("text", [*TEXTS, "Zürich – 東京 🙂 \t tabs\nand lines"])
def test_any_text_goes_through_bytes_and_back(text: str) -> None:
    _, small, _ = cut("bpe", 270)
    assert small.decode(small.encode(text).ids) == text


def test_too_few_and_too_many_tokens() -> None:
    raw = json.loads(byte_bpe().to_str())
    least = len(needed_ids(raw))
    for tokens in (least - 1, byte_bpe().get_vocab_size()):
        with pytest.raises(BadInputError, match=f"can't be cut to {tokens}"):
            choose_tokens(raw, {}, tokens)
    assert len(choose_tokens(raw, {}, least)) == least


def test_settings_are_renumbered() -> None:
    new = {0: 0, 7: 1, 9: 2}
    config = {"eos_token_id": [7, 8], "pad_token_id": 9, "bos_token_id": 3, "size": 7, "text_config": {"x_token_id": 7}}
    wanted = {"eos_token_id": [1], "pad_token_id": 2, "bos_token_id": None, "size": 7, "text_config": {"x_token_id": 1}}
    assert renumbered_ids(config, new) == wanted
    assert renumbered_ids({"added_tokens_decoder": {"9": {"content": "x"}, "5": {}}}, new) == {
        "added_tokens_decoder": {"2": {"content": "x"}}
    }


def model_of(module: Any, folder: Path, tokenizer: Tokenizer) -> Model:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "bos_token_id": 0}))
    assets = {name: folder / name for name in ("tokenizer.json", "generation_config.json")}
    values = {"reference": "tiny", "kind": "huggingface", "task": None, "files": {}, "licence": None, "note": None}
    return build_huggingface(module, name="tiny", assets=assets, **values)


@pytest.mark.parametrize("tied", [True, False])
def test_scores_of_kept_tokens_are_the_originals(tied: bool, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=330, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1)
    tokenizer = byte_bpe()
    model = model_of(LlamaForCausalLM(config), tmp_path, tokenizer)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(CORPUS))
    (tmp_path / "out").mkdir()
    write_trimmed(tmp_path / "out", model, PruneVocabulary(method="prune_vocabulary", tokens=285, corpus=str(corpus)))
    small = read_trimmed(tmp_path / "out", model)
    kept = json.loads((tmp_path / "out" / "kept.json").read_text())["kept"]
    again = Tokenizer.from_file(str(small.assets["tokenizer.json"]))
    assert small.module.config.vocab_size == small.outputs[0].shape[-1] == 285
    ties = small.module.get_input_embeddings().weight is small.module.get_output_embeddings().weight
    assert ties is tied
    for text in CORPUS:
        ids = torch.tensor([again.encode(text).ids])
        with torch.no_grad():
            found = small.module(input_ids=ids).logits
            wanted = model.module(input_ids=torch.tensor([tokenizer.encode(text).ids])).logits[..., kept]
        assert torch.allclose(found, wanted, atol=1e-6)


def test_a_missing_or_empty_corpus(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = model_of(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=330)), tmp_path, byte_bpe())
    (tmp_path / "empty.txt").write_text("\n\n")
    for name, words in (("nothing.txt", "can't be read"), ("empty.txt", "is empty")):
        step = PruneVocabulary(method="prune_vocabulary", tokens=285, corpus=str(tmp_path / name))
        with pytest.raises(BadInputError, match=words):
            write_trimmed(tmp_path, model, step)

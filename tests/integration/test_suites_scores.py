"""Suites on shipped files of tiny models, against torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeport.errors import BadInputError
from edgeport.export.artifact import LoweringSettings
from edgeport.export.onnx.lower import lower
from edgeport.model.decoder import for_generation
from edgeport.model.load import load_model
from edgeport.target import load_target
from edgeport.validate.suites.evaluate import evaluate
from edgeport.validate.suites.subject import of_artifact, of_model

TARGET = load_target("linux-x86_64-ort")
FP32 = LoweringSettings("fp32", "dynamic")
SENTENCES = [
    "the cat is in the hat",
    "a hat was on the mat and the cat in it",
    "of all the cats this is the fattest",
    "in and out, to and fro, on and on",
]


def write_suite(folder: Path, kind: str, rows: list[dict[str, object]], extra: str = "") -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    top, _, tables = extra.partition("[")
    (folder / "mine.toml").write_text(
        f'name = "mine"\ntitle = "mine"\nkind = "{kind}"\ndata = "rows.jsonl"\n{top}\n'
        f"[evaluation]\nstart = 0\nstop = {len(rows)}\n" + (f"[{tables}" if tables else "")
    )
    return str(folder / "mine.toml")


@pytest.fixture(scope="module")
def llama(tiny_model, tmp_path_factory):
    """A tiny decoder: the original in torch, and its file with a cache in ONNX Runtime."""
    model = load_model(str(tiny_model("llama")), task="text-generation")
    artifact = lower(for_generation(model, 48), TARGET, FP32, tmp_path_factory.mktemp("llama"))
    original = of_model(model)
    return model, original, of_artifact(artifact, original.traits)


def test_the_loss_through_the_cache_is_torchs(llama, tmp_path):
    model, original, artifact = llama
    found = evaluate(
        write_suite(tmp_path, "language_modelling", [{"text": text} for text in SENTENCES]), original, artifact
    )
    losses, weights = [], []
    for text in SENTENCES:
        ids = torch.tensor([original.tokenizer(48).encode(text).ids])
        with torch.no_grad():
            losses.append(float(model.module(input_ids=ids, labels=ids).loss))
        weights.append(ids.shape[1] - 1)
    assert sorted(found.original_scores) == pytest.approx(sorted(losses), rel=1e-5)
    assert found.artifact_scores == pytest.approx(found.original_scores, rel=1e-5)
    assert found.artifact.mean == pytest.approx(np.average(losses, weights=weights), rel=1e-5)
    assert found.chance == pytest.approx(np.log(model.module.config.vocab_size))
    assert not found.higher_is_better


def test_choices_are_scored_after_a_prompt_that_is_read_once(llama, tmp_path):
    model, original, artifact = llama
    rows = [{"prompt": text, "choices": ["the cat", "on a hat today", "in"], "answer": 1} for text in SENTENCES]
    found = evaluate(write_suite(tmp_path, "multiple_choice", rows), original, artifact)
    by_hand = []
    tokenizer = original.tokenizer(48)
    for row in rows:
        prefix = tokenizer.encode(row["prompt"]).ids
        scores = []
        for choice in row["choices"]:
            end = tokenizer.encode(" " + choice, add_special_tokens=False).ids
            with torch.no_grad():
                logs = model.module(input_ids=torch.tensor([prefix + end])).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[len(prefix) + i - 1, token]) for i, token in enumerate(end)) / len(choice))
        by_hand.append(float(int(np.argmax(scores)) == row["answer"]))
    assert sorted(found.original_scores) == sorted(by_hand)
    assert found.artifact_scores == found.original_scores
    assert found.chance == pytest.approx(1 / 3)


def test_a_truncated_vocabulary_shows_in_the_loss(llama, tmp_path):
    """The planted fault: the file's scores of the upper half of the vocabulary are gone."""
    _, original, artifact = llama

    class Truncated:
        def __init__(self, inner):
            self.inner, self.context = inner, inner.context

        def rewind(self, length=0):
            self.inner.rewind(length)

        def feed(self, ids):
            scores = self.inner.feed(ids).copy()
            scores[len(scores) // 2 :] = -1e4
            return scores

    from dataclasses import replace

    broken = replace(artifact, tokens=Truncated(artifact.tokens))
    path = write_suite(tmp_path, "language_modelling", [{"text": text} for text in SENTENCES])
    found = evaluate(path, original, broken)
    assert found.worse == len(SENTENCES)
    assert found.difference.mean > 100


@pytest.fixture(scope="module")
def bert(tiny_model, tmp_path_factory):
    model = load_model(str(tiny_model("bert")))
    artifact = lower(model, TARGET, FP32, tmp_path_factory.mktemp("bert"))
    original = of_model(model)
    return model, original, of_artifact(artifact, original.traits)


def test_a_classifiers_own_classes(bert, tmp_path):
    model, original, artifact = bert
    with torch.no_grad():
        answers = [
            int(model.module(input_ids=torch.tensor([original.tokenizer(32).encode(text).ids])).logits.argmax())
            for text in SENTENCES
        ]
    rows = [{"text": text, "label": answer} for text, answer in zip(SENTENCES, answers, strict=True)]
    rows[0]["label"] = (answers[0] + 1) % 5
    found = evaluate(write_suite(tmp_path, "text_classification", rows), original, artifact)
    assert found.original.mean == found.artifact.mean == 0.75
    assert (found.worse, found.better) == (0, 0)
    rows[0]["label"] = 7
    with pytest.raises(BadInputError, match="no class '7'"):
        evaluate(write_suite(tmp_path, "text_classification", rows), original, artifact)


def test_a_function_of_the_users_own(bert, tmp_path, monkeypatch):
    _, original, artifact = bert
    (tmp_path / "my_score.py").write_text("def top(row, outputs):\n    return float(outputs['logits'].max())\n")
    monkeypatch.syspath_prepend(tmp_path)
    extra = 'score = "my_score:top"\nunit = "score"'
    path = write_suite(tmp_path, "custom", [{"text": text} for text in SENTENCES], extra)
    found = evaluate(path, original, artifact)
    assert found.artifact_scores == pytest.approx(found.original_scores, rel=1e-4)
    assert len(set(found.original_scores)) == len(SENTENCES)
    broken = write_suite(tmp_path, "custom", [{"text": "a"}], 'score = "my_score:absent"')
    with pytest.raises(BadInputError, match="can't be imported"):
        evaluate(broken, original, artifact)


def test_a_suite_for_other_models_names_those_that_fit(bert):
    _, original, artifact = bert
    with pytest.raises(BadInputError, match="'commonsense' is for a causal language model") as caught:
        evaluate("commonsense", original, artifact)
    assert caught.value.allowed.startswith("intents, sentiment")

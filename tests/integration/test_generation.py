"""A decoder's bundle as a user meets it: exported, run, chatted with, its tokenizer replayed."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeport.bundle.read import read_bundle
from edgeport.bundle.write import write_assets
from edgeport.cli.main import main
from edgeport.cli.run import open_conversation
from edgeport.errors import EXIT_BAD_INPUT, EXIT_PARITY, BadInputError
from edgeport.gate import judge
from edgeport.job import ExportRequest
from edgeport.model.load import load_model
from edgeport.pipeline import export
from edgeport.recipe import load_recipe
from edgeport.runtime.conversation import Conversation
from edgeport.target import load_target
from edgeport.validate.evidence import Measurements
from edgeport.validate.tokenizer import replay
from edgeport.validating import validate_bundle

PROMPT = "the cat"


@pytest.fixture(scope="module")
def bundle(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generation") / "bundle"
    request = ExportRequest(
        str(tiny_model("llama")), load_target("linux-x86_64-ort"), load_recipe("fp32"), out, samples=4, quick=True
    )
    result = export(request)
    assert result.exit_code == 0
    return out


def talk(bundle: Path) -> Conversation:
    return open_conversation(bundle, temperature=0.0, top_k=None, top_p=None, seed=0, threads=1)


def reference(folder: Path, ids: list[int], count: int) -> list[int]:
    """What transformers generates, stop token left out."""
    module = load_model(str(folder)).module
    with torch.no_grad():
        answer = module.generate(  # type: ignore[operator]
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=1, pad_token_id=1
        )
    new = answer[0, len(ids) :].tolist()
    return new[: new.index(1)] if 1 in new else new


def test_the_evidence_names_the_cache_and_the_device_tokenizer(bundle: Path) -> None:
    found = read_bundle(bundle)
    assert found.manifest.task == "text-generation-with-past"
    assert found.manifest.context == found.artifact.context == 64
    assert found.evidence is not None
    device = [item for item in found.evidence.tokenizers if item.device]
    assert [item.implementation for item in device] == ["onnxruntime-extensions"]
    assert device[0].different == 0
    assert device[0].texts > 40
    assert device[0].templates == 2
    assert [check.passed for check in found.evidence.verdict.checks if check.metric == "tokenizer"] == [True]


def test_the_evidence_says_how_it_generates(bundle: Path) -> None:
    evidence = read_bundle(bundle).evidence
    assert evidence is not None
    found = evidence.generation
    assert found is not None
    assert (found.context, found.long_tokens) == (64, 64)
    assert found.cache_bytes == 64 * 2 * 2 * 2 * 16 * 4  # tokens, keys and values, layers, heads, width, float32
    assert found.long_cosine > 0.999999
    assert [rate.length for rate in found.rates] == [32]
    assert found.rates[0].decode_tokens_per_s > 0
    assert [check.passed for check in evidence.verdict.checks if check.metric == "long_cache"] == [True]


def test_a_cache_that_goes_wrong_as_it_grows_fails_the_gate(bundle: Path) -> None:
    """One position off leaves a cosine of 0.9 or less; the gate stops well before."""
    evidence = read_bundle(bundle).evidence
    assert evidence is not None
    assert evidence.generation is not None
    bad = evidence.generation.model_copy(update={"long_cosine": 0.95})
    measured = Measurements(**{**evidence.model_dump(exclude={"verdict"}), "generation": bad})
    verdict = judge(measured, load_recipe("fp32").gate)
    assert verdict.exit_code == EXIT_PARITY
    assert [check.metric for check in verdict.checks if not check.passed] == ["long_cache"]


def test_run_answers_what_transformers_answers(
    bundle: Path, tiny_model: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(bundle), PROMPT, "--raw", "-n", "12", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    ids = [int(token) for token in talk(bundle).texts.ids(PROMPT)]
    assert answer["ids"] == reference(tiny_model("llama"), ids, 12)
    assert answer["prompt_tokens"] == len(ids)
    assert answer["new_tokens"] == len(answer["ids"])
    assert answer["finish"] in ("length", "stop")
    assert main(["run", str(bundle), PROMPT, "--raw", "-n", "12"]) == 0
    streamed = capsys.readouterr()
    assert streamed.out == answer["text"] + "\n"
    assert f"{len(ids)} prompt tokens" in streamed.err


def test_run_uses_the_chat_template(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(bundle), PROMPT, "-n", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    rendered = f"<s>user\n{PROMPT}</s>\n<s>assistant\n"
    assert answer["prompt_tokens"] == len(talk(bundle).texts.tokenizer(rendered)["input_ids"])


def test_the_same_seed_draws_the_same_tokens(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        arguments = ["run", str(bundle), PROMPT, "-n", "10", "--temperature", "1.5", "--seed", seed, "--json"]
        assert main(arguments) == 0
        texts.append(json.loads(capsys.readouterr().out)["ids"])
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_longer_than_the_cache_is_one_clear_error(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(bundle), "x" * 70, "--raw"]) == EXIT_BAD_INPUT
    shown = capsys.readouterr().err
    assert "The prompt has 70 tokens; the model's cache holds 64." in shown
    assert "--context" in shown
    assert "Traceback" not in shown


def test_a_settings_error_names_the_option(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(bundle), "x", "--top-p", "1.5"]) == EXIT_BAD_INPUT
    assert "--top-p" in capsys.readouterr().err


def test_chat_keeps_what_was_said_in_the_cache(bundle: Path) -> None:
    kept, said = talk(bundle), []
    kept.say("a", 3, said.append)
    first = kept.tokens.length
    fed: list[int] = []
    feed = kept.tokens.feed

    def count(ids: np.ndarray) -> np.ndarray:
        fed.append(len(ids))
        return feed(ids)

    kept.tokens.feed = count  # type: ignore[method-assign]
    record = kept.say("b", 3, said.append)
    whole = kept.texts.chat_ids(kept.messages[:3])
    # Only what the cache lacks is read; it may lack a little more than the turn, where texts split otherwise.
    assert fed[0] < len(whole) - first + 6
    fresh = talk(bundle).answer(whole, 3, said.append)
    assert record.ids == fresh.ids


def test_an_interrupted_answer_leaves_a_conversation_that_goes_on(bundle: Path) -> None:
    def interrupt(_piece: str) -> None:
        raise KeyboardInterrupt

    conversation = talk(bundle)
    with pytest.raises(KeyboardInterrupt):
        conversation.say("a", 8, interrupt)
    ids = conversation.texts.ids("is in the")
    again = conversation.answer(ids, 5, lambda _piece: None)
    assert again.ids == talk(bundle).answer(ids, 5, lambda _piece: None).ids


def test_chat_reads_turns_until_an_empty_line(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n/new\n" + "x" * 70 + "\nb\n\nnever read\n"))
    assert main(["chat", str(bundle), "-n", "3"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("new tokens") == 2
    assert "the model's cache holds 64" in shown.err


def test_a_stop_token_ends_the_answer(bundle: Path) -> None:
    conversation = talk(bundle)
    ids = conversation.texts.ids(PROMPT)
    plain = conversation.answer(ids, 8, lambda _piece: None).ids
    stop = next(token for token in plain if plain.index(token) > 0)
    texts = type(conversation.texts)(conversation.texts.tokenizer, frozenset({stop}))
    stopped = Conversation(conversation.tokens, texts, conversation.sampling).answer(ids, 8, lambda _piece: None)
    assert stopped.ids == plain[: plain.index(stop)]
    assert stopped.finish == "stop"


def test_validate_replays_the_tokenizer(bundle: Path) -> None:
    result = validate_bundle(bundle, quick=True)
    assert result.exit_code == 0
    assert any(item["device"] and item["texts"] > 40 for item in result.evidence["tokenizers"])


def test_a_wrong_tokenizer_is_caught(bundle: Path, tmp_path: Path) -> None:
    """By the hashes when it was changed; by the vectors when it was wrong from the start."""
    changed = tmp_path / "changed"
    shutil.copytree(bundle, changed)
    path = changed / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:2]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(BadInputError, match=r"tokenizer\.json"):
        validate_bundle(changed, quick=True)
    vectors = json.loads((bundle / "golden" / "tokenizer.json").read_text())
    found = replay(vectors, changed / "model", "onnxruntime")
    device = next(item for item in found if item.device)
    assert device.different > 0
    evidence = read_bundle(bundle).evidence
    assert evidence is not None
    measured = Measurements(**{**evidence.model_dump(exclude={"verdict"}), "tokenizers": found})
    verdict = judge(measured, load_recipe("fp32").gate)
    assert verdict.exit_code == EXIT_PARITY
    assert [check.metric for check in verdict.checks if not check.passed] == ["tokenizer"]


def test_a_tokenizer_that_the_device_can_not_read_fails(bundle: Path, tmp_path: Path) -> None:
    """transformers' own class name, which onnxruntime-extensions refuses: why bundles carry another one."""
    shutil.copytree(bundle / "model", tmp_path / "assets", ignore=shutil.ignore_patterns("model.onnx"))
    vectors = json.loads((bundle / "golden" / "tokenizer.json").read_text())
    config = tmp_path / "assets" / "tokenizer_config.json"
    assert json.loads(config.read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "is_local" not in json.loads(config.read_text())
    config.write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
    device = next(item for item in replay(vectors, tmp_path / "assets", "onnxruntime") if item.device)
    assert "TokenizersBackend" in (device.failed or "")
    repaired = tmp_path / "repaired"
    write_assets({path.name: path for path in (tmp_path / "assets").iterdir()}, repaired)
    assert next(item for item in replay(vectors, repaired, "onnxruntime") if item.device).different == 0


def test_the_settings_of_onnxruntime_genai_name_the_file_and_its_cache(bundle: Path) -> None:
    config = json.loads((bundle / "model" / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    names = {spec.name for spec in read_bundle(bundle).artifact.inputs}
    assert (bundle / "model" / decoder["filename"]).resolve() == (bundle / "model" / "model.onnx").resolve()
    for layer in range(decoder["num_hidden_layers"]):
        assert decoder["inputs"]["past_key_names"].replace("%d", str(layer)) in names
    assert config["model"]["context_length"] == 64
    assert config["model"]["eos_token_id"] == [1]


def test_the_task_declines_the_cache_and_a_context_without_one_is_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = str(tiny_model("llama"))
    arguments = ["export", folder, "-t", "linux-x86_64-ort", "-r", "fp32", "-o", str(tmp_path / "out"), "--dry-run"]
    assert main([*arguments, "--task", "text-generation", "--sequence", "16"]) == 0
    assert main([*arguments, "--task", "text-generation", "--context", "16"]) == EXIT_BAD_INPUT
    assert main([*arguments, "--sequence", "16"]) == EXIT_BAD_INPUT
    assert main([*arguments, "--context", "65"]) == EXIT_BAD_INPUT
    assert main([*arguments, "--context", "16", "--task", "text-generation-with-past"]) == 0
    bert = ["export", str(tiny_model("bert")), "-t", "linux-x86_64-ort", "-o", str(tmp_path / "x"), "--dry-run"]
    assert main([*bert, "--context", "16"]) == EXIT_BAD_INPUT

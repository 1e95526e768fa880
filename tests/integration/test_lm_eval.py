"""A bundle in lm-evaluation-harness: the scores are those that the harness's own model gives the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeport.cli.main import main
from edgeport.errors import BadInputError

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

CONTEXT = 64
ROWS = [
    {"question": "the cat is in", "choices": [" the hat", " a cat and a hat", " on"], "answer": 0},
    {"question": "a hat was on the cat and", "choices": [" the cat", " on and on", " in the hat"], "answer": 2},
    {"question": "in and out", "choices": [" is", " on the hat", " a"], "answer": 1},
]
LONG = "the cat in the hat and the hat on the cat " * 8
"""More tokens than the cache holds, so that the harness takes it in windows."""
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {max_gen_toks: 12, until: ["zz"]}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tiny_model: Any) -> Path:
    path: Path = tiny_model("llama")
    return path


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lm_eval") / "bundle"
    arguments = ["export", str(folder), "-t", "linux-x86_64-ort", "-r", "fp32", "--context", str(CONTEXT), "--quick"]
    assert main([*arguments, "-o", str(out)]) in (0, 10, 12)  # a random model need pass no gate to be asked
    return out


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tasks")
    rows = [{**row, "text": text} for row, text in zip(ROWS, ["the cat", LONG, "a hat is a hat."], strict=True)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {root / 'rows.jsonl'}}}}}\n"
        (root / f"{name}.yaml").write_text(f"task: {name}\ntest_split: test\n{data}{text}")
    return root


def answers(model: Any, tasks: Path, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found: dict[str, Any] = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    return found


def responses(found: dict[str, Any], task: str) -> list[Any]:
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [part for sample in samples for part in sample["resps"]]


def test_a_bundle_scores_as_the_harness_scores_the_original(
    folder: Path, bundle: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets
    from lm_eval.models.huggingface import HFLM

    import edgeport.harness  # noqa: F401 - registers the model

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    ours = answers("edgeport", tasks, {"bundle": str(bundle)})
    theirs = answers(HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1), tasks)
    mine, others = responses(ours, "choices"), responses(theirs, "choices")
    assert len(mine) == 9
    for (our,), (their,) in zip(mine, others, strict=True):
        assert our[0] == pytest.approx(their[0], abs=1e-4)
        assert our[1] == their[1]
    whole = [float(each[0]) for each in responses(ours, "whole")]
    assert whole == pytest.approx([float(each[0]) for each in responses(theirs, "whole")], abs=1e-3)
    assert min(whole) < -500  # the long text went in windows
    written = responses(ours, "answers")
    assert written == responses(theirs, "answers")
    assert any(text for (text,) in written)
    for task in TASKS:
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-4), (task, metric)
    assert ours["config"]["edgeport_target"] == "linux-x86_64-ort"


def test_what_can_not_be_asked_is_one_clear_error(bundle: Path, tmp_path: Path) -> None:
    from edgeport.harness import EdgeportLM

    with pytest.raises(BadInputError, match="no such folder"):
        EdgeportLM(str(tmp_path / "absent"))
    with pytest.raises(BadInputError, match="100 tokens are out of range") as caught:
        EdgeportLM(str(bundle), max_length=100)
    assert caught.value.allowed == f"2 to {CONTEXT}"
    model = EdgeportLM(str(bundle))

    class Request:
        def __init__(self, how: dict[str, Any]) -> None:
            self.args = ("the cat", how)

    with pytest.raises(BadInputError, match="num_beams=4"):
        model.generate_until([Request({"num_beams": 4, "until": []})], disable_tqdm=True)
    with pytest.raises(BadInputError, match="answers of 64 tokens"):
        model.generate_until([Request({"max_gen_toks": CONTEXT, "until": []})], disable_tqdm=True)
    (stopped,) = model.generate_until([Request({"max_gen_toks": 8, "until": ["e", "a", "t", " "]})], disable_tqdm=True)
    assert not set(stopped) & set("eat ")

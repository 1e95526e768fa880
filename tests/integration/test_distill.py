"""Distillation as a step of recipes: what it records, how it goes on, and what it refuses; on tiny random models."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from edgeport.bundle.read import read_bundle
from edgeport.compress.calibrate import as_tensors, calibration_samples
from edgeport.compress.cost import load_cost
from edgeport.compress.distill.checks import check_teacher
from edgeport.compress.distill.data import training_samples
from edgeport.compress.distill.lessons import Lessons
from edgeport.compress.distill.run import distil
from edgeport.compress.restructure import restructure
from edgeport.compression import CompressRequest, compress
from edgeport.data.corpus import answer_samples, corpus_samples
from edgeport.data.samples import SampleRecord, Samples
from edgeport.data.sources import rows_of_record
from edgeport.distilling import Distill
from edgeport.errors import BadInputError
from edgeport.job import ExportRequest
from edgeport.model.compressed import load_compressed
from edgeport.model.digest import state_digest
from edgeport.model.load import load_model
from edgeport.model.types import Model, Source, TensorSpec
from edgeport.pipeline import export
from edgeport.prepare import prepare
from edgeport.progress import Silent
from edgeport.recipe import Recipe
from edgeport.schema import parse_mapping
from edgeport.stages import stored
from edgeport.target import load_target
from edgeport.validate.suites.evaluate import learned_from

ORT = "linux-x86_64-ort"
BOARD = "raspberry-pi-5-executorch"
DEPTH = {"method": "prune_depth", "layers": 1}
WIDTH = {"method": "prune_width", "ffn": 0.5, "heads": 0.5}
INT8 = {"method": "rtn", "linear": "int8", "embedding": "int8", "activations": ["dynamic_int8", "float"]}


def recipe(*steps: dict[str, object]) -> Recipe:
    tables = {"calibration": {"samples": 8}, "gate": {}}
    return parse_mapping(Recipe, {"name": "chain", "summary": "x", "compress": list(steps), **tables}, "test")


def heal(**options: object) -> dict[str, object]:
    return {"method": "distill", "steps": 12, "checks": 4, "learning_rate": 0.003, **options}


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell's background jobs, and so the tests in one, ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """A hundred lines of pronounceable nonsense."""
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("aeioulmnrst"), 4)) for _ in range(40)]
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(" ".join(generator.choice(words, 30)) for _ in range(100)))
    return str(path)


def tokens(model: Model, count: int, length: int = 24) -> Samples:
    generator = np.random.default_rng(0)
    inputs = []
    for _ in range(count):
        ids = generator.integers(0, 128, (1, length))
        arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        inputs.append({spec.name: arrays[spec.name] for spec in model.inputs})
    return Samples(inputs, SampleRecord("random", False, {}, "all", None, count))


def outputs(model: Model, samples: Samples) -> list[torch.Tensor]:
    with torch.no_grad():
        found = [model.module(**{k: torch.from_numpy(v) for k, v in one.items()}) for one in samples.inputs]
    return [one[0] for one in found]


def test_prune_distil_prune_distil_quantize(tiny_model: Callable[[str], Path], texts: str, tmp_path: Path) -> None:
    """To the shipped file, with the records of every step; a second run finds it done."""
    data = {"texts": [texts], "sequence": 32, "samples": 60}
    steps = recipe(DEPTH, heal(data=data), WIDTH, heal(data=data, labels=0.5, divergence="jsd"), INT8)
    source = str(tiny_model("llama"))

    class Watch(Silent):
        def __init__(self) -> None:
            self.stages: list[str] = []
            self.lines: list[str] = []
            self.training = 0

        def stage(self, name: str, detail: str = "") -> None:
            self.stages.append(name)

        def update(self, done: int, total: int, detail: str = "") -> None:
            self.training += "training, loss" in detail

        def message(self, text: str) -> None:
            self.lines.append(text)

    watch = Watch()
    export(ExportRequest(source, load_target(ORT), steps, tmp_path / "bundle", samples=4, quick=True), watch)
    bundle = read_bundle(tmp_path / "bundle")
    assert [step.method for step in bundle.manifest.steps] == ["prune_depth", "distill", "prune_width", "distill"]
    assert watch.training == 24
    assert sum("held-out loss" in line for line in watch.lines) == 2
    first, second = (step.training for step in bundle.manifest.steps if step.method == "distill")
    assert first is not None
    assert second is not None
    original = load_model(source)
    for training in (first, second):
        assert training.teacher == "the model before the cuts"
        assert training.teacher_sha256 == state_digest(original.module)
        assert training.loss_after == min(loss for _, loss in training.held_out) < training.loss_before
        assert [step for step, _ in training.held_out] == [3, 6, 9, 12]
        assert training.steps == 12
        assert training.tokens == 12 * 4 * 32
        assert (training.inputs, training.inputs_held_out) == (48, 12)
        assert list(training.data.sha256) == ["corpus.txt"]
    depth, healed, width, last = bundle.manifest.steps
    assert healed.parameters_before == healed.parameters_after == depth.parameters_after
    assert last.parameters_after == width.parameters_after
    assert all(part.loss > 0 for part in healed.parts)
    assert bundle.evidence is not None
    assert bundle.evidence.weights.checked == bundle.evidence.weights.equal > 0
    again = Watch()
    request = CompressRequest(source, steps, tmp_path / "folder", target=load_target(ORT), samples=4)
    assert compress(request, again).steps[1].training.data_sha256 == first.data_sha256
    assert again.training == 0
    # Other texts are another training.
    Path(texts).write_text(Path(texts).read_text() + "\none more line")
    before = prepare(ExportRequest(source, load_target(ORT), steps, tmp_path / "no"), Silent())
    keys = before.restructure_key, before.compress_key
    Path(texts).write_text(Path(texts).read_text() + "\nand another")
    after = prepare(ExportRequest(source, load_target(ORT), steps, tmp_path / "no"), Silent())
    assert keys[0] != after.restructure_key
    assert keys[1] != after.compress_key
    board = prepare(ExportRequest(source, load_target(BOARD), steps, tmp_path / "no"), Silent())
    assert board.restructure_key == after.restructure_key  # what is trained for one target serves all
    assert board.lower_key != after.lower_key


def test_a_healed_folder_has_the_trained_weights(tiny_model: Callable[[str], Path], texts: str, tmp_path: Path) -> None:
    source = str(tiny_model("bert"))
    step = heal(hidden=1.0, relations=1.0, data={"texts": [texts], "samples": 60})
    chosen = recipe(DEPTH, step)
    result = compress(CompressRequest(source, chosen, tmp_path / "out", samples=4))
    model = load_model(source)
    inputs = as_tensors(model, calibration_samples(model, chosen))
    made = restructure(model, chosen, inputs)
    assert state_digest(load_compressed(tmp_path / "out").module) == state_digest(made.model.module)
    assert made.steps == result.steps
    # What another recipe finds done still counts as its cost.
    other = recipe(DEPTH, step, {"method": "rtn", "linear": "int8"})
    key = prepare(ExportRequest(source, load_target(ORT), other, tmp_path / "no", samples=4), Silent()).restructure_key
    trained = load_cost(stored("restructure", key)).cpu_seconds
    again = compress(CompressRequest(source, other, tmp_path / "other", samples=4))
    assert again.steps == result.steps
    assert again.cost.cpu_seconds > trained > 0
    cut = restructure(model, recipe(DEPTH), inputs).model
    assert state_digest(cut.module) != state_digest(made.model.module)
    # On texts that nothing learned from the healed model is nearer to the original.
    fresh = tokens(model, 10)
    wanted = outputs(model, fresh)

    def apart(one: Model) -> float:
        return sum(
            float((a - b).square().sum() / b.square().sum()) for a, b in zip(outputs(one, fresh), wanted, strict=True)
        )

    assert apart(made.model) < 0.5 * apart(cut)


def test_an_interrupted_export_goes_on(
    tiny_model: Callable[[str], Path], texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = str(tiny_model("bert")), tmp_path / "cache"
    chosen = recipe(DEPTH, heal(hidden=1.0, data={"texts": [texts], "samples": 40}))
    whole = compress(CompressRequest(source, chosen, tmp_path / "whole", samples=4))
    packages = Path(os.environ["EDGEPORT_CACHE"]) / "packages" if "EDGEPORT_CACHE" in os.environ else None
    if packages is not None and packages.exists():
        cache.mkdir()
        (cache / "packages").symlink_to(packages)
    monkeypatch.setenv("EDGEPORT_CACHE", str(cache))

    class Interrupts(Silent):
        done = 0

        def update(self, done: int, total: int, detail: str = "") -> None:
            if "training" in detail:
                self.done = done
                if done == 7:
                    os.kill(os.getpid(), signal.SIGINT)

    watch = Interrupts()
    with pytest.raises(KeyboardInterrupt):
        compress(CompressRequest(source, chosen, tmp_path / "out", samples=4), watch)
    assert watch.done == 7
    assert len(list((cache / "trainings").rglob("*.safetensors"))) == 1
    seen: list[int] = []
    watch.update = lambda done, total, detail="": seen.append(done) if "training" in detail else None  # type: ignore[method-assign]
    result = compress(CompressRequest(source, chosen, tmp_path / "out", samples=4), watch)
    assert seen == [8, 9, 10, 11, 12]
    assert result.files == whole.files
    assert list((cache / "trainings").iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "reverse_kl", "learning_rate": 3e-4},
        {"on_policy": 1.0, "divergence": "jsd", "temperature": 0.9, "new_tokens": 8, "learning_rate": 3e-4},
        {"policy_gradient": True, "divergence": "reverse_kl", "labels": 0.3, "new_tokens": 8, "learning_rate": 1e-3},
        {"hidden": 0.1, "relations": 1.0, "relation_pairs": ["qk", "vv"], "outputs": 0.0},
        {"precision": "mixed", "accumulate": 2, "freeze": ["*embed*", "lm_head*"]},
    ],
)
def test_every_way_of_teaching_a_language_model(tiny_model: Callable[[str], Path], options: dict[str, object]) -> None:
    model = load_model(str(tiny_model("llama")))
    cut = restructure(model, recipe({"method": "magnitude", "sparsity": 0.3}), [])
    step = Distill.model_validate(heal(**{"steps": 16, "checks": 8, "batch": 8, **options}))
    made, record = distil(cut.model, model, step, tokens(model, 40))
    assert record.loss_after < record.loss_before
    if step.policy_gradient:  # the one that draws most
        again, other = distil(cut.model, model, step, tokens(model, 40))
        assert record == other
        assert state_digest(made.module) == state_digest(again.module)
    assert not any(value.requires_grad for value in made.module.parameters())
    # Zeros stay zeros, what is frozen stays, and the given models are untouched.
    for name in cut.model.sparse:
        zeros = cut.model.module.get_parameter(name) == 0
        assert torch.equal(made.module.get_parameter(name) == 0, zeros)
    embeddings = [one.module.get_input_embeddings().weight for one in (made, cut.model)]
    assert torch.equal(*embeddings) == ("freeze" in options)
    assert state_digest(model.module) == state_digest(load_model(str(tiny_model("llama"))).module)


def conv_net(width: int) -> Model:
    torch.manual_seed(width)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(3, width, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(width, width, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(width, 5),
    )

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.layers(pixels)

    return Model(
        name="net",
        module=Net().eval().requires_grad_(False),
        source=Source("factory", f"net{width}", {}),
        task="image-classification",
        modality="image",
        inputs=(TensorSpec("pixels", "float32", (1, 3, 12, 12)),),
        outputs=(TensorSpec("logits", "float32", (1, 5)),),
        example={"pixels": torch.ones(1, 3, 12, 12)},
        huggingface=False,
    )


def test_a_conv_net_learns_features_logits_and_labels() -> None:
    teacher, student = conv_net(16), conv_net(8)
    generator = np.random.default_rng(0)
    inputs = [{"pixels": generator.standard_normal((1, 3, 12, 12)).astype(np.float32)} for _ in range(60)]
    with torch.no_grad():
        labels = tuple(int(teacher.module(torch.from_numpy(one["pixels"])).argmax()) for one in inputs)
    data = Samples(inputs, SampleRecord("random", False, {}, "all", None, 60), labels)
    step = Distill.model_validate(heal(steps=40, batch=8, features=1.0, labels=0.2, temperature=2.0))
    _, record = distil(student, teacher, step, data)
    assert record.loss_after < 0.95 * record.loss_before
    assert record.tokens is None
    assert record.parameters == sum(value.numel() for value in student.module.parameters())
    with pytest.raises(BadInputError, match="no true classes"):
        distil(student, teacher, step, Samples(inputs, data.record))
    with pytest.raises(BadInputError, match="none"):
        distil(student, teacher, step.model_copy(update={"hidden": 1.0}), data)


def test_teachers_that_do_not_fit(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    source = tiny_model("llama")
    config = LlamaConfig.from_pretrained(source)
    config.vocab_size += 8
    other = tmp_path / "other"
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    chosen = recipe(DEPTH, heal(teacher=str(other)))
    with pytest.raises(BadInputError, match="vocabularies differ") as error:
        prepare(ExportRequest(str(source), load_target(ORT), chosen, tmp_path / "out"), Silent())
    assert "prompts" in str(error.value.next_step)
    with pytest.raises(BadInputError, match="no model"):
        prepare(ExportRequest(str(source), load_target(ORT), recipe(heal(teacher="nothing")), tmp_path / "o"), Silent())
    model, step = load_model(str(source)), Distill.model_validate(heal())
    renamed = tmp_path / "tokenizer.json"
    table = json.loads(model.assets["tokenizer.json"].read_text())
    words = sorted(table["model"]["vocab"], key=table["model"]["vocab"].get)
    table["model"]["vocab"] = {word: index for index, word in enumerate([*words[1:], words[0]])}
    renamed.write_text(json.dumps(table))
    with pytest.raises(BadInputError, match="but other ones"):
        check_teacher(model, replace(model, assets={**model.assets, "tokenizer.json": renamed}), step)
    bert = load_model(str(tiny_model("bert")))
    with pytest.raises(BadInputError, match="has the inputs"):
        check_teacher(model, bert, step)


def test_a_larger_teacher_of_the_same_vocabulary(tiny_model: Callable[[str], Path], texts: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    source = tiny_model("llama")
    config = LlamaConfig.from_pretrained(source)
    config.hidden_size, config.num_hidden_layers = 96, 3
    other = tmp_path / "other"
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    step = heal(teacher=str(other), hidden=0.5, data={"texts": [texts], "sequence": 32, "samples": 60})
    result = compress(CompressRequest(str(source), recipe(step), tmp_path / "out", samples=4))
    training = result.steps[0].training
    assert training.teacher == str(other)
    assert (
        training.teacher_sha256
        == state_digest(load_model(str(other)).module)
        != state_digest(load_model(str(source)).module)
    )
    assert training.loss_after < training.loss_before
    # The matrix between the widths is no part of the student.
    assert load_compressed(tmp_path / "out").module.config.hidden_size == 64


def test_relations_need_no_equal_widths(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModel, BertConfig

    made = []
    for width, layers in ((64, 2), (48, 3)):
        config = BertConfig.from_pretrained(tiny_model("bert"))
        config.hidden_size, config.num_hidden_layers = width, layers
        torch.manual_seed(width)
        AutoModel.from_config(config).save_pretrained(tmp_path / str(width))
        made.append(load_model(str(tmp_path / str(width))))
    student, teacher = made
    alike = Distill.model_validate(heal(relations=1.0))
    with pytest.raises(BadInputError, match="gives last_hidden_state"):
        distil(student, teacher, alike, tokens(student, 30))
    _, record = distil(student, teacher, alike.model_copy(update={"outputs": 0.0}), tokens(student, 30))
    assert record.loss_after < 0.9 * record.loss_before


def test_an_encoder_decoder_learns(tiny_model: Callable[[str], Path]) -> None:
    model = load_model(str(tiny_model("t5")))
    generator = np.random.default_rng(0)
    inputs = [
        {
            "input_ids": (ids := generator.integers(2, 100, (1, length))),
            "attention_mask": np.ones_like(ids),
            "decoder_input_ids": generator.integers(2, 100, (1, 9)),
        }
        for length in [9, 9, 12, 15, 9, 12] * 4
    ]
    cut = restructure(model, recipe({"method": "magnitude", "sparsity": 0.6}), []).model
    data = Samples(inputs, SampleRecord("random", False, {}, "all", None, len(inputs)))
    _, record = distil(cut, model, Distill.model_validate(heal(learning_rate=3e-4)), data)
    assert record.loss_after < record.loss_before


def test_answers_of_a_command_are_learned(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Only the answers' tokens count, and a second run asks nobody."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"q": f"say {word}"}) for word in "abcdefghijklmnop"))
    script = tmp_path / "teacher.py"
    script.write_text("import sys; print(sys.stdin.read()[4:], 'is the cat in the hat')")
    asked = {"command": f"{sys.executable} {script}", "record": str(tmp_path / "answers.jsonl")}
    step = Distill.model_validate(
        heal(steps=30, labels=1.0, data={"prompts": [str(prompts)], "key": "q", "teacher": asked})
    )
    model = load_model(str(tiny_model("llama")))
    data = training_samples(model, model, step)
    script.unlink()
    assert training_samples(model, model, step).inputs[3]["input_ids"].tolist() == data.inputs[3]["input_ids"].tolist()
    assert data.record.samples == 16
    tokenizer = Tokenizer.from_file(str(model.assets["tokenizer.json"]))
    for letter, one in zip("abcdefghijklmnop", data.inputs, strict=True):
        ids, mask = one["input_ids"][0], one["answer_mask"][0].astype(bool)
        assert ids[mask][-1] == model.module.config.eos_token_id
        assert tokenizer.decode(ids[mask][:-1]).strip() == f"{letter} is the cat in the hat"
        assert tokenizer.decode(ids[~mask]).strip() == f"say {letter}"
    made, record = distil(model, model, step, data)
    assert record.loss_after < 0.8 * record.loss_before
    # The loss is the cross-entropy of the answers' tokens alone.
    held = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()[:3]
    total = 0.0
    with torch.no_grad():
        for index in held:
            one = {name: torch.from_numpy(value) for name, value in data.inputs[index].items()}
            mask = one.pop("answer_mask")[0, 1:].bool()
            logs = made.module(**one).logits[0, :-1].log_softmax(-1)
            total += float(-logs[mask, one["input_ids"][0, 1:][mask]].mean()) / 3
    assert record.loss_after == pytest.approx(total, rel=1e-3)


def test_prompts_in_a_chat_template(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_model(str(tiny_model("llama")))
    record = SampleRecord("asked", True, {}, "answers", None, 1)
    config = tmp_path / "tokenizer_config.json"
    chats = replace(model, assets={"tokenizer.json": model.assets["tokenizer.json"], "tokenizer_config.json": config})
    table = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(table))
    bare = replace(model, assets={"tokenizer.json": model.assets["tokenizer.json"]})
    for without in (bare, chats):
        with pytest.raises(BadInputError, match="no chat template"):
            answer_samples(without, ["the cat"], ["a hat"], record, chat=True)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}answer:"
    config.write_text(json.dumps({**table, "chat_template": template}))
    (one,) = answer_samples(chats, ["the cat"], ["a hat"], record, chat=True).inputs
    tokenizer = Tokenizer.from_file(str(model.assets["tokenizer.json"]))
    asked, told = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("[user]the cat;answer:", "a hat"))
    assert one["input_ids"][0].tolist() == [*asked, *told, model.module.config.eos_token_id]
    assert one["answer_mask"][0].tolist() == [0] * len(asked) + [1] * (len(told) + 1)


def test_files_become_windows_and_parts(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    llama, bert = (load_model(str(tiny_model(name))) for name in ("llama", "bert"))
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("the cat in the hat\n\n  \nthe hat")
    lines.write_text(json.dumps({"body": "a\u2028line " * 30}) + "\n\n" + json.dumps({"body": "cat"}))
    files = [str(plain), str(lines)]
    tokenizer = Tokenizer.from_file(str(llama.assets["tokenizer.json"]))
    every: list[int] = []
    for text in ("the cat in the hat", "the hat", "a\u2028line " * 30, "cat"):
        every += [*tokenizer.encode(text).ids, llama.module.config.eos_token_id]
    made = corpus_samples(llama, files, count=1000, key="body", sequence=16)
    rows = sorted(one["input_ids"][0].tolist() for one in made.inputs)
    assert rows == sorted(every[start : start + 16] for start in range(0, len(every) - 15, 16))
    assert len(corpus_samples(llama, files, count=3, key="body", sequence=16).inputs) == 3
    parts = corpus_samples(bert, files, count=1000, key="body", sequence=16)
    assert len(parts.inputs) > 4  # the long text is in parts
    assert max(one["input_ids"].shape[1] for one in parts.inputs) == 16
    assert all(one["attention_mask"].all() and not one["token_type_ids"].any() for one in parts.inputs)
    for files_given, words in (
        ([str(tmp_path / "none.txt")], "can't be read"),
        ([str(lines)], "key 'text'"),
    ):
        with pytest.raises(BadInputError, match=words):
            corpus_samples(llama, files_given, count=10)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(BadInputError, match="no text to learn from"):
        corpus_samples(llama, [str(empty)], count=10)
    with pytest.raises(BadInputError, match="shorter than one input"):
        corpus_samples(llama, [str(plain)], count=10, sequence=60)
    with pytest.raises(BadInputError, match="can't take 100000"):
        corpus_samples(llama, [str(plain)], count=10, sequence=100_000)
    with pytest.raises(BadInputError, match="can't learn from texts"):
        corpus_samples(conv_net(8), [str(plain)], count=10)


def test_what_was_learned_from_is_known_to_suites(tmp_path: Path) -> None:
    lines = tmp_path / "b.jsonl"
    lines.write_text(json.dumps({"body": "one text"}) + "\n" + json.dumps({"body": "another"}))
    of_files = recipe(heal(data={"texts": [str(lines), str(tmp_path / "gone.txt")], "key": "body"}))
    card = SampleRecord("web-excerpts", True, {}, "", None, 4)
    assert learned_from(of_files, "text", None) == {"one text", "another"}
    assert learned_from(recipe(heal(data={"generate": 4})), "text", None) == frozenset()
    assert learned_from(recipe(DEPTH), "text", None) == frozenset()
    assert learned_from(recipe(heal()), "text", None) == rows_of_record(card) != frozenset()
    assert learned_from(recipe(DEPTH), "text", card) == rows_of_record(card)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([INT8, heal()], "comes before"),
        ([heal(), {"method": "prune_vocabulary", "tokens": 300}], "comes first"),
        ([heal(outputs=0.0)], "nothing is learned"),
        ([heal(policy_gradient=True)], "reverse_kl"),
        ([heal(data={"texts": ["a"], "generate": 5})], "give one of"),
        ([heal(data={"prompts": ["a"]})], "belong together"),
        ([heal(data={"prompts": ["a"], "teacher": {"command": "x", "record": "r"}})], "labels a share"),
        ([heal(labels=1.0, data={"prompts": ["a"], "teacher": {"endpoint": "http://x", "record": "r"}})], "a model"),
        ([heal(relation_pairs=[])], "at least one"),
        ([heal(beta=0.1)], "beta changes nothing"),
        ([heal(new_tokens=5)], "new_tokens changes nothing"),
        ([heal(outputs=0.0, hidden=1.0, labels=0.5)], "labels changes nothing"),
        ([heal(temperature=0)], "greater than 0"),
    ],
)
def test_steps_that_make_no_sense(steps: list[dict[str, object]], words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        recipe(*steps)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("llama", {"freeze": ["nothing*"]}, "matches no parameter"),
        ("bert", {"on_policy": 0.5}, "does not write texts"),
        ("bert", {"features": 1.0}, "no feature maps"),
        ("bert", {"relations": 1.0, "relation_heads": 7}, "can't be cut into 7"),
        ("wav2vec2", {"relations": 1.0}, "does not know where"),
    ],
)
def test_steps_that_do_not_fit_the_model(
    tiny_model: Callable[[str], Path], name: str, options: dict[str, object], words: str
) -> None:
    model = load_model(str(tiny_model(name)))
    data = (
        tokens(model, 4)
        if name != "wav2vec2"
        else Samples(
            [{"input_values": np.zeros((1, 16000), np.float32)}] * 4, SampleRecord("zeros", False, {}, "all", None, 4)
        )
    )
    with pytest.raises(BadInputError, match=words):
        distil(model, model, Distill.model_validate(heal(**options)), data)


def test_too_little_data_and_models_that_are_broken(tiny_model: Callable[[str], Path]) -> None:
    model = load_model(str(tiny_model("llama")))
    with pytest.raises(BadInputError, match="held out"):
        distil(model, model, Distill.model_validate(heal()), tokens(model, 1))
    module = copy.deepcopy(model.module)
    with torch.no_grad():
        module.get_parameter("model.norm.weight").fill_(torch.nan)
    with pytest.raises(BadInputError, match="not finite"):
        distil(replace(model, module=module), model, Distill.model_validate(heal()), tokens(model, 8))


def test_a_teacher_writes_the_texts(tiny_model: Callable[[str], Path]) -> None:
    model = load_model(str(tiny_model("llama")))
    chosen = recipe(heal(steps=2, data={"generate": 6}))
    made = restructure(model, chosen, [], lessons=Lessons())
    (record,) = made.steps
    assert record.training is not None
    assert record.training.data.name == "generated"
    assert (record.training.inputs, record.training.inputs_held_out) == (5, 1)
    assert record.divergence is None

"""Suites: their definitions, their rows, and what is refused."""

import json
import re

import pytest

from edgeport.errors import BadInputError
from edgeport.schema import parse_mapping
from edgeport.validate.suites.definition import COLUMNS, Suite, load_suite, suite_names
from edgeport.validate.suites.evaluate import fits
from edgeport.validate.suites.readers import intents, passages, read_files
from edgeport.validate.suites.rows import check_answers, load_rows
from edgeport.validate.suites.traits import Traits

MINE = {
    "name": "mine",
    "title": "mine",
    "kind": "text_classification",
    "reader": "jsonl",
    "data": "rows.jsonl",
    "training": {"start": 0, "stop": 4},
    "evaluation": {"start": 4, "stop": 10},
}


def suite(**changes):
    return parse_mapping(Suite, {**MINE, **changes}, "mine.toml")


def write(tmp_path, rows, name="rows.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", suite_names())
def test_a_suite_that_comes_with_edgeport_says_where_its_rows_come_from(name):
    found, _ = load_suite(name)
    assert found.name == name
    assert found.package is not None
    assert found.licence
    assert found.source
    assert found.quick <= found.evaluation.stop - found.evaluation.start or found.kind in (
        "similarity",
        "image_classification",
    )


def test_there_is_a_suite_for_every_kind_but_a_users_own():
    assert {load_suite(name)[0].kind for name in suite_names()} == set(COLUMNS) - {"custom"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"start": 0, "stop": 5}}, "overlap"),
        ({"data": None}, "exactly one of 'data' and"),
        ({"kind": "custom"}, "'score' names the function"),
        ({"columns": {"sentence": "text"}}, "'columns' has 'sentence'"),
        ({"reader": "images"}, "pictures are read by"),
        ({"reader": "social_iqa"}, "must be one of jsonl, csv, images"),
        ({"evaluation": {"start": 7, "stop": 7}}, "must be greater"),
        ({"kind": "classification"}, "text_classification"),
    ],
)
def test_a_wrong_definition_is_one_clear_error(changes, message):
    with pytest.raises(BadInputError, match=re.escape(message)) as caught:
        suite(**changes)
    assert caught.value.where == "mine.toml"


def test_an_unknown_suite_names_the_known_ones():
    with pytest.raises(BadInputError, match="Did you mean 'sentiment'") as caught:
        load_suite("sentimet")
    assert "intents" in caught.value.allowed


def test_rows_are_each_once_shuffled_alike_and_cut_apart(tmp_path):
    rows = [{"text": f"text {number}", "label": number % 2} for number in range(12)]
    write(tmp_path, [*rows, *rows])
    first, second = (load_rows(suite(), tmp_path, quick=False) for _ in range(2))
    assert first == second
    evaluated, trained = ({row["text"] for row in part} for part in (first.evaluation, first.training))
    assert (len(evaluated), len(trained)) == (6, 4)
    assert not evaluated & trained
    assert [row["text"] for row in first.evaluation] != sorted(evaluated, key=lambda text: int(text.split()[1]))
    assert first.record.samples == 6
    few = load_rows(suite(quick=2), tmp_path, quick=True)
    assert few.evaluation == first.evaluation[:2]


def test_columns_take_the_names_that_the_data_has(tmp_path):
    (tmp_path / "rows.csv").write_text("sentence,mood\n" + "".join(f"line {n},{n % 2}\n" for n in range(10)))
    found = load_rows(
        suite(reader="csv", data="rows.csv", columns={"text": "sentence", "label": "mood"}), tmp_path, quick=False
    )
    assert set(found.evaluation[0]) == {"text", "label"}


def test_a_missing_column_names_those_that_there_are(tmp_path):
    write(tmp_path, [{"sentence": "a", "label": 0}])
    with pytest.raises(BadInputError, match="Row 1 lacks the column 'text'") as caught:
        load_rows(suite(), tmp_path, quick=False)
    assert caught.value.allowed == "label, sentence"


def test_no_suite_is_measured_on_what_was_calibrated_on(tmp_path):
    write(tmp_path, [{"text": f"Text  {number}", "label": number % 2} for number in range(10)])
    rows = load_rows(suite(), tmp_path, quick=False)
    seen, unseen = rows.evaluation[3]["text"].upper(), rows.training[0]["text"]
    assert load_rows(suite(), tmp_path, quick=False, calibration=[unseen, "another"]) == rows
    with pytest.raises(BadInputError, match="calibrated on"):
        load_rows(suite(), tmp_path, quick=False, calibration=[f" {seen} "])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"text": f"{n}", "label": 0} for n in range(4)], "'evaluation' is empty: there are 4 rows"),
        ([{"text": "  ", "label": 0}], "The text is empty"),
        ([["a", 0]], "line 1 is no JSON object"),
    ],
)
def test_rows_that_are_no_rows_are_one_clear_error(tmp_path, rows, message):
    write(tmp_path, rows)
    with pytest.raises(BadInputError, match=message):
        load_rows(suite(), tmp_path, quick=False)


def test_an_answer_that_is_no_choice_is_refused():
    rows = [{"prompt": "p", "choices": ["a", "b"], "answer": 2}]
    with pytest.raises(BadInputError, match="The answer 2 is out of range") as caught:
        check_answers(suite(), rows)
    assert caught.value.allowed == "0 to 1"


def test_pictures_take_their_class_from_their_folder_or_their_name(tmp_path):
    for name in ("dog/1.jpg", "cat/2.png", "cat/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert [(row["path"].name, row["label"]) for row in read_files("images", files)] == [("2.png", 0), ("1.jpg", 1)]
    assert [row["label"] for row in read_files("images", files[2:], r"([0-9]+)\.jpg")] == [1]
    with pytest.raises(BadInputError, match=r"2\.png does not match"):
        read_files("images", files, r"([0-9]+)\.jpg")


def test_templates_of_intents_become_sentences(tmp_path):
    book = {
        "expansion_rules": {"turn": "(turn|switch) [the]"},
        "lists": {"name": {"wildcard": True}, "colour": {"values": [{"in": "(dark|light) red", "out": "red"}, "blue"]}},
        "intents": {
            "On": {"data": [{"sentences": ["<turn> {name} on"]}]},
            "Paint": {"data": [{"sentences": ["paint it {colour}"]}]},
        },
    }
    (tmp_path / "en.json").write_text(json.dumps(book))
    rows = list(intents(tmp_path / "en.json"))
    assert rows == list(intents(tmp_path / "en.json"))
    by_label = {label: [row["text"] for row in rows if row["label"] == label] for label in ("On", "Paint")}
    assert all(re.fullmatch(r"(turn|switch)( the)? [a-z ]+ on", text) for text in by_label["On"])
    assert {text.split()[0] for text in by_label["On"]} == {"turn", "switch"}
    assert set(by_label["Paint"]) <= {"paint it dark red", "paint it light red", "paint it blue"}
    assert len(by_label["Paint"]) >= 2


def test_passages_are_whole_sentences(tmp_path):
    sentence = "This sentence has exactly eight words in it."
    write(tmp_path, [{"type": "c4", "text": " ".join([sentence] * 20)}, {"type": "oscar", "text": sentence * 20}])
    found = [row["text"] for row in passages(tmp_path / "rows.jsonl")]
    assert found == [" ".join([sentence] * 8)] * 2


@pytest.mark.parametrize(
    ("task", "names"),
    [
        ("feature-extraction", {"intents", "sentiment", "similarity", "smart-reply"}),
        ("text-generation-with-past", {"commonsense", "language", "next-word"}),
        ("text-classification", {"intents", "sentiment"}),
        ("image-classification", set()),  # it does not say how pictures are prepared
        ("automatic-speech-recognition", set()),
    ],
)
def test_which_suites_fit_a_model(tmp_path, task, names):
    traits = Traits(task, tmp_path / "tokenizer.json")
    assert {name for name in suite_names() if fits(load_suite(name)[0], traits)} == names

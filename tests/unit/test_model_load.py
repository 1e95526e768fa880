"""What a MODEL may be written as: everything else is refused before anything is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgeport.errors import BadInputError
from edgeport.model.load import load_model, short_name


@pytest.mark.parametrize("reference", ["", "nothing", "./no/such/folder", "/no/such/folder", "a b", "C:model", "a/b/c"])
def test_references_that_name_nothing(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPORT_OFFLINE", "1")
    with pytest.raises(BadInputError):
        load_model(reference)


def test_a_path_with_a_typo_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInputError, match="There is no model 'models/bret'"):
        load_model("models/bret")


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x07")
    with pytest.raises(BadInputError, match="no model that edgeport can read") as caught:
        load_model(str(path))
    assert "zoo:NAME" in (caught.value.allowed or "")


def test_example_inputs_only_go_with_factories(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="Example inputs are only taken with"):
        load_model("zoo:minilm", example_inputs=tmp_path / "a.npz")


def test_zoo_names_are_checked_and_corrected() -> None:
    with pytest.raises(BadInputError, match="Did you mean 'minilm'") as caught:
        load_model("zoo:minilmm")
    assert "zoo:efficientnet-lite0" in (caught.value.allowed or "")


@pytest.mark.parametrize(
    ("text", "expected"), [("My Model_v2", "my-model-v2"), ("SmolLM2.Q4_1", "smollm2.q4-1"), ("..", "model")]
)
def test_short_names_can_name_files(text: str, expected: str) -> None:
    assert short_name(text) == expected


def test_listing_the_zoo_and_the_cards_needs_no_torch() -> None:
    code = (
        "import sys; from edgeport.model.zoo import zoo_entries; from edgeport.data.cards import card_names, load_card;"
        "import edgeport.model.load; zoo_entries(); [load_card(n) for n in card_names()];"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

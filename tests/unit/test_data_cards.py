"""Data cards: strict, with slices that never overlap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeport.data.cards import Card, card_names, load_card
from edgeport.errors import BadInputError
from edgeport.schema import parse_mapping

VALUE: dict[str, Any] = {
    "name": "toy",
    "title": "Toy texts",
    "kind": "text",
    "licence": "CC0-1.0",
    "source": "a.jsonl",
    "unit": "rows",
    "text": {"key": "0"},
    "splits": {"parity": {"start": 0, "stop": 5}, "calibration": {"start": 5, "stop": 9}},
    "package": {"name": "toy", "version": "1.0", "sha256": "0" * 64, "size_mb": 1, "members": {"a.jsonl": "0" * 64}},
}


def test_every_card_of_the_installation_is_valid_and_pinned() -> None:
    cards = {name: load_card(name) for name in card_names()}
    assert {card.kind for card in cards.values()} == {"text", "image", "audio"}
    for name, card in cards.items():
        assert card.name == name
        assert card.package.members


def test_the_recording_and_its_transcript_are_members() -> None:
    card = load_card("conversation")
    assert card.audio is not None
    assert {card.audio.recording, card.audio.transcript} == set(card.package.members)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"splits": {"parity": {"start": 0, "stop": 6}, "calibration": {"start": 5, "stop": 9}}}, "overlap"),
        ({"splits": {"parity": {"start": 5, "stop": 5}, "calibration": {"start": 6, "stop": 9}}}, "greater than"),
        ({"kind": "image"}, r"needs a table \[image\]"),
        ({"kind": "video"}, "kind"),
        ({"licens": "MIT"}, "Did you mean 'licence'"),
        ({"licence": None}, "licence"),
    ],
)
def test_wrong_cards_are_refused(changes: dict[str, Any], match: str) -> None:
    parse_mapping(Card, VALUE, "toy.toml")
    with pytest.raises(BadInputError, match=match):
        parse_mapping(Card, {**VALUE, **changes}, "toy.toml")


def test_unknown_cards_and_files_that_are_no_toml(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="Did you mean 'web-excerpts'"):
        load_card("web-excerpt")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(BadInputError, match="not valid TOML"):
        load_card(str(tmp_path / "bad.toml"))

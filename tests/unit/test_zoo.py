"""The zoo's list: every entry is pinned whole and says what it is."""

from __future__ import annotations

from edgeport.model.zoo import zoo_entries, zoo_entry


def test_the_zoo_holds_the_documented_models() -> None:
    names = [entry.name for entry in zoo_entries()]
    assert names[:4] == ["minilm", "efficientnet-lite0", "mobilenetv2", "smollm2"]
    assert names[4:] == ["whisper-tiny.en", "silero-vad", "nano-ocr"]
    assert zoo_entry("zoo:minilm") == zoo_entry("minilm")


def test_what_is_loaded_is_among_the_pinned_members() -> None:
    for entry in zoo_entries():
        assert any(m == entry.entry or m.startswith(f"{entry.entry}/") for m in entry.package.members), entry.name
        for package in entry.packages:
            assert len(package.sha256) == 64
            assert not any(member.endswith((".bin", ".pth")) and len(d) != 64 for member, d in package.members.items())


def test_rounded_checkpoints_say_so() -> None:
    assert "4 bits" in (zoo_entry("smollm2").note or "")
    assert "float16" in (zoo_entry("whisper-tiny.en").note or "")

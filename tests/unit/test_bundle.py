"""A bundle: round trip, the chain of hashes, and every way in which writing or reading one is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from edgeport.bundle.golden import Golden
from edgeport.bundle.manifest import (
    AxisEntry,
    ImageEntry,
    LayerEntry,
    Manifest,
    SettingsEntry,
    SourceEntry,
    TensorEntry,
    check_relative,
)
from edgeport.bundle.read import read_bundle, verify_files
from edgeport.bundle.write import Contents, check_destination, evidence_text, write_bundle
from edgeport.compress import LayerRecord, apply_recipe
from edgeport.errors import BadInputError
from edgeport.export.artifact import Artifact, LoweringSettings
from edgeport.model.types import Axis, ImagePreprocessing, Model, Source, TensorSpec
from edgeport.recipe import load_recipe
from edgeport.report import render_report
from edgeport.schema import Strict
from edgeport.storage import hash_bytes, hash_file
from edgeport.target import load_target
from edgeport.validate.evidence import DataRecord, Evidence, Machine, Size, States, Verdict

DATA = DataRecord(
    name="numbers", real=True, sha256={"numbers.txt": "0" * 64}, slice="all", licence="CC0-1.0", samples=2
)
EVIDENCE = Evidence(
    measured_at="2026-01-02T03:04:05Z",
    machine=Machine(platform="Linux", cpu="a cpu", cores=2, memory_gb=8, python="3.11", versions={}),
    states=States(lowered="yes", executed_here="none", numerics_verified="no", statement="</script> Not run."),
    data=DATA,
    parity=(),
    weights=None,
    size=Size(bytes=100, baseline_bytes=None, ratio=None),
    latency=None,
    memory=None,
    verdict=Verdict(passed=False, exit_code=15, checks=()),
)
AXES = (Axis("batch", 1, 8, 1), 8)


def make_contents(folder: Path) -> Contents:
    """What a two-layer model gives, with stand-ins for the files that a backend would write."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)).eval()
    (folder / "artifact/model.mlpackage/Data").mkdir(parents=True)
    (folder / "artifact/model.mlpackage/Manifest.json").write_text("{}")
    (folder / "artifact/model.mlpackage/Data/weight.bin").write_bytes(bytes(range(256)))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    inputs = (TensorSpec("x", "float32", AXES),)
    outputs = (TensorSpec("y", "float32", (AXES[0], 4)),)
    model = Model(
        name="tiny",
        module=module,
        source=Source("factory", "package.module:make", {"make.py": "1" * 64}, "MIT", "a note"),
        task="feature-extraction",
        modality="other",
        inputs=inputs,
        outputs=outputs,
        example={"x": torch.zeros(1, 8)},
        huggingface=False,
        assets={"tokenizer/tokenizer.json": folder / "tokenizer.json"},
        image=ImagePreprocessing((8, 8), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 1 / 255),
        labels=("cat", "dog"),
    )
    recipe, target = load_recipe("int8"), load_target("ios18-coreml")
    _, layers = apply_recipe(model, recipe, target)
    samples = [torch.full((1, 8), float(value)) for value in range(6)]
    artifact = Artifact(
        runtime="coreml",
        delegate="coreml",
        root=folder / "artifact",
        entry="model.mlpackage",
        inputs=inputs,
        outputs=outputs,
        weights={layer.name: f"{layer.name}_stored" for layer in layers},
        facts={"operators": {"linear": 2}},
    )
    with torch.inference_mode():
        golden = Golden(
            inputs=tuple({"x": sample.numpy()} for sample in samples),
            outputs=tuple({"y": module(sample).numpy()} for sample in samples),
        )
    settings = LoweringSettings(precision="fp16", shapes="dynamic")
    return Contents(model, recipe, target, settings, artifact, layers, golden, EVIDENCE, {"torch": "2.13.0"})


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> Contents:
    return make_contents(tmp_path_factory.mktemp("contents"))


@pytest.fixture(scope="module")
def written(contents: Contents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "out", contents, render=render_report)


@pytest.fixture
def bundle(written: Path, tmp_path: Path) -> Path:
    """A bundle of the test's own, to damage."""
    return Path(shutil.copytree(written, tmp_path / "out"))


def test_round_trip(bundle: Path, contents: Contents) -> None:
    found = read_bundle(bundle)
    verify_files(found)
    assert found.artifact == dataclasses.replace(contents.artifact, root=bundle / "model")
    assert found.artifact.path.is_dir()
    assert found.manifest.recipe == contents.recipe
    assert found.manifest.target == contents.target
    assert found.manifest.parameters == 8 * 16 + 16 + 16 * 4 + 4
    assert [layer.model_dump() for layer in found.manifest.layers] == [dataclasses.asdict(r) for r in contents.layers]
    assert found.manifest.source.model_dump() == dataclasses.asdict(contents.model.source)
    assert found.evidence is not None
    assert found.evidence.manifest_sha256 == hash_file(bundle / "manifest.json")
    assert found.evidence.states == EVIDENCE.states
    assert (bundle / "model/model.mlpackage/Data/weight.bin").read_bytes() == bytes(range(256))
    assert (bundle / "assets/tokenizer/tokenizer.json").read_text() == '{"a": 1}'


def test_every_file_is_in_the_manifest(bundle: Path) -> None:
    written = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    files = read_bundle(bundle).manifest.files
    assert written == set(files) | {"manifest.json", "evidence.json", "report.html"}
    assert all(entry.sha256 == hash_file(bundle / name) for name, entry in files.items())
    assert all(entry.bytes == (bundle / name).stat().st_size for name, entry in files.items())
    assert {(bundle / name).stat().st_mode & 0o777 for name in written} == {0o644}


@pytest.mark.parametrize(
    ("entry", "core"),
    [
        (LayerEntry, LayerRecord),
        (SettingsEntry, LoweringSettings),
        (SourceEntry, Source),
        (TensorEntry, TensorSpec),
        (AxisEntry, Axis),
        (ImageEntry, ImagePreprocessing),
    ],
)
def test_the_schema_mirrors_the_core_types(entry: type[Strict], core: type) -> None:
    assert list(entry.model_fields) == [field.name for field in dataclasses.fields(core)]


def test_golden_vectors_are_the_first_samples_of_the_torch_model(bundle: Path, contents: Contents) -> None:
    golden = read_bundle(bundle).golden()
    assert len(golden.inputs) == 4
    assert golden.artifact_outputs == ()
    for given, expected in zip(golden.inputs, golden.outputs, strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(
                contents.model.module(torch.from_numpy(given["x"])).numpy(), expected["y"], rtol=0, atol=0
            )
    assert load_file(bundle / "golden/inputs.safetensors").keys() == {f"{i:04d}/x" for i in range(4)}


def test_golden_vectors_stay_small_but_never_empty() -> None:
    large = {"y": np.zeros((5, 1024, 1024), np.float32)}  # 20 MiB
    few = Golden(({"x": np.zeros(1)},) * 3, (large,) * 3, (large,) * 3).first()
    assert (len(few.inputs), len(few.outputs), len(few.artifact_outputs)) == (1, 1, 1)
    assert len(Golden(({"x": np.zeros(1)},) * 3, (large,) * 3).first().inputs) == 1
    assert len(Golden(({"x": np.zeros(1)},) * 9, ({"y": np.zeros(1)},) * 9).first().inputs) == 4


def test_another_time_and_machine_change_evidence_and_its_block_alone(contents: Contents, tmp_path: Path) -> None:
    first = write_bundle(tmp_path / "first", contents, render=render_report)
    later = EVIDENCE.model_copy(update={"measured_at": "2030-01-01T00:00:00Z"})
    second = write_bundle(
        tmp_path / "elsewhere/second", dataclasses.replace(contents, evidence=later), render=render_report
    )
    for path in sorted(p for p in first.rglob("*") if p.is_file() and p.name not in ("evidence.json", "report.html")):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path
    texts = [(b / "report.html").read_bytes().replace((b / "evidence.json").read_bytes(), b"") for b in (first, second)]
    assert texts[0] == texts[1]
    assert (first / "evidence.json").read_bytes() != (second / "evidence.json").read_bytes()
    assert hash_bytes(texts[0]) == read_bundle(first).manifest.report_shell_sha256


def test_nothing_of_the_machine_is_in_the_manifest(bundle: Path, contents: Contents) -> None:
    text = (bundle / "manifest.json").read_text()
    assert str(contents.artifact.root) not in text
    assert EVIDENCE.measured_at not in text
    assert EVIDENCE.machine.cpu not in text


def test_evidence_can_stand_in_a_script_element(bundle: Path) -> None:
    text = (bundle / "evidence.json").read_text()
    assert "<" not in text
    assert json.loads(text)["states"]["statement"] == "</script> Not run."
    assert text in (bundle / "report.html").read_text()
    assert "<" not in evidence_text(EVIDENCE)


def test_reading_a_bundle_needs_no_torch(bundle: Path) -> None:
    program = (
        "import sys, pathlib\nfrom edgeport.bundle.read import read_bundle, verify_files\n"
        f"verify_files(read_bundle(pathlib.Path({str(bundle)!r})))\n"
        "print(sorted({'torch', 'onnx', 'coremltools', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_append, _flip, Path.unlink], ids=["longer", "one bit", "missing"])
@pytest.mark.parametrize(
    "name",
    [
        "model/model.mlpackage/Data/weight.bin",
        "model/model.mlpackage/Manifest.json",
        "assets/tokenizer/tokenizer.json",
        "golden/inputs.safetensors",
        "golden/outputs.safetensors",
    ],
)
def test_a_changed_or_missing_file_is_found(bundle: Path, name: str, damage: Callable[[Path], None]) -> None:
    expected = read_bundle(bundle).manifest.files[name]
    damage(bundle / name)
    with pytest.raises(BadInputError, match="tampered with or damaged") as caught:
        verify_files(read_bundle(bundle))
    assert caught.value.where == str(bundle / name)
    assert name in caught.value.what
    if damage is _flip:
        assert expected.sha256 in caught.value.what
        assert hash_file(bundle / name) in caught.value.what
    if damage is _append:
        assert f"{expected.bytes + 1:,} bytes" in caught.value.what


@pytest.mark.parametrize("name", ["model/extra.bin", ".hidden", "assets/new/deep.txt"])
def test_an_extra_file_is_found(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("x")
    with pytest.raises(BadInputError, match=f"{name} is not in the manifest"):
        verify_files(read_bundle(bundle))


def test_a_link_is_refused_even_to_the_right_content(bundle: Path, tmp_path: Path) -> None:
    target = bundle / "model/model.mlpackage/Data/weight.bin"
    shutil.move(target, tmp_path / "weight.bin")
    target.symlink_to(tmp_path / "weight.bin")
    with pytest.raises(BadInputError, match="neither a file nor a folder"):
        verify_files(read_bundle(bundle))


def test_a_pipe_is_refused_and_not_read(bundle: Path) -> None:
    os.mkfifo(bundle / "model/pipe")
    with pytest.raises(BadInputError, match="neither a file nor a folder"):
        verify_files(read_bundle(bundle))


def _edit(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_an_edited_manifest_is_found(bundle: Path) -> None:
    _edit(bundle / "manifest.json", lambda value: value.update(name="other"))
    with pytest.raises(BadInputError, match=r"manifest\.json has sha256"):
        verify_files(read_bundle(bundle))


def test_edited_evidence_is_found(bundle: Path) -> None:
    _edit(bundle / "evidence.json", lambda value: value["verdict"].update(passed=True))  # type: ignore[attr-defined]
    with pytest.raises(BadInputError, match=r"report\.html does not hold the very text of evidence\.json"):
        verify_files(read_bundle(bundle))


def test_an_edited_report_is_found(bundle: Path) -> None:
    report = bundle / "report.html"
    report.write_text(report.read_text().replace("tiny", "best", 1))
    with pytest.raises(BadInputError, match=r"report\.html without its evidence has sha256"):
        verify_files(read_bundle(bundle))


def test_a_bundle_without_evidence_can_be_read(bundle: Path) -> None:
    (bundle / "evidence.json").unlink()
    (bundle / "report.html").unlink()
    found = read_bundle(bundle)
    verify_files(found)
    assert found.evidence is None


@pytest.mark.parametrize("version", [2, 0, None, "1"])
def test_another_schema_version_is_refused(bundle: Path, version: object) -> None:
    _edit(bundle / "manifest.json", lambda value: value.update(schema_version=version))
    with pytest.raises(BadInputError, match="schema version") as caught:
        read_bundle(bundle)
    assert caught.value.allowed == "1"


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/passwd", "model/../../x", "model//x", "model/./x", "a\\b", "C:/x", "", "model/\n"]
)
def test_a_path_that_escapes_is_refused(bundle: Path, path: str) -> None:
    def plant(value: dict[str, object]) -> None:
        value["files"][path] = {"sha256": "0" * 64, "bytes": 1}  # type: ignore[index]

    with pytest.raises(ValueError, match=r"path|leaves"):
        check_relative(path)
    _edit(bundle / "manifest.json", plant)
    with pytest.raises(BadInputError, match="files"):
        read_bundle(bundle)


@pytest.mark.parametrize("entry", ["../model.onnx", "model/../../x", "golden/inputs.safetensors"])
def test_an_entry_outside_the_model_folder_is_refused(bundle: Path, entry: str) -> None:
    _edit(bundle / "manifest.json", lambda value: value.update(entry=entry))
    with pytest.raises(BadInputError, match="entry"):
        read_bundle(bundle)


def test_an_unknown_or_missing_key_is_named(bundle: Path) -> None:
    _edit(bundle / "manifest.json", lambda value: value.update(nmae="x"))
    with pytest.raises(BadInputError, match="Did you mean 'name'"):
        read_bundle(bundle)
    _edit(bundle / "manifest.json", lambda value: (value.pop("nmae"), value.pop("task")))
    with pytest.raises(BadInputError, match="'task' is missing"):
        read_bundle(bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_manifest_that_is_no_json_object_is_refused(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(BadInputError):
        read_bundle(bundle)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no such folder"):
        read_bundle(tmp_path / "nowhere")
    with pytest.raises(BadInputError, match=r"no manifest\.json"):
        read_bundle(tmp_path)


def test_damaged_golden_vectors_are_refused(bundle: Path) -> None:
    (bundle / "golden/outputs.safetensors").write_bytes(b"\x08")
    with pytest.raises(BadInputError, match="golden vectors can't be read"):
        read_bundle(bundle).golden()


def test_an_existing_folder_needs_force(bundle: Path, contents: Contents) -> None:
    (bundle / "of the user").write_text("kept until replaced")
    with pytest.raises(BadInputError, match="exists already") as caught:
        write_bundle(bundle, contents, render=render_report)
    assert "--force" in str(caught.value)
    assert (bundle / "of the user").is_file()
    write_bundle(bundle, contents, render=render_report, force=True)
    verify_files(read_bundle(bundle))
    assert not (bundle / "of the user").exists()
    assert [path.name for path in bundle.parent.iterdir() if path.name.startswith(".")] == []


def test_force_never_replaces_a_folder_of_something_else(tmp_path: Path, contents: Contents) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(BadInputError, match="is no bundle"):
            write_bundle(tmp_path / "home", contents, render=render_report, force=force)
    assert (tmp_path / "home/thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path, contents: Contents) -> None:
    (tmp_path / "empty").mkdir()
    verify_files(read_bundle(write_bundle(tmp_path / "empty", contents, render=render_report)))


def test_a_file_in_the_place_of_the_output_or_its_parent_is_refused(tmp_path: Path, contents: Contents) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInputError, match="is a file"):
        write_bundle(tmp_path / "file", contents, render=render_report, force=True)
    with pytest.raises(BadInputError, match="Not a directory") as caught:
        check_destination(tmp_path / "file/deep/out", force=False)
    assert caught.value.where == str(tmp_path / "file")


def test_a_place_that_takes_no_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="can't be written"):
        check_destination(Path("/proc/edgeport/out"), force=False)
    check_destination(tmp_path / "deep/out", force=False)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1234))
    with pytest.raises(BadInputError, match=r"needs [\d,]+ bytes, 1,234 are free"):
        write_bundle(tmp_path / "out", contents, render=render_report)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_nothing_behind(
    tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, destination: Path) -> None:
        raise OSError(28, "No space left on device", str(destination))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(BadInputError, match="No space left on device"):
        write_bundle(tmp_path / "out", contents, render=render_report)
    assert list(tmp_path.iterdir()) == []


def test_an_asset_whose_name_escapes_is_refused(tmp_path: Path, contents: Contents) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    model = dataclasses.replace(contents.model, assets={"../evil": tmp_path / "tokenizer.json"})
    with pytest.raises(BadInputError, match="bad name"):
        write_bundle(tmp_path / "out", dataclasses.replace(contents, model=model), render=render_report)
    assert not (tmp_path / "evil").exists()


def test_the_manifest_survives_json(bundle: Path) -> None:
    manifest = read_bundle(bundle).manifest
    assert Manifest.model_validate(json.loads(json.dumps(manifest.to_json()))) == manifest

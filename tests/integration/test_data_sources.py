"""Calibration data of the user's own: read as it lies, on record by its hash, and in the key of the stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as T
from PIL import Image

from edgeport.cli.main import main
from edgeport.compress.calibrate import calibration_samples
from edgeport.data.images import open_image, preprocess_image
from edgeport.data.sources import rows_of, rows_of_record, source_samples
from edgeport.errors import BadInputError
from edgeport.job import ExportRequest
from edgeport.model.load import load_model
from edgeport.model.types import Model
from edgeport.prepare import prepare
from edgeport.progress import Silent
from edgeport.recipe import calibrated_on, load_recipe
from edgeport.sourcing import DataSource
from edgeport.storage import hash_file
from edgeport.target import load_target

GPTQ = '[[compress]]\nmethod = "gptq"\nlinear = "int8"\n'


@pytest.fixture(scope="module")
def sees(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of a tiny ViT."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    T.ViTForImageClassification(T.ViTConfig(**small, image_size=32, patch_size=8)).save_pretrained(folder)
    T.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with three pictures, one of them a folder deeper."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3)).astype(np.uint8)
    for name, values in zip(("a.png", "b.PNG", "deep/c.webp"), pixels, strict=True):
        Image.fromarray(values).save(folder / name)
    (folder / "notes.md").write_text("no picture")
    return folder


def recipe_file(folder: Path, table: str) -> str:
    path = folder / "mine.toml"
    path.write_text(f'name = "mine"\nsummary = "x"\n{GPTQ}[calibration]\n{table}\n[gate]\n')
    return str(path)


def test_pictures_of_a_folder_are_what_the_model_is_tuned_on(sees: str, photos: Path, tmp_path: Path) -> None:
    model = load_model(sees)
    assert model.image is not None
    recipe = load_recipe(recipe_file(tmp_path, f"pictures = [{json.dumps(str(photos))}]"))
    found = calibration_samples(model, recipe)
    files = [photos / name for name in ("a.png", "b.PNG", "deep/c.webp")]
    expected = {preprocess_image(open_image(path), model.image).tobytes() for path in files}
    assert len(found.inputs) == 6  # mirrored ones make up for what is asked and not there
    assert {call["pixel_values"].tobytes() for call in found.inputs[:3]} == expected
    assert set(found.record.sha256.values()) == {hash_file(path) for path in files}
    assert found.record.real
    assert rows_of(recipe.calibration, "image") == rows_of_record(found.record) == set(found.record.sha256.values())
    elsewhere = DataSource(pictures=("gone",)), DataSource(texts=("gone.txt",)), DataSource(card="gone.toml")
    assert {rows_of(source, "image") for source in elsewhere} == {frozenset()}


def test_a_changed_file_changes_the_key_of_what_is_made(sees: str, photos: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, f"pictures = [{json.dumps(str(photos / 'a.png'))}]"))
    target = load_target("linux-x86_64-ort")
    request = ExportRequest(model=sees, target=target, recipe=recipe, output=tmp_path / "out")

    def key() -> str:
        return prepare(request, Silent()).compress_key

    before = key()
    assert key() == before
    Image.open(photos / "b.PNG").save(photos / "a.png")
    assert key() != before


def test_a_targets_largest_batch_is_not_in_the_key_of_what_methods_see(sees: str, tmp_path: Path) -> None:
    server, board = (
        prepare(
            ExportRequest(model=sees, target=load_target(name), recipe=load_recipe("int4"), output=tmp_path / "out"),
            Silent(),
        )
        for name in ("linux-x86_64-ort", "raspberry-pi-5-executorch")
    )
    assert server.model_key != board.model_key  # the board takes one picture at a time
    assert server.tuned_key == board.tuned_key


def test_sources_that_do_not_fit(sees: str, photos: Path, tmp_path: Path) -> None:
    model = load_model(sees)
    texts = tmp_path / "texts.txt"
    texts.write_text("a text\n")
    with pytest.raises(BadInputError, match="can't learn from texts"):
        source_samples(model, DataSource(texts=(str(texts),)), count=4)
    with pytest.raises(BadInputError, match="The data is text, the model takes image"):
        source_samples(model, DataSource(card="web-excerpts"), count=4)
    with pytest.raises(BadInputError, match="no pictures"):
        source_samples(model, DataSource(pictures=(str(tmp_path / "gone"),)), count=4)
    broken = photos / "broken.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(BadInputError, match="can't be read"):
        source_samples(model, DataSource(pictures=(str(photos),)), count=4)
    with pytest.raises(BadInputError, match="does not say how they are prepared"):
        source_samples(without_preparation(model), DataSource(pictures=(str(photos / "a.png"),)), count=4)


def without_preparation(model: Model) -> Model:
    return replace(model, image=None)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('card = "web-excerpts"\ntexts = ["a.txt"]', "give one of card and texts"),
        ('source = "generated"\npictures = ["a"]', 'either source = "generated" or pictures'),
        ("sequence = 8", "sequence is about texts"),
    ],
)
def test_tables_that_contradict_themselves(tmp_path: Path, table: str, words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        load_recipe(recipe_file(tmp_path, table))


def test_the_command_line_recognises_what_it_is_given(photos: Path) -> None:
    gptq = load_recipe("int4")
    assert calibrated_on(gptq, []) is gptq
    assert calibrated_on(gptq, ["a.jsonl", "b.txt"]).calibration.texts == ("a.jsonl", "b.txt")
    assert calibrated_on(gptq, [str(photos), "x.jpg"]).calibration.pictures == (str(photos), "x.jpg")
    assert calibrated_on(gptq, ["cutouts"]).calibration.card == "cutouts"
    assert calibrated_on(gptq, ["cutouts"]).calibration.samples == gptq.calibration.samples
    for wrong in (["a.txt", "b.png"], ["cutouts", "web-excerpts"], ["song.mp3"]):
        with pytest.raises(BadInputError, match="no single source") as caught:
            calibrated_on(gptq, wrong)
        assert caught.value.where == "--calibration"
    with pytest.raises(BadInputError, match="looks at it"):
        calibrated_on(load_recipe("int8"), ["a.txt"])


def test_compress_takes_it_and_says_so(sees: str, photos: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "gptq.toml"
    recipe.write_text(f'name = "mine"\nsummary = "x"\n{GPTQ}[gate]\n')
    out = tmp_path / "out"
    words = ["compress", sees, "-r", str(recipe), "-o", str(out), "--calibration", str(photos), "--samples", "4"]
    assert main([*words, "--json"]) == 0
    record = json.loads((out / "edgeport.json").read_text())
    assert record["recipe"]["calibration"]["pictures"] == [str(photos)]
    assert record["calibration"]["name"] == "pictures"
    assert set(record["calibration"]["sha256"].values()) == set(
        map(hash_file, map(Path, record["calibration"]["sha256"]))
    )

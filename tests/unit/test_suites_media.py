"""Suites of recordings and drawn pictures: how rows are made, read and refused, and the error rates."""

from __future__ import annotations

import itertools
import json
import wave
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from edgeport.data.audio import RATE, Recording, pink_noise, read_speech, speech_intervals
from edgeport.data.rendered import Rendered
from edgeport.errors import BadInputError
from edgeport.schema import parse_mapping
from edgeport.storage import hash_file
from edgeport.validate.suites.definition import Suite
from edgeport.validate.suites.kinds.edits import edits, words
from edgeport.validate.suites.kinds.voice_activity import area, frames_within
from edgeport.validate.suites.made import drawn_words, spoken_dates
from edgeport.validate.suites.readers import read_files
from edgeport.validate.suites.rows import load_rows


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE, width: int = 2, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes() if width == 2 else bytes(len(samples)))
    return path


def tone(seconds: float, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def suite(**changes: object) -> Suite:
    value = {
        "name": "mine",
        "title": "mine",
        "kind": "speech_recognition",
        "data": "rows.jsonl",
        "evaluation": {"start": 0, "stop": 10},
    }
    return parse_mapping(Suite, {**value, **changes}, "mine.toml")


def load(folder: Path, rows: list[dict[str, object]], **changes: object):
    calibration = changes.pop("calibration", ())
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(suite(**changes), folder, quick=False, calibration=calibration)


def slow_edits(found: str, wanted: str) -> int:
    """The definition of the Levenshtein distance, as a recursion."""

    @cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        same = distance(i - 1, j - 1) + (found[i - 1] != wanted[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, same)

    return distance(len(found), len(wanted))


def test_edits_are_the_fewest() -> None:
    texts = ["", "a", "kitten", "sitting", "saturday", "sunday", "intention", "execution"]
    for found, wanted in itertools.product(texts, texts):
        assert edits(found, wanted) == slow_edits(found, wanted)
    assert (edits("kitten", "sitting"), edits(["he", "is"], ["he", "was", "is"])) == (3, 1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Tuesday, July 8th, at 12:18 AM.", "tuesday july eight at twelve eighteen am"),
        ("5 5", "five five"),
        ("It's 2,002!", "it is 2002"),
        ("the twenty-first", "The 21"),
    ],
)
def test_words_that_mean_the_same_are_the_same(one: str, other: str) -> None:
    assert words(one) == words(other)
    assert words(one) != words(other + " not")


def test_the_area_is_the_share_of_pairs_in_the_right_order() -> None:
    random = np.random.default_rng(0)
    values, truth = random.integers(0, 9, 60).astype(np.float64), random.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in values[truth] for b in values[~truth]]
    assert area(values, truth) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert area(truth.astype(np.float64), truth) == 1.0
    assert np.isnan(area(np.where(values > 3, np.nan, values), truth))


def test_frames_are_speech_where_their_middle_is() -> None:
    assert frames_within([(0.033, 0.095)], 4).tolist() == [False, True, True, False]  # frames of 32 ms


def test_recordings_of_any_rate_and_channels_are_read_at_16_khz(tmp_path: Path) -> None:
    slow = write_wav(tmp_path / "slow.wav", tone(1.0, 8000), 8000)
    both = np.stack([tone(1.0), tone(1.0)], axis=1).reshape(-1)
    stereo = write_wav(tmp_path / "stereo.wav", both, channels=2)
    for path in (slow, stereo):
        samples = read_speech(path)
        assert (samples.dtype, len(samples)) == (np.float32, RATE)
        # Away from the ends, where resampling has nothing to go by, it is the tone itself.
        assert np.abs(samples[200:-200] - tone(1.0)[200:-200]).max() < 0.01


@pytest.mark.parametrize(("width", "seconds"), [(1, 1.0), (2, 0.0)])
def test_what_is_no_recording_is_named(tmp_path: Path, width: int, seconds: float) -> None:
    path = write_wav(tmp_path / "odd.wav", tone(seconds), width=width)
    with pytest.raises(BadInputError, match=f"{8 * width} bits"):
        read_speech(path)
    path.write_bytes(b"RIFF....")
    with pytest.raises(BadInputError, match="can't be read") as caught:
        read_speech(path)
    assert caught.value.where == "odd.wav"


def test_noise_lies_as_far_below_the_speech_as_asked(tmp_path: Path) -> None:
    piece = write_wav(tmp_path / "tone.wav", 0.2 * tone(1.0))
    recording = Recording((piece, piece), (0.5, 0.25, 1.0), noise_db=10.0, seed=3)
    clean, mixed = recording.clean(), recording.samples()
    assert len(clean) == len(mixed) == round(3.75 * RATE)
    silent = clean == 0
    assert np.flatnonzero(~silent)[0] == pytest.approx(0.5 * RATE, abs=2)
    ratio = np.square(clean[~silent]).mean() / np.square(mixed - clean).mean()
    assert 10 * np.log10(ratio) == pytest.approx(10.0, abs=0.1)
    assert np.array_equal(mixed, recording.samples())
    assert not np.array_equal(mixed, Recording((piece, piece), (0.5, 0.25, 1.0), noise_db=10.0, seed=4).samples())


def test_pink_noise_has_equal_power_in_each_octave() -> None:
    power = np.square(np.abs(np.fft.rfft(pink_noise(1 << 18, 0))))
    octaves = [power[start : 2 * start].sum() for start in (1 << 9, 1 << 11, 1 << 13, 1 << 15)]
    assert max(octaves) / min(octaves) < 1.2


def test_speech_is_where_the_clean_recording_is_loud(tmp_path: Path) -> None:
    piece = write_wav(tmp_path / "tone.wav", tone(0.5))
    clean = Recording((piece, piece), (0.4, 0.6, 0.4)).clean()
    found = speech_intervals(clean)
    assert [pytest.approx(time, abs=0.033) for pair in found for time in pair] == [0.4, 0.9, 1.5, 2.0]
    assert speech_intervals(np.zeros(RATE, np.float32)) == []


def test_dates_are_put_together_of_the_words_that_they_are_said_with() -> None:
    days = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
    months = "January February March April May June July August September October November December"
    numbers = [*map(str, range(21)), "30", "40", "50"]
    names = [*numbers, *(f"h-{number}" for number in numbers), "thousand", "at", "a-m", "p-m"]
    names += [f"day-{n}" for n in range(7)] + [f"mon-{n}" for n in range(12)]
    rows = list(spoken_dates([Path(f"{name}.wav") for name in names]))
    assert rows == list(spoken_dates([Path(f"{name}.wav") for name in names]))

    def total(pieces: list[str]) -> int:
        return sum(int(piece.removeprefix("h-")) for piece in pieces)

    for row in rows:
        day, month, *rest = (piece.stem for piece in row["audio"].pieces)
        said = f"{days[int(day[4:])]} {months.split()[int(month[4:])]}"
        if "at" in rest:
            place = rest.index("at")
            *time, half = rest[place + 1 :]
            # The hour is one word; the minutes are those after it.
            said += f" {total(rest[:place])} at {time[0]}:{total(time[1:])} {half.replace('-', '')}"
        else:
            assert rest[-3:-1] == ["2", "thousand"]
            said += f" {total(rest[:-3])} {2000 + int(rest[-1])}"
        assert said == row["text"]
    assert {row["text"].split()[0] for row in rows} == set(days)
    assert {row["text"].split()[1] for row in rows} == set(months.split())


def test_words_are_drawn_alike_each_time(tmp_path: Path) -> None:
    from PIL import ImageFont

    (tmp_path / "book.txt").write_text("cat\nWashington\nhouse\nox\n")
    font = tmp_path / "font.ttf"
    font.write_bytes(ImageFont.load_default(10).font_bytes)
    rows = list(itertools.islice(drawn_words([tmp_path / "book.txt", font]), 40))
    assert {row["text"].lower() for row in rows if row["text"].isalpha()} == {"cat", "house"}
    assert any(row["text"].isdecimal() for row in rows)
    drawn = rows[0]["path"]
    first, second = (np.asarray(drawn.image()) for _ in range(2))
    assert np.array_equal(first, second)
    plain = Rendered("I", font, ink=0, paper=255, degrees=0.0, noise=0.0, seed=0)
    pixels = np.asarray(plain.image())
    assert pixels[0].min() == 255  # the margin
    assert (pixels.min(), pixels.shape[2]) == (0, 3)
    with pytest.raises(BadInputError, match="font can't be read"):
        Rendered("I", tmp_path / "book.txt", 0, 255, 0.0, 0.0, 0).image()


def test_transcriptions_name_their_recordings(tmp_path: Path) -> None:
    path = tmp_path / "cards.transcription"
    path.write_text("<s> ten of clubs  </s> (001)\nhe was not (a-2)\n")
    rows = read_files("transcribed", [path, tmp_path / "001.wav"])
    assert [(row["audio"].name, row["text"]) for row in rows] == [
        ("001.wav", "ten of clubs"),
        ("a-2.wav", "he was not"),
    ]
    path.write_text("ten of clubs\n")
    with pytest.raises(BadInputError, match="names no recording"):
        read_files("transcribed", [path])


def test_classes_of_pictures_by_name(tmp_path: Path) -> None:
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    rows = read_files("images", files, labels={"a.png": 7, "b.png": 3, "c.png": 1})
    assert [row["label"] for row in rows] == [7, 3]
    with pytest.raises(BadInputError, match=r"'labels' lacks b\.png"):
        read_files("images", files, labels={"a.png": 7})


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"audio": "absent.wav", "text": "a"}, "speech_recognition", "There is no file 'absent.wav'"),
        ({"audio": "a.wav"}, "speech_recognition", "Row 1 lacks the column 'text'"),
        ({"audio": "a.wav", "text": " "}, "speech_recognition", "The text is empty"),
        ({"path": "absent.png", "text": "a"}, "text_recognition", "There is no file 'absent.png'"),
        ({"audio": "a.wav", "speech": "all of it"}, "voice_activity", "is no list of times"),
        ({"audio": "a.wav", "speech": [[2.0, 1.0]]}, "voice_activity", "not in order"),
        ({"audio": "a.wav", "speech": [[1.0, 2.0, 3.0]]}, "voice_activity", "is no list of times"),
    ],
)
def test_a_row_that_is_wrong_is_one_clear_error(
    tmp_path: Path, row: dict[str, object], kind: str, message: str
) -> None:
    write_wav(tmp_path / "a.wav", tone(0.1))
    with pytest.raises(BadInputError, match=message) as caught:
        load(tmp_path, [row], kind=kind)
    assert "suite mine" in str(caught.value.where)


def test_an_empty_suite_of_recordings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no rows"):
        load(tmp_path, [])


def test_no_suite_is_measured_on_a_recording_that_was_calibrated_on(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", tone(0.1))
    rows = [{"audio": "a.wav", "text": "a"}]
    assert len(load(tmp_path, rows, calibration=["a.wav"]).evaluation) == 1  # names say nothing, contents do
    with pytest.raises(BadInputError, match="calibrated on"):
        load(tmp_path, rows, calibration=[hash_file(path)])

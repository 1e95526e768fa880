"""The parity matrix's exit code and wording, and golden inputs as each kind of model takes them."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from edgeport.errors import EXIT_BUG, EXIT_NOT_VALID, EXIT_OK, EXIT_PARITY, EXIT_TARGET_REFUSES
from edgeport.golden import as_taken
from edgeport.model.types import Axis, Decoder, Model, Source, TensorSpec
from edgeport.report.matrix import html, markdown
from edgeport.target import Execution
from edgeport.validate.evidence import DataRecord, Interval, Machine, OutputParity
from edgeport.validate.matrix import Cell, Outcome, ParityMatrix, executed_by, overall

EVIL = "</td><script>alert(1)</script> | x"


def cell(outcome: Outcome, exit_code: int = EXIT_OK, **more) -> Cell:
    named = {"target": "a-target", "title": "A target", "runtime": "coreml", "precision": "fp16"}
    return Cell(**{**named, "executed_by": "executed by a test", "outcome": outcome, "exit_code": exit_code, **more})


def output(name: str = "logits", **more) -> OutputParity:
    cosine = Interval(mean=0.99975, low=0.999, high=1.0, n=4)
    numbers = {"max_abs": 0.125, "relative_l2": 0.03125, "cosine": cosine, "cosine_worst": 0.9875, "finite": True}
    return OutputParity(output=name, **{**numbers, **more})


def matrix(*cells: Cell) -> ParityMatrix:
    return ParityMatrix(
        model="zoo:tiny",
        task="feature-extraction",
        parameters=1400,
        source_files={},
        data=DataRecord(name="texts", real=True, sha256={}, slice="rows 0 to 4", licence=None, samples=4),
        golden={"inputs.safetensors": "0" * 64},
        cells=cells,
        machine=Machine(
            platform="Linux", cpu="a cpu", cores=2, memory_gb=8.0, python="3.12", versions={"torch": "2.13"}
        ),
        exit_code=overall(cells),
    )


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([cell("passed"), cell("not offered"), cell("not executed")], EXIT_OK),
        ([cell("passed"), cell("refused", EXIT_TARGET_REFUSES)], EXIT_TARGET_REFUSES),
        ([cell("refused", EXIT_TARGET_REFUSES), cell("failed", EXIT_PARITY)], EXIT_PARITY),
        ([cell("error", EXIT_NOT_VALID), cell("failed", EXIT_PARITY), cell("error", EXIT_BUG)], EXIT_PARITY),
        ([cell("error", EXIT_BUG), cell("refused", EXIT_TARGET_REFUSES)], EXIT_TARGET_REFUSES),
        ([cell("error", EXIT_BUG), cell("passed")], EXIT_BUG),
        ([cell("not offered"), cell("not offered")], EXIT_TARGET_REFUSES),
    ],
)
def test_the_exit_code_is_the_lowest_gate_code_and_else_the_lowest(cells: list[Cell], expected: int) -> None:
    assert overall(cells) == expected


def test_who_executed_a_file_is_said_and_nothing_is_claimed_for_apple() -> None:
    def words(here: str) -> str:
        return executed_by(Execution(here=here, statement=""), "executorch", {"executorch": "1.4.1"})

    assert words("runtime") == "executed by executorch 1.4.1 here"
    assert words("none") == "converted, not executed here"
    assert "not executed on Apple hardware" in words("reference")
    assert "reference evaluator" in words("reference")


class Table(HTMLParser):
    """Texts of a page's table cells; `scripts` counts elements that could run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.scripts = 0
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        if tag == "td":
            self._inside = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "td"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.cells[-1] += data


def test_both_pages_say_the_numbers_and_why_a_cell_has_none() -> None:
    whole = matrix(
        cell("passed", outputs=(output(kl=Interval(mean=0.0025, low=0, high=1, n=4), positions=4),), file_bytes=2000),
        cell("refused", EXIT_TARGET_REFUSES, target="other", reason=EVIL, next_step="Take another."),
        cell("failed", EXIT_PARITY, target="third", outputs=(output(finite=False, max_abs=None),), reason="NaN"),
    )
    page, text = Table(html(whole)), markdown(whole)
    assert page.scripts == 0
    for number in ("0.12", "0.031", "0.999750 (0.987500)", "0.0025", "2.00 kB"):
        assert number in page.cells, number
        assert f"| {number} |" in text
    assert any(EVIL in found for found in page.cells)
    assert "not finite" in page.cells
    assert "exit code 10" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {12}
    assert "other fp16: refused, </td><script>alert(1)</script> \\| x Next: Take another." in text


def tiny(*inputs: TensorSpec, decoder: Decoder | None = None) -> Model:
    import torch

    return Model(
        name="tiny",
        module=torch.nn.Identity(),
        source=Source("factory", "tiny", {}),
        task="text-generation",
        modality="text",
        inputs=inputs,
        outputs=(),
        example={},
        huggingface=False,
        decoder=decoder,
    )


def test_a_decoder_with_a_cache_reads_the_same_text_without_its_padding() -> None:
    """Its reference is the scores of the last real positions, not those of the padding."""
    read, padded = 40, 64
    ids = np.arange(padded)[None]
    mask = (ids < read).astype(np.int64)
    logits = np.arange(padded * 3, dtype=np.float32).reshape(1, padded, 3)
    calls = {"input_ids": ids, "attention_mask": mask}
    axis = Axis("sequence", 1, 64, 8)
    whole = tiny(TensorSpec("input_ids", "int64", (1, axis)), TensorSpec("attention_mask", "int64", (1, axis)))
    taken, wanted = as_taken(whole, calls, {"logits": logits})
    assert taken.keys() == calls.keys()
    assert wanted["logits"].shape == (1, padded, 3)

    cached = replace(whole, inputs=whole.inputs[:1], decoder=Decoder((), 64, 3))
    taken, wanted = as_taken(cached, calls, {"logits": logits})
    assert list(taken) == ["input_ids"]
    np.testing.assert_array_equal(taken["input_ids"], ids[:, :read])
    np.testing.assert_array_equal(wanted["logits"], logits[:, read - 32 : read])


def test_a_decoder_beside_an_encoder_is_scored_along_its_own_text() -> None:
    axis = Axis("sequence", 1, 64, 8)
    names = ("input_ids", "decoder_input_ids")
    model = tiny(*(TensorSpec(name, "int64", (1, axis)) for name in names), decoder=Decoder((), 64, 3, cross=()))
    calls = {
        "input_ids": np.arange(20)[None],
        "attention_mask": np.array([[1] * 15 + [0] * 5]),
        "decoder_input_ids": np.arange(10)[None],
    }
    logits = np.random.default_rng(0).normal(size=(1, 10, 3))
    taken, wanted = as_taken(model, calls, {"logits": logits})
    assert {name: value.shape for name, value in taken.items()} == {"input_ids": (1, 15), "decoder_input_ids": (1, 10)}
    np.testing.assert_array_equal(wanted["logits"], logits)

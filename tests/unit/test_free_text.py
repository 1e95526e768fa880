"""What an encoder-decoder writes by itself, beside the original."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeport.gate.checks import _generation_checks
from edgeport.validate.evidence import FreeText, Generation
from edgeport.validate.free_text import MOST, compare_texts, edits

TEXTS = st.lists(st.integers(0, 3), max_size=7)


def slowly(a, b):
    """Levenshtein's distance by its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(slowly(a[1:], b) + 1, slowly(a, b[1:]) + 1, slowly(a[1:], b[1:]) + (a[0] != b[0]))


@given(TEXTS, TEXTS)
def test_edits_are_levenshteins(a, b):
    assert edits(a, b) == slowly(a, b)


class Writer:
    """A cache that scores highest what its text says comes next, by the source."""

    name, vendor_kernels, context, source = "written", True, 200, "input_features"

    def __init__(self, texts):
        self.texts, self.length = texts, 0

    def encode(self, source):
        self.text, self.length = self.texts[int(source[0])], 0

    def rewind(self, length=0):
        self.length = length

    def feed(self, ids):
        self.length += len(ids)
        scores = np.zeros(10, np.float32)
        scores[self.text[min(self.length - 1, len(self.text) - 1)]] = 1
        return scores


STOP = 9


def compared(originals, artifacts):
    sources = [np.array([index]) for index in range(len(originals))]
    return compare_texts(
        Writer(artifacts), sources, lambda source: originals[int(source[0])], start=[0], stop=frozenset([STOP])
    )


def test_texts_are_compared_by_their_tokens():
    same, other = [1, 2, 3, STOP], [1, 5, 3, 4, STOP]
    assert compared([same, same], [same, other]) == FreeText(texts=2, tokens=6, edits=2, equal=1, unended=0)


def test_a_text_that_goes_round_in_circles_is_counted_to_the_limit():
    found = compared([[1, 2, STOP]], [[7]])
    assert found == FreeText(texts=1, tokens=2, edits=MOST, equal=0, unended=1)


def test_an_original_that_ends_nothing_is_no_yardstick():
    assert compared([[1] * MOST], [[1, STOP]]) is None


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        (FreeText(texts=8, tokens=100, edits=10, equal=5, unended=0), True),
        (FreeText(texts=8, tokens=100, edits=26, equal=0, unended=0), False),
        (FreeText(texts=8, tokens=100, edits=20, equal=3, unended=3), False),
    ],
)
def test_the_gate_fails_what_writes_something_else(text, passed):
    class Measured:
        generation = Generation(
            context=448, cache_bytes=1, long_tokens=96, long_cosine=0.9998, long_kl=0.0, free_text=text
        )

    checks = {check.metric: check for check in _generation_checks(Measured)}
    assert checks["long_cache"].passed
    assert checks["free_text"].passed is passed
    assert checks["free_text"].exit_code == 10

"""The allocator against trying everything."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeport.compress.allocate import Choice, allocate
from edgeport.errors import BadInputError

layers = st.lists(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0, 10)), min_size=1, max_size=4), min_size=1, max_size=5
)


def as_choices(values):
    return {
        f"layer{index}": [Choice(f"format{number}", size, cost) for number, (size, cost) in enumerate(options)]
        for index, options in enumerate(values)
    }


@given(values=layers, share=st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_no_other_choice_is_better(values, share):
    choices = as_choices(values)
    least = sum(min(size for size, _ in options) for options in values)
    most = sum(max(size for size, _ in options) for options in values)
    budget = int(least + share * (most - least))
    chosen = allocate(choices, budget)
    assert list(chosen) == list(choices)
    assert sum(choice.bytes for choice in chosen.values()) <= budget
    fitting = (each for each in itertools.product(*values) if sum(size for size, _ in each) <= budget)
    best = min(sum(cost for _, cost in each) for each in fitting)
    assert sum(choice.cost for choice in chosen.values()) == pytest.approx(best, abs=1e-6)


def test_bytes_that_buy_nothing_are_not_spent():
    choices = {"a": [Choice("int8", 80, 1.0), Choice("int4", 40, 1.0)]}
    assert allocate(choices, 100)["a"].format == "int4"


def test_a_budget_that_nothing_fits_is_refused_with_the_least():
    with pytest.raises(BadInputError, match="at least, the budget") as error:
        allocate({"a": [Choice("int4", 40, 1.0)], "b": [Choice("int4", 60, 0.0)]}, 99)
    assert "100 bytes" in str(error.value)

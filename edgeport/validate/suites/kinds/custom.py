"""A user's own score: a function of a row and of the model's outputs for its text."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from edgeport.errors import BadInputError
from edgeport.validate.suites.kinds import Asked, Scores

if TYPE_CHECKING:
    import numpy as np

Function = Callable[[Mapping[str, Any], Mapping[str, "np.ndarray"]], float]


def score(asked: Asked) -> Scores:
    """What the function gives for each row, in the suite's unit.

    The function is called as `function(row, outputs)`, with the row as the data has it and every output of the model
    for the row's `text` by name.

    Raises:
        BadInputError: the function can't be imported or fails, or a row has no text.
    """
    assert asked.suite.score is not None
    function = _load(asked.suite.score)
    rows, most = asked.rows.evaluation, asked.most_tokens
    scores: tuple[list[float], list[float]] = ([], [])
    for done, row in enumerate(rows):
        for found, subject in zip(scores, asked.both, strict=True):
            outputs = subject.run_text(str(row[asked.suite.columns.get("text", "text")]), most)
            try:
                found.append(float(function(row, outputs)))
            except Exception as error:  # a user's function may raise anything
                raise BadInputError(
                    f"The function failed at row {done + 1}: {error!r}.", where=asked.suite.score
                ) from error
        asked.watch(done + 1, len(rows))
    suite = asked.suite
    return Scores("score", suite.unit, *scores, higher_is_better=suite.higher_is_better, rows=range(len(rows)))


def _load(reference: str) -> Function:
    module, _, name = reference.partition(":")
    try:
        function: Function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInputError(
            f"The function can't be imported: {error}.", where=reference, allowed="package.module:function"
        ) from error
    return function

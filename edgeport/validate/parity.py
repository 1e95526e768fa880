"""Parity: the outputs of the shipped file against the uncompressed torch model, on the same inputs.

Everything is computed in float64, over valid (not padded) positions. Nothing that is not finite enters
a number: an artifact that gives NaN has `finite = False` and no numbers at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeport.errors import MeasurementError
from edgeport.validate.evidence import OutputParity
from edgeport.validate.intervals import bootstrap_sums, mean_interval, share_interval
from edgeport.validate.outputs import class_scores, valid_positions, with_derived

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class SampleParity:
    """One output of one sample; sums are float64.

    Attributes:
        size: numbers compared.
        dot, reference_square, measured_square: <r, m>, <r, r>, <m, m> of the flattened output.
        low, high: range of the reference; measured_low, measured_high: of the artifact's output.
        positions, matches, kl: argmax comparisons, equal ones, summed KL divergence; None without classes.
    """

    size: int
    finite: bool
    max_abs: float
    difference_square: float
    dot: float
    reference_square: float
    measured_square: float
    low: float
    high: float
    measured_low: float
    measured_high: float
    positions: int | None
    matches: int
    kl: float

    @property
    def cosine(self) -> float:
        """Cosine similarity; 1 of two zero vectors, 0 of one."""
        if self.reference_square == 0 or self.measured_square == 0:
            return float(self.reference_square == self.measured_square)
        return float(self.dot / (self.reference_square**0.5 * self.measured_square**0.5))


def divergence(reference: np.ndarray, measured: np.ndarray) -> float:
    """Sum over positions of KL(softmax(reference) || softmax(measured)), nats.

    Args:
        reference, measured: scores, shape (positions, classes); -inf marks classes that can't be.
    """
    import numpy as np
    from scipy.special import log_softmax  # type: ignore[import-untyped]

    log_p, log_q = log_softmax(reference, axis=-1), log_softmax(measured, axis=-1)
    possible = np.isfinite(log_p)
    return float(np.exp(log_p[possible]) @ (log_p[possible] - log_q[possible]))


def compare_sample(
    name: str, reference: np.ndarray, measured: np.ndarray, inputs: Arrays, *, task: str, only_output: bool = False
) -> SampleParity:
    """Compare one output of one sample.

    Args:
        reference, measured: arrays of the same shape.
        inputs: the call's inputs, for its attention masks.
        only_output: the model has no other output, so a classifier's scores may carry any name.

    Raises:
        MeasurementError: shapes differ, or the reference is not finite.
    """
    import numpy as np

    if reference.shape != measured.shape:
        raise MeasurementError(
            f"The artifact's output has the shape {measured.shape}, the original's {reference.shape}.",
            where=f"output {name}",
        )
    valid = valid_positions(name, reference.shape, inputs)
    want, got = reference.astype(np.float64), measured.astype(np.float64)
    r, m = (want.reshape(-1), got.reshape(-1)) if valid is None else (want[valid].reshape(-1), got[valid].reshape(-1))
    if r.size == 0 or not bool(np.isfinite(r).all()):
        raise MeasurementError(
            "The original model's own output is empty, NaN or infinite, so nothing can be compared with it.",
            where=f"output {name}",
            next_step="Run the model in PyTorch on the same inputs; check the checkpoint and the preprocessing.",
        )
    finite = bool(np.isfinite(m).all())
    scores = class_scores(name, want, valid, task, only_output=only_output)
    positions = None if scores is None else len(scores)
    if not finite:
        nan = float("nan")
        return SampleParity(
            r.size, False, nan, nan, nan, nan, nan, r.min(), r.max(), nan, nan, positions=positions, matches=0, kl=nan
        )
    matches, kl = 0, 0.0
    if scores is not None:
        answer = class_scores(name, got, valid, task, only_output=only_output)
        assert answer is not None  # same shape, same answer
        matches = int((scores.argmax(axis=-1) == answer.argmax(axis=-1)).sum())
        kl = divergence(scores, answer)
    difference = m - r
    return SampleParity(
        size=r.size,
        finite=True,
        max_abs=float(np.abs(difference).max()),
        difference_square=float(difference @ difference),
        dot=float(r @ m),
        reference_square=float(r @ r),
        measured_square=float(m @ m),
        low=float(r.min()),
        high=float(r.max()),
        measured_low=float(m.min()),
        measured_high=float(m.max()),
        positions=positions,
        matches=matches,
        kl=kl,
    )


def summarise(name: str, rows: list[SampleParity], *, varies: bool) -> OutputParity:
    """One output over all samples.

    Raises:
        MeasurementError: the reference is one constant value, so that a similarity to it says nothing.
    """
    import numpy as np

    if min(row.low for row in rows) == max(row.high for row in rows):
        raise MeasurementError(
            f"The original model's output is {rows[0].low:g} everywhere, on all {len(rows)} samples.",
            where=f"output {name}",
            next_step="Give inputs on which the model has something to say.",
        )
    positions = [row.positions for row in rows if row.positions is not None]
    counted = sum(positions) if positions else None
    if not all(row.finite for row in rows):
        return OutputParity(
            output=name,
            max_abs=None,
            relative_l2=None,
            cosine=None,
            cosine_worst=None,
            positions=counted,
            finite=False,
        )
    cosines = [row.cosine for row in rows]
    cosine = mean_interval(cosines)
    if all(row.size == 1 for row in rows):
        # The cosine of two single numbers is only their sign: take all samples as one vector.
        columns = np.array([[row.dot, row.reference_square, row.measured_square] for row in rows])
        cosine = bootstrap_sums(columns, stacked_cosine)
        cosines = [cosine.mean]
    # KL is never negative; rounding may leave a tiny negative sum for equal distributions.
    kl = [max(row.kl, 0.0) for row in rows]
    constant = min(row.measured_low for row in rows) == max(row.measured_high for row in rows)
    return OutputParity(
        output=name,
        max_abs=max(row.max_abs for row in rows),
        relative_l2=(sum(row.difference_square for row in rows) / sum(row.reference_square for row in rows)) ** 0.5,
        cosine=cosine,
        cosine_worst=min(cosines),
        top1_agreement=share_interval([row.matches for row in rows], positions) if positions else None,
        kl=mean_interval(kl, positions) if positions else None,
        positions=counted,
        finite=True,
        varies=varies and not constant,
    )


def stacked_cosine(sums: np.ndarray) -> np.ndarray:
    """Cosine from sums of (dot, reference square, measured square), shape (r, 3); 0 where a vector is 0."""
    import numpy as np

    norms = np.sqrt(sums[:, 1] * sums[:, 2])
    cosine: np.ndarray = np.divide(sums[:, 0], norms, out=np.zeros(len(sums)), where=norms > 0)
    return cosine


def compare(
    reference: Iterable[Arrays],
    measured: Iterable[Arrays],
    *,
    task: str,
    inputs: Iterable[Arrays] | None = None,
) -> tuple[OutputParity, ...]:
    """Compare all outputs over all samples. Iterables are read side by side, one sample in memory at a time.

    Args:
        reference: outputs of the uncompressed torch model, one mapping a sample, float arrays by name.
        measured: outputs of the artifact on the same inputs.
        task: optimum's task name: classifiers and language models get top-1 agreement and KL.
        inputs: the inputs, for attention masks (padding does not count) and the sentence embedding.

    Raises:
        MeasurementError: no samples, an output is missing or has another shape, or the reference is degenerate.
    """
    rows: dict[str, list[SampleParity]] = {}
    first: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    reference_varies: set[str] = set()
    measured_varies: set[str] = set()
    wants = iter(reference)
    calls = iter(inputs) if inputs is not None else None
    for got in measured:
        want = next(wants, None)
        call = {} if calls is None else next(calls, None)
        if want is None or call is None:
            raise MeasurementError("There are fewer reference outputs or inputs than measured outputs.")
        missing = sorted(set(want) - set(got))
        if missing:
            raise MeasurementError("The artifact lacks an output.", where=missing[0], allowed=sorted(got))
        references, answers = with_derived(want, call, task), with_derived(got, call, task)
        for name, value in references.items():
            answer = answers[name]
            row = compare_sample(name, value, answer, call, task=task, only_output=len(want) == 1)
            rows.setdefault(name, []).append(row)
            first_value, first_answer = first.setdefault(name, (value, answer))
            if differs(value, first_value):
                reference_varies.add(name)
            if differs(answer, first_answer):
                measured_varies.add(name)
    if not rows or next(wants, None) is not None:
        raise MeasurementError("There is no sample to compare, or the artifact answered fewer than there are.")
    return tuple(
        summarise(name, found, varies=name in measured_varies or name not in reference_varies)
        for name, found in rows.items()
    )


def differs(value: np.ndarray, other: np.ndarray) -> bool:
    """Two arrays differ in shape or in any value."""
    import numpy as np

    return not np.array_equal(value, other)

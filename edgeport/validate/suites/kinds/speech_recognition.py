"""What is said: the word error rate, with the words of each utterance as its weight."""

from __future__ import annotations

from edgeport.errors import BadInputError
from edgeport.validate.suites.kinds import Asked, Scores
from edgeport.validate.suites.kinds.edits import edits, words


def score(asked: Asked) -> Scores:
    """Edits a word of each utterance; their weighted mean is the word error rate. Silence has an error rate of 1.

    Raises:
        BadInputError: a text has no words, or a recording can't be read or is too long.
    """
    rows, most = asked.rows.evaluation, asked.most_tokens
    scores: tuple[list[float], list[float]] = ([], [])
    weights: list[float] = []
    answers: tuple[list[str], list[str]] = ([], [])
    for done, row in enumerate(rows):
        wanted = words(row["text"])
        if not wanted:
            raise BadInputError(f"The text {row['text']!r} has no words.", where=f"suite {asked.suite.name}")
        samples = row["audio"].samples()
        weights.append(float(len(wanted)))
        for index, subject in enumerate(asked.both):
            text = subject.transcribe(samples, most)
            scores[index].append(edits(words(text), wanted) / len(wanted))
            answers[index].append(text)
        asked.watch(done + 1, len(rows))
    return Scores(
        "word_error_rate",
        "share",
        *scores,
        higher_is_better=False,
        chance=1.0,
        weights=weights,
        answers=answers[0],
        artifact_answers=answers[1],
        rows=range(len(rows)),
    )

"""What is written on pictures: the character error rate, with the characters of each text as its weight."""

from __future__ import annotations

from edgeport.data.images import open_image
from edgeport.data.rendered import Rendered
from edgeport.validate.suites.kinds import Asked, Scores
from edgeport.validate.suites.kinds.edits import edits


def score(asked: Asked) -> Scores:
    """Edits a character of each text, capitals told apart; their weighted mean is the character error rate.

    Raises:
        BadInputError: a picture can't be read.
    """
    rows = asked.rows.evaluation
    scores: tuple[list[float], list[float]] = ([], [])
    answers: tuple[list[str], list[str]] = ([], [])
    for done, row in enumerate(rows):
        picture = row["path"].image() if isinstance(row["path"], Rendered) else open_image(row["path"])
        for index, subject in enumerate(asked.both):
            text = subject.characters(picture)
            scores[index].append(edits(text, row["text"]) / len(row["text"]))
            answers[index].append(text)
        asked.watch(done + 1, len(rows))
    weights = [float(len(row["text"])) for row in rows]
    return Scores(
        "character_error_rate",
        "share",
        *scores,
        higher_is_better=False,
        chance=1.0,
        weights=weights,
        answers=answers[0],
        artifact_answers=answers[1],
        rows=range(len(rows)),
    )

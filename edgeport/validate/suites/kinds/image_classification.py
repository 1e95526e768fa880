"""Classes of pictures: is the most likely one the right one?"""

from __future__ import annotations

from edgeport.errors import BadInputError
from edgeport.validate.suites.kinds import Asked, Scores, certainty, right


def score(asked: Asked) -> Scores:
    """1 where the class with the highest score is the picture's. Chance is the share of the commonest class.

    Raises:
        BadInputError: a label is beyond the model's classes.
    """
    import numpy as np

    rows = asked.rows.evaluation
    scores: tuple[list[float], list[float]] = ([], [])
    answers: tuple[list[int], list[int]] = ([], [])
    confidence: list[float] = []
    for done, row in enumerate(rows):
        for index, subject in enumerate(asked.both):
            found = subject.picture_scores(row["path"])
            if not 0 <= row["label"] < len(found):
                raise BadInputError(
                    f"The label {row['label']} is out of range.",
                    where=f"suite {asked.suite.name}: {row['path'].name}",
                    allowed=f"0 to {len(found) - 1}",
                )
            answer = int(found.argmax()) if bool(np.isfinite(found).all()) else -1
            scores[index].append(right(answer, row["label"]))
            answers[index].append(answer)
            if index == 0:
                confidence.append(certainty(found))
        asked.watch(done + 1, len(rows))
    labels = [row["label"] for row in rows]
    chance = max(max(labels.count(label) for label in set(labels)) / len(labels), 1 / len(found))
    return Scores(
        "accuracy",
        "share",
        *scores,
        chance=chance,
        answers=answers[0],
        artifact_answers=answers[1],
        confidence=confidence,
        rows=range(len(rows)),
    )

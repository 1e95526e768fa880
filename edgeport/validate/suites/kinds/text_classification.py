"""Classes of texts: by the model's own head, or by a logistic regression on its embeddings.

The regression is fitted on the *original's* embeddings of the training rows and then asked about both models': an app
that ships the artifact keeps the classifier that it has. It is scikit-learn's, with L2 regularization.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from edgeport.errors import BadInputError
from edgeport.validate.suites.kinds import Asked, Scores, certainty, right

if TYPE_CHECKING:
    from edgeport.validate.suites.remembered import Asker

STRENGTH = 10.0
"""Inverse of the regularization, as embeddings have length 1."""


def score(asked: Asked) -> Scores:
    """1 where the class is right. Chance is the share of the commonest class.

    Raises:
        BadInputError: the suite has a class that the model's head does not know, or no training rows for embeddings.
    """
    rows = asked.rows.evaluation
    labels = [str(row["label"]) for row in rows]
    answer = _own_classes(asked, labels) if asked.original.traits.classifies_texts else _fitted(asked)
    scores: tuple[list[float], list[float]] = ([], [])
    answers: tuple[list[Hashable], list[Hashable]] = ([], [])
    confidence: list[float] = []
    for done, (row, label) in enumerate(zip(rows, labels, strict=True)):
        for index, subject in enumerate(asked.both):
            found, probability = answer(subject, row["text"])
            scores[index].append(right(found, label))
            answers[index].append(found)
            if index == 0:
                confidence.append(probability)
        asked.watch(done + 1, len(rows))
    chance = max(labels.count(label) for label in set(labels)) / len(labels)
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


Answer = Callable[["Asker", str], tuple[str | None, float]]
"""A class, None without a usable one, and its probability."""


def _own_classes(asked: Asked, labels: list[str]) -> Answer:
    """The class that the model's head scores highest, as its name or its index, whichever the suite uses."""
    import numpy as np

    most = asked.most_tokens

    names = asked.original.traits.labels
    count = len(asked.original.class_scores(asked.rows.evaluation[0]["text"], most))
    indices = tuple(str(index) for index in range(count))
    known = names if set(labels) <= set(names) else indices
    for label in labels:
        if label not in known:
            raise BadInputError(
                f"The model has no class {label!r}.", where=f"suite {asked.suite.name}", allowed=[*names, *indices]
            )

    def answer(subject: Asker, text: str) -> tuple[str | None, float]:
        scores = subject.class_scores(text, most)
        return known[int(scores.argmax())] if bool(np.isfinite(scores).all()) else None, certainty(scores)

    return answer


def _fitted(asked: Asked) -> Answer:
    """A regression on the original's embeddings."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    training, most = asked.rows.training, asked.most_tokens
    labels = [str(row["label"]) for row in training]
    if len(set(labels)) < 2:
        raise BadInputError(
            f"There are training rows of {len(set(labels))} classes.",
            where=f"suite {asked.suite.name}",
            allowed="two classes at least",
            next_step="Give the suite a slice 'training': the model has no classes of its own.",
        )
    fitted = LogisticRegression(C=STRENGTH, max_iter=1000)
    fitted.fit(np.stack([asked.original.embed(row["text"], most) for row in training]), labels)

    def answer(subject: Asker, text: str) -> tuple[str | None, float]:
        vector = subject.embed(text, most)
        if not bool(np.isfinite(vector).all()):
            return None, float("nan")
        probabilities = fitted.predict_proba(vector[None])[0]
        return str(fitted.classes_[int(probabilities.argmax())]), float(probabilities.max())

    return answer

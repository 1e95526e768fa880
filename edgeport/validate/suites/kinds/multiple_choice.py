"""Which continuation is most likely, by log-likelihood a character, so that long answers are not at a disadvantage."""

from __future__ import annotations

from edgeport.validate.suites.kinds import Asked, Scores, certainty, right
from edgeport.validate.suites.rows import check_answers


def score(asked: Asked) -> Scores:
    """1 where the right choice has the highest likelihood. Chance is the mean of one over the number of choices.

    Raises:
        BadInputError: an answer is none of its row's choices.
    """
    import numpy as np

    rows = asked.rows.evaluation
    check_answers(asked.suite, rows)
    scores: tuple[list[float], list[float]] = ([], [])
    answers: tuple[list[int], list[int]] = ([], [])
    confidence: list[float] = []
    most = asked.most_tokens
    for done, row in enumerate(rows):
        tokenizer = asked.original.tokenizer(most)
        ends = [tokenizer.encode(" " + text, add_special_tokens=False).ids for text in row["choices"]]
        tokenizer.no_truncation()
        prefix = tokenizer.encode(row["prompt"]).ids[-(most - max(map(len, ends))) :]
        tokenizer.enable_truncation(most)
        for index, subject in enumerate(asked.both):
            predicted = subject.predictions(prefix, ends)
            likelihoods = [
                float(each.logs.sum()) / len(text) for text, each in zip(row["choices"], predicted, strict=True)
            ]
            answer = int(np.argmax(likelihoods)) if np.isfinite(likelihoods).all() else -1
            scores[index].append(right(answer, row["answer"]))
            answers[index].append(answer)
            if index == 0:
                # Of the choices alone, by their likelihoods a character.
                confidence.append(certainty(np.asarray(likelihoods)))
        asked.watch(done + 1, len(rows))
    chance = float(np.mean([1 / len(row["choices"]) for row in rows]))
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

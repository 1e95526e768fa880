"""Is the answer that belongs to a query the nearest of all answers? Recall at 1 by cosine of embeddings."""

from __future__ import annotations

from edgeport.validate.suites.kinds import Asked, Scores, right


def score(asked: Asked) -> Scores:
    """1 where the nearest answer is the query's own; answers that several queries share count for each of them."""
    import numpy as np

    rows, most = asked.rows.evaluation, asked.most_tokens
    answers = sorted({row["answer"] for row in rows})
    total = 2 * (len(answers) + len(rows))
    done = 0
    scores, chosen = [], []
    for subject in asked.both:
        vectors = []
        for text in answers:
            vectors.append(subject.embed(text, most))
            asked.watch(done := done + 1, total)
        stacked = np.stack(vectors)
        found = []
        for row in rows:
            found.append(answers[int((stacked @ subject.embed(row["query"], most)).argmax())])
            asked.watch(done := done + 1, total)
        usable = bool(np.isfinite(stacked).all())
        scores.append([right(best, row["answer"]) if usable else 0.0 for best, row in zip(found, rows, strict=True)])
        chosen.append(found)
    return Scores(
        "recall_at_1",
        "share",
        scores[0],
        scores[1],
        chance=1 / len(answers),
        answers=chosen[0],
        artifact_answers=chosen[1],
        rows=range(len(rows)),
    )

"""How well a text is predicted: the mean loss a token, nats, whose exponential is the perplexity."""

from __future__ import annotations

import math

from edgeport.validate.suites.kinds import Asked, Scores


def score(asked: Asked) -> Scores:
    """One score a text: its mean loss over all tokens but the first, weighted by their number."""
    most = asked.most_tokens
    losses: tuple[list[float], list[float]] = ([], [])
    weights = []
    kept = []
    vocabulary = 0
    for done, row in enumerate(asked.rows.evaluation):
        ids = asked.original.tokenizer(most).encode(row["text"]).ids
        if len(ids) < 2:
            continue
        weights.append(float(len(ids) - 1))
        kept.append(done)
        for found, subject in zip(losses, asked.both, strict=True):
            predicted = subject.predictions(ids[:1], [ids[1:]])[0]
            vocabulary = predicted.vocabulary
            found.append(float(-predicted.logs.mean()))
        asked.watch(done + 1, len(asked.rows.evaluation))
    chance = math.log(vocabulary) if vocabulary else None
    return Scores("loss", "nats", *losses, higher_is_better=False, chance=chance, weights=weights, rows=kept)

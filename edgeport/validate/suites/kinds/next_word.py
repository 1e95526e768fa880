"""The last word of a passage (Paperno et al. 2016, LAMBADA, https://arxiv.org/abs/1606.06031): right or wrong."""

from __future__ import annotations

from edgeport.validate.suites.kinds import Asked, Scores


def score(asked: Asked) -> Scores:
    """1 where every token of the last word, without the punctuation behind it, is the most likely one."""
    scores: tuple[list[float], list[float]] = ([], [])
    words: tuple[list[str], list[str]] = ([], [])
    confidence: list[float] = []
    kept: list[int] = []
    most = asked.most_tokens
    for done, row in enumerate(asked.rows.evaluation):
        before, _, word = row["text"].strip().rstrip(".,;:!?\"'”’)-—").rpartition(" ")
        tokenizer = asked.original.tokenizer(most)
        end = tokenizer.encode(" " + word, add_special_tokens=False).ids
        # The words nearest to it, where the passage is longer than the models take.
        tokenizer.no_truncation()
        prefix = tokenizer.encode(before).ids[-(most - len(end)) :]
        tokenizer.enable_truncation(most)
        if not prefix or not end:
            continue
        kept.append(done)
        for index, subject in enumerate(asked.both):
            (predicted,) = subject.predictions(prefix, [end])
            found = predicted.likeliest.tolist()
            scores[index].append(float(found == end))
            words[index].append(tokenizer.decode(found).strip())
            if index == 0:
                confidence.append(predicted.certainty)
        asked.watch(done + 1, len(asked.rows.evaluation))
    return Scores(
        "accuracy",
        "share",
        *scores,
        answers=words[0],
        artifact_answers=words[1],
        confidence=confidence,
        rows=kept,
    )

"""Vocabulary pruning: the tokens that a corpus uses, and all that any text can be spelled with.

Works on the JSON of a tokenizer (tokenizers' format) for byte-level or character BPE, WordPiece and Unigram. Always
kept: special and added tokens, single characters and bytes, and of every BPE token the parts that it is merged from. A
text whose tokens are all kept is cut into the same tokens as before: every merge that it needs is still there, in the
same order.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from edgeport.errors import BadInputError

Json = dict[str, Any]


def token_ids(tokenizer: Json) -> dict[str, int]:
    """Every token of the model and its id.

    Raises:
        BadInputError: the tokenizer is of a kind that can't be pruned.
    """
    model = tokenizer["model"]
    kind = model.get("type")
    if kind == "Unigram":
        return {token: index for index, (token, _score) in enumerate(model["vocab"])}
    if kind in ("BPE", "WordPiece"):
        return dict(model["vocab"])
    raise BadInputError(
        f"A tokenizer of the kind {kind} can't be pruned.",
        where="prune_vocabulary",
        allowed="BPE, WordPiece, Unigram",
        next_step="Leave the step out.",
    )


def merges_of(tokenizer: Json) -> list[tuple[str, str]]:
    """BPE's merges in their order; older files write them as one text with a blank."""
    pairs = tokenizer["model"].get("merges") or []
    both = (pair.split(" ") if isinstance(pair, str) else pair for pair in pairs)
    return [(str(left), str(right)) for left, right in both]


def needed_ids(tokenizer: Json) -> set[int]:
    """Ids that every cut keeps: special and added tokens, and single characters and bytes."""
    model = tokenizer["model"]
    ids = token_ids(tokenizer)
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""

    def is_single(token: str) -> bool:
        inner = token.removeprefix(prefix) if prefix and token != prefix else token
        inner = inner.removesuffix(suffix) if suffix and inner != suffix else inner
        return len(inner) == 1 or (len(token) == 6 and token.startswith("<0x") and token.endswith(">"))

    kept = {index for token, index in ids.items() if is_single(token)}
    kept |= {int(entry["id"]) for entry in tokenizer.get("added_tokens") or []}
    unknown = model.get("unk_token")
    if unknown is not None and unknown in ids:
        kept.add(ids[unknown])
    if model.get("unk_id") is not None:
        kept.add(int(model["unk_id"]))
    return kept


def choose_tokens(tokenizer: Json, counts: Mapping[int, int], tokens: int, always: Iterable[int] = ()) -> list[int]:
    """The ids that stay, ascending: what is needed, then the most frequent with what they are merged from.

    Args:
        counts: how often the corpus uses an id.
        tokens: how many stay.
        always: further ids to keep (those that a config names).

    Raises:
        BadInputError: the tokenizer has no more tokens than that, or needs more.
    """
    ids = token_ids(tokenizer)
    every = set(ids.values()) | {int(entry["id"]) for entry in tokenizer.get("added_tokens") or []}
    kept = needed_ids(tokenizer) | (set(always) & every)
    if not len(kept) <= tokens < len(every):
        raise BadInputError(
            f"The tokenizer can't be cut to {tokens} tokens.",
            where="tokens of prune_vocabulary",
            allowed=f"{len(kept)} (special tokens, characters and bytes) to {len(every) - 1}",
        )
    derive = Derivation(tokenizer)
    names = {index: token for token, index in ids.items()}
    by_use = sorted(every - kept, key=lambda index: (-counts.get(index, 0), index))
    for index in by_use:
        wanted = {index, *(ids[part] for part in derive(names[index]) if part in ids)} - kept
        if len(kept) + len(wanted) <= tokens:
            kept |= wanted
        if len(kept) == tokens:
            break
    return sorted(kept)


class Derivation:
    """What BPE merges a token from: between two others it goes through the same parts as alone, for a merge across its
    ends would have made another token of it."""

    def __init__(self, tokenizer: Json) -> None:
        """A tokenizer of another kind derives nothing."""
        model = tokenizer["model"]
        self.prefix = model.get("continuing_subword_prefix") or ""
        self.suffix = model.get("end_of_word_suffix") or ""
        self.ranks = {pair: rank for rank, pair in enumerate(merges_of(tokenizer))}

    def joined(self, left: str, right: str) -> str:
        """The token that a merge makes."""
        return left + right.removeprefix(self.prefix)

    def __call__(self, token: str) -> set[str]:
        """The tokens on the way to it, down to single characters."""
        parts = self._characters(token)
        found = set(parts)
        while True:
            pairs = [(self.ranks.get(pair), place) for place, pair in enumerate(itertools.pairwise(parts))]
            known = [(rank, place) for rank, place in pairs if rank is not None]
            if not known:
                return found
            _, place = min(known)
            parts[place : place + 2] = [self.joined(parts[place], parts[place + 1])]
            found.add(parts[place])

    def _characters(self, token: str) -> list[str]:
        if not self.ranks:
            return []
        inner = token.removesuffix(self.suffix) if self.suffix else token
        ended = len(inner) < len(token)
        characters = list(inner.removeprefix(self.prefix))
        if self.prefix:
            inside = inner.startswith(self.prefix)
            characters = [
                one if place == 0 and not inside else self.prefix + one for place, one in enumerate(characters)
            ]
        return [*characters[:-1], characters[-1] + self.suffix] if ended and characters else characters


def pruned_tokenizer(tokenizer: Json, kept: list[int]) -> Json:
    """The tokenizer with these tokens alone, numbered in their order."""
    new = {old: place for place, old in enumerate(kept)}
    result = copy.deepcopy(tokenizer)
    model = result["model"]
    if model["type"] == "Unigram":
        size = len(model["vocab"])
        model["vocab"] = [model["vocab"][old] for old in kept if old < size]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[int(model["unk_id"])]
    else:
        model["vocab"] = {token: new[old] for token, old in model["vocab"].items() if old in new}
    if model["type"] == "BPE":
        left, derive = model["vocab"], Derivation(tokenizer)
        pairs = zip(merges_of(tokenizer), model.get("merges") or [], strict=True)
        model["merges"] = [
            raw for (first, second), raw in pairs if {first, second, derive.joined(first, second)} <= left.keys()
        ]
    for entry in result.get("added_tokens") or []:
        entry["id"] = new[int(entry["id"])]
    result["post_processor"] = _renumbered(result.get("post_processor"), new)
    return result


def _renumbered(value: Any, new: Mapping[int, int]) -> Any:
    """A post-processor with the tokens' new ids: ["[SEP]", 102] of BERT's, "ids": [0] of a template's."""
    if isinstance(value, dict):
        return {
            key: [new[int(one)] for one in item]
            if key == "ids"
            else [item[0], new[int(item[1])]]
            if key in ("sep", "cls") and isinstance(item, list)
            else _renumbered(item, new)
            for key, item in value.items()
        }
    return [_renumbered(item, new) for item in value] if isinstance(value, list) else value


def renumbered_ids(value: Any, new: Mapping[int, int]) -> Any:
    """A config's settings with the tokens' new ids, wherever a key ends in `_token_id` or `_token_ids`; in
    `added_tokens_decoder` the ids are the keys. An id that is gone becomes None."""
    if isinstance(value, list):
        return [renumbered_ids(item, new) for item in value]
    if not isinstance(value, dict):
        return value
    result: Json = {}
    for key, item in value.items():
        if str(key).endswith(("_token_id", "_token_ids")) and item is not None:
            result[key] = [new[one] for one in item if one in new] if isinstance(item, list) else new.get(item)
        elif key == "added_tokens_decoder":
            result[key] = {str(new[int(one)]): entry for one, entry in item.items() if int(one) in new}
        else:
            result[key] = renumbered_ids(item, new)
    return result


def count_tokens(tokenizer: Any, texts: Iterable[str]) -> Counter[int]:
    """How often some texts use each id.

    Args:
        tokenizer: a tokenizers.Tokenizer without truncation.
    """
    counts: Counter[int] = Counter()
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        counts.update(encoding.ids)
    return counts

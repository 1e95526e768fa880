"""What a weight is for, from its layer kinds and its name: the groups that bytes and errors are told by."""

from __future__ import annotations

import re
from collections.abc import Sequence

from edgeport.explain.document import Group

GROUPS: dict[Group, str] = {
    "embedding": "Embeddings",
    "tied_head": "Embeddings tied to the head",
    "attention": "Attention",
    "feed_forward": "Feed-forward",
    "conv": "Convolutions",
    "head": "Head and pooler",
    "other": "Norms, biases, other",
    "file": "The file itself",
}
"""Their names for people, in the order in which they are told."""

_IN_BLOCK = re.compile(r"(^|\.)\d+\.")
_HEAD = re.compile(r"(^|[._])(lm_head|head|classifier|score|pooler|fc|proj_out|logits|embed_out|projector)([._]|$)")
_ATTENTION = re.compile(r"attn|attention|(^|[._])(q|k|v|o|qkv|query|key|value|out)_?proj([._]|$)")
_FEED_FORWARD = re.compile(
    r"mlp|ffn|feed_forward|feedforward|intermediate|densereludense|(^|[._])(ff|fc\d?|wi(_\d)?|wo|lin\d|linear\d)([._]|$)"
    r"|(gate|up|down)_proj|(^|\.)output\.dense"
)


def layer_group(name: str, kinds: Sequence[str]) -> Group:
    """The group of a weight.

    Args:
        kinds: of the layers that use it ("linear", "embedding", "conv", "depthwise_conv").
    """
    lower = name.lower()
    if "embedding" in kinds:
        return "tied_head" if "linear" in kinds else "embedding"
    if "conv" in kinds or "depthwise_conv" in kinds:
        return "conv"
    if _HEAD.search(lower) and not _IN_BLOCK.search(lower):
        return "head"
    if _ATTENTION.search(lower):
        return "attention"
    if _FEED_FORWARD.search(lower):
        return "feed_forward"
    return "other"

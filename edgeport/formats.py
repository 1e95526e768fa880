"""The names of weight and activation formats, as recipes ask for them and targets offer them.

========= ===================================================================================
float     as it is, stored at the recipe's precision
intB      B-bit integers, symmetric (no zero point), one scale a channel
uintB     B-bit integers with a zero point beside each scale (asymmetric)
lutB      B-bit indices into a palette of 2**B values, one palette a weight
========= ===================================================================================

`_gG` behind `intB` and `uintB` means one scale (and zero point) every G weights of a channel; behind `lutB`
one palette every G channels. Widths 2 to 8 and any group size parse; what runs is for a target to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from edgeport.errors import BadInputError

LayerKind = Literal["linear", "embedding", "conv", "depthwise_conv"]
LAYER_KINDS: tuple[LayerKind, ...] = ("linear", "embedding", "conv", "depthwise_conv")

ActivationFormat = Literal["float", "dynamic_int8", "static_int8"]
ACTIVATION_FORMATS: tuple[ActivationFormat, ...] = ("float", "dynamic_int8", "static_int8")

CacheFormat = Literal["float", "int8", "int4"]
"""Keys and values that a decoder keeps: as they are, or as symmetric integers."""
CACHE_BITS: dict[CacheFormat, int] = {"float": 32, "int8": 8, "int4": 4}

Scheme = Literal["float", "int", "uint", "lut"]

_PATTERN = re.compile(r"(int|uint|lut)([2-8])(?:_g([1-9][0-9]*))?")
ALLOWED = (
    "float, intB (symmetric, one scale a channel), uintB (with zero points), lutB (a palette), "
    "each also as intB_gG, uintB_gG (one scale every G weights), lutB_gG (one palette every G channels), "
    "with B from 2 to 8"
)


@dataclass(frozen=True)
class WeightFormat:
    """A parsed weight format.

    Attributes:
        name: as written, for example `int4_g32`.
        scheme: what the codes stand for.
        bits: 2 to 8 for codes, 32 for `float`.
        group_size: weights of a channel that share a scale, or channels that share a palette; None means all.
    """

    name: str
    scheme: Scheme
    bits: int
    group_size: int | None

    @property
    def quantized(self) -> bool:
        """Stored as codes."""
        return self.scheme != "float"

    def fits(self, channels: int, columns: int) -> bool:
        """A weight of `channels` x `columns` can be cut into these groups."""
        if self.group_size is None:
            return True
        return (channels if self.scheme == "lut" else columns) % self.group_size == 0

    @classmethod
    def parse(cls, name: str) -> WeightFormat:
        """Read a format's name.

        Raises:
            BadInputError: it is no format's name.
        """
        if name == "float":
            return cls(name, "float", 32, None)
        match = _PATTERN.fullmatch(name)
        if match is None:
            raise BadInputError(f"{name!r} is no weight format.", allowed=ALLOWED)
        return cls(name, cast(Scheme, match[1]), int(match[2]), int(match[3]) if match[3] else None)

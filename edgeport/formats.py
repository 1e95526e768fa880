"""The names of weight and activation formats, as recipes ask for them and targets offer them.

`float` leaves a weight as it is, stored at the recipe's precision. `int8` is symmetric, one scale a
channel; `int4_g32` is symmetric, one scale every 32 weights of a channel. Widths 2 to 8 and any group
size parse; what runs is for a target to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from edgeport.errors import BadInputError

LayerKind = Literal["linear", "embedding", "conv", "depthwise_conv"]
LAYER_KINDS: tuple[LayerKind, ...] = ("linear", "embedding", "conv", "depthwise_conv")

ActivationFormat = Literal["float", "dynamic_int8"]
ACTIVATION_FORMATS: tuple[ActivationFormat, ...] = ("float", "dynamic_int8")

_PATTERN = re.compile(r"int([2-8])(?:_g([1-9][0-9]*))?")
ALLOWED = "float, intB (one scale a channel) or intB_gG (one scale every G weights), with B from 2 to 8"


@dataclass(frozen=True)
class WeightFormat:
    """A parsed weight format.

    Attributes:
        name: as written, for example `int4_g32`.
        bits: 2 to 8 for integers, 32 for `float`.
        group_size: weights that share a scale; None means a whole channel.
    """

    name: str
    bits: int
    group_size: int | None

    @property
    def quantized(self) -> bool:
        """Stored as integer codes and scales."""
        return self.name != "float"

    @classmethod
    def parse(cls, name: str) -> WeightFormat:
        """Read a format's name.

        Raises:
            BadInputError: it is no format's name.
        """
        if name == "float":
            return cls(name, 32, None)
        match = _PATTERN.fullmatch(name)
        if match is None:
            raise BadInputError(f"{name!r} is no weight format.", allowed=ALLOWED)
        return cls(name, int(match[1]), int(match[2]) if match[2] else None)

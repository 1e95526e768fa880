"""Pictures of written words: a text in a font, slightly turned, in one grey on another, with noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeport.errors import BadInputError

if TYPE_CHECKING:
    from PIL.Image import Image

HEIGHT = 40
"""Of the letters, pixels."""


@dataclass(frozen=True)
class Rendered:
    """A picture that is drawn when it is asked for.

    Attributes:
        font: a TrueType file.
        ink, paper: grey, 0 to 255.
        degrees: by which the line is turned.
        noise: deviation of each pixel, grey values; seed: of it.
    """

    text: str
    font: Path
    ink: int
    paper: int
    degrees: float
    noise: float
    seed: int

    def image(self) -> Image:
        """The picture, RGB, as large as the text with a margin.

        Raises:
            BadInputError: the font can't be read.
        """
        from PIL import Image as Pillow
        from PIL import ImageDraw, ImageFont
        from PIL.Image import Resampling

        try:
            font = ImageFont.truetype(str(self.font), HEIGHT, layout_engine=ImageFont.Layout.BASIC)
        except OSError as error:
            raise BadInputError(f"The font can't be read: {error}.", where=self.font.name) from error
        left, top, right, bottom = font.getbbox(self.text)
        size = (round(right - left) + HEIGHT // 2, round(bottom - top) + HEIGHT // 2)
        drawn = Pillow.new("L", size, self.paper)
        ImageDraw.Draw(drawn).text((HEIGHT // 4 - left, HEIGHT // 4 - top), self.text, self.ink, font)
        drawn = drawn.rotate(self.degrees, Resampling.BILINEAR, expand=True, fillcolor=self.paper)
        pixels = np.asarray(drawn, np.float64)
        pixels = pixels + np.random.default_rng(self.seed).normal(0.0, self.noise, pixels.shape)
        return Pillow.fromarray(pixels.clip(0, 255).round().astype(np.uint8)).convert("RGB")

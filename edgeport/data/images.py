"""Pictures of a card, and how they become a model's input."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeport.data.cards import Card, Split
from edgeport.errors import BadInputError
from edgeport.model.types import ImagePreprocessing

if TYPE_CHECKING:
    from PIL.Image import Image


def crop_image(image: Image, how: ImagePreprocessing) -> np.ndarray:
    """Resize and centre-crop.

    Returns:
        uint8 array, shape (height, width, 3), RGB: what a Core ML image input is given.
    """
    from PIL.Image import Resampling

    image = image.convert("RGB")
    height, width = how.size
    resample = Resampling.BICUBIC if how.resample == "bicubic" else Resampling.BILINEAR
    if how.stretch:
        return np.asarray(image.resize((width, height), resample))
    # The shorter side becomes so long that the crop is `how.crop` of it.
    factor = max(height / image.height, width / image.width) / how.crop
    scaled = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    image = image.resize(scaled, resample)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


def normalize_pixels(pixels: np.ndarray, how: ImagePreprocessing) -> np.ndarray:
    """(pixel * scale - mean) / std.

    Args:
        pixels: uint8, shape (height, width, 3).

    Returns:
        float32, shape (1, 3, height, width).
    """
    scaled = pixels.astype(np.float32) * np.float32(how.scale)
    values = (scaled - np.asarray(how.mean, np.float32)) / np.asarray(how.std, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


def preprocess_image(image: Image, how: ImagePreprocessing) -> np.ndarray:
    """A picture as the model takes it: float32, shape (1, 3, height, width)."""
    return normalize_pixels(crop_image(image, how), how)


def open_image(path: Path) -> Image:
    """An RGB picture; what is transparent is white.

    Raises:
        BadInputError: the file is no picture.
    """
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    try:
        with Pillow.open(path) as image:
            if not image.has_transparency_data:
                return image.convert("RGB")
            white = Pillow.new("RGBA", image.size, "white")
            white.alpha_composite(image.convert("RGBA"))
            return white.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise BadInputError(f"The picture can't be read: {error}.", where=path.name) from error


def split_pictures(card: Card, files: Sequence[Path], split: Split) -> list[Path]:
    """The pictures of a slice, by name."""
    part = card.slice(split)
    return sorted(files, key=lambda path: path.name)[part.start : part.stop]


def label_of(card: Card, path: Path) -> int | None:
    """The class index that the picture's name carries, or None."""
    pattern = card.image.label_pattern if card.image else None
    match = re.fullmatch(pattern, path.name) if pattern else None
    return int(match[1]) if match else None

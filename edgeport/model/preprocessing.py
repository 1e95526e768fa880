"""Read how a picture becomes a model's input from Hugging Face's preprocessor_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeport.errors import BadInputError
from edgeport.model.types import ImagePreprocessing, TensorSpec
from edgeport.storage import read_json

BILINEAR, BICUBIC = 2, 3  # PIL.Image.Resampling


def read_preprocessing(path: Path, pixels: TensorSpec) -> ImagePreprocessing | None:
    """The preprocessing of an RGB model, or None for models that do not take three channels.

    Args:
        pixels: the model's picture input, shape (batch, channels, height, width).

    Raises:
        BadInputError: the file is not JSON, or a field has the wrong form.
    """
    _, channels, height, width = pixels.fixed_shape()
    if channels != 3:
        return None
    config = read_json(path)
    try:
        return _preprocessing(config, (height, width))
    except (TypeError, ValueError, KeyError) as error:
        raise BadInputError(f"The preprocessing config is wrong: {error}.", where=path) from error


def _preprocessing(config: Mapping[str, Any], size: tuple[int, int]) -> ImagePreprocessing:
    normalize = bool(config.get("do_normalize", True))
    rescale = bool(config.get("do_rescale", True))
    crops = bool(config.get("do_center_crop", False))
    shorter = _shorter_side(config.get("size"), crops=crops)
    return ImagePreprocessing(
        size=size,
        mean=_three(config["image_mean"]) if normalize else (0.0, 0.0, 0.0),
        std=_three(config["image_std"]) if normalize else (1.0, 1.0, 1.0),
        scale=float(config.get("rescale_factor", 1 / 255)) if rescale else 1.0,
        crop=min(1.0, min(size) / shorter) if crops and shorter else 1.0,
        resample="bicubic" if int(config.get("resample") or BILINEAR) == BICUBIC else "bilinear",
        stretch=not crops and shorter is None,
    )


def _shorter_side(size: Any, *, crops: bool) -> int | None:
    """Pixels that the shorter side is resized to; None when the whole picture is stretched to both sides."""
    if isinstance(size, int):
        return size
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return int(size["shortest_edge"])
    if isinstance(size, Mapping) and crops:
        # Resized to both sides and then cropped: the nearest that keeps the picture's proportions.
        return min(int(size["height"]), int(size["width"]))
    return None


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue

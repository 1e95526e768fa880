"""Pictures: the same pixels and numbers as transformers' own image processors make."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeport.data.images import crop_image, normalize_pixels, open_image, preprocess_image
from edgeport.errors import BadInputError
from edgeport.model.preprocessing import read_preprocessing
from edgeport.model.types import ImagePreprocessing, TensorSpec


def picture(width: int, height: int) -> Image.Image:
    """A smooth picture with noise, so that resampling and cropping both show."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1)
    noise = np.random.default_rng(0).integers(0, 40, (height, width, 3))
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(320, 240), (240, 320), (100, 100)])
@pytest.mark.parametrize("processor", ["ViTImageProcessorPil", "MobileNetV2ImageProcessorPil"])
def test_equals_transformers_processor_of_the_same_config(
    processor: str, size: tuple[int, int], tmp_path: Path
) -> None:
    import transformers

    reference = getattr(transformers, processor)(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25], resample=3)
    (tmp_path / "preprocessor_config.json").write_text(reference.to_json_string())
    how = read_preprocessing(tmp_path / "preprocessor_config.json", TensorSpec("x", "float32", (1, 3, 224, 224)))
    assert how is not None
    expected = np.asarray(reference(picture(*size), return_tensors="np")["pixel_values"])
    actual = preprocess_image(picture(*size), how)
    assert actual.shape == expected.shape == (1, 3, 224, 224)
    assert actual.dtype == np.float32
    # Where the longer side's rounding differs by a pixel, the crop may begin half a pixel away.
    assert float(np.abs(actual - expected).mean()) < 0.02
    if size == (100, 100) or processor.startswith("ViT"):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_normalisation_by_hand() -> None:
    how = ImagePreprocessing((1, 2), mean=(127.0,) * 3, std=(128.0,) * 3, scale=1.0)
    pixels = np.asarray([[[0, 127, 255], [255, 0, 63]]], np.uint8)
    expected = [[[[-127 / 128, 1.0]], [[0.0, -127 / 128]], [[1.0, -0.5]]]]
    np.testing.assert_array_equal(normalize_pixels(pixels, how), np.asarray(expected, np.float32))


def test_the_crop_is_centred_and_of_the_asked_share() -> None:
    values = np.zeros((100, 200, 3), np.uint8)
    values[:, 100:] = 255  # the border between black and white is in the middle
    how = ImagePreprocessing((64, 64), mean=(0.0,) * 3, std=(1.0,) * 3, scale=1.0, crop=0.5, resample="bilinear")
    cropped = crop_image(Image.fromarray(values), how)
    assert cropped.shape == (64, 64, 3)
    assert cropped[:, :31].max() == 0
    assert cropped[:, 33:].min() == 255


def test_grey_and_transparent_pictures_become_rgb_and_no_picture_is_refused(tmp_path: Path) -> None:
    how = ImagePreprocessing((8, 8), mean=(0.0,) * 3, std=(1.0,) * 3, scale=1.0)
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert crop_image(Image.new(mode, (20, 10)), how).shape == (8, 8, 3)
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(BadInputError, match="picture can't be read"):
        open_image(tmp_path / "a.jpg")


def test_a_wrong_preprocessing_config_is_refused_and_grey_models_have_none(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_mean": [0.5], "image_std": [0.5, 0.5, 0.5], "size": 224}))
    with pytest.raises(BadInputError, match="preprocessing config is wrong"):
        read_preprocessing(path, TensorSpec("x", "float32", (1, 3, 224, 224)))
    assert read_preprocessing(path, TensorSpec("x", "float32", (1, 1, 28, 28))) is None

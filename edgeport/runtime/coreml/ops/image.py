"""Resizing and resampling of the last two axes (coremltools `image_resizing.py`)."""

from __future__ import annotations

import torch
from torch.nn import functional

from edgeport.runtime.coreml.ops.arguments import Operators, Tensor, flag, integer, integers

GRID_PADDING = {"constant": "zeros", "border": "border", "reflection": "reflection"}


def grid(size: int, wanted: int, mode: str) -> Tensor:
    """Places in [0, size - 1] at which `wanted` samples are taken, float32, by coremltools' sampling modes."""
    steps = torch.arange(wanted, dtype=torch.float32)
    if mode == "ALIGN_CORNERS" and wanted == 1:
        places = torch.tensor([(size - 1) / 2])
    elif mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        places = steps * ((size - 1) / max(wanted - 1, 1))
    elif mode == "DEFAULT":
        places = steps * (size / wanted)
    elif mode == "OFFSET_CORNERS":
        delta = max(1, size - 1) / wanted
        places = 0.5 * delta + steps * delta
    elif mode == "UNALIGN_CORNERS":
        places = (steps + 0.5) * (size / wanted) - 0.5
    else:
        raise NotImplementedError(f"sampling mode '{mode}'")
    return places.clamp(0, size - 1)


def interpolate(x: Tensor, axis: int, places: Tensor) -> Tensor:
    """Linear interpolation of one axis at fractional places."""
    low = places.floor().long()
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    shape = [1] * x.ndim
    shape[axis] = -1
    share = (places - low).reshape(shape)
    return x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share


def resize_bilinear(
    x: Tensor, target_size_height: Tensor | int = 1, target_size_width: Tensor | int = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    """Bilinear interpolation to a given size."""
    for axis, wanted in ((-2, integer(target_size_height)), (-1, integer(target_size_width))):
        x = interpolate(x, x.ndim + axis, grid(x.shape[axis], wanted, sampling_mode))
    return x


def resize_nearest_neighbor(x: Tensor, target_size_height: Tensor, target_size_width: Tensor) -> Tensor:
    """The element at floor(i * size / wanted)."""
    for axis, wanted in ((-2, integer(target_size_height)), (-1, integer(target_size_width))):
        size = x.shape[axis]
        x = x.index_select(x.ndim + axis, torch.arange(wanted) * size // wanted)
    return x


def upsample_bilinear(
    x: Tensor,
    scale_factor_height: Tensor | int = 1,
    scale_factor_width: Tensor | int = 1,
    align_corners: Tensor | bool = True,
    half_pixel_centers: Tensor | bool | None = None,
) -> Tensor:
    """Bilinear interpolation to floor(size * factor)."""
    corners = flag(align_corners)
    half = not corners if half_pixel_centers is None else flag(half_pixel_centers)
    if corners and half:
        raise NotImplementedError("align_corners together with half_pixel_centers")
    mode = "STRICT_ALIGN_CORNERS" if corners else "UNALIGN_CORNERS" if half else "DEFAULT"
    height, width = _scaled(x, scale_factor_height, scale_factor_width)
    return resize_bilinear(x, height, width, mode)


def upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: Tensor | int = 1, scale_factor_width: Tensor | int = 1
) -> Tensor:
    """Nearest element, to floor(size * factor)."""
    height, width = _scaled(x, scale_factor_height, scale_factor_width)
    return resize_nearest_neighbor(x, torch.tensor(height), torch.tensor(width))


def resize(
    x: Tensor,
    shape: Tensor,
    resized_dims: Tensor,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """The last `resized_dims` axes interpolated to the last sizes of `shape`; 0 keeps a size."""
    count = integer(resized_dims)
    for axis, wanted in zip(range(x.ndim - count, x.ndim), integers(shape)[-count:], strict=True):
        places = grid(x.shape[axis], wanted or x.shape[axis], sampling_mode)
        if interpolation_mode == "LINEAR":
            x = interpolate(x, axis, places)
        elif sampling_mode == "DEFAULT":
            size, length = x.shape[axis], len(places)
            x = x.index_select(axis, torch.arange(length) * size // length)
        else:
            raise NotImplementedError(f"nearest neighbour with sampling mode '{sampling_mode}'")
    return x


def crop(x: Tensor, crop_height: Tensor, crop_width: Tensor) -> Tensor:
    """Take rows and columns off both ends of the last two axes."""
    (top, bottom), (left, right) = integers(crop_height), integers(crop_width)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: Tensor | float,
    coordinates_mode: str,
    align_corners: Tensor | bool,
) -> Tensor:
    """x (B, C, H, W) sampled at coordinates (B, H2, W2, 2) given as (x, y) -> (B, C, H2, W2)."""
    if padding_mode not in GRID_PADDING or (padding_mode == "constant" and float(padding_value) != 0):
        raise NotImplementedError(f"padding mode '{padding_mode}' with value {float(padding_value)}")
    if coordinates_mode == "normalized_zero_to_one":
        coordinates = coordinates * 2 - 1
    elif coordinates_mode != "normalized_minus_one_to_one":
        raise NotImplementedError(f"coordinates mode '{coordinates_mode}'")
    return functional.grid_sample(
        x, coordinates, sampling_mode, padding_mode=GRID_PADDING[padding_mode], align_corners=flag(align_corners)
    )


def _scaled(x: Tensor, height: Tensor | float, width: Tensor | float) -> tuple[int, int]:
    return int(x.shape[-2] * float(height)), int(x.shape[-1] * float(width))


OPERATORS: Operators = {
    "crop": crop,
    "resample": resample,
    "resize": resize,
    "resize_bilinear": resize_bilinear,
    "resize_nearest_neighbor": resize_nearest_neighbor,
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}

"""Convolution and pooling over 1 to 3 spatial axes (coremltools `conv.py`, `pool.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from edgeport.runtime.coreml.ops.arguments import Operators, Tensor, along, flag, integer, integers

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
MAX_POOLS = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
AVERAGE_POOLS = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}

Padding = list[tuple[int, int]]  # (before, after) of each spatial axis


def spatial_padding(
    pad_type: str, pad: Tensor | None, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> Padding:
    """What `pad_type` adds before and after each spatial axis.

    `same` keeps ceil(size / stride) outputs and puts the odd element after (`same_lower`: before).

    Args:
        kernel: kernel sizes with their dilation: (k - 1) * dilation + 1.
    """
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    if pad_type == "custom":
        flat = integers(pad) or [0] * (2 * len(sizes))
        return list(zip(flat[::2], flat[1::2], strict=True))
    if pad_type not in ("same", "same_lower"):
        raise NotImplementedError(f"pad_type '{pad_type}'")
    totals = [
        max(0, stride * -(-size // stride) - size + k - stride)
        for size, k, stride in zip(sizes, kernel, strides, strict=True)
    ]
    if pad_type == "same":
        return [(total // 2, total - total // 2) for total in totals]
    return [(total - total // 2, total // 2) for total in totals]


def pad_spatial(x: Tensor, padding: Padding, value: float = 0.0) -> Tensor:
    """Pad the last axes with a constant."""
    if all(amount == (0, 0) for amount in padding):
        return x
    return functional.pad(x, [edge for pair in reversed(padding) for edge in pair], value=value)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Tensor | int = 1,
) -> Tensor:
    """Convolution: x (n, C_in, *D), weight (C_out, C_in / groups, *K) -> (n, C_out, *D_out)."""
    rank = x.ndim - 2
    steps = integers(strides) or [1] * rank
    dilation = integers(dilations) or [1] * rank
    kernel = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], dilation, strict=True)]
    padding = spatial_padding(pad_type, pad, x.shape[2:], kernel, steps)
    even = all(before == after >= 0 for before, after in padding)
    # The kernel's own padding spares a copy of x, but is the same on both sides.
    padded, around = (x, [before for before, _ in padding]) if even else (pad_spatial(x, padding), [0] * rank)
    return CONVOLUTIONS[rank](padded, weight, bias, steps, around, dilation, integer(groups))


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Tensor | None = None,
    output_shape: Tensor | None = None,
    pad_type: str = "valid",
    strides: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Tensor | int = 1,
) -> Tensor:
    """Transposed convolution: x (n, C_in, *D), weight (C_in, C_out / groups, *K) -> (n, C_out, *D_out).

    Padding takes elements off the full result, whose sizes are (D - 1) * stride + (K - 1) * dilation + 1;
    `output_shape` fixes how many remain, elements past the full result are the bias alone.
    """
    rank = x.ndim - 2
    steps = integers(strides) or [1] * rank
    dilation = integers(dilations) or [1] * rank
    full = TRANSPOSED[rank](x, weight, None, stride=steps, dilation=dilation, groups=integer(groups))
    sizes = list(full.shape[2:])
    if pad_type == "same":
        wanted = [size * step for size, step in zip(x.shape[2:], steps, strict=True)]
        before = [max(0, size - want) // 2 for size, want in zip(sizes, wanted, strict=True)]
    else:
        padding = spatial_padding(pad_type, pad, sizes, sizes, steps)
        before = [first for first, _ in padding]
        wanted = [size - first - last for size, (first, last) in zip(sizes, padding, strict=True)]
    if output_shape is not None:
        wanted = integers(output_shape)[2:]
    crop = [(-first, first + want - size) for first, want, size in zip(before, wanted, sizes, strict=True)]
    out = pad_spatial(full, crop)
    return out if bias is None else out + along(bias, 1, out.ndim)


def max_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    ceil_mode: Tensor | bool = False,
) -> Tensor:
    """Largest value of each window; padding never wins."""
    kernel, steps, padding, extra = _windows(x, kernel_sizes, strides, pad_type, pad, flag(ceil_mode))
    padded = pad_spatial(pad_spatial(x, padding, -torch.inf), extra, -torch.inf)
    return MAX_POOLS[x.ndim - 2](padded, kernel, steps)


def avg_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    exclude_padding_from_average: Tensor | bool = False,
    ceil_mode: Tensor | bool = False,
) -> Tensor:
    """Mean of each window; padding counts as zeros unless excluded, elements that only `ceil_mode` adds never count."""
    kernel, steps, padding, extra = _windows(x, kernel_sizes, strides, pad_type, pad, flag(ceil_mode))
    pool = AVERAGE_POOLS[x.ndim - 2]
    counted = pad_spatial(torch.ones_like(x[:1, :1]), padding, 0.0 if flag(exclude_padding_from_average) else 1.0)
    share = pool(pad_spatial(counted, extra), kernel, steps)
    return pool(pad_spatial(pad_spatial(x, padding), extra), kernel, steps) / share


def l2_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    ceil_mode: Tensor | bool = False,
) -> Tensor:
    """Square root of the sum of squares of each window."""
    kernel, steps, padding, extra = _windows(x, kernel_sizes, strides, pad_type, pad, flag(ceil_mode))
    padded = pad_spatial(pad_spatial(x * x, padding), extra)
    count = 1
    for size in kernel:
        count *= size
    return torch.sqrt(AVERAGE_POOLS[x.ndim - 2](padded, kernel, steps) * count)


def _windows(
    x: Tensor, kernel_sizes: Tensor, strides: Tensor | None, pad_type: str, pad: Tensor | None, ceil_mode: bool
) -> tuple[list[int], list[int], Padding, Padding]:
    """Kernel, strides, padding, and what `ceil_mode` adds at the end for a last, partial window."""
    kernel = integers(kernel_sizes)
    steps = integers(strides) or [1] * len(kernel)
    padding = spatial_padding(pad_type, pad, x.shape[2:], kernel, steps)
    extra: Padding = [(0, 0)] * len(kernel)
    if ceil_mode:
        for axis, (size, k, step) in enumerate(zip(x.shape[2:], kernel, steps, strict=True)):
            before, after = padding[axis]
            windows = -(-(size + before + after - k) // step) + 1
            if (windows - 1) * step >= size + before:  # the last window would start in the padding
                windows -= 1
            extra[axis] = (0, max(0, (windows - 1) * step + k - (size + before + after)))
    return kernel, steps, padding, extra


OPERATORS: Operators = {
    "avg_pool": avg_pool,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "l2_pool": l2_pool,
    "max_pool": max_pool,
}

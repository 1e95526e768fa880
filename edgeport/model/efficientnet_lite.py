"""EfficientNet-Lite: the EfficientNet variant made for phones, without squeeze-and-excite and with ReLU6.

Architecture: Tan & Le 2019 (https://arxiv.org/abs/1905.11946), table 1, with the changes of the "lite" release:
no squeeze-and-excite blocks, ReLU6 in place of swish, and a stem and a head that are not scaled. Lite0 has
width and depth 1.0 and takes pictures of 224 x 224.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from edgeport.errors import BadInputError
from edgeport.model.published import published_classifier
from edgeport.model.types import ImagePreprocessing, Model

STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
BATCH_NORM_EPSILON = 1e-3


@dataclass(frozen=True)
class Stage:
    """One row of table 1: `repeats` inverted bottlenecks, the first with `stride`."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


LITE0_SIZE = (224, 224)
LITE0 = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def convolution(
    channels_in: int, channels_out: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution and batch norm with TensorFlow's SAME padding, for even input sizes.

    At stride 2 that padding is one pixel wider at the right and the bottom, which needs a layer of its own.
    """
    total = kernel - stride  # (out - 1) * stride + kernel - in, with in = out * stride
    layers: list[nn.Module] = []
    if stride > 1:
        layers.append(nn.ZeroPad2d((total // 2, total - total // 2, total // 2, total - total // 2)))
    padding = 0 if stride > 1 else kernel // 2
    layers.append(nn.Conv2d(channels_in, channels_out, kernel, stride, padding, groups=groups, bias=False))
    layers.append(nn.BatchNorm2d(channels_out, eps=BATCH_NORM_EPSILON))
    return nn.Sequential(*layers)


class InvertedBottleneck(nn.Module):
    """Expand (1x1), filter (depthwise), project (1x1); Sandler et al. 2018 (https://arxiv.org/abs/1801.04381)."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = channels_in * expansion
        self.expand = convolution(channels_in, width) if expansion > 1 else None
        self.depthwise = convolution(width, width, kernel, stride, groups=width)
        self.project = convolution(width, channels_out)
        self.activation = nn.ReLU6()
        self.residual = stride == 1 and channels_in == channels_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels_in, height, width) to (batch, channels_out, height / stride, width / stride)."""
        y = x if self.expand is None else self.activation(self.expand(x))
        y = self.project(self.activation(self.depthwise(y)))
        result: torch.Tensor = x + y if self.residual else y
        return result


class EfficientNetLite(nn.Module):
    """The classifier: stem, stages, head, mean over the picture, linear."""

    def __init__(self, stages: tuple[Stage, ...] = LITE0, classes: int = 1000) -> None:
        super().__init__()
        self.stem = convolution(3, STEM_CHANNELS, 3, 2)
        blocks, channels = [], STEM_CHANNELS
        for stage in stages:
            for index in range(stage.repeats):
                stride = stage.stride if index == 0 else 1
                blocks.append(InvertedBottleneck(channels, stage.channels, stage.kernel, stride, stage.expansion))
                channels = stage.channels
        self.blocks = nn.ModuleList(blocks)
        self.head = convolution(channels, HEAD_CHANNELS)
        self.activation = nn.ReLU6()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(HEAD_CHANNELS, classes)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits, shape (batch, classes), of pictures (batch, 3, height, width), sizes divisible by 32."""
        x = self.activation(self.stem(pixel_values))
        for block in self.blocks:
            x = block(x)
        x = self.pool(self.activation(self.head(x))).flatten(1)
        logits: torch.Tensor = self.classifier(x)
        return logits


def from_published(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of the published PyTorch checkpoints to this module's names.

    There each block holds `_expand_conv/_bn0` (absent without expansion), `_depthwise_conv/_bn1` and
    `_project_conv/_bn2`; the stem is `_conv_stem/_bn0`, the head `_conv_head/_bn1`, the classifier `_fc`.
    """
    ends = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    units = {
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "project": ("_project_conv", "_bn2"),
    }
    own = EfficientNetLite().state_dict()
    renamed = {}
    for name in own:
        part, _, rest = name.partition(".")
        if part == "classifier":
            renamed[name] = state[f"_fc.{rest}"]
            continue
        if part in ends:
            prefix, pair = "", ends[part]
        else:
            index, unit, rest = rest.split(".", 2)
            prefix, pair = f"_blocks.{index}.", units[unit]
        field = rest.partition(".")[2]  # after the index in the nn.Sequential
        is_convolution = field == "weight" and own[name].dim() == 4
        renamed[name] = state[f"{prefix}{pair[0] if is_convolution else pair[1]}.{field}"]
    return renamed


def load_lite0(
    path: Path, *, name: str, reference: str, labels: Path | None = None, hashes: Mapping[str, str] | None = None
) -> Model:
    """EfficientNet-Lite0 with the published ImageNet weights, its batch norms folded.

    Args:
        path: the published checkpoint (`efficientnet-lite0-57934424.pth`).
        labels: a JSON list of the 1000 classes' names.
        hashes: sha256 by file name where they are already known.

    Raises:
        BadInputError: the file is damaged or another checkpoint.
    """
    module = EfficientNetLite()
    try:
        module.load_state_dict(from_published(torch.load(path, map_location="cpu", weights_only=True)))
    except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError) as error:
        raise BadInputError("The file is no EfficientNet-Lite0 checkpoint, or is damaged.", where=path) from error
    # The published training code normalises with (pixel - 127) / 128 and crops 224 of 256 pixels.
    image = ImagePreprocessing(size=LITE0_SIZE, mean=(127.0,) * 3, std=(128.0,) * 3, scale=1.0, crop=0.875)
    return published_classifier(module, path, image, name=name, reference=reference, labels=labels, hashes=hashes)

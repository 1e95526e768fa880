"""MobileNetV2, the picture classifier made for phones.

Architecture: Sandler et al. 2018 (https://arxiv.org/abs/1801.04381), table 2, at width 1.0 and 224 x 224. The modules
carry the names of the published PyTorch checkpoint.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from edgeport.errors import BadInputError
from edgeport.model.published import published_classifier
from edgeport.model.types import ImagePreprocessing, Model

SIZE = (224, 224)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
STAGES = (
    # expansion, channels, repeats, stride of the first
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def convolution(
    channels_in: int, channels_out: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution, batch norm, ReLU6; the size is divided by the stride."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """Expand (1x1), filter (3x3 depthwise), project (1x1, linear), and add the input where the shapes agree."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = channels_in * expansion
        expand = [convolution(channels_in, width)] if expansion > 1 else []
        self.conv = nn.Sequential(
            *expand,
            convolution(width, width, 3, stride, groups=width),
            nn.Conv2d(width, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.residual = stride == 1 and channels_in == channels_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels_in, height, width) to (batch, channels_out, height / stride, width / stride)."""
        y: torch.Tensor = self.conv(x)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """The classifier: stem, stages, head, mean over the picture, linear."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [convolution(3, STEM_CHANNELS, 3, 2)]
        channels = STEM_CHANNELS
        for expansion, width, repeats, stride in STAGES:
            for index in range(repeats):
                layers.append(InvertedResidual(channels, width, stride if index == 0 else 1, expansion))
                channels = width
        self.features = nn.Sequential(*layers, convolution(channels, HEAD_CHANNELS))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(HEAD_CHANNELS, classes))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits, shape (batch, classes), of pictures (batch, 3, height, width)."""
        logits: torch.Tensor = self.classifier(self.features(pixel_values).mean((2, 3)))
        return logits


def load_mobilenet_v2(
    path: Path, *, name: str, reference: str, labels: Path | None = None, hashes: Mapping[str, str] | None = None
) -> Model:
    """MobileNetV2 with the published ImageNet weights, its batch norms folded.

    Args:
        path: the published checkpoint (`mobilenet_v2-b0353104.pth`).
        labels: a JSON list of the 1000 classes' names.
        hashes: sha256 by file name where they are already known.

    Raises:
        BadInputError: the file is damaged or another checkpoint.
    """
    module = MobileNetV2()
    try:
        module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, TypeError, EOFError) as error:
        raise BadInputError("The file is no MobileNetV2 checkpoint, or is damaged.", where=path) from error
    # As the weights were trained and published: the shorter side to 256, 224 of it, ImageNet's mean and deviation.
    image = ImagePreprocessing(
        size=SIZE,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        scale=1 / 255,
        crop=0.875,
        resample="bilinear",
    )
    return published_classifier(module, path, image, name=name, reference=reference, labels=labels, hashes=hashes)

"""Two small convolutional networks for 8x8 images: residual and depthwise-separable."""

from __future__ import annotations

import torch
from torch import nn


def conv_norm(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution, batch norm, relu."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around an identity, or a strided 1x1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = conv_norm(inputs, outputs, stride=stride)
        self.conv = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm(self.conv(self.first(x)))
        out += self.shortcut(x)
        return self.relu(out)


class ResidualNet(nn.Module):
    """A stem, three residual blocks, a linear head: (N, 1, 8, 8) to (N, 10)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = conv_norm(1, width)
        self.blocks = nn.Sequential(
            ResidualBlock(width, width),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 2 * width),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.pool(self.blocks(self.stem(x)))
        return self.head(torch.flatten(features, 1))


class SeparableNet(nn.Module):
    """Depthwise 3x3 and pointwise 1x1 convolutions in turn: (N, 1, 8, 8) to (N, 10).

    Few weights per output and no identity path: the kind of network that naive rounding to few
    bits destroys.
    """

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_norm(1, width)]
        channels = width
        for level in range(depth):
            stride = 2 if level in (1, 3) else 1
            outputs = channels * stride
            layers.append(conv_norm(channels, channels, stride=stride, groups=channels))
            layers.append(conv_norm(channels, outputs, kernel=1))
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))

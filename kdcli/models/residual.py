"""Residual blocks of the post-activation kind (He et al. 2016)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from kdcli.models.blocks import Block, conv1x1, conv3x3

ShortcutName = Literal["downsample", "shortcut"]
"""Under which name the public checkpoints store the projection."""


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """1x1 convolution and BatchNorm where the shape changes, else None (the identity)."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


class ResidualBlock(Block):
    """Adds a shortcut to `branch`; subclasses build the branch."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: ShortcutName) -> None:
        super().__init__()
        self.shortcut_name = shortcut
        self.register_module(shortcut, projection(inputs, outputs, stride))

    def skip(self, x: torch.Tensor) -> torch.Tensor:
        """The shortcut's output."""
        project = getattr(self, self.shortcut_name)
        return x if project is None else project(x)


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: ShortcutName) -> None:
        super().__init__(inputs, width, stride, shortcut)
        self.conv1, self.bn1 = conv3x3(inputs, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The BatchNorm in front of the addition."""
        return self.bn2

    def raw(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.skip(x)


class Bottleneck(ResidualBlock):
    """1x1, 3x3 (which carries the stride), 1x1 to four times the width."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, shortcut: ShortcutName) -> None:
        super().__init__(inputs, 4 * width, stride, shortcut)
        self.conv1, self.bn1 = conv1x1(inputs, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv1x1(width, 4 * width), nn.BatchNorm2d(4 * width)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The BatchNorm in front of the addition."""
        return self.bn3

    def raw(self, x: torch.Tensor) -> torch.Tensor:
        x_in = x
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x)) + self.skip(x_in)

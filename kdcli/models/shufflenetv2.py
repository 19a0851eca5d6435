"""ShuffleNetV2 (Ma et al. 2018) of size 1 for CIFAR.

Keys: `conv1, bn1`; the first block of a layer has `conv1..5, bn1..5`, the others `conv1..3, bn1..3`; then
`conv2, bn2, linear`.
A stage map is shuffled; its pre-activation is the concatenation before ReLU and before the shuffle, so ReLU of it is
a channel permutation of the map.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from kdcli.models.blocks import Block, Stage, conv1x1, conv3x3
from kdcli.models.network import Network
from kdcli.models.shuffle import shuffle

STEM = 24
CHANNELS = (116, 232, 464)
LAST = 1024
DEPTHS = (4, 8, 4)
"""Blocks per stage, the down-sampling one included."""


class SplitUnit(Block):
    """The second half of the channels goes through 1x1, 3x3 depthwise, 1x1; the first half stays as it is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = conv1x1(half, half), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = conv3x3(half, half, groups=half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv1x1(half, half), nn.BatchNorm2d(half)

    def raw(self, x: torch.Tensor) -> torch.Tensor:
        kept, branch = x.chunk(2, dim=1)
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(branch)))))
        return torch.cat([kept, self.bn3(self.conv3(branch))], dim=1)

    def close(self, raw: torch.Tensor) -> torch.Tensor:
        return shuffle(F.relu(raw), 2)  # the untouched half is not negative, so the ReLU leaves it alone


class DownUnit(Block):
    """Two branches of all channels, concatenated. `stride` 1 is used only when a head repeats the last stage."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1, self.bn1 = conv3x3(inputs, inputs, stride, groups=inputs), nn.BatchNorm2d(inputs)
        self.conv2, self.bn2 = conv1x1(inputs, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv1x1(inputs, half), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = conv3x3(half, half, stride, groups=half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = conv1x1(half, half), nn.BatchNorm2d(half)

    def raw(self, x: torch.Tensor) -> torch.Tensor:
        left = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        return torch.cat([left, self.bn5(self.conv5(right))], dim=1)

    def close(self, raw: torch.Tensor) -> torch.Tensor:
        return shuffle(F.relu(raw), 2)


class ShuffleNetV2(Network):
    """The network; all stages halve the side. The pooled vector comes after the final 1x1 convolution."""

    def __init__(self, outputs: int, first: int = 0) -> None:
        channels = [STEM, *CHANNELS]
        super().__init__(outputs=outputs, n_stages=3, pooled_dim=LAST, classifier_name="linear", first=first)
        if first == 0:
            self.conv1, self.bn1 = conv1x1(3, STEM), nn.BatchNorm2d(STEM)
        for i in self.own_stages:
            again = first > self.n_stages
            front = DownUnit(channels[i] if again else channels[i - 1], channels[i], 1 if again else 2)
            self.add_module(f"layer{i}", Stage(front, *(SplitUnit(channels[i]) for _ in range(DEPTHS[i - 1] - 1))))
        self.conv2, self.bn2 = conv1x1(channels[-1], LAST), nn.BatchNorm2d(LAST)
        self.linear = nn.Linear(LAST, outputs)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn1(self.conv1(x)))

    def raw_stage(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, f"layer{i}").raw(x)

    def close(self, i: int, raw: torch.Tensor) -> torch.Tensor:
        return shuffle(F.relu(raw), 2)

    def final(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn2(self.conv2(x)))

    def truncated(self, first: int, outputs: int) -> ShuffleNetV2:
        return ShuffleNetV2(outputs, first)

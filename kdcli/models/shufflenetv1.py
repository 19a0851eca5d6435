"""ShuffleNetV1 (Zhang et al. 2018) with 3 groups for CIFAR.

Keys: `conv1, bn1, layer{1,2,3}.{j}.{conv1,bn1,conv2,bn2,conv3,bn3}, linear`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from kdcli.models.blocks import Block, Stage, conv1x1, conv3x3
from kdcli.models.network import Network
from kdcli.models.shuffle import shuffle

GROUPS = 3
STEM = 24
CHANNELS = (240, 480, 960)
DEPTHS = (4, 8, 4)


class ShuffleUnit(Block):
    """Grouped 1x1, shuffle, 3x3 depthwise, grouped 1x1; stride 2 concatenates the pooled input, stride 1 adds it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        branch = outputs - inputs if stride == 2 else outputs
        middle = branch // 4
        # The stem's 24 channels are too few for groups.
        self.groups = 1 if inputs == STEM else GROUPS
        self.conv1, self.bn1 = conv1x1(inputs, middle, groups=self.groups), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = conv3x3(middle, middle, stride, groups=middle), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = conv1x1(middle, branch, groups=GROUPS), nn.BatchNorm2d(branch)

    def raw(self, x: torch.Tensor) -> torch.Tensor:
        branch = shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        branch = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(branch)))))
        if self.stride == 2:
            return torch.cat([branch, F.avg_pool2d(x, 3, 2, padding=1)], dim=1)
        return branch + x


class ShuffleNetV1(Network):
    """The network; all stages halve the side."""

    def __init__(self, outputs: int, first: int = 0) -> None:
        channels = [STEM, *CHANNELS]
        super().__init__(outputs=outputs, n_stages=3, pooled_dim=channels[-1], classifier_name="linear", first=first)
        if first == 0:
            self.conv1, self.bn1 = conv1x1(3, STEM), nn.BatchNorm2d(STEM)
        for i in self.own_stages:
            again = first > self.n_stages
            front = ShuffleUnit(channels[i] if again else channels[i - 1], channels[i], 1 if again else 2)
            rest = (ShuffleUnit(channels[i], channels[i], 1) for _ in range(DEPTHS[i - 1] - 1))
            self.add_module(f"layer{i}", Stage(front, *rest))
        self.linear = nn.Linear(channels[-1], outputs)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn1(self.conv1(x)))

    def raw_stage(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, f"layer{i}").raw(x)

    def final(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def truncated(self, first: int, outputs: int) -> ShuffleNetV1:
        return ShuffleNetV1(outputs, first)

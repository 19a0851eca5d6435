"""MobileNetV1 (Howard et al. 2017) for ImageNet: the student of the ResNet-50 pairs, often called V2 by mistake.

Keys: `model.0.{0,1}` (the first convolution), `model.{1..13}.{0,1,3,4}` (depthwise, pointwise), `fc`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from kdcli.models.blocks import conv1x1, conv3x3, he_fan_out
from kdcli.models.network import Network

STEM = 32
LAYERS: tuple[tuple[int, int], ...] = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
"""Channels and stride of layers 1..13."""
STAGES: tuple[tuple[int, ...], ...] = ((1, 2, 3), (4, 5), (6, 7, 8, 9, 10, 11), (12, 13))
"""Layers per stage: one stage per resolution below the stem's."""


def separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """3x3 depthwise and 1x1 convolution, each with BatchNorm; the closing ReLU is the caller's."""
    return nn.Sequential(
        conv3x3(inputs, inputs, stride, groups=inputs),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        conv1x1(inputs, outputs),
        nn.BatchNorm2d(outputs),
    )


class MobileNetV1(Network):
    """The network at width 1."""

    def __init__(self, outputs: int, *, first: int = 0) -> None:
        channels = [STEM, *(width for width, _ in LAYERS)]
        super().__init__(outputs=outputs, n_stages=4, pooled_dim=channels[-1], classifier_name="fc", first=first)
        # A dict, not a list: a truncated network keeps the numbers of the layers it has.
        self.model = nn.ModuleDict()
        if first == 0:
            self.model["0"] = nn.Sequential(conv3x3(3, STEM, 2), nn.BatchNorm2d(STEM), nn.ReLU())
        for i in self.own_stages:
            for layer in STAGES[i - 1]:
                inputs, (outs, stride) = channels[layer - 1], LAYERS[layer - 1]
                if first > self.n_stages:
                    stride, inputs = 1, channels[-1]
                self.model[str(layer)] = separable(inputs, outs, stride)
        self.fc = nn.Linear(channels[-1], outputs)
        he_fan_out(self)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.model["0"](x)

    def raw_stage(self, i: int, x: torch.Tensor) -> torch.Tensor:
        *front, last = STAGES[i - 1]
        for layer in front:
            x = F.relu(self.model[str(layer)](x))
        return self.model[str(last)](x)

    def preact_norm(self, i: int) -> nn.BatchNorm2d:
        norm = self.get_submodule(f"model.{STAGES[i - 1][-1]}.4")
        assert isinstance(norm, nn.BatchNorm2d)
        return norm

    def final(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def truncated(self, first: int, outputs: int) -> MobileNetV1:
        return MobileNetV1(outputs, first=first)

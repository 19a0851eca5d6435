"""MobileNetV2 at half width for CIFAR (the "MobileNetV2" of the distillation literature).

Keys: `conv1.{0,1}, blocks.{0..6}.{j}.conv.{0,1,3,4,6,7}, conv2.{0,1}, classifier.0`. Unlike torchvision's network it
has ReLU instead of ReLU6 and expands in its first block too. Stage maps are linear bottlenecks: no ReLU, so no
pre-activation either. The stem has stride 2 in most code bases and stride 1 in HSAKD; the parameters are the same.
"""

from __future__ import annotations

import torch
from torch import nn

from kdcli.models.blocks import conv1x1, conv3x3, he_fan_out, small_linear
from kdcli.models.network import Network

GROUPS: tuple[tuple[int, int, int, int], ...] = (
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)
"""Per group of blocks: expansion, channels (already halved), number of blocks, stride of the first."""
STAGES: tuple[tuple[int, ...], ...] = ((0, 1), (2,), (3, 4), (5, 6))
"""Groups per stage: the stage maps are the outputs of groups 1, 2, 4 and 6."""
STEM, LAST = 16, 1280


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; adds its input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            conv1x1(inputs, middle),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            conv3x3(middle, middle, stride, groups=middle),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            conv1x1(middle, outputs),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(Network):
    """The network; `stem_stride` is 2 or 1."""

    def __init__(self, outputs: int, *, stem_stride: int = 2, first: int = 0) -> None:
        super().__init__(outputs=outputs, n_stages=4, pooled_dim=LAST, classifier_name="classifier.0", first=first)
        self.stem_stride = stem_stride
        again = first > self.n_stages
        if first == 0:
            self.conv1 = nn.Sequential(conv3x3(3, STEM, stem_stride), nn.BatchNorm2d(STEM), nn.ReLU())
        channels = [STEM, *(group[1] for group in GROUPS)]
        # A dict, not a list: a truncated network keeps the numbers of the groups it has.
        self.blocks = nn.ModuleDict()
        for i in self.own_stages:
            for g in STAGES[i - 1]:
                expansion, outs, depth, stride = GROUPS[g]
                inputs = channels[g]
                if again:
                    stride, inputs = 1, channels[-1] if g == STAGES[-1][0] else inputs
                first_block = InvertedResidual(inputs, outs, stride, expansion)
                rest = (InvertedResidual(outs, outs, 1, expansion) for _ in range(depth - 1))
                self.blocks[str(g)] = nn.Sequential(first_block, *rest)
        self.conv2 = nn.Sequential(conv1x1(channels[-1], LAST), nn.BatchNorm2d(LAST), nn.ReLU())
        linear = nn.Linear(LAST, outputs)
        self.classifier = nn.Sequential(linear)
        he_fan_out(self)
        small_linear(linear)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv1(x)

    def raw_stage(self, i: int, x: torch.Tensor) -> torch.Tensor:
        for g in STAGES[i - 1]:
            x = self.blocks[str(g)](x)
        return x

    def close(self, i: int, raw: torch.Tensor) -> torch.Tensor:
        return raw

    def preact_norm(self, i: int) -> nn.BatchNorm2d:
        norm = self.get_submodule(f"blocks.{STAGES[i - 1][-1]}")[-1].conv[-1]  # type: ignore[index]
        assert isinstance(norm, nn.BatchNorm2d)
        return norm

    def final(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(x)

    def truncated(self, first: int, outputs: int) -> MobileNetV2:
        return MobileNetV2(outputs, stem_stride=self.stem_stride, first=first)

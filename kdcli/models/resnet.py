"""Residual networks of post-activation blocks: the CIFAR nets (3 stages) and ResNet-18/34/50 with a CIFAR stem.

State-dict keys are those of the public CIFAR checkpoints: `conv1, bn1, layer{i}.{j}.*`, then `downsample` and `fc` for
the 3-stage nets, `shortcut` and `linear` for the 4-stage ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from kdcli.models.blocks import Stage, conv3x3, he_fan_out
from kdcli.models.network import Network
from kdcli.models.residual import BasicBlock, Bottleneck, ShortcutName


@dataclass(frozen=True)
class ResNetPlan:
    """What distinguishes one residual network from another."""

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, ...]
    """Blocks per stage."""
    stem: int
    """Channels of F0."""
    widths: tuple[int, ...]
    """Width per stage; a bottleneck's output has four times as many channels."""
    shortcut: ShortcutName
    classifier: str


def cifar_plan(depth: int, *, wide: bool = False) -> ResNetPlan:
    """He's CIFAR network of depth 6n+2; `wide` is the x4 variant (stem 32, not 64)."""
    n = (depth - 2) // 6
    stem, widths = (32, (64, 128, 256)) if wide else (16, (16, 32, 64))
    return ResNetPlan(BasicBlock, (n, n, n), stem, widths, "downsample", "fc")


def four_stage_plan(depth: int) -> ResNetPlan:
    """ResNet-18, -34 or -50 with a 3x3 stride-1 stem and no max-pooling."""
    block, depths = {
        18: (BasicBlock, (2, 2, 2, 2)),
        34: (BasicBlock, (3, 4, 6, 3)),
        50: (Bottleneck, (3, 4, 6, 3)),
    }[depth]
    return ResNetPlan(block, depths, 64, (64, 128, 256, 512), "shortcut", "linear")


class ResNet(Network):
    """The network of a `ResNetPlan`; every stage but the first halves the side."""

    def __init__(self, plan: ResNetPlan, outputs: int, first: int = 0) -> None:
        channels = [plan.stem, *(width * plan.block.expansion for width in plan.widths)]
        super().__init__(
            outputs=outputs,
            n_stages=len(plan.depths),
            pooled_dim=channels[-1],
            classifier_name=plan.classifier,
            first=first,
        )
        self.plan = plan
        if first == 0:
            self.conv1, self.bn1 = conv3x3(3, plan.stem), nn.BatchNorm2d(plan.stem)
        for i in self.own_stages:
            again = first > self.n_stages
            inputs, stride = (channels[i], 1) if again else (channels[i - 1], 1 if i == 1 else 2)
            blocks = []
            for j in range(plan.depths[i - 1]):
                blocks.append(plan.block(inputs, plan.widths[i - 1], stride if j == 0 else 1, plan.shortcut))
                inputs = channels[i]
            self.add_module(f"layer{i}", Stage(*blocks))
        self.add_module(plan.classifier, nn.Linear(self.pooled_dim, outputs))
        he_fan_out(self)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn1(self.conv1(x)))

    def raw_stage(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, f"layer{i}").raw(x)

    def final(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def preact_norm(self, i: int) -> nn.BatchNorm2d:
        return getattr(self, f"layer{i}")[-1].last_norm

    def truncated(self, first: int, outputs: int) -> ResNet:
        return ResNet(self.plan, outputs, first)

"""Pieces shared by the families: blocks with a separable closing step, their sequence, pooling, initialisation."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module, ABC):
    """A block that ends in a closing step (a ReLU), so that the value before it can be had."""

    @abstractmethod
    def raw(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` to the block's output before its closing step."""

    def close(self, raw: torch.Tensor) -> torch.Tensor:
        """The closing step."""
        return F.relu(raw)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.close(self.raw(x))


class Stage(nn.Sequential):
    """Blocks in a row."""

    def raw(self, x: torch.Tensor) -> torch.Tensor:
        """The output of the last block before its closing step."""
        *front, last = self
        for block in front:
            x = block(x)
        assert isinstance(last, Block)
        return last.raw(x)


def pool(x: torch.Tensor) -> torch.Tensor:
    """Global average pooling, `[B, C, H, W]` to `[B, C]`: any input size works."""
    return x.mean(dim=(2, 3))


def conv3x3(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 3x3 convolution, padded, without bias."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 1, stride, groups=groups, bias=False)


def he_fan_out(network: nn.Module) -> None:
    """He-normal convolutions (fan out, variance 2 / (k * k * outputs / groups)) with zero bias, as the CIFAR recipes
    expect; BatchNorm keeps its 1 and 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def small_linear(layer: nn.Linear) -> None:
    """A linear layer drawn from N(0, 0.01^2), bias zero."""
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)

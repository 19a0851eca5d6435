"""Wide residual networks (Zagoruyko and Komodakis 2016): pre-activation blocks, no dropout.

Keys: `conv1, block{i}.layer.{j}.{bn1,conv1,bn2,conv2,convShortcut}, bn1, fc`. F0 is the bare first convolution and the
stage maps are raw residual sums: the BatchNorm and ReLU that belong to them open the next stage.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from kdcli.models.blocks import conv1x1, conv3x3, he_fan_out
from kdcli.models.network import Network


class PreactBlock(nn.Module):
    """BN-ReLU-conv twice; where the shape changes, a bare 1x1 convolution of the activated input is the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3x3(outputs, outputs)
        self.convShortcut = None if inputs == outputs else conv1x1(inputs, outputs, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = F.relu(self.bn1(x))
        branch = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return branch + (x if self.convShortcut is None else self.convShortcut(active))


class PreactStage(nn.Module):
    """Blocks in a row, under the key `layer`."""

    def __init__(self, inputs: int, outputs: int, stride: int, depth: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            PreactBlock(inputs, outputs, stride), *(PreactBlock(outputs, outputs, 1) for _ in range(depth - 1))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class WideResNet(Network):
    """WRN-`depth`-`width`, depth = 6n+4, widths 16, 16k, 32k, 64k."""

    def __init__(self, depth: int, width: int, outputs: int, first: int = 0) -> None:
        channels = [16, 16 * width, 32 * width, 64 * width]
        super().__init__(outputs=outputs, n_stages=3, pooled_dim=channels[-1], classifier_name="fc", first=first)
        self.depth, self.width = depth, width
        if first == 0:
            self.conv1 = conv3x3(3, channels[0])
        for i in self.own_stages:
            again = first > self.n_stages
            inputs, stride = (channels[i], 1) if again else (channels[i - 1], 1 if i == 1 else 2)
            self.add_module(f"block{i}", PreactStage(inputs, channels[i], stride, (depth - 4) // 6))
        self.bn1 = nn.BatchNorm2d(channels[-1])
        self.fc = nn.Linear(channels[-1], outputs)
        he_fan_out(self)
        nn.init.zeros_(self.fc.bias)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv1(x)

    def raw_stage(self, i: int, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, f"block{i}")(x)

    def close(self, i: int, raw: torch.Tensor) -> torch.Tensor:
        return raw

    def preact_norm(self, i: int) -> nn.BatchNorm2d:
        return self.bn1 if i == self.n_stages else getattr(self, f"block{i + 1}").layer[0].bn1

    def preact(self, i: int, raw: torch.Tensor) -> torch.Tensor:
        # A second call of the module would update its running statistics a second time, so only its function is used.
        norm = self.preact_norm(i)
        if norm.training:
            return F.batch_norm(raw, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
        return F.batch_norm(raw, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)

    def raw_of(self, i: int, preact: torch.Tensor) -> torch.Tensor:
        norm = self.preact_norm(i)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        dead = norm.weight.abs() < 1e-12  # a channel the BatchNorm has switched off: any value gives its bias
        scale = torch.where(dead, 0.0, (norm.running_var + norm.eps).sqrt() / norm.weight)
        mean = norm.running_mean - norm.bias * scale
        return preact * scale[:, None, None] + mean[:, None, None]

    def final(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn1(x))

    def truncated(self, first: int, outputs: int) -> WideResNet:
        return WideResNet(self.depth, self.width, outputs, first)

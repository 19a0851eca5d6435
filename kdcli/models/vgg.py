"""VGG with BatchNorm and one linear layer, as used on CIFAR.

Keys: `block{0..4}.{0,1,3,4,...}, classifier`. Block 0 is the stem, blocks 1..4 are the stages, each preceded by a 2x2
max-pooling, except block 4, which is pooled only for images of 64 pixels (F3 of side 8).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from kdcli.models.blocks import he_fan_out, small_linear
from kdcli.models.network import Network

DEPTHS: dict[int, tuple[int, ...]] = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Convolutions per block."""
CHANNELS = (64, 128, 256, 512, 512)


def conv_block(inputs: int, outputs: int, depth: int) -> nn.Sequential:
    """3x3 convolutions (with bias), each with BatchNorm; ReLU between them but not behind the last."""
    layers: list[nn.Module] = []
    for j in range(depth):
        layers += [nn.Conv2d(inputs if j == 0 else outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class VGG(Network):
    """VGG-`depth`.

    Args:
        fixed_stride: never pool in front of block 4, whatever the image size.
        first: as in `Network`. Truncated networks never pool there (so do HSAKD's heads), and `first=5` holds blocks 3
            and 4, both 512 channels wide and without pooling.
    """

    def __init__(self, depth: int, outputs: int, *, fixed_stride: bool = False, first: int = 0) -> None:
        super().__init__(
            outputs=outputs, n_stages=4, pooled_dim=CHANNELS[-1], classifier_name="classifier", first=first
        )
        self.depth, self.fixed_stride = depth, fixed_stride
        self.head_taps = (0, 1, 2, 4)
        if first == 0:
            self.block0 = conv_block(3, CHANNELS[0], DEPTHS[depth][0])
        for i in self.own_stages:
            inputs = CHANNELS[-1] if first > self.n_stages else CHANNELS[i - 1]
            self.add_module(f"block{i}", conv_block(inputs, CHANNELS[i], DEPTHS[depth][i]))
        self.classifier = nn.Linear(self.pooled_dim, outputs)
        he_fan_out(self)
        small_linear(self.classifier)

    @property
    def extra_stages(self) -> tuple[int, ...]:
        return (3, 4)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.block0(x))

    def _pools(self, i: int, side: int) -> bool:
        if self.first > self.n_stages:
            return False
        return i < 4 or (side == 8 and not self.fixed_stride)

    def raw_stage(self, i: int, x: torch.Tensor) -> torch.Tensor:
        if self._pools(i, x.shape[2]):
            x = F.max_pool2d(x, 2)
        return getattr(self, f"block{i}")(x)

    def preact_norm(self, i: int) -> nn.BatchNorm2d:
        return getattr(self, f"block{i}")[-1]

    def final(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def truncated(self, first: int, outputs: int) -> VGG:
        return VGG(self.depth, outputs, fixed_stride=True, first=first)

"""The Rescale Block of VSD: brings the student's maps to the scale at which the teacher's were made."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.transforms import rescale


class Resize(nn.Module):
    """[B,C,H,W] → [B,C,fH,fW] by interpolation; `nearest` copies each pixel f×f times. No parameters."""

    def __init__(self, factor: int, mode: str) -> None:
        super().__init__()
        self.factor, self.mode = factor, mode

    def forward(self, x: Tensor) -> Tensor:
        return rescale(x, self.factor, self.mode)


class Tile(nn.Module):
    """[B,C,H,W] → [B,C,fH,fW] by repeating the whole map f×f times. No parameters."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 1, self.factor, self.factor)


class Pool(nn.Module):
    """[B,C,H,W] → [B,C,ceil(H/f),ceil(W/f)] by averaging, for the teacher's maps. No parameters."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.factor, ceil_mode=True) if self.factor > 1 else x


def rescale_block(kind: str, factor: int, channels: int) -> nn.Module:
    """The student's Rescale Block for maps of `channels` channels.

    Args:
        kind: `nearest` (default: a reviewer describes the block as copying existing features; the paper is silent),
            `bilinear`, `tile`, `transposed` (a learned transposed convolution with kernel and stride f),
            `pool_teacher` (the student's maps stay, the teacher's are pooled) or `none`.
        factor: f, how much larger the teacher's input is.
        channels: C of the maps.
    """
    if factor == 1 or kind in ("none", "pool_teacher"):
        return nn.Identity()
    if kind == "transposed":
        return nn.ConvTranspose2d(channels, channels, factor, factor)
    if kind == "tile":
        return Tile(factor)
    return Resize(factor, kind)

"""The channel shuffle of both ShuffleNets."""

from __future__ import annotations

import torch


def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """`[B, groups * n, H, W]`: the channels read as a `groups x n` table, written column by column."""
    b, c, h, w = x.shape
    return x.reshape(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)

"""What one forward pass of a network yields besides its logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch


class Preactivating(Protocol):
    """What can turn a stage's raw output into its pre-activation map: a `Network`."""

    def preact(self, i: int, raw: torch.Tensor) -> torch.Tensor:
        """The pre-activation map `[B, C, H, W]` of stage i."""
        ...


@dataclass
class Features:
    """Outputs of one forward pass (`B` images, `K` outputs, `C,H,W` differ from map to map).

    `maps` is F0 (the stem) and F1..FL (the stages) as the literature taps them: after the closing ReLU, except where a
    stage has none (wide residual networks: the raw residual sum; MobileNetV2: the linear bottleneck).
    """

    logits: torch.Tensor
    """`[B, K]`"""
    pooled: torch.Tensor
    """`[B, C]`, the input of the last linear layer."""
    maps: tuple[torch.Tensor, ...]
    """F0, F1..FL, each `[B, C, H, W]`."""
    heads: tuple[torch.Tensor, ...] = ()
    """Logits of the auxiliary heads, shallowest first; empty for a network without heads."""
    final: torch.Tensor | None = None
    """`[B, C, H, W]`, the map whose mean over the positions is `pooled`; None where `pooled` is no such mean."""
    classifier: torch.Tensor | None = None
    """`[K, C]`, the weight of the last linear layer, where a method has asked for it."""
    assistants: tuple[Features, ...] = ()
    """What the assistants of a `Panel` made of the same images."""
    _raw: tuple[torch.Tensor, ...] = field(default=(), repr=False)
    """What each stage was before its closing step (see `Network.close`); `_raw[i - 1]` belongs to stage i."""
    network: Preactivating | None = field(default=None, repr=False)
    """The network that made them, where it is known (`pairing.network_of` gives it with its stages)."""

    @property
    def stages(self) -> tuple[torch.Tensor, ...]:
        """F1..FL."""
        return self.maps[1:]

    def preact(self, i: int) -> torch.Tensor:
        """Stage i (1..L) before its final ReLU, `[B, C, H, W]`; no BatchNorm statistic changes.

        A stage that ends in no ReLU is returned as it is. Wide residual networks: the next BatchNorm applied to the raw
        sum, with batch statistics in training mode and running statistics in evaluation mode. ShuffleNetV2: the
        concatenation before ReLU and before the channel shuffle. (OFD and the teacher side of ReviewKD use these maps.)
        """
        if not 1 <= i <= len(self._raw) or self.network is None:
            raise IndexError(f"stage {i} of {len(self._raw)}")
        return self.network.preact(i, self._raw[i - 1])

"""Auxiliary heads: one classifier per tapped map, each "the remaining stages again" (HSAKD, VSD)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from kdcli.errors import IncompatibleError
from kdcli.models.features import Features
from kdcli.models.network import Network


def build_heads(network: Network, outputs: int, count: int | None = None) -> nn.ModuleList:
    """Fresh heads for the last `count` (default: all) of `network.head_taps`, each with `outputs` logits.

    Raises:
        IncompatibleError: the network has fewer taps, or cannot be cut into stages.
    """
    taps = len(network.head_taps)
    count = taps if count is None else count
    if not 0 < count <= taps:
        raise IncompatibleError(f"{network.arch} has {taps} maps for auxiliary heads, not {count}")
    return nn.ModuleList(network.head(position, outputs) for position in range(taps - count, taps))


class Headed(nn.Module):
    """A network with auxiliary heads on its last `len(heads)` taps.

    Args:
        network: the backbone.
        heads: from `build_heads`, shallowest first.
        rescale: applied to each tapped map before its head (VSD enlarges maps here); default: nothing.
    """

    def __init__(self, network: Network, heads: nn.ModuleList, rescale: nn.Module | None = None) -> None:
        super().__init__()
        self.network, self.heads = network, heads
        self.rescale = nn.Identity() if rescale is None else rescale
        self.taps = network.head_taps[len(network.head_taps) - len(heads) :]
        """Indices into `Features.maps`: the map of each head."""

    def features(self, x: torch.Tensor) -> Features:
        """As `Network.features`, with `heads` filled: one `[B, K_heads]` per head."""
        features = self.network.features(x)
        heads = tuple(head(self.rescale(features.maps[tap])) for head, tap in zip(self.heads, self.taps, strict=True))
        return replace(features, heads=heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The main logits `[B, K]`; no head is computed."""
        return self.network(x)

"""What a teacher carries besides its classifier: auxiliary heads on its maps, or a projection of its pooled vector.

An auxiliary head is "the remaining stages again" (HSAKD, VSD); the projection is a small perceptron (SSKD).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

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


class Projection(nn.Module):
    """Pooled vector [B,C] to an embedding [B,C]: linear, ReLU, linear (SSKD, Xu et al. 2020, Section 3.2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.layers(pooled)


def build_projection(network: Network) -> nn.ModuleList:
    """A fresh projection of the network's pooled vector, in the list that `Headed` takes."""
    return nn.ModuleList([Projection(network.pooled_dim)])


def heads_spec(heads: nn.ModuleList) -> dict[str, Any]:
    """All that is needed to build `heads` again for the same network, as JSON-able values."""
    last = heads[-1]
    if isinstance(last, Projection):
        return {"kind": "projection"}
    assert isinstance(last, Network)
    return {"outputs": last.outputs, "count": len(heads)}


def from_heads_spec(spec: dict[str, Any], network: Network) -> nn.ModuleList:
    """The heads that `heads_spec` described, with fresh weights."""
    if spec.get("kind") == "projection":
        return build_projection(network)
    return build_heads(network, spec["outputs"], spec["count"])


class Headed(nn.Module):
    """A network with auxiliary heads on its last `len(heads)` taps, or a projection of its pooled vector.

    Args:
        network: the backbone.
        heads: from `build_heads`, shallowest first, or from `build_projection`.
        frozen: the backbone is a constant: it stays in evaluation mode and only the heads are trained.
    """

    def __init__(self, network: Network, heads: nn.ModuleList, *, frozen: bool = False) -> None:
        super().__init__()
        self.network, self.heads, self.frozen = network, heads, frozen
        if frozen:
            network.requires_grad_(False).eval()
        self.projects = isinstance(heads[-1], Projection)
        """Whether the heads read the pooled vector instead of maps."""
        self.taps = network.head_taps[len(network.head_taps) - len(heads) :]
        """Indices into `Features.maps`: the map of each head."""

    def train(self, mode: bool = True) -> Self:
        """As always, except that a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.network.eval()
        return self

    def features(self, x: torch.Tensor) -> Features:
        """As `Network.features`, with `heads` filled: one `[B, K_heads]` per head."""
        features = self.network.features(x)
        read = [features.pooled] if self.projects else [features.maps[tap] for tap in self.taps]
        return replace(features, heads=tuple(head(value) for head, value in zip(self.heads, read, strict=True)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The main logits `[B, K]`; no head is computed."""
        return self.network(x)

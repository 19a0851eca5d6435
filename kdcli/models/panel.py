"""Several frozen networks that teach together: a teacher and its assistants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from kdcli.models.features import Features
from kdcli.models.network import Network


class Panel(nn.Module):
    """The teacher first, then its assistants, all seeing the same images.

    Args:
        teacher: its features are the panel's.
        assistants: theirs are `Features.assistants`, in this order.
    """

    def __init__(self, teacher: Network, assistants: Sequence[Network]) -> None:
        super().__init__()
        self.networks = nn.ModuleList([teacher, *assistants])

    @property
    def teacher(self) -> Network:
        """The network the panel stands for."""
        first = self.networks[0]
        assert isinstance(first, Network)
        return first

    def features(self, x: torch.Tensor) -> Features:
        """Everything from one pass of each network over images `[B,3,H,W]`."""
        first, *others = [network.features(x) for network in self.networks]  # type: ignore[operator]
        return replace(first, assistants=tuple(others))

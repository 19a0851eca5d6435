"""DML: deep mutual learning, networks that start untrained and learn from each other as well as from the labels.

There is no teacher. The student is trained together with its peers, which are dropped at the end.

Equation: L = Σ_i [CE(z_i, y) + 1/(n-1) · Σ_{j≠i} T² · KL(softmax(z_j/T) ‖ softmax(z_i/T))] over the n networks, T = 1, with
    z_j a constant in network i's divergence
Reductions: CE and KL are means over the batch; the KL is summed over the classes.
Source: Zhang et al. 2018, arXiv 1706.00384, Eq. 3-8; losses and gradients equal to the unofficial public code's, with the
    peers' logits as constants.
Tensors: the logits of all networks.
Cost: forward and backward passes of every peer, and their parameters; no teacher.
Our reading: all networks are updated at once from the same outputs. The paper updates one after the other, computing its
    outputs anew each time, which costs one more forward of each network.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.losses import cross_entropy, divergence
from kdcli.methods.base import Method, MethodSpec, Progress, Setting
from kdcli.models import build
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.names import canonical
from kdcli.models.network import Network
from kdcli.models.panel import Panel


class DMLSpec(MethodSpec):
    """Settings of DML."""

    name: str = "dml"
    """The method's name."""
    peers: tuple[str, ...] = ()
    """Architectures of the peers; default: one more of the student's own."""
    ce_weight: float = Field(default=1.0, ge=0)
    """Weight of each network's cross-entropy to the labels."""
    kl_weight: float = Field(default=1.0, ge=0)
    """Weight of each network's mean divergence from the others."""
    temperature: float = Field(default=1.0, gt=0, le=1000)
    """T, by which all logits are divided (the paper: 1)."""

    @field_validator("peers")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(canonical(name, field="method.peers") for name in value)


class DML(Method):
    """L = Σ over the networks of ce_weight · CE + kl_weight · the mean divergence from the others' (constant) outputs."""

    Spec: ClassVar[type[MethodSpec]] = DMLSpec
    needs_teacher: ClassVar[bool] = False

    def __init__(
        self, spec: DMLSpec, setting: Setting, student: Network | None, teacher: Network | Headed | Panel | None
    ) -> None:
        super().__init__(spec, setting, student, teacher)
        self.peers = nn.ModuleList()
        if student is not None:
            names = spec.peers or (student.arch,)
            taps = student.taps if not spec.peers else None
            self.peers.extend(build(name, student.outputs, setting.image_size, taps=taps) for name in names)

    def student_features(self, student: Network, views: Tensor) -> Features:
        """The student's pass and, as its `assistants`, those of the peers on the same images."""
        others = tuple(peer.features(views) for peer in self.peers)  # type: ignore[operator]
        return replace(student.features(views), assistants=others)

    def loss(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> dict[str, Tensor]:
        """{"ce", "kl"} of the student and {"peers_ce", "peers_kl"}, sums over the peers, from logits [B,K]."""
        logits = [student.logits, *(peer.logits for peer in student.assistants)]
        ce = [cross_entropy(z, batch.targets, self.setting.label_smoothing) for z in logits]
        kl = [self._from_others(i, logits) for i in range(len(logits))]
        return {
            "ce": self.spec.ce_weight * ce[0],
            "kl": self.spec.kl_weight * kl[0],
            "peers_ce": self.spec.ce_weight * torch.stack(ce[1:]).sum(),
            "peers_kl": self.spec.kl_weight * torch.stack(kl[1:]).sum(),
        }

    def _from_others(self, i: int, logits: list[Tensor]) -> Tensor:
        """The mean over the other networks of network i's divergence from them."""
        others = [z for j, z in enumerate(logits) if j != i]
        return torch.stack([divergence(logits[i], z, self.spec.temperature) for z in others]).mean()

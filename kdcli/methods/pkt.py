"""PKT: probabilistic knowledge transfer, how likely each image of a batch is to pick each other one.

Equation: L = CE(s, y) + b · mean_ij p_ij of the teacher · ln((p_ij of the teacher + ε) / (p_ij of the student + ε)),
    with p_ij = k_ij / Σ_j k_ij and k_ij = (1 + cosine of f_i and f_j) / 2
Reductions: CE is a mean over the batch; the divergence is a mean over all B² pairs (i = j included), hence the size
    of b.
Source: Passalis & Tefas 2018, arXiv 1803.10837, with the cosine kernel; numbers equal to RepDistiller and mdistiller.
    b = 30000, ε = 10⁻⁷ (CRD's tables).
Tensors: the pooled vectors of both networks.
Cost: one teacher forward; no extra parameters; the B x B similarities, B being the whole batch of all ranks.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.gather import gathered
from kdcli.losses import exact
from kdcli.methods.base import MethodSpec, Progress
from kdcli.methods.feature import FeatureMethod, FeatureSpec
from kdcli.models.features import Features

_EPSILON = 1e-7


class PKTSpec(FeatureSpec):
    """Settings of PKT."""

    name: str = "pkt"
    """The method's name."""
    weight: float = Field(default=30000.0, ge=0)
    """Weight b of the divergence."""


class PKT(FeatureMethod):
    """L = CE(s, y) + weight · mean over the B² pairs of p^t · ln((p^t + ε) / (p^s + ε))."""

    Spec: ClassVar[type[MethodSpec]] = PKTSpec

    def compare(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"pkt"} from the pooled vectors [B,C], whose widths may differ."""
        s, t = (_neighbours(gathered(exact(x), batch)) for x in (student.pooled, teacher.pooled.detach()))
        return {"pkt": self.spec.weight * (t * ((t + _EPSILON) / (s + _EPSILON)).log()).mean()}


def _neighbours(x: Tensor) -> Tensor:
    """[B,C] → [B,B]: in each row the probabilities of the images to be the row's neighbour."""
    unit = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + _EPSILON)
    kernel = (unit @ unit.T + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)

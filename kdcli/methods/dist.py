"""DIST: correlations instead of divergences, between classes of one image and between images for one class.

Equation: L = a · CE(s, y) + b · T² · (β · inter + γ · intra), Y = softmax(·/T) [B,K];
    inter = 1 - mean over the rows of Pearson(Y_s[i,:], Y_t[i,:]), intra = 1 - mean over the columns of
    Pearson(Y_s[:,k], Y_t[:,k]); each correlation's denominator + 1e-8.
Reductions: means over the batch (inter) and over the classes (intra); the columns span the batch of all ranks.
Source: Huang et al. 2022, arXiv 2205.10536; losses equal to those of the released code (and OFA-KD's copy):
    b = 2, β = γ = 1 and T = 4 on CIFAR-100, T = 1 on ImageNet.
Tensors: the logits of both networks.
Cost: one teacher forward; no extra parameters; memory 2·B·K.
Our reading: T² is in the released code and not in the paper's equations; it is kept, so the weight is effectively 32 on
    CIFAR-100. The intra term compares images of a batch, so it depends on the batch size.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.gather import gathered
from kdcli.losses import exact
from kdcli.methods.base import MethodSpec, Progress
from kdcli.methods.logits import LogitMethod, LogitSpec
from kdcli.models.features import Features


class DISTSpec(LogitSpec):
    """Settings of DIST."""

    name: str = "dist"
    """The method's name."""
    kd_weight: float = Field(default=2.0, ge=0)
    """Weight b of both correlation terms."""
    beta: float = Field(default=1.0, ge=0)
    """Weight β of the inter-class term (rows)."""
    gamma: float = Field(default=1.0, ge=0)
    """Weight γ of the intra-class term (columns)."""
    temperature: float = Field(default=4.0, gt=0, le=1000)
    """T, by which both networks' logits are divided: 4 (CIFAR-100), 1 (ImageNet)."""


class DIST(LogitMethod):
    """L = ce_weight · CE(s, y) + kd_weight · T² · (beta · inter + gamma · intra)."""

    Spec: ClassVar[type[MethodSpec]] = DISTSpec

    @classmethod
    def for_pair(cls, given: dict[str, Any], teacher: str, student: str, dataset: str) -> dict[str, Any]:
        """ImageNet's temperature."""
        return {"temperature": 1.0} if dataset == "imagenet" else {}

    def distil(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"inter", "intra"} from the logits [B,K] of both networks."""
        spec = self.spec
        s, t = (
            (self.prepare(gathered(exact(x), batch)) / spec.temperature).softmax(1)
            for x in (student.logits, teacher.logits.detach())
        )
        weight = spec.kd_weight * spec.temperature**2
        return {
            "inter": weight * spec.beta * (1 - correlation(s, t).mean()),
            "intra": weight * spec.gamma * (1 - correlation(s.T, t.T).mean()),
        }


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row of a [N,D] with the same row of b [N,D] → [N]; 0 for a constant row."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return (a * b).sum(1) / (norms + 1e-8)

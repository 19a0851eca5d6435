"""AT: attention transfer, where in the image the maps of each stage are large.

Equation: L = CE(s, y) + b · Σ_l D(A(F_l of the student), A(F_l of the teacher)), with the attention A(F) = a / ‖a‖₂,
    a = mean over the channels of F^p, a vector over the positions of one image
Reductions: CE is a mean over the batch; D is the mean over batch and positions of the squared difference; the stages
    are summed, so a stage with fewer positions weighs more.
Source: Zagoruyko & Komodakis 2017, arXiv 1612.03928, Section 3.1, in the form of their released code; numbers equal
    to RepDistiller and mdistiller. p = 2, b = 1000 (CRD's tables; mdistiller's ImageNet runs too).
Tensors: the maps of all stages of both networks; the larger of two is averaged down to the smaller before the power.
Cost: one teacher forward; no extra parameters.
Our reading: Eq. 2 of the paper has the norm of the difference, not its square (`distance=norm`, to which the weight
    1000 does not belong). Where one network has more stages, its shallowest are left out; the code bases leave out
    its deepest (`align=first`). Their published pairs all have equal numbers of stages.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.methods.base import MethodSpec, Progress
from kdcli.methods.feature import Align, FeatureMethod, FeatureSpec, aligned, at_smaller_size
from kdcli.models.features import Features


class ATSpec(FeatureSpec):
    """Settings of AT."""

    name: str = "at"
    """The method's name."""
    weight: float = Field(default=1000.0, ge=0)
    """Weight b of the sum over the stages."""
    power: int = Field(default=2, ge=1)
    """p, to which each value of a map is raised; an odd one keeps the sign."""
    distance: Literal["squares", "norm"] = "squares"
    """squares: mean of the squared difference over batch and positions (all public code, the published numbers); norm: the
    difference's Euclidean norm, mean over the batch (the paper's Eq. 2)."""
    align: Align = "last"
    """Which stages are compared where one network has more: all up to the last, or (public code) from the first on."""


class AT(FeatureMethod):
    """L = CE(s, y) + weight · Σ_l mean over B and H·W of (A(F_l^s) - A(F_l^t))²."""

    Spec: ClassVar[type[MethodSpec]] = ATSpec

    def compare(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"at"} from the maps [B,C,H,W] of all stages."""
        pairs = aligned(student.stages, teacher.stages, self.spec.align)
        return {"at": self.spec.weight * torch.stack([self._stage(s, t) for s, t in pairs]).sum()}

    def _stage(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The distance of two maps' attentions, []."""
        s, t = (self._attention(x) for x in at_smaller_size(student, teacher))
        if self.spec.distance == "norm":
            return torch.linalg.vector_norm(s - t, dim=1).mean()
        return (s - t).square().mean()

    def _attention(self, x: Tensor) -> Tensor:
        """[B,C,H,W] → [B,H·W] of length 1 per image."""
        return F.normalize(x.pow(self.spec.power).mean(1).flatten(1), dim=1)

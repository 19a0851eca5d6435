"""NST: neuron selectivity transfer, what the channels of each stage respond to, compared as distributions.

Equation: L = CE(s, y) + b · Σ_l (mean k(t, t') + mean k(s, s') - 2 · mean k(s, t)), over the channels s of the
    student's map and t of the teacher's, each flattened and divided by its length, with k(a, b) = (a·b)²
Reductions: CE is a mean over the batch; each mean is over the batch and all pairs of channels; the stages are summed.
Source: Huang & Wang 2017, arXiv 1707.01219, with the polynomial kernel of degree 2; numbers equal to
    RepDistiller and mdistiller. b = 50 (CRD's tables).
Tensors: the maps of all stages of both networks; the larger of two is averaged down to the smaller.
Cost: one teacher forward; no extra parameters; per image and stage the inner products of all pairs of channels or,
    where fewer, of all pairs of positions. Both are far less than the products of all pairs of channels at every
    position.
Our reading: where one network has more stages, its shallowest are left out; the code bases leave out its deepest
    (`align=first`). Their published pairs all have equal numbers of stages.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.methods.base import MethodSpec, Progress
from kdcli.methods.feature import Align, FeatureMethod, FeatureSpec, aligned, at_smaller_size
from kdcli.models.features import Features


class NSTSpec(FeatureSpec):
    """Settings of NST."""

    name: str = "nst"
    """The method's name."""
    weight: float = Field(default=50.0, ge=0)
    """Weight b of the sum over the stages."""
    align: Align = "last"
    """Which stages are compared where one network has more: all up to the last, or (public code) from the first on."""


class NST(FeatureMethod):
    """L = CE(s, y) + weight · Σ_l squared maximum mean discrepancy of the channels, mean over B."""

    Spec: ClassVar[type[MethodSpec]] = NSTSpec

    def compare(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"nst"} from the maps [B,C,H,W] of all stages."""
        pairs = aligned(student.stages, teacher.stages, self.spec.align)
        stages = [_discrepancy(*at_smaller_size(s, t)) for s, t in pairs]
        return {"nst": self.spec.weight * torch.stack(stages).sum()}


def _discrepancy(student: Tensor, teacher: Tensor) -> Tensor:
    """[B,C_s,H,W], [B,C_t,H,W] → []: mean over B of the squared discrepancy under k(a, b) = (a·b)²."""
    s, t = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))
    (c_s, positions), c_t = s.shape[1:], t.shape[1]
    if 2 * positions**2 < c_s**2 + c_s * c_t + c_t**2:
        # Σ over pairs of (a·b)² is the inner product of Σ a aᵀ and Σ b bᵀ: the discrepancy is a distance of matrices.
        difference = t.mT @ t / c_t - s.mT @ s / c_s
        return difference.square().sum((1, 2)).mean()
    return (t @ t.mT).square().mean() + (s @ s.mT).square().mean() - 2 * (s @ t.mT).square().mean()

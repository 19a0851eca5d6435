"""VID: variational information distillation, the teacher's maps predicted with a variance for each channel.

Equation: L = CE(s, y) + b · Σ_l mean of ½ · ((μ_l(F_l of the student) - F_l of the teacher)² / σ²_lc + ln σ²_lc),
    with μ_l three 1x1 convolutions without biases and a ReLU between them, and σ²_lc = softplus(α_lc) + 10⁻⁵,
    starting at 5
Reductions: CE is a mean over the batch; the mean is over batch, channels and positions; the stages are summed. A
    variance below 1 has a negative logarithm, so the term can be negative.
Source: Ahn et al. 2019, arXiv 1904.05835, Section 2; numbers equal to RepDistiller. b = 1 (CRD's tables).
Tensors: the maps of all stages of both networks; the larger of two is averaged down to the smaller.
Cost: one teacher forward; per stage C_s·C_t + 2·C_t² + C_t parameters (wrn40_2 → wrn16_2: 64,512 of the convolutions
    and 224 α).
Our reading: mdistiller has the same loss, but its α never reach the optimiser, so all variances stay 5
    (`learn_variance=false`). Where one network has more stages, its shallowest are left out; the code bases leave out
    its deepest (`align=first`). Their published pairs all have equal numbers of stages.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.methods.base import MethodSpec, Progress, Setting
from kdcli.methods.feature import Align, FeatureMethod, FeatureSpec, aligned, at_smaller_size
from kdcli.methods.pairing import backbone
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network, stage_shapes
from kdcli.models.panel import Panel

_EPSILON = 1e-5


class VIDSpec(FeatureSpec):
    """Settings of VID."""

    name: str = "vid"
    """The method's name."""
    weight: float = Field(default=1.0, ge=0)
    """Weight b of the sum over the stages."""
    init_variance: float = Field(default=5.0, gt=_EPSILON)
    """Where every channel's variance starts."""
    learn_variance: bool = True
    """Train the variances (the paper, RepDistiller); off, they stay where they start (mdistiller)."""
    align: Align = "last"
    """Which stages are compared where one network has more: all up to the last, or (public code) from the first on."""


class Gaussian(nn.Module):
    """A stage's prediction of the teacher's map: a mean for every value, a variance for every channel.

    Args:
        c_s, c_t: channels of the student's and the teacher's map.
        variance: where the variances start.
        learn: whether they are trained.
    """

    def __init__(self, c_s: int, c_t: int, variance: float, *, learn: bool) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(c, c_t, 1, bias=False) for c in (c_s, c_t, c_t))
        self.regressor = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        start = torch.full((c_t,), _inverse_softplus(variance - _EPSILON))
        if learn:
            self.log_scale = nn.Parameter(start)
        else:
            self.register_buffer("log_scale", start)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B,c_s,H,W], [B,c_t,H,W] → []: the mean negative log-likelihood, without its constant."""
        variance = (F.softplus(self.log_scale) + _EPSILON)[:, None, None]
        return 0.5 * ((self.regressor(student) - teacher).square() / variance + variance.log()).mean()


class VID(FeatureMethod):
    """L = CE(s, y) + weight · Σ_l mean over B, C, H, W of ½ · ((μ_l(F_l^s) - F_l^t)² / σ² + ln σ²)."""

    Spec: ClassVar[type[MethodSpec]] = VIDSpec

    def __init__(
        self, spec: VIDSpec, setting: Setting, student: Network | None, teacher: Network | Headed | Panel | None
    ) -> None:
        super().__init__(spec, setting, student, teacher)
        self.stages = nn.ModuleList()
        if student is None or teacher is None:
            return
        s_shapes = stage_shapes(student, setting.image_size)[1:]
        t_shapes = stage_shapes(backbone(teacher), setting.teacher_size)[1:]
        for s, t in aligned(s_shapes, t_shapes, spec.align):
            self.stages.append(Gaussian(s[0], t[0], spec.init_variance, learn=spec.learn_variance))

    def compare(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"vid"} from the maps [B,C,H,W] of all stages."""
        pairs = aligned(student.stages, teacher.stages, self.spec.align)
        losses = [stage(*at_smaller_size(*pair)) for stage, pair in zip(self.stages, pairs, strict=True)]
        return {"vid": self.spec.weight * torch.stack(losses).sum()}


def _inverse_softplus(x: float) -> float:
    return x + math.log(-math.expm1(-x))

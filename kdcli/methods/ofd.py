"""OFD: the teacher's maps before their ReLU, of which the negative part counts only down to a margin.

Equation: L = CE(s, y) + b · Σ_l 2^-(L-l) · d(c_l(F_l of the student), max(F_l of the teacher, m_l)), l = 1..L, with
    d(x, t) = Σ (x - t)² over the elements where x > t or t > 0, c_l a 1x1 convolution without bias and BatchNorm,
    and m_l, one margin per channel, the mean of the negative part of a normal distribution: E[z | z < 0],
    z ~ N(β, γ²), with β and γ of the teacher's BatchNorm in front of the ReLU (-3|γ| where P(z < 0) ≤ 0.001)
Reductions: CE is a mean over the batch; d is summed over channels and positions and averaged over the batch.
Source: Heo et al. 2019, arXiv 1904.01866, Section 3; numbers equal to the authors' code, which divides its sum
    by the batch and by 1000 (CIFAR) or 10000 (ImageNet), and to mdistiller. b = 0.001 (CIFAR), 0.0001 (ImageNet).
Tensors: the maps of all stages of both networks before their closing ReLU, where they have one; γ and β of the teacher.
    A larger map of the teacher is averaged down to the student's size (mdistiller), and a larger one of the student.
Cost: one teacher forward; per stage C_s·C_t + 2·C_t parameters (wrn40_2 → wrn16_2: 21,952) and C_t margins.
Our reading: the teacher's BatchNorms use the statistics of each batch, as in the authors' code, on purpose (Table 8 of
    the paper), and in mdistiller, but its running statistics are not changed; `teacher_bn=eval` uses those. Where one
    network has more stages, its shallowest are left out, as in mdistiller. A stage that ends in no ReLU (MobileNetV2)
    is compared as it is.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.errors import IncompatibleError
from kdcli.gather import BatchNorm2d
from kdcli.methods.base import MethodSpec, Progress, Setting
from kdcli.methods.feature import FeatureMethod, FeatureSpec, aligned, at_smaller_size
from kdcli.methods.pairing import backbone
from kdcli.methods.preactivation import Statistics, preactivated, teacher_preactivations
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network, stage_shapes
from kdcli.models.panel import Panel

_RARELY_NEGATIVE = 0.001


class OFDSpec(FeatureSpec):
    """Settings of OFD."""

    name: str = "ofd"
    """The method's name."""
    weight: float = Field(default=1e-3, ge=0)
    """Weight b of the sum over the stages; 0.0001 on ImageNet."""
    teacher_bn: Statistics = "batch"
    """Statistics of the teacher's BatchNorms: of the batch (the authors' code and mdistiller, so all published numbers),
    or (eval) of its training, as a frozen teacher is used elsewhere."""


def margins(weight: Tensor, bias: Tensor) -> Tensor:
    """E[z | z < 0] for z ~ N(bias, weight²), or -3|weight| where P(z < 0) ≤ 0.001; [C], [C] → float64 [C]."""
    deviation, mean = weight.detach().cpu().double().abs(), bias.detach().cpu().double()
    ratio = mean / deviation
    negative = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    return torch.where(negative > _RARELY_NEGATIVE, mean - deviation * density / negative, -3 * deviation)


class Connector(nn.Module):
    """A stage's distance: the student's map brought to the teacher's channels, and the teacher's margins.

    Args:
        c_s: channels of the student's map.
        margin: [c_t], a lower bound for each channel of the teacher's.
    """

    margin: Tensor

    def __init__(self, c_s: int, margin: Tensor) -> None:
        super().__init__()
        c_t = margin.shape[0]
        convolution = nn.Conv2d(c_s, c_t, 1, bias=False)
        nn.init.normal_(convolution.weight, 0, math.sqrt(2 / c_t))
        self.connect = nn.Sequential(convolution, BatchNorm2d(c_t))
        self.register_buffer("margin", margin)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B,c_s,H,W], [B,c_t,H,W] → []: squared errors summed over C, H, W, mean over B.

        Where the teacher is negative, a student that is more negative still is as good: a ReLU sees no difference.
        """
        s, target = self.connect(student), torch.maximum(teacher, self.margin[:, None, None])
        counts = (s > target) | (target > 0)
        return torch.where(counts, (s - target).square(), 0).sum((1, 2, 3)).mean()


class OFD(FeatureMethod):
    """L = CE(s, y) + weight · Σ_l 2^-(L-l) · d_l, each d_l summed over C, H, W and averaged over B.

    Raises:
        IncompatibleError: a stage of the teacher has no BatchNorm in front of its closing ReLU.
    """

    Spec: ClassVar[type[MethodSpec]] = OFDSpec

    def __init__(
        self, spec: OFDSpec, setting: Setting, student: Network | None, teacher: Network | Headed | Panel | None
    ) -> None:
        super().__init__(spec, setting, student, teacher)
        self.stages = nn.ModuleList()
        if student is None or teacher is None:
            return
        network = backbone(teacher)
        shapes = stage_shapes(student, setting.image_size)
        for i, j in aligned(range(1, student.n_stages + 1), range(1, network.n_stages + 1), "last"):
            self.stages.append(Connector(shapes[i][0], _margin(network, j)))
        if not self.stages:
            raise IncompatibleError(f"{student.arch} and {network.arch} share no stages")

    @classmethod
    def for_pair(cls, given: dict[str, Any], teacher: str, student: str, dataset: str) -> dict[str, Any]:
        """ImageNet's weight."""
        return {"weight": 1e-4} if dataset == "imagenet" else {}

    def student_features(self, student: Network, views: Tensor) -> Features:
        """One pass of the student, its stages before their closing ReLU."""
        return preactivated(student.features(views))

    def needs_batchnorm(self) -> bool:
        """If the teacher uses the batch's statistics."""
        return self.spec.teacher_bn == "batch"

    def teacher_features(self, teacher: Network | Headed | Panel, views: Tensor) -> Features:
        """One pass of the teacher, its stages before their closing ReLU, normalised as `teacher_bn` says."""
        return teacher_preactivations(teacher, views, self.spec.teacher_bn)

    def compare(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"ofd"} from the maps [B,C,H,W] of all stages, the last with factor 1 and each before it with half the next's."""
        pairs = aligned(student.stages, teacher.stages, "last")
        losses = [stage(*at_smaller_size(*pair)) for stage, pair in zip(self.stages, pairs, strict=True)]
        factors = [0.5 ** (len(losses) - 1 - j) for j in range(len(losses))]
        return {"ofd": self.spec.weight * torch.stack([f * x for f, x in zip(factors, losses, strict=True)]).sum()}


def _margin(teacher: Network, i: int) -> Tensor:
    """Margins [C] of the teacher's stage i.

    Raises:
        IncompatibleError: there is no BatchNorm whose output the stage's ReLU sees.
    """
    norm = teacher.preact_norm(i)
    if norm is None or not norm.affine:
        raise IncompatibleError(
            f"{teacher.arch} has no BatchNorm directly in front of the ReLU that ends stage {i}, which OFD's margins "
            "come from",
            field="--teacher",
            hint="ResNets, wide ResNets, VGG and MobileNets have one",
        )
    return margins(norm.weight, norm.bias).float()

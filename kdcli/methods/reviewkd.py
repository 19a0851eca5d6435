"""ReviewKD: the student's deep maps, fused stage by stage with the shallower ones, learn the teacher's of every stage.

Equation: L = CE(s, y) + λ · min(1, epoch/20) · Σ_k HCL(O_k, T_k), k = 1..L+1, with S_k and T_k the stages of student
    and teacher and, last, their pooled vectors as maps of one position. From deep to shallow: X_k = BN(conv1x1(S_k));
    R_k = X_k for the pooled vector, else X_k · z_1 + R_{k+1} · z_2, R_{k+1} resized to X_k and z, two channels,
    = sigmoid(conv1x1([X_k, R_{k+1}])); R_k resized to T_k; O_k = BN(conv3x3(R_k)). HCL(o, t) is the weighted mean of
    MSE(o, t), weight 1, and of the MSEs of o and t averaged over 4x4, 2x2 and 1x1 regions, as far as these are fewer
    than the map's own, weights 1/2, 1/4, 1/8 in the order used
Reductions: CE is a mean over the batch, each MSE a mean over all elements; stages and pooled vector are summed.
Source: Chen et al. 2021, arXiv 2104.09044, Section 3; numbers equal to mdistiller and the authors' code. λ from the
    authors' scripts: 5 for wrn40_2 → wrn16_2, wrn40_1, shufflenetv1 and for resnet32x4 → resnet8x4, shufflenetv1; 8
    for resnet32x4 → shufflenetv2; 0.6 for resnet56 → resnet20; 1 for resnet110 → resnet32 and where nothing is known.
    From mdistiller: 5 for vgg13 → vgg8 (issue 23), 30 for resnet50 → mobilenetv2 (issue 39: 30 reached the paper's
    accuracy, 7 did not); on ImageNet 1, 8 for mobilenetv1, without the long warm-up.
Tensors: the maps of all stages of the student (on ImageNet before their closing ReLU) and of the teacher before their
    closing ReLU, and both pooled vectors. Resizing is nearest-neighbour.
Cost: one teacher forward; with M = min(512, width of the student's pooled vector) channels between,
    M·(C_s + 9·C_t + 6) + 2·C_t + 2 parameters per stage and 4·M + 2 fewer for the pooled vectors (wrn40_2 → wrn16_2:
    453,830; resnet50 → mobilenetv2: 27.9 million).
Our reading: the teacher's BatchNorms use the statistics of each batch, since the authors' CIFAR script, which gave the
    published numbers, leaves it in training mode; the paper does not speak of it, and the authors' ImageNet script and
    mdistiller do not do so (`teacher_bn=eval`, our default on ImageNet). Its running statistics are not changed. The
    warm-up counts the first epoch as 1 (mdistiller; the authors: 0). Where one network has more stages, its shallowest
    are left out; all published pairs have equal numbers. For vgg13 → mobilenetv2 no λ is published; we take
    resnet50's.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.errors import IncompatibleError
from kdcli.gather import BatchNorm2d
from kdcli.losses import exact
from kdcli.methods.base import MethodSpec, Progress, Setting
from kdcli.methods.feature import FeatureMethod, FeatureSpec, aligned, shrink
from kdcli.methods.pairing import backbone
from kdcli.methods.preactivation import Statistics, preactivated, teacher_preactivations
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network, stage_shapes
from kdcli.models.panel import Panel

WEIGHTS = {
    ("wrn40_2", "wrn16_2"): 5.0,
    ("wrn40_2", "wrn40_1"): 5.0,
    ("wrn40_2", "shufflenetv1"): 5.0,
    ("resnet32x4", "resnet8x4"): 5.0,
    ("resnet32x4", "shufflenetv1"): 5.0,
    ("resnet32x4", "shufflenetv2"): 8.0,
    ("resnet56", "resnet20"): 0.6,
    ("resnet110", "resnet32"): 1.0,
    ("vgg13", "vgg8"): 5.0,
    ("resnet50", "mobilenetv2"): 30.0,
    ("vgg13", "mobilenetv2"): 30.0,
}
"""λ by teacher and student on CIFAR; where each comes from is in the module's docstring."""
REGIONS = (4, 2, 1)
"""Into how many regions per side HCL averages a map."""
WIDEST = 512


class ReviewKDSpec(FeatureSpec):
    """Settings of ReviewKD."""

    name: str = "reviewkd"
    """The method's name."""
    weight: float = Field(default=1.0, ge=0)
    """Weight λ of the sum over the stages; the pair's own where one is known."""
    warmup: int = Field(default=20, ge=0)
    """Epochs over which λ grows linearly, the first counting as 1; 0: none. 1 on ImageNet."""
    mid_channels: int | None = Field(default=None, ge=1)
    """Channels M in which the stages are fused; by default the width of the student's pooled vector, 512 at most."""
    student_taps: Literal["feature", "preact"] = "feature"
    """Which maps of the student are fused: as they leave its stages, or before the closing ReLU (on ImageNet)."""
    teacher_bn: Statistics = "batch"
    """Statistics of the teacher's BatchNorms: of the batch (the authors' CIFAR script, which gave the published numbers,
    though by leaving out a line), or (eval) of its training (the authors' ImageNet script, mdistiller)."""


class Fusion(nn.Module):
    """One stage of the student with what came from the deeper ones, and its prediction of the teacher's stage.

    Args:
        c_s, middle, c_t: channels of the student's map, in between, and of the teacher's map.
        fuses: whether there is a deeper stage.
    """

    def __init__(self, c_s: int, middle: int, c_t: int, *, fuses: bool) -> None:
        super().__init__()
        self.reduce = _convolution(c_s, middle, 1)
        self.attention = nn.Conv2d(2 * middle, 2, 1) if fuses else None
        self.predict = _convolution(middle, c_t, 3)

    def forward(self, x: Tensor, deeper: Tensor | None, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """[B,c_s,h,w], [B,middle,·,·], [B,c_t,H,W] → prediction [B,c_t,H,W], what is handed on [B,middle,H,W].

        The teacher's map gives its size, nothing else.
        """
        x = self.reduce(x)
        if self.attention is not None:
            assert deeper is not None
            deeper = _resized(deeper, x)
            weights = self.attention(torch.cat([x, deeper], 1)).sigmoid()
            x = x * weights[:, :1] + deeper * weights[:, 1:]
        x = _resized(x, teacher)
        return self.predict(x), x


class ReviewKD(FeatureMethod):
    """L = CE(s, y) + weight · min(1, epoch/warmup) · Σ_k HCL_k, each a mean over all elements."""

    Spec: ClassVar[type[MethodSpec]] = ReviewKDSpec

    def __init__(
        self, spec: ReviewKDSpec, setting: Setting, student: Network | None, teacher: Network | Headed | Panel | None
    ) -> None:
        super().__init__(spec, setting, student, teacher)
        self.fusions = nn.ModuleList()
        if student is None or teacher is None:
            return
        network = backbone(teacher)
        s_shapes = stage_shapes(student, setting.image_size)[1:]
        t_shapes = stage_shapes(network, setting.teacher_size)[1:]
        pairs = [(s[0], t[0]) for s, t in aligned(s_shapes, t_shapes, "last")]
        if not pairs:
            raise IncompatibleError(f"{student.arch} and {network.arch} share no stages")
        middle = spec.mid_channels or min(WIDEST, student.pooled_dim)
        self.fusions.extend(Fusion(c_s, middle, c_t, fuses=True) for c_s, c_t in pairs)
        self.fusions.append(Fusion(student.pooled_dim, middle, network.pooled_dim, fuses=False))

    @classmethod
    def for_pair(cls, given: dict[str, Any], teacher: str, student: str, dataset: str) -> dict[str, Any]:
        """λ of the pair; ImageNet's λ, M, warm-up, maps of the student and statistics of the teacher."""
        if dataset == "imagenet":
            own = {"weight": 8.0, "mid_channels": 256} if student.removeprefix("torchvision:") == "mobilenetv1" else {}
            return {"weight": 1.0, **own, "warmup": 1, "student_taps": "preact", "teacher_bn": "eval"}
        weight = WEIGHTS.get((teacher, student))
        return {} if weight is None else {"weight": weight}

    def student_features(self, student: Network, views: Tensor) -> Features:
        """One pass of the student, its stages as `student_taps` says."""
        features = student.features(views)
        return preactivated(features) if self.spec.student_taps == "preact" else features

    def needs_batchnorm(self) -> bool:
        """If the teacher uses the batch's statistics."""
        return self.spec.teacher_bn == "batch"

    def teacher_features(self, teacher: Network | Headed | Panel, views: Tensor) -> Features:
        """One pass of the teacher, its stages before their closing ReLU, normalised as `teacher_bn` says."""
        return teacher_preactivations(teacher, views, self.spec.teacher_bn)

    def compare(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"review"} from the maps [B,C,H,W] of all stages and the pooled vectors [B,C]."""
        pairs = aligned(student.stages, teacher.stages, "last")
        levels = [*pairs, (student.pooled[:, :, None, None], teacher.pooled[:, :, None, None])]
        deeper: Tensor | None = None
        losses = []
        for fusion, (s, t) in zip(reversed(self.fusions), reversed(levels), strict=True):
            target = exact(t.detach())
            predicted, deeper = fusion(exact(s), deeper, target)
            losses.append(hierarchical_context(predicted, target))
        begun = (progress.epoch / max(self.spec.warmup, 1)).clamp(max=1)
        return {"review": self.spec.weight * begun * torch.stack(losses).sum()}


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """HCL of two maps [B,C,H,W]: [], the weighted mean of their MSE and of that of their regions' averages."""
    difference = student - teacher  # averaging is linear: the averages' difference is the difference's average
    loss, weight, total = difference.square().mean(), 1.0, 1.0
    for side in REGIONS:
        if side < difference.shape[2]:
            weight /= 2
            loss = loss + weight * shrink(difference, (side, side)).square().mean()
            total += weight
    return loss / total


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution without bias that keeps the size, and BatchNorm."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, BatchNorm2d(outputs))


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """Nearest-neighbour resizing of [B,C,h,w] to the height and width of another map."""
    return x if x.shape[2:] == like.shape[2:] else F.interpolate(x, like.shape[2:], mode="nearest")

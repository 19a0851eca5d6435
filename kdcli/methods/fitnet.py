"""FitNet: a hint, the teacher's map at one intermediate stage, regressed from the student's.

Equation: L = CE(s, y) + b · MSE(R(F_h of the student), F_h of the teacher), with R = ReLU ∘ BatchNorm ∘ convolution
Reductions: CE is a mean over the batch, the MSE a mean over all elements of the map.
Source: Romero et al. 2015, arXiv 1412.6550, Eq. 3; numbers equal to RepDistiller and mdistiller, with
    `regressor=plain` to OFAKD. h = 2, b = 100 (CRD's tables). The convolution, with a bias, goes by the sizes: 3x3
    with stride 2 where the student's map is twice as large, transposed 4x4 with stride 2 where it is half as large,
    else without padding a kernel of 1 + the difference (1x1 between equal sizes).
Tensors: one map of each network.
Cost: one teacher forward; the regressor (wrn40_2 → wrn16_2: 4,288 parameters; resnet32x4 → shufflenetv1: 983,424).
Our reading: one stage of training, as in all public tables, while the paper first trains the lower half of the
    student on the hint alone. Where the student's map is smaller by anything but a half, for which the code bases
    have no rule, the teacher's map is averaged down to the student's and the convolution is 1x1. The regressor's ReLU
    cannot reach the negative part of targets such as a wide residual network's raw sums; `hint_relu=false` leaves it
    out.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.errors import IncompatibleError
from kdcli.gather import BatchNorm2d
from kdcli.losses import exact
from kdcli.methods.base import MethodSpec, Progress, Setting
from kdcli.methods.feature import FeatureMethod, FeatureSpec, shrink
from kdcli.methods.pairing import backbone
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network, stage_shapes
from kdcli.models.panel import Panel


class FitNetSpec(FeatureSpec):
    """Settings of FitNet."""

    name: str = "fitnet"
    """The method's name."""
    weight: float = Field(default=100.0, ge=0)
    """Weight b of the hint."""
    hint: int = 2
    """h, the stage whose map is the hint: 0 is the stem, 1 the first stage, -1 the last, in either network."""
    teacher_hint: int | None = None
    """The teacher's stage, if it is not the student's (the paper lets both be chosen)."""
    hint_relu: bool = True
    """Whether the regressor ends in a ReLU, as in the public code; off, negative targets can be reached."""
    regressor: Literal["norm", "plain"] = "norm"
    """norm: convolution, BatchNorm, ReLU (RepDistiller, mdistiller); plain: a 1x1 convolution without bias and nothing else
    (OFAKD's between networks of different families), the larger map averaged down to the smaller where they differ."""


class Regressor(nn.Module):
    """The student's map [B,c_s,s,s] to the teacher's channels, [B,c_t,·,·].

    Args:
        c_s, c_t: channels of the student's and the teacher's map.
        s, t: their heights.
        relu: whether to end in a ReLU.
    """

    def __init__(self, c_s: int, c_t: int, s: int, t: int, *, relu: bool = True) -> None:
        super().__init__()
        self.conv: nn.Module
        if s == 2 * t:
            self.conv = nn.Conv2d(c_s, c_t, 3, stride=2, padding=1)
        elif 2 * s == t:
            self.conv = nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1)
        else:
            self.conv = nn.Conv2d(c_s, c_t, 1 + max(s - t, 0))
        self.bn = BatchNorm2d(c_t)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Convolution, BatchNorm and, if wanted, ReLU."""
        x = self.bn(self.conv(x))
        return F.relu(x) if self.relu else x


class FitNet(FeatureMethod):
    """L = CE(s, y) + weight · MSE(R(F_h^s), F_h^t), the MSE being a mean over all elements.

    Raises:
        IncompatibleError: a network has no stage of that number.
    """

    Spec: ClassVar[type[MethodSpec]] = FitNetSpec

    def __init__(
        self, spec: FitNetSpec, setting: Setting, student: Network | None, teacher: Network | Headed | Panel | None
    ) -> None:
        super().__init__(spec, setting, student, teacher)
        self.hint = spec.hint
        self.teacher_hint = spec.hint if spec.teacher_hint is None else spec.teacher_hint
        self.regressor: nn.Module = nn.Identity()
        if student is None or teacher is None:
            return
        c_s, s, _ = _shape(student, self.hint, setting.image_size, "method.hint")
        field = "method.hint" if spec.teacher_hint is None else "method.teacher_hint"
        c_t, t, _ = _shape(backbone(teacher), self.teacher_hint, setting.teacher_size, field)
        if spec.regressor == "plain":
            self.regressor = nn.Conv2d(c_s, c_t, 1, bias=False)
        else:
            self.regressor = Regressor(c_s, c_t, s, t, relu=spec.hint_relu)

    def compare(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"hint"} from one map [B,C,H,W] of each network."""
        s, t = exact(student.maps[self.hint]), exact(teacher.maps[self.teacher_hint].detach())
        if self.spec.regressor == "plain":
            s = shrink(s, [min(a, b) for a, b in zip(s.shape[2:], t.shape[2:], strict=True)])
        regressed = self.regressor(s)
        return {"hint": self.spec.weight * F.mse_loss(regressed, shrink(t, regressed.shape[2:]))}


def _shape(network: Network, hint: int, size: int, field: str) -> tuple[int, int, int]:
    """`(C, H, W)` of the map `hint` for images of `size` pixels.

    Raises:
        IncompatibleError: the network has no such map.
    """
    shapes = stage_shapes(network, size)
    if not -len(shapes) < hint < len(shapes):
        last = len(shapes) - 1
        raise IncompatibleError(
            f"{network.arch} has {last} stages, so no stage {hint}",
            field=field,
            hint=f"0 (the stem) to {last}, or counted from the end -1 to -{last}",
        )
    return shapes[hint]

"""KD: softened logits, the method that all others are compared with.

Equation: L = a · CE(s, y) + b · T² · KL(softmax(t/T) ‖ softmax(s/T))
Reductions: CE and KL are means over the batch; the KL is summed over the classes.
Source: Hinton, Vinyals & Dean 2015, arXiv 1503.02531, Section 2; a = 0.1, b = 0.9, T = 4 on CIFAR (CRD's tables),
    a = b = 0.5, T = 1 on ImageNet (mdistiller).
Tensors: the logits of both networks.
Cost: one teacher forward; no extra parameters.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.losses import divergence
from kdcli.methods.base import MethodSpec, Progress
from kdcli.methods.logits import LogitMethod, LogitSpec
from kdcli.models.features import Features


class KDSpec(LogitSpec):
    """Settings of KD."""

    name: str = "kd"
    """The method's name."""
    ce_weight: float = Field(default=0.1, ge=0)
    """Weight a of the cross-entropy to the labels."""
    kd_weight: float = Field(default=0.9, ge=0)
    """Weight b of the divergence to the teacher."""
    temperature: float = Field(default=4.0, gt=0, le=1000)
    """T, by which both networks' logits are divided."""


class KD(LogitMethod):
    """L = ce_weight · CE(s, y) + kd_weight · T² · KL(softmax(t/T) ‖ softmax(s/T)), means over B, the KL summed over K."""

    Spec: ClassVar[type[MethodSpec]] = KDSpec

    @classmethod
    def for_pair(cls, given: dict[str, Any], teacher: str, student: str, dataset: str) -> dict[str, Any]:
        """ImageNet's weights and temperature."""
        return {"ce_weight": 0.5, "kd_weight": 0.5, "temperature": 1.0} if dataset == "imagenet" else {}

    def distil(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"kd"} from the logits [B,K] of both networks."""
        s, t = self.prepare(student.logits), self.prepare(teacher.logits)
        return {"kd": self.spec.kd_weight * divergence(s, t, self.spec.temperature)}

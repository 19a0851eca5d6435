"""KD: knowledge distillation by softened logits (Hinton, Vinyals & Dean 2015)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.losses import cross_entropy, divergence
from kdcli.methods.base import Method, MethodSpec, Progress, Setting
from kdcli.models.features import Features


class KDSpec(MethodSpec):
    """Settings of KD. The defaults are those of the CIFAR-100 tables; ImageNet's are 0.5, 0.5 and T = 1."""

    name: str = "kd"
    """The method's name."""
    ce_weight: float = Field(default=0.1, ge=0)
    """Weight of the cross-entropy to the labels."""
    kd_weight: float = Field(default=0.9, ge=0)
    """Weight of the divergence to the teacher."""
    temperature: float = Field(default=4.0, gt=0)
    """T, by which both networks' logits are divided."""


class KD(Method):
    """L = ce_weight · CE(s, y) + kd_weight · T² · KL(softmax(t/T) ‖ softmax(s/T)), means over B, the KL summed over K."""

    Spec: ClassVar[type[MethodSpec]] = KDSpec

    def __init__(self, spec: KDSpec, setting: Setting, student: nn.Module | None, teacher: nn.Module | None) -> None:
        super().__init__()
        self.spec, self.smoothing = spec, setting.label_smoothing

    def loss(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> dict[str, Tensor]:
        """{"ce", "kd"} from the logits [B,K] of both networks."""
        assert teacher is not None
        return {
            "ce": self.spec.ce_weight * cross_entropy(student.logits, batch.labels, self.smoothing),
            "kd": self.spec.kd_weight * divergence(student.logits, teacher.logits, self.spec.temperature),
        }

    def teacher_loss(self, batch: Batch, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """Plain cross-entropy."""
        return {"ce": cross_entropy(teacher.logits, batch.labels, self.smoothing)}

"""No distillation: a network trained on labels alone, the baseline of every table and the plain teacher."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.losses import cross_entropy
from kdcli.methods.base import Method, MethodSpec, Progress, Setting
from kdcli.models.features import Features


class NoneSpec(MethodSpec):
    """Settings of training without a teacher: none of its own."""

    name: str = "none"
    """The method's name."""


class NoDistillation(Method):
    """L = CE(s, y), mean over B."""

    Spec: ClassVar[type[MethodSpec]] = NoneSpec
    needs_teacher: ClassVar[bool] = False

    def __init__(self, spec: Any, setting: Setting, student: nn.Module | None, teacher: nn.Module | None) -> None:
        super().__init__()
        self.smoothing = setting.label_smoothing

    def loss(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> dict[str, Tensor]:
        """{"ce"}: logits [B,K] against labels [B]."""
        return {"ce": cross_entropy(student.logits, batch.labels, self.smoothing)}

    def teacher_loss(self, batch: Batch, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """The same cross-entropy."""
        return {"ce": cross_entropy(teacher.logits, batch.labels, self.smoothing)}

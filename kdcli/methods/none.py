"""none: a network trained on labels alone, the baseline of every table and the plain teacher.

Equation: L = CE(s, y)
Reductions: the mean over the batch.
Source: the student-alone rows of the tables.
Tensors: the network's logits.
Cost: no teacher; no extra parameters.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.losses import cross_entropy
from kdcli.methods.base import Method, MethodSpec, Progress
from kdcli.models.features import Features


class NoneSpec(MethodSpec):
    """Settings of training without a teacher: none of its own."""

    name: str = "none"
    """The method's name."""


class NoDistillation(Method):
    """L = CE(s, y), mean over B."""

    Spec: ClassVar[type[MethodSpec]] = NoneSpec
    needs_teacher: ClassVar[bool] = False

    def loss(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> dict[str, Tensor]:
        """{"ce"}: logits [B,K] against labels [B]."""
        return {"ce": cross_entropy(student.logits, batch.targets, self.setting.label_smoothing)}

"""What methods that compare logits alone have in common; LSKD wraps any of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

from pydantic import Field
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.losses import cross_entropy
from kdcli.methods.base import Method, MethodSpec, Progress
from kdcli.models.features import Features


class LogitSpec(MethodSpec):
    """Settings that every logit method has."""

    ce_weight: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy to the labels."""


class LogitMethod(Method):
    """L = ce_weight · CE(s, y) + the terms of `distil`, which read nothing but labels and logits."""

    prepare: Callable[[Tensor], Tensor] = staticmethod(lambda logits: logits)
    """Applied to the logits [B,K] of both networks before they are softened and compared instance by instance; the
    identity, unless LSKD standardises them."""

    @abstractmethod
    def distil(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """The weighted terms that compare the student's logits with the teacher's, by name."""

    def supervised(self, batch: Batch, student: Features) -> Tensor:
        """The unweighted cross-entropy to the labels, mean over B."""
        return cross_entropy(student.logits, batch.labels, self.setting.label_smoothing)

    def loss(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> dict[str, Tensor]:
        """{"ce"} and the terms of `distil`."""
        assert teacher is not None
        ce = self.spec.ce_weight * self.supervised(batch, student)
        return {"ce": ce, **self.distil(batch, student, teacher, progress)}

"""What methods that compare logits alone have in common; LSKD wraps any of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.losses import cross_entropy
from kdcli.methods.base import Method, MethodSpec, Progress, Setting
from kdcli.methods.pairing import require_same_outputs
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network
from kdcli.models.panel import Panel


class LogitSpec(MethodSpec):
    """Settings that every logit method has; LSKD sets the last two."""

    ce_weight: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy to the labels."""
    kd_weight: float = Field(default=1.0, ge=0)
    """Weight of all terms that compare logits."""
    temperature: float = Field(default=4.0, gt=0, le=1000)
    """T, by which both networks' logits are divided."""


class LogitMethod(Method):
    """L = ce_weight · CE(s, y) + the terms of `distil`, which read nothing but labels and logits."""

    prepare: Callable[[Tensor], Tensor] = staticmethod(lambda logits: logits)
    """Applied to the logits [B,K] of both networks before they are softened and compared instance by instance; the
    identity, unless LSKD standardises them."""

    def __init__(
        self, spec: LogitSpec, setting: Setting, student: Network | None, teacher: Network | Headed | Panel | None
    ) -> None:
        super().__init__(spec, setting, student, teacher)
        if student is not None and teacher is not None:
            require_same_outputs(student, teacher)

    @abstractmethod
    def distil(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """The weighted terms that compare the student's logits with the teacher's, by name."""

    def supervised(self, batch: Batch, student: Features) -> Tensor:
        """The unweighted cross-entropy to the labels, mean over B."""
        return cross_entropy(student.logits, batch.targets, self.setting.label_smoothing)

    def loss(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> dict[str, Tensor]:
        """{"ce"} and the terms of `distil`."""
        assert teacher is not None
        ce = self.spec.ce_weight * self.supervised(batch, student)
        return {"ce": ce, **self.distil(batch, student, teacher, progress)}


def non_target(logits: Tensor, labels: Tensor) -> Tensor:
    """[B,K] logits without each row's own class → [B,K-1], the other classes in their order."""
    columns = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, columns + (columns >= labels[:, None]).long())

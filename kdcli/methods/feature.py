"""What methods that compare features and keep the ordinary cross-entropy have in common."""

from __future__ import annotations

from abc import abstractmethod

from pydantic import Field
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.losses import cross_entropy, divergence
from kdcli.methods.base import Method, MethodSpec, Progress
from kdcli.models.features import Features


class FeatureSpec(MethodSpec):
    """Settings that every feature method has. Subclasses set the default of `weight`."""

    ce_weight: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy to the labels."""
    kd_weight: float = Field(default=0.0, ge=0)
    """Weight of Hinton's divergence beside the method's own term; 0 in the CRD tables, 1 in their "+KD" rows."""
    temperature: float = Field(default=4.0, gt=0)
    """T of that divergence."""


class FeatureMethod(Method):
    """L = ce_weight · CE(s, y) [+ kd_weight · KD_T] + the terms of `compare`."""

    @abstractmethod
    def compare(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """The weighted terms that compare the networks' features, by name."""

    def loss(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> dict[str, Tensor]:
        """{"ce"}, {"kd"} where it has a weight, and the terms of `compare`."""
        assert teacher is not None
        spec = self.spec
        terms = {"ce": spec.ce_weight * cross_entropy(student.logits, batch.labels, self.setting.label_smoothing)}
        if spec.kd_weight:
            terms["kd"] = spec.kd_weight * divergence(student.logits, teacher.logits, spec.temperature)
        return terms | self.compare(batch, student, teacher, progress)

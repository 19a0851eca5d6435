"""NKD: the teacher's probability of the target class, and the normalised distribution over all others.

Equation: L = a · CE(s, y) + b · (- p(t)_y · log p(s)_y - γ · T² · Σ_{i≠y} N_T(t)_i · log N_T(s)_i),
    p = softmax at temperature 1, N_T = softmax over the K-1 logits of the classes other than y, divided by T.
Reductions: all terms are means over the batch.
Source: Yang et al. 2023, arXiv 2303.13005; losses equal to those of cls_KD, whose settings are γ = 1.5, T = 1 on
    ImageNet and γ = 3.5, T = 3 on CIFAR-100.
Tensors: the logits of both networks and the labels.
Cost: one teacher forward; no extra parameters.
Our reading: both terms are cross-entropies, not divergences (the teacher's entropy is not subtracted), so the loss of two
    equal networks is not zero; gradients are the same. b is 1 in the published runs. The published run from ResNet50 to
    MobileNetV1 clips gradients at 5 (`--clip-grad 5`), which is left to the recipe.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.losses import exact
from kdcli.methods.base import MethodSpec, Progress
from kdcli.methods.logits import LogitMethod, LogitSpec, non_target
from kdcli.models.features import Features


class NKDSpec(LogitSpec):
    """Settings of NKD."""

    name: str = "nkd"
    """The method's name."""
    gamma: float = Field(default=3.5, ge=0)
    """Weight γ of the other classes' term: 3.5 (CIFAR-100), 1.5 (ImageNet)."""
    temperature: float = Field(default=3.0, gt=0, le=1000)
    """T of the other classes' term: 3 (CIFAR-100), 1 (ImageNet)."""


class NKD(LogitMethod):
    """L = ce_weight · CE(s, y) + kd_weight · (target term + gamma · T² · non-target term), means over B."""

    Spec: ClassVar[type[MethodSpec]] = NKDSpec

    @classmethod
    def for_pair(cls, given: dict[str, Any], teacher: str, student: str, dataset: str) -> dict[str, Any]:
        """ImageNet's γ and temperature."""
        return {"gamma": 1.5, "temperature": 1.0} if dataset == "imagenet" else {}

    def distil(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"target", "non_target"} from the logits [B,K] of both networks."""
        spec, labels = self.spec, batch.labels
        s, t = (self.prepare(exact(x)) for x in (student.logits, teacher.logits.detach()))
        own = labels[:, None]
        target = -(t.softmax(1).gather(1, own) * s.log_softmax(1).gather(1, own)).mean()
        s, t = (non_target(x, labels) / spec.temperature for x in (s, t))
        others = -(t.softmax(1) * s.log_softmax(1)).sum(1).mean()
        return {
            "target": spec.kd_weight * target,
            "non_target": spec.kd_weight * spec.gamma * spec.temperature**2 * others,
        }

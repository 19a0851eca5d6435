"""TAKD: teacher assistants, a chain of networks of falling size, each the teacher of the next.

Each link of the chain is an ordinary run: `--assistant A --assistant B` distils teacher → A, A → B, B → student; links
that are there already are used. A run itself sees only its own teacher.

Equation: L = a · CE(s, y) + b · T² · KL(softmax(t/T) ‖ softmax(s/T)) for each link
Reductions: CE and KL are means over the batch; the KL is summed over the classes.
Source: Mirzadeh et al. 2020, arXiv 1902.03393, Section 3; loss equal to that of the released code.
Tensors: the logits of the student and of the link's teacher.
Cost: one teacher forward, and as many runs before as there are assistants.
Our reading: the released code averages the KL over the classes too (`reduction=mean`), which makes it K times smaller and
    explains the weights found there by search; no table that we compare with shows TAKD, so the default is the paper's KL
    with the weights of KD. The released learning-rate schedule never uses its first rate, which we do not repeat.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.losses import divergence
from kdcli.methods.base import MethodSpec, Progress
from kdcli.methods.kd import KD
from kdcli.methods.logits import LogitMethod, LogitSpec
from kdcli.models.features import Features


class TAKDSpec(LogitSpec):
    """Settings of TAKD: those of KD, for every link."""

    name: str = "takd"
    """The method's name."""
    ce_weight: float = Field(default=0.1, ge=0)
    """Weight a of the cross-entropy to the labels (1-λ in the paper)."""
    kd_weight: float = Field(default=0.9, ge=0)
    """Weight b of the divergence (λ in the paper)."""
    temperature: float = Field(default=4.0, gt=0, le=1000)
    """T, by which both networks' logits are divided."""
    reduction: Literal["batchmean", "mean"] = "batchmean"
    """The KL as a mean over the batch (the paper) or over batch and classes (the released code)."""


class TAKD(LogitMethod):
    """L = ce_weight · CE(s, y) + kd_weight · T² · KL, the teacher being the last assistant where there are any."""

    Spec: ClassVar[type[MethodSpec]] = TAKDSpec
    assistants: ClassVar[Literal["none", "last", "all"]] = "last"

    @classmethod
    def for_pair(cls, given: dict[str, Any], teacher: str, student: str, dataset: str) -> dict[str, Any]:
        """Those of KD."""
        return KD.for_pair(given, teacher, student, dataset)

    def distil(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"kd"} from the logits [B,K] of both networks."""
        s, t = self.prepare(student.logits), self.prepare(teacher.logits)
        share = s.shape[1] if self.spec.reduction == "mean" else 1
        return {"kd": self.spec.kd_weight / share * divergence(s, t, self.spec.temperature)}

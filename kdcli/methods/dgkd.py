"""DGKD: densely guided distillation, the teacher and all its assistants teaching at once.

The assistants of a chain are distilled in the same way, each from the teacher and all assistants before it; every one is an
ordinary run (`--assistant A --assistant B`). In each batch some of the teaching networks, chosen at random, are left out.

Equation: L = (1-λ) · CE(s, y) + λ · T² · Σ_m KL(softmax(t_m/T) ‖ softmax(s/T)), m over the networks kept in this batch
Reductions: CE and each KL are means over the batch; the KLs are summed over classes and networks.
Source: Son et al. 2021, arXiv 2009.08825, Section 3.2; losses equal to those of the released code.
Tensors: the logits of the student, the teacher and each assistant.
Cost: one forward of the teacher and of each assistant, those left out in the batch included.
Our reading: the released code averages the KL over the classes too (`reduction=mean`); the default is the paper's. λ = 1 and
    T = 5 are the released defaults. With one teaching network none is left out.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.losses import divergence
from kdcli.methods.base import MethodSpec, Progress
from kdcli.methods.logits import LogitMethod, LogitSpec
from kdcli.models.features import Features


class DGKDSpec(LogitSpec):
    """Settings of DGKD."""

    name: str = "dgkd"
    """The method's name."""
    ce_weight: float = Field(default=0.0, ge=0)
    """Weight 1-λ of the cross-entropy to the labels (the released default leaves it out)."""
    kd_weight: float = Field(default=1.0, ge=0)
    """Weight λ of each divergence."""
    temperature: float = Field(default=5.0, gt=0, le=1000)
    """T, by which all logits are divided."""
    drop: int = Field(default=1, ge=0)
    """How many of the teaching networks are left out of each batch, at least one being kept."""
    reduction: Literal["batchmean", "mean"] = "batchmean"
    """The KL as a mean over the batch (the paper) or over batch and classes (the released code)."""


class DGKD(LogitMethod):
    """L = ce_weight · CE(s, y) + kd_weight · T² · Σ_m KL_m over the networks kept in the batch."""

    Spec: ClassVar[type[MethodSpec]] = DGKDSpec
    assistants: ClassVar[Literal["none", "last", "all"]] = "all"

    def distil(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"kd"} from the logits [B,K] of the student, the teacher and its assistants."""
        teaching = [teacher, *teacher.assistants]
        s = self.prepare(student.logits)
        share = s.shape[1] if self.spec.reduction == "mean" else 1
        each = [divergence(s, self.prepare(t.logits), self.spec.temperature) for t in teaching]
        kept = self.kept(len(teaching), progress).to(s.device)  # type: ignore[call-arg]
        return {"kd": self.spec.kd_weight / share * (torch.stack(each) * kept).sum()}

    def variant(self, progress: Progress) -> Hashable | None:
        """None if networks are left out by draws from the step's seed."""
        return None if self.spec.drop else 0

    @torch.compiler.disable
    def kept(self, count: int, progress: Progress) -> Tensor:
        """Float [count]: 1 for the networks that teach in this batch, 0 for the others; the same on every rank."""
        generator = torch.Generator().manual_seed(progress.seed)
        mask = torch.ones(count)
        mask[torch.randperm(count, generator=generator)[: min(self.spec.drop, count - 1)]] = 0
        return mask

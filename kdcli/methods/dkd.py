"""DKD: the divergence of softened logits split into a part for the target class and one for all others.

Equation: L = a · CE(s, y) + b · w · (α · TCKD + β · NCKD), w = min(epoch / warmup, 1), the first epoch being 1;
    TCKD = T² · KL((p_y, 1-p_y)(t) ‖ (p_y, 1-p_y)(s)), p = softmax(·/T);
    NCKD = T² · KL(softmax(t'/T) ‖ softmax(s'/T)), where t', s' are the logits of the classes other than y.
Reductions: CE and both KLs are means over the batch; KLs are summed over their classes.
Source: Zhao et al. 2022, arXiv 2203.08679, Eq. 7; losses equal to those of mdistiller, which also gives β for each pair,
    T = 4, α = 1 and 20 epochs of warm-up; on ImageNet T = 1, one epoch of warm-up, β = 0.5 (ResNet18) or 2 (MobileNetV1).
Tensors: the logits of both networks and the labels.
Cost: one teacher forward; no extra parameters.
Our reading: probabilities are compared as logarithms (log-sum-exp), where the released code takes the logarithm of a sum
    that can underflow; the numbers are the same. b is 1 in all published runs (LSKD sets it).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.errors import IncompatibleError
from kdcli.losses import divergence, exact
from kdcli.methods.base import MethodSpec, Progress, Setting
from kdcli.methods.logits import LogitMethod, LogitSpec, non_target
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network
from kdcli.models.panel import Panel

# β where the literature deviates from 8; the last pair is named in mdistiller's issue 6.
BETA = {
    ("vgg13", "vgg8"): 6.0,
    ("vgg13", "mobilenetv2"): 6.0,
    ("wrn40_2", "wrn16_2"): 6.0,
    ("wrn40_2", "wrn40_1"): 6.0,
    ("resnet56", "resnet20"): 2.0,
    ("resnet110", "resnet32"): 2.0,
    ("resnet50", "wrn16_2"): 6.0,
}


class DKDSpec(LogitSpec):
    """Settings of DKD."""

    name: str = "dkd"
    """The method's name."""
    alpha: float = Field(default=1.0, ge=0)
    """Weight α of the target class's part (TCKD)."""
    beta: float = Field(default=8.0, ge=0)
    """Weight β of the other classes' part (NCKD); default: that of the pair of networks, 8 where none is published."""
    warmup: int = Field(default=20, ge=1)
    """Epochs over which the weight of both parts rises linearly: 1/warmup in the first epoch, 1 from that epoch on."""


class DKD(LogitMethod):
    """L = ce_weight · CE(s, y) + kd_weight · min(epoch/warmup, 1) · (alpha · TCKD + beta · NCKD)."""

    Spec: ClassVar[type[MethodSpec]] = DKDSpec

    def __init__(
        self, spec: DKDSpec, setting: Setting, student: Network | None, teacher: Network | Headed | Panel | None
    ) -> None:
        super().__init__(spec, setting, student, teacher)
        if setting.classes < 3:
            raise IncompatibleError(
                f"dkd compares the classes that are not the target, and of {setting.classes} classes too few are left",
                field="method",
                hint="kd does the same with two classes",
            )

    @classmethod
    def for_pair(cls, given: dict[str, Any], teacher: str, student: str, dataset: str) -> dict[str, Any]:
        """β of the pair; ImageNet's temperature, warm-up and β."""
        if dataset == "imagenet":
            beta = 2.0 if student.removeprefix("torchvision:") == "mobilenetv1" else 0.5
            return {"temperature": 1.0, "warmup": 1, "beta": beta}
        beta = BETA.get((teacher, student))
        return {} if beta is None else {"beta": beta}

    def distil(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"tckd", "nckd"} from the logits [B,K] of both networks."""
        spec, labels = self.spec, batch.labels
        s, t = (self.prepare(exact(x)) for x in (student.logits, teacher.logits.detach()))
        weight = spec.kd_weight * (progress.epoch / spec.warmup).clamp(max=1).to(s)
        # TCKD's logits are divided by T already, so T² is all that is left of the temperature.
        target = divergence(
            target_or_not(s / spec.temperature, labels), target_or_not(t / spec.temperature, labels), temperature=1
        )
        others = divergence(non_target(s, labels), non_target(t, labels), spec.temperature)
        return {"tckd": weight * spec.alpha * spec.temperature**2 * target, "nckd": weight * spec.beta * others}


def target_or_not(logits: Tensor, labels: Tensor) -> Tensor:
    """[B,K] → [B,2]: logits whose softmax is the probability of the row's class and of all other classes together."""
    return torch.stack([logits.gather(1, labels[:, None])[:, 0], non_target(logits, labels).logsumexp(1)], 1)

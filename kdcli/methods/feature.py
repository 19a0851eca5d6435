"""What methods that compare features and keep the ordinary cross-entropy have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.losses import cross_entropy, divergence, exact
from kdcli.methods.base import Method, MethodSpec, Progress, Setting
from kdcli.methods.pairing import require_same_outputs
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network
from kdcli.models.panel import Panel

T = TypeVar("T")
Align = Literal["last", "first"]


def aligned(student: Sequence[T], teacher: Sequence[T], align: Align) -> list[tuple[T, T]]:
    """What belongs together of two networks' stages (anything listed per stage), shallowest first.

    Where one network has more stages, its shallowest have no partner (`last`) or its deepest (`first`).
    """
    count = min(len(student), len(teacher))
    first = align == "first"
    s, t = (list(x[:count] if first else x[len(x) - count :]) for x in (student, teacher))
    return list(zip(s, t, strict=True))


def shrink(x: Tensor, size: Sequence[int]) -> Tensor:
    """Adaptive average pooling of [B,C,H,W] to `size`; nothing happens to a map of that size."""
    h, w = size
    if x.shape[2:] == (h, w):
        return x
    if x.shape[2] % h == 0 and x.shape[3] % w == 0:  # the same numbers, with a backward pass that is deterministic
        return F.avg_pool2d(x, (x.shape[2] // h, x.shape[3] // w))
    return F.adaptive_avg_pool2d(x, (h, w))


def at_smaller_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [B,C,H,W] in fp32 or better, each averaged down to the smaller height and width of the two."""
    size = [min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return shrink(exact(student), size), shrink(exact(teacher.detach()), size)


class FeatureSpec(MethodSpec):
    """Settings that every feature method has. Subclasses set the default of `weight`."""

    ce_weight: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy to the labels."""
    kd_weight: float = Field(default=0.0, ge=0)
    """Weight of Hinton's divergence beside the method's own term; 0 in the CRD tables, 1 in their "+KD" rows."""
    temperature: float = Field(default=4.0, gt=0, le=1000)
    """T of that divergence."""


class FeatureMethod(Method):
    """L = ce_weight · CE(s, y) [+ kd_weight · KD_T] + the terms of `compare`.

    Raises:
        IncompatibleError: the networks were made for different numbers of classes.
    """

    def __init__(
        self, spec: Any, setting: Setting, student: Network | None, teacher: Network | Headed | Panel | None
    ) -> None:
        super().__init__(spec, setting, student, teacher)
        if student is not None and teacher is not None:
            require_same_outputs(student, teacher)

    @abstractmethod
    def compare(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """The weighted terms that compare the networks' features, by name."""

    def loss(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> dict[str, Tensor]:
        """{"ce"}, {"kd"} where it has a weight, and the terms of `compare`."""
        assert teacher is not None
        spec = self.spec
        terms = {"ce": spec.ce_weight * cross_entropy(student.logits, batch.targets, self.setting.label_smoothing)}
        if spec.kd_weight:
            terms["kd"] = spec.kd_weight * divergence(student.logits, teacher.logits, spec.temperature)
        return terms | self.compare(batch, student, teacher, progress)

"""One training step's forward pass as a module: views, networks, losses. DDP and torch.compile wrap exactly this."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.engine.device import Device
from kdcli.inference import Use
from kdcli.methods.base import Method, Outcome, Progress
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network
from kdcli.models.panel import Panel
from kdcli.transforms import fold, views


@dataclass
class StepOutput:
    """What one forward pass gives.

    Attributes:
        total: [] the loss to minimise.
        terms: the weighted terms it is the sum of, by name.
        followed: values to follow that are not minimised, by name.
        correct: [] how many images of the batch the trained network got right (single inference, as augmented).
    """

    total: Tensor
    terms: dict[str, Tensor]
    followed: dict[str, Tensor]
    correct: Tensor


class Step(nn.Module):
    """What the loop trains: called with `(batch, progress)` it gives a `StepOutput`; its state is a run's state."""

    trained: nn.Module
    """The network that is evaluated and exported."""

    def frozen(self) -> tuple[nn.Module, ...]:
        """Networks that take part and never change; they are no submodules."""
        return ()

    def companions(self) -> dict[str, nn.Module]:
        """Networks that are evaluated beside the trained one, by name; images [B,3,H,W] to logits [B,K]."""
        return {}

    def alarms(self, followed: dict[str, float]) -> list[str]:
        """Sentences about what goes wrong, given an epoch's means of the followed values."""
        return []

    def undecayed(self) -> tuple[nn.Parameter, ...]:
        """Parameters that are to have no weight decay, whatever the recipe says."""
        return ()

    def variant(self, progress: Progress) -> Hashable | None:
        """What the host decides about a step, see `Method.variant`."""
        return 0


class StudentStep(Step):
    """A student learning from a frozen teacher (or from labels alone)."""

    def __init__(
        self, method: Method, student: Network, teacher: Network | Headed | Panel | None, use: Use, device: Device
    ) -> None:
        super().__init__()
        self.method, self.student = method, student
        # In a tuple, so that the frozen teacher is no submodule: not optimised, not synchronised, not in the state.
        self._teacher = (teacher,)
        self._use, self._device = use, device

    @property
    def trained(self) -> Network:  # type: ignore[override]
        return self.student

    def frozen(self) -> tuple[nn.Module, ...]:
        return tuple(network for network in self._teacher if network is not None)

    def companions(self) -> dict[str, nn.Module]:
        return self.method.companions(self.student, self._teacher[0])

    def alarms(self, followed: dict[str, float]) -> list[str]:
        return self.method.alarms(followed)

    def undecayed(self) -> tuple[nn.Parameter, ...]:
        return self.method.undecayed()

    def variant(self, progress: Progress) -> Hashable | None:
        return self.method.variant(progress)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Loss of a batch: images [B,C,H,W], labels [B]."""
        teacher = self._teacher[0]
        with self._device.autocast():
            taught: Features | None = None
            if teacher is not None:
                with torch.no_grad():
                    taught = self.method.teacher_features(teacher, self.method.teacher_views(batch, progress))
            seen = self.method.student_views(batch, progress)
            learned = self.method.joint_features(self.method.student_features(self.student, seen), taught)
        return _output(self.method.outcome(batch, learned, taught, progress), learned, batch, self._use)


class TeacherStep(Step):
    """A teacher being trained for a method, with whatever heads the method asks of it."""

    def __init__(self, method: Method, teacher: Network | Headed, use: Use, device: Device) -> None:
        super().__init__()
        self.method, self.teacher = method, teacher
        self._use, self._device = use, device

    @property
    def trained(self) -> Network | Headed:  # type: ignore[override]
        return self.teacher

    def variant(self, progress: Progress) -> Hashable | None:
        return self.method.variant(progress)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Loss of a batch: images [B,C,H,W], labels [B]."""
        with self._device.autocast():
            features = self.teacher.features(self.method.teacher_views(batch, progress))
        return _output(Outcome(self.method.teacher_loss(batch, features, progress)), features, batch, self._use)


def _output(outcome: Outcome, features: Features, batch: Batch, use: Use) -> StepOutput:
    total = torch.stack(list(outcome.terms.values())).sum()
    with torch.no_grad():
        rows = features.logits.shape[0] // batch.labels.shape[0]
        logits = fold(features.logits.detach()[::rows], views(use.transform), "single")
        correct = (logits.argmax(1) == batch.labels).sum()
    terms, followed = ({k: v.detach() for k, v in values.items()} for values in (outcome.terms, outcome.followed))
    return StepOutput(total, terms, followed, correct)


def deploy(module: Any) -> nn.Module:
    """The bare network of a `Headed` one: what is evaluated, since heads only serve training."""
    return module.network if isinstance(module, Headed) else module

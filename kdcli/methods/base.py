"""What a distillation method is: views of a batch, losses on features, and the teacher it asks for.

A method never imports the engine; the engine never asks a method for its name. A method is one file: a `Spec` with its
settings and a `Method` with its losses. Whatever it learns besides the student is an attribute of the Method, so it is
optimised, synchronised over ranks and saved for resuming, and is not in the exported student.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network
from kdcli.specs import Section


class MethodSpec(Section):
    """Base of every method's settings."""

    name: str
    """The method's name."""


@dataclass(frozen=True)
class Progress:
    """Where training stands, for warm-ups inside a loss.

    Attributes:
        epoch: float tensor [], epochs begun: 1 in the first epoch (the convention of mdistiller's warm-ups).
        fraction: float tensor [], share of all steps done, from 0 towards 1.
        odd_step: whether the step's number is odd (for what alternates by batch).
    """

    epoch: Tensor
    fraction: Tensor
    odd_step: bool


@dataclass(frozen=True)
class Setting:
    """What a method is built for.

    Attributes:
        classes: K, the number of classes of the data set.
        image_size: side of the student's input in pixels.
        label_smoothing: of the cross-entropy to the labels.
    """

    classes: int
    image_size: int
    label_smoothing: float


class Method(nn.Module, ABC):
    """A distillation method.

    Subclasses set `Spec`, and take `(spec, setting, student, teacher)`; the networks may be inspected (shapes) to size
    side modules, but are not kept: they are handed to the loss as features.
    """

    Spec: ClassVar[type[MethodSpec]]
    needs_teacher: ClassVar[bool] = True
    """Whether a student is trained with a teacher."""
    nesterov: ClassVar[bool] = False
    """Whether the method's literature trained with Nesterov momentum."""
    fixed_stride: ClassVar[bool] = False
    """Whether networks must down-sample alike at every input size (the method shows the networks different sizes)."""

    @classmethod
    def check(cls, spec: Any) -> None:
        """Raise `UsageError` where settings contradict each other. Called before anything is loaded."""

    @classmethod
    def student_outputs(cls, spec: Any, classes: int) -> int:
        """Width of the student's main head for K classes; default K."""
        return classes

    @classmethod
    def teacher_outputs(cls, spec: Any, classes: int) -> int:
        """Width of the teacher's main head for K classes; default K."""
        return classes

    @classmethod
    def teacher_heads(cls, spec: Any, network: Network, classes: int) -> nn.ModuleList | None:
        """Fresh auxiliary heads for a teacher of this method; default none."""
        return None

    @classmethod
    def teacher_settings(cls, spec: Any) -> dict[str, Any]:
        """Name and settings of the method that this method's teacher is trained with; default: plain cross-entropy.

        Two specs with equal teacher settings share a teacher.
        """
        return {"name": "none"}

    @classmethod
    def inference(cls, spec: Any, role: str) -> dict[str, Any]:
        """How a trained network of `role` (student, teacher) is to be used: `transform`, `scale`, `scale_mode`.

        `transform` spans the joint label space of its main head (`none`: plain classes); `scale` enlarges its input.
        """
        return {"transform": "none", "scale": 1, "scale_mode": "bilinear"}

    def student_views(self, batch: Batch, progress: Progress) -> Tensor:
        """Images the student sees, [B*V,C,H,W]; default: the augmented batch."""
        return batch.images

    def teacher_views(self, batch: Batch, progress: Progress) -> Tensor:
        """Images the teacher sees, [B*V,C,H,W]; default: the augmented batch."""
        return batch.images

    def student_features(self, student: Network, views: Tensor) -> Features:
        """One pass of the student; a method with heads on the student adds them here."""
        return student.features(views)

    def teacher_features(self, teacher: Network | Headed, views: Tensor) -> Features:
        """One pass of the frozen teacher (no gradients), without its auxiliary heads: override where a loss reads them."""
        backbone = teacher.network if isinstance(teacher, Headed) else teacher
        return backbone.features(views)

    @abstractmethod
    def loss(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> dict[str, Tensor]:
        """The weighted terms of the student's loss, by name; their sum is minimised."""

    @abstractmethod
    def teacher_loss(self, batch: Batch, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """The weighted terms with which a teacher for this method is trained."""

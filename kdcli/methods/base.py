"""What a distillation method is: views of a batch, losses on features, and the teacher it asks for.

A method never imports the engine; the engine never asks a method for its name. A method is one file: a `Spec` with its
settings and a `Method` with its losses. Whatever it learns besides the student is an attribute of the Method, so it is
optimised, synchronised over ranks and saved for resuming, and is not in the exported student.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_origin

import torch
from pydantic import model_validator
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.losses import cross_entropy
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network
from kdcli.models.panel import Panel
from kdcli.specs import Section, TrainSpec
from kdcli.transforms import rescale


@dataclass(frozen=True)
class Outcome:
    """What a method makes of a batch.

    Attributes:
        terms: the weighted terms of the student's loss, by name, each []; their sum is minimised.
        followed: values to follow over the epochs that nobody minimises, by name, each [], means over the batch's images.
    """

    terms: dict[str, Tensor]
    followed: dict[str, Tensor] = field(default_factory=dict)


class MethodSpec(Section):
    """Base of every method's settings."""

    name: str
    """The method's name."""
    teacher_scale: Literal[1, 2, 4] = 1
    """How much larger the teacher's images are per side: VSD's variable scale for any method (VSD, Section 3.1.1)."""
    scale_mode: Literal["bilinear", "nearest", "bicubic"] = "bilinear"
    """Interpolation of the teacher's images where they are enlarged."""

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, values: Any) -> Any:
        """Lists may be written with commas (`--set method.pairs=ts,tf`)."""
        if not isinstance(values, dict):
            return values
        lists = {name for name, field in cls.model_fields.items() if get_origin(field.annotation) is tuple}
        return {k: v.split(",") if k in lists and isinstance(v, str) else v for k, v in values.items()}


@dataclass(frozen=True)
class Progress:
    """Where training stands, for warm-ups inside a loss.

    Attributes:
        epoch: float tensor [], epochs begun: 1 in the first epoch (the convention of mdistiller's warm-ups).
        fraction: float tensor [], share of all steps done, from 0 towards 1.
        odd_step: whether the step's number is odd (for what alternates by batch).
        seed: of this step and the same on every rank, for what is drawn for the whole batch. Read it only in a function
            that torch.compile leaves alone (`torch.compiler.disable`): each new value would compile the step anew.
    """

    epoch: Tensor
    fraction: Tensor
    odd_step: bool
    seed: int = 0


@dataclass(frozen=True)
class Setting:
    """What a method is built for.

    Attributes:
        classes: K, the number of classes of the data set.
        image_size: side of the student's input in pixels.
        label_smoothing: of the cross-entropy to the labels.
        scale: how much larger the teacher's input is per side.
        labels: int64 [n], the class of each image the student trains on, at the positions that `batch.index` names.
    """

    classes: int
    image_size: int
    label_smoothing: float
    scale: int = 1
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @property
    def teacher_size(self) -> int:
        """Side of the teacher's input in pixels."""
        return self.image_size * self.scale


class Method(nn.Module, ABC):
    """A distillation method.

    Subclasses set `Spec` if they have settings, and take `(spec, setting, student, teacher)`; the networks may be inspected
    (shapes) to size side modules, but are not kept: they are handed to the loss as features. Both are None, or the student
    alone is, where only `teacher_loss` will be called.
    """

    Spec: ClassVar[type[MethodSpec]] = MethodSpec
    needs_teacher: ClassVar[bool] = True
    """Whether a student is trained with a teacher."""
    nesterov: ClassVar[bool] = False
    """Whether the method's literature added Nesterov momentum to the common recipe; see `nesterov_on`."""
    fixed_stride: ClassVar[bool] = False
    """Whether networks must down-sample alike at every input size even where both see the same size."""
    mixes: ClassVar[bool] = True
    """Whether the losses make sense of mixed images (mixup, cutmix), whose targets are shared among classes."""
    assistants: ClassVar[Literal["none", "last", "all"]] = "none"
    """Which assistants teach (`--assistant`): none are taken; the last of the chain in the teacher's place; or all of
    them beside the teacher, whose features then hold theirs."""

    def __init__(
        self, spec: Any, setting: Setting, student: Network | None, teacher: Network | Headed | Panel | None
    ) -> None:
        super().__init__()
        self.spec: Any = spec
        self.setting = setting

    @classmethod
    def check(cls, spec: Any) -> None:
        """Raise `UsageError` where settings contradict each other. Called before anything is loaded."""

    @classmethod
    def nesterov_on(cls, dataset: str) -> bool:
        """Whether the method is trained with Nesterov momentum on this data set, unless the user says so or not."""
        return cls.nesterov

    @classmethod
    def for_pair(cls, given: dict[str, Any], teacher: str, student: str, dataset: str) -> dict[str, Any]:
        """Settings the literature chose for a pair of networks (registry names) on a data set; default none.

        `given` is what the user set, which wins over these.
        """
        return {}

    @classmethod
    def augmentations(cls, spec: Any) -> tuple[Literal["crop", "strong"], ...]:
        """Further augmented copies of each image, found in `batch.extra` in this order; default none.

        `crop`: the same flip and another random crop; `strong`: RandAugment and a cut-out on a flip and crop of its own.
        """
        return ()

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
        return {"name": "none", **cls.scale_settings(spec)}

    @classmethod
    def scale_settings(cls, spec: Any) -> dict[str, Any]:
        """The settings that enlarge a teacher's images, where they are enlarged."""
        return {} if spec.teacher_scale == 1 else {"teacher_scale": spec.teacher_scale, "scale_mode": spec.scale_mode}

    @classmethod
    def teacher_backbone(cls, spec: Any) -> dict[str, Any] | None:
        """Name and settings of the method that trains the backbone to which this method's teacher adds its heads.

        The backbone is then frozen and only the heads are trained; default None: backbone and heads from scratch.
        """
        return None

    @classmethod
    def teacher_recipe(cls, spec: Any, recipe: TrainSpec) -> TrainSpec:
        """The recipe by which this method's teacher is trained, given the run's; default: the same."""
        return recipe

    @classmethod
    def inference(cls, spec: Any, role: str) -> dict[str, Any]:
        """How a trained network of `role` (student, teacher) is to be used: `transform`, `scale`, `scale_mode`.

        `transform` spans the joint label space of its main head (`none`: plain classes); `scale` enlarges its input.
        """
        scale = spec.teacher_scale if role == "teacher" else 1
        return {"transform": "none", "scale": scale, "scale_mode": spec.scale_mode}

    @classmethod
    def prepared(cls, spec: Any) -> tuple[dict[str, Any], ...]:
        """Name and settings of the methods by which networks of the teacher's architecture learn from it beforehand.

        Each is an ordinary run with the recipe of this one and the seed 0, 1, …. Frozen, they teach beside the teacher: its
        features hold theirs as `assistants`. Default none.
        """
        return ()

    def student_views(self, batch: Batch, progress: Progress) -> Tensor:
        """Images the student sees, [B*V,C,H,W]; default: the augmented batch."""
        return batch.images

    def teacher_views(self, batch: Batch, progress: Progress) -> Tensor:
        """Images the teacher sees, [B*V,C,sH,sW]; default: the augmented batch, enlarged by the teacher's scale s."""
        return rescale(batch.images, self.spec.teacher_scale, self.spec.scale_mode)

    def student_features(self, student: Network, views: Tensor) -> Features:
        """One pass of the student; a method with heads on the student adds them here."""
        return student.features(views)

    def teacher_features(self, teacher: Network | Headed | Panel, views: Tensor) -> Features:
        """One pass of the frozen teacher (no gradients), without its auxiliary heads: override where a loss reads them."""
        backbone = teacher.network if isinstance(teacher, Headed) else teacher
        return backbone.features(views)

    def reads_teacher(self) -> bool:
        """Whether any term reads the teacher's features; where none does under these settings, its pass is left out."""
        return True

    def needs_batchnorm(self) -> bool:
        """Whether the teacher's BatchNorm layers do more than evaluation mode does (statistics of a batch); default no.

        Where they do not, they are folded into the layers in front of them.
        """
        return False

    def joint_features(self, student: Features, teacher: Features | None) -> Features:
        """The student's features with what further passes through stages of both networks add to them; default: as they are.

        Gradients flow here, through the stages of a frozen teacher too; `pairing.network_of` gives the stages.
        """
        return student

    @abstractmethod
    def loss(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> dict[str, Tensor]:
        """The weighted terms of the student's loss, by name; their sum is minimised."""

    def outcome(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> Outcome:
        """`loss`, and the values to follow over the epochs; a method that has some overrides this and lets `loss` call it."""
        return Outcome(self.loss(batch, student, teacher, progress))

    def alarms(self, followed: dict[str, float]) -> list[str]:
        """Sentences about what goes wrong, given the means of the followed values over an epoch; default none."""
        return []

    def companions(self, student: Network, teacher: Network | Headed | Panel | None) -> dict[str, nn.Module]:
        """Networks whose accuracy is measured along with the student's, by name; default none.

        Each maps images [B,3,H,W] of the student's size to logits [B,K]. They serve the training and are not exported.
        """
        return {}

    def undecayed(self) -> tuple[nn.Parameter, ...]:
        """The method's own parameters that are to have no weight decay; default none."""
        return ()

    def variant(self, progress: Progress) -> Hashable | None:
        """What of a step of a student is decided on the host; None: something new at every step.

        Steps of equal variants do the same to their tensors, so on a GPU one is recorded and replayed. Whoever reads
        `progress.odd_step` or `progress.seed`, or draws random numbers otherwise than from torch's own generators, overrides
        this; by default all steps are alike.
        """
        return 0

    def teacher_loss(self, batch: Batch, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """The weighted terms with which a teacher for this method is trained; default: {"ce"}, plain cross-entropy."""
        return {"ce": cross_entropy(teacher.logits, batch.targets, self.setting.label_smoothing)}

"""HSAKD: auxiliary heads on every stage of both networks, over the joint space of classes and rotations.

Each head is the remaining stages of the architecture again, with 4K logits for the K classes under four rotations; the
student's heads imitate the teacher's, and its main head the teacher's main head under all four rotations. The heads serve
only training.

Equation: L = CE(s_0, y) + mean_i KD_3(s_i, t_i) + Σ_l mean_i KD_3(h_li, g_li), where s_i, t_i are the main logits of student
    and teacher for view i, h_li, g_li those of their heads on stage l, and KD_3 = 3² · KL(t ‖ s) at temperature 3.
Teacher: L = CE(t_0, y) + Σ_l mean_i CE(g_li, (y, i)), from scratch (the tables' HSAKD*), or the second term alone on the
    heads of a finished network (`teacher=frozen`, the tables' HSAKD).
Reductions: the first CE is a mean over the B upright images, everything else over the M·B rows; sums over the heads; the
    KLs are summed over the K classes or the K·M joint ones.
Source: Yang et al. 2021 (IJCAI), arXiv 2107.13715, Section 3, extended in arXiv 2109.03075; losses and gradients equal to
    the released code's.
Tensors: logits of both networks, and the maps of the taps that have heads (`head_taps`).
Cost: four passes of both networks, heads included; wrn40_2 → wrn16_2 with 100 classes: heads of 5.77 and 1.93 million
    parameters, 2.3 and 2.4 times the multiplications of the networks alone.
Our reading: where the networks have unequal numbers of heads, the shallowest are left out (no published pair needs it).
    A frozen teacher is trained on its heads alone, since the main head's term is a constant there. MobileNetV2 in the
    published tables is the variant with a stride-1 stem, `mobilenetv2_s1`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.errors import UsageError
from kdcli.losses import cross_entropy, divergence
from kdcli.methods.base import Method, MethodSpec, Progress, Setting
from kdcli.methods.joint import joint_cross_entropies, require_heads, shared_stages
from kdcli.methods.pairing import backbone, require_same_outputs
from kdcli.models.features import Features
from kdcli.models.heads import Headed, build_heads
from kdcli.models.network import Network
from kdcli.models.panel import Panel
from kdcli.specs import TrainSpec
from kdcli.transforms import check, expand, rescale, views


class HSAKDSpec(MethodSpec):
    """Settings of HSAKD."""

    name: str = "hsakd"
    """The method's name."""
    transform: str = "rot4"
    """Transformations spanning the joint label space: rot4 (the paper), rot2, perm6, perm3, none, or a product such as
    rot4xperm6."""
    teacher: Literal["joint", "frozen"] = "joint"
    """How the teacher is made: joint trains backbone and heads from scratch (the tables' HSAKD*, teachers about four
    points better); frozen adds heads to a finished ordinary network (the tables' HSAKD)."""
    head_epochs: int | None = Field(default=None, ge=1)
    """Epochs of the heads of a frozen teacher; default: 5/12 of the recipe's (released code: 100 of 240)."""
    temperature: float = Field(default=3.0, gt=0, le=1000)
    """Temperature of both divergences."""
    ce_weight: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy of the upright images."""
    kd_weight: float = Field(default=1.0, ge=0)
    """Weight of the divergence of the main heads."""
    heads_weight: float = Field(default=1.0, ge=0)
    """Weight of the divergences of the auxiliary heads."""
    student_ce: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy of the student's auxiliary heads to the joint labels; the authors' ablation, which
    lowered the accuracy."""

    @field_validator("transform")
    @classmethod
    def _known(cls, value: str) -> str:
        return check(value)


class HSAKD(Method):
    """L = ce_weight · CE + kd_weight · KD(main) + heads_weight · Σ_l KD(head_l) [+ student_ce · Σ_l CE(head_l)]."""

    Spec: ClassVar[type[MethodSpec]] = HSAKDSpec
    nesterov: ClassVar[bool] = True
    fixed_stride: ClassVar[bool] = True
    mixes: ClassVar[bool] = False

    def __init__(
        self, spec: HSAKDSpec, setting: Setting, student: Network | None, teacher: Network | Headed | None
    ) -> None:
        super().__init__(spec, setting, student, teacher)
        self.m = views(spec.transform)
        self.taps: tuple[int, ...] = ()
        self.teacher_taps: tuple[int, ...] = ()
        self.student_heads = nn.ModuleList()
        if student is None or teacher is None:
            return
        main = backbone(teacher)
        require_same_outputs(student, teacher)
        width = setting.classes * self.m
        if spec.heads_weight:
            require_heads(teacher, width, "hsakd", "method.heads_weight=0")
        if spec.heads_weight or spec.student_ce:
            count = shared_stages(student, teacher)
            self.taps, self.teacher_taps = student.head_taps[-count:], main.head_taps[-count:]
            self.student_heads = build_heads(student, width, count)

    @classmethod
    def nesterov_on(cls, dataset: str) -> bool:
        """The CIFAR scripts have Nesterov momentum, those for ImageNet have not."""
        return dataset != "imagenet"

    @classmethod
    def check(cls, spec: Any) -> None:
        """Raise `UsageError` for combinations that have no meaning."""
        if spec.ce_weight == spec.kd_weight == 0:
            raise UsageError(
                "ce_weight and kd_weight are both 0, so nothing trains the main head, which is what is evaluated",
                field="method.ce_weight",
                hint="give one of them a weight",
            )
        if spec.teacher == "joint" and spec.head_epochs is not None:
            raise UsageError(
                "a joint teacher's heads are trained as long as the teacher",
                field="method.head_epochs",
                hint="set method.teacher=frozen, or leave it out",
            )

    @classmethod
    def teacher_heads(cls, spec: HSAKDSpec, network: Network, classes: int) -> nn.ModuleList:
        """A head with K*M outputs for every tap of the network."""
        return build_heads(network, classes * views(spec.transform))

    @classmethod
    def teacher_settings(cls, spec: HSAKDSpec) -> dict[str, Any]:
        """HSAKD itself; what concerns only the student is left at its default."""
        kept = {"transform": spec.transform, "teacher": spec.teacher, "head_epochs": spec.head_epochs}
        return {"name": "hsakd", **kept, **cls.scale_settings(spec)}

    @classmethod
    def teacher_backbone(cls, spec: HSAKDSpec) -> dict[str, Any] | None:
        """An ordinary classifier for a frozen teacher, at the scale at which it will teach."""
        return {"name": "none", **cls.scale_settings(spec)} if spec.teacher == "frozen" else None

    @classmethod
    def teacher_recipe(cls, spec: HSAKDSpec, recipe: TrainSpec) -> TrainSpec:
        """The run's, but the heads of a frozen teacher take fewer epochs, the rate falling after 0.3, 0.6, 0.9 of them."""
        if spec.teacher == "joint":
            return recipe
        epochs = spec.head_epochs or max(1, recipe.epochs * 5 // 12)
        return recipe.model_copy(update={"epochs": epochs, "schedule": "step", "milestones": (0.3, 0.6, 0.9)})

    def student_views(self, batch: Batch, progress: Progress) -> Tensor:
        """[B*M,C,H,W], interleaved."""
        return expand(batch.images, self.spec.transform)

    def teacher_views(self, batch: Batch, progress: Progress) -> Tensor:
        """[B*M,C,sH,sW]: enlarged once, then transformed (interpolation commutes with rotations and permutations)."""
        return expand(rescale(batch.images, self.spec.teacher_scale, self.spec.scale_mode), self.spec.transform)

    def student_features(self, student: Network, views: Tensor) -> Features:
        """The student's pass with its auxiliary heads."""
        features = student.features(views)
        pairs = zip(self.student_heads, self.taps, strict=True)
        features.heads = tuple(head(features.maps[tap]) for head, tap in pairs)
        return features

    def teacher_features(self, teacher: Network | Headed | Panel, views: Tensor) -> Features:
        """The teacher's pass; of its heads only those that are compared."""
        features = backbone(teacher).features(views)
        if self.spec.heads_weight and isinstance(teacher, Headed):
            pairs = zip(list(teacher.heads)[-len(self.teacher_taps) :], self.teacher_taps, strict=True)
            features.heads = tuple(head(features.maps[tap]) for head, tap in pairs)
        return features

    def loss(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> dict[str, Tensor]:
        """{"ce", "kd"}, and {"heads", "heads_ce"} where they have a weight."""
        assert teacher is not None
        spec = self.spec
        terms = {
            "ce": spec.ce_weight * self._upright(student.logits, batch),
            "kd": spec.kd_weight * divergence(student.logits, teacher.logits, spec.temperature),
        }
        if spec.heads_weight:
            pairs = zip(student.heads, teacher.heads, strict=True)
            each = [divergence(s, t, spec.temperature) for s, t in pairs]
            terms["heads"] = spec.heads_weight * torch.stack(each).sum()
        if spec.student_ce:
            terms["heads_ce"] = spec.student_ce * self._joint(student.heads, batch)
        return terms

    def teacher_loss(self, batch: Batch, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"ce", "heads"}; for a frozen teacher, whose main head no longer learns, {"heads"} alone."""
        heads = {"heads": self._joint(teacher.heads, batch)}
        return heads if self.spec.teacher == "frozen" else {"ce": self._upright(teacher.logits, batch), **heads}

    def _upright(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of view 0's logits among [B*M,K] to the classes."""
        return cross_entropy(logits[:: self.m], batch.labels, self.setting.label_smoothing)

    def _joint(self, heads: tuple[Tensor, ...], batch: Batch) -> Tensor:
        """Cross-entropies of the heads' logits [B*M,K*M] to the joint labels, summed."""
        return joint_cross_entropies(heads, batch.labels, self.m, self.setting.label_smoothing)

"""SLKD: self-learning teachers, fresh copies of the teacher whose way of learning the student follows.

N networks of the teacher's architecture start untrained and learn from the teacher by KD beside the student, which learns
from the teacher and from their fused logits at the same time. They are dropped at the end. `training=sequential` (SLKD* of
the paper) distils them first, as ordinary runs that are found again, and freezes them.

Each epoch records under `followed` how far the networks are apart, T² · KL at temperature T as in the loss
(`kl_teacher_student`, `kl_fused_student`, `kl_teacher_self1` …, `kl_teacher_fused`), and the top-1 of the self-learning
teachers and of their fused logits on the training images, as augmented (`top1_self1` …, `top1_fused`).

Equation: L = a · CE(s, y) + (1-a) · KD(t→s) + w · [c1 · CE(s, y) + c2 · KD(f→s)] + Σ_i [a · CE(z_i, y) + (1-a) · KD(t→z_i)],
    KD(p→q) = T² · KL(softmax(p/T) ‖ softmax(q/T)), f = Σ_i w_i · z_i the fused logits, z_i those of self-learning teacher i
Reductions: CE and KL are means over the batch; the KL is summed over the classes; the last part is summed over i.
Source: "Improving Knowledge Distillation via Transferring Learning Ability", arXiv 2304.11923, Eq. 1-7; loss and gradients
    equal to those of the released code, two fused in equal parts. a = 0.1, T = 4 on CIFAR (Table 10) and a = 0.5, T = 1 on
    ImageNet (Table 11); w = c1 = c2 = 1 is the released code's.
Tensors: the logits of all networks.
Cost: one forward of the teacher, forward and backward of every self-learning teacher, in one step with the student; wrn40_2 →
    wrn16_2: 4.51 million parameters more to train. resnet32x4 → resnet8x4 takes 5.0 times KD's multiply-accumulates, and a
    step of 64 images 4.5 to 5 times its time on a CPU. In sequence: N runs of KD, then N+1 forwards a step.
Our reading: as released, the gradient of KD(f→s) reaches the self-learning teachers too, which draws them to the student;
    Eq. 5 and 6 have no such term (`detach`). Table 7 leaves open which cross-entropies an ablated student keeps: we leave out
    the whole lesson, so that the teacher alone is plain KD. All networks have one learning rate, the student's, as in the
    released code; in sequence, the ordinary runs' own. Table 7's student of both teachers lies below that of Table 1, so we
    take it to have a single self-learning teacher.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.errors import UsageError
from kdcli.losses import cross_entropy, divergence, exact
from kdcli.methods.base import Method, MethodSpec, Outcome, Progress, Setting
from kdcli.methods.pairing import backbone, require_same_outputs
from kdcli.models import build
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network
from kdcli.models.panel import Panel
from kdcli.transforms import rescale


class SLKDSpec(MethodSpec):
    """Settings of SLKD."""

    name: str = "slkd"
    """The method's name."""
    self_teachers: int = Field(default=2, ge=1)
    """N, the number of self-learning teachers."""
    fusion: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Weight of each self-learning teacher in the fused logits, relative to their sum (Eq. 7); default: equal ones."""
    taught_by: Literal["both", "teacher", "self-learning"] = "both"
    """Whose lessons the student takes (Table 7): teacher leaves out the part weighted by process_weight and is plain KD,
    without any self-learning teacher; self-learning leaves out the student's first cross-entropy and KD(t→s)."""
    training: Literal["parallel", "sequential"] = "parallel"
    """parallel: self-learning teachers learn beside the student; sequential (SLKD*, Tables 8 and 9): they were distilled
    from the teacher before, by KD with the same a and T, seeds 0, 1, …, and are frozen."""
    detach: bool = False
    """Hold the fused logits constant in KD(f→s), as the paper's equations do; off, its gradient reaches the self-learning
    teachers too, as in the released code, which the paper names as that of its experiments."""
    ce_share: float = Field(default=0.1, ge=0, le=1)
    """a, the weight of the cross-entropy beside the teacher's lesson, whose weight is 1 - a."""
    temperature: float = Field(default=4.0, gt=0, le=1000)
    """T, by which all logits are divided in the divergences."""
    process_weight: float = Field(default=1.0, ge=0)
    """w, the weight of the self-learning teachers' lesson."""
    process_ce: float = Field(default=1.0, ge=0)
    """c1, the weight of the cross-entropy in that lesson; the student's has a + w · c1 in all."""
    process_kd: float = Field(default=1.0, ge=0)
    """c2, the weight of KD(f→s) in that lesson."""
    evaluate_self_teachers: bool = False
    """Measure the self-learning teachers wherever the student is measured, in parallel training (in sequence the summary
    has their accuracy anyway)."""


class Enlarged(nn.Module):
    """A network that is shown images [B,3,H,W] enlarged by `scale`."""

    def __init__(self, network: nn.Module, scale: int, mode: str) -> None:
        super().__init__()
        self.network, self.scale, self.mode = network, scale, mode

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B,K]."""
        return self.network(rescale(images, self.scale, self.mode))


class SLKD(Method):
    """L = a CE(s) + (1-a) KD(t→s) + w [c1 CE(s) + c2 KD(f→s)] + Σ_i [a CE(z_i) + (1-a) KD(t→z_i)], means over B."""

    Spec: ClassVar[type[MethodSpec]] = SLKDSpec

    def __init__(
        self, spec: SLKDSpec, setting: Setting, student: Network | None, teacher: Network | Headed | Panel | None
    ) -> None:
        super().__init__(spec, setting, student, teacher)
        weights = spec.fusion or (1.0,) * spec.self_teachers
        self.fusion = tuple(weight / sum(weights) for weight in weights)
        self.self_teachers = nn.ModuleList()
        if student is None or teacher is None:
            return
        require_same_outputs(student, teacher)
        if spec.taught_by != "teacher" and spec.training == "parallel":
            like = backbone(teacher)
            self.self_teachers.extend(
                build(like.arch, like.outputs, like.image_size, taps=like.taps, fixed_stride=like.fixed_stride)
                for _ in range(spec.self_teachers)
            )

    @classmethod
    def check(cls, spec: SLKDSpec) -> None:
        """One weight for each network that is fused; networks taught beforehand see images as a student does."""
        if spec.fusion and len(spec.fusion) != spec.self_teachers:
            raise UsageError(
                f"{len(spec.fusion)} weights for {spec.self_teachers} self-learning teachers",
                field="method.fusion",
                hint="one for each, or none for equal ones",
            )
        if cls.prepared(spec) and spec.teacher_scale != 1:
            raise UsageError(
                "self-learning teachers taught beforehand see images as a student does, so they cannot teach at another "
                "scale",
                field="method.training",
                hint="use training=parallel, or leave out --teacher-scale",
            )

    @classmethod
    def for_pair(cls, given: dict[str, Any], teacher: str, student: str, dataset: str) -> dict[str, Any]:
        """ImageNet's a and T (the paper's Table 11)."""
        return {"ce_share": 0.5, "temperature": 1.0} if dataset == "imagenet" else {}

    @classmethod
    def prepared(cls, spec: SLKDSpec) -> tuple[dict[str, Any], ...]:
        """In sequence: the self-learning teachers, each distilled by KD."""
        if spec.training == "parallel" or spec.taught_by == "teacher":
            return ()
        rest = round(1 - spec.ce_share, 12)  # 0.3, not 0.30000000000000004: it names a run that others may share
        kd = {"name": "kd", "ce_weight": spec.ce_share, "kd_weight": rest, "temperature": spec.temperature}
        return (kd,) * spec.self_teachers

    def student_features(self, student: Network, views: Tensor) -> Features:
        """The student's pass and, as its `assistants`, those of the self-learning teachers, on images enlarged for them."""
        larger = rescale(views, self.spec.teacher_scale, self.spec.scale_mode) if self.self_teachers else views
        others = tuple(network.features(larger) for network in self.self_teachers)  # type: ignore[operator]
        return replace(student.features(views), assistants=others)

    def loss(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> dict[str, Tensor]:
        """The terms of `outcome`."""
        return self.outcome(batch, student, teacher, progress).terms

    def outcome(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> Outcome:
        """{"ce", "kd"} (the teacher's lesson), {"process_ce", "process_kd"} (that of the fused logits) and {"self_ce",
        "self_kd"} (sums over the self-learning teachers in training), from logits [B,K]; followed: divergences and top-1.
        """
        assert teacher is not None
        a, w = self.spec.ce_share, self.spec.process_weight
        ce = self._cross_entropy(student.logits, batch)
        kd = divergence(student.logits, teacher.logits, self.spec.temperature)
        terms, followed = {}, {"kl_teacher_student": kd.detach()}
        if self.spec.taught_by != "self-learning":
            terms |= {"ce": a * ce, "kd": (1 - a) * kd}
        if self.spec.taught_by != "teacher":
            learning = self.spec.training == "parallel"
            logits = [exact(z.logits) for z in (student if learning else teacher).assistants]
            fused = torch.stack([share * z for share, z in zip(self.fusion, logits, strict=True)]).sum(0)
            t, held = self.spec.temperature, self.spec.detach
            process = divergence(student.logits, fused, t, constant=held)  # as released, the gradient reaches f
            lessons = [divergence(z, teacher.logits, self.spec.temperature) for z in logits]
            terms |= {"process_ce": w * self.spec.process_ce * ce, "process_kd": w * self.spec.process_kd * process}
            if learning:
                own = [self._cross_entropy(z, batch) for z in logits]
                terms |= {"self_ce": a * torch.stack(own).sum(), "self_kd": (1 - a) * torch.stack(lessons).sum()}
            followed |= {"kl_fused_student": process.detach()}
            followed |= self._trajectory(batch, teacher.logits, logits, fused, lessons)
        return Outcome(terms, followed)

    def companions(self, student: Network, teacher: Network | Headed | Panel | None) -> dict[str, nn.Module]:
        """With `evaluate_self_teachers`: the self-learning teachers in training, `self1`, `self2` …"""
        if not self.spec.evaluate_self_teachers:
            return {}
        scale, mode = self.spec.teacher_scale, self.spec.scale_mode
        return {f"self{i}": Enlarged(network, scale, mode) for i, network in enumerate(self.self_teachers, 1)}

    def _cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        return cross_entropy(logits, batch.targets, self.setting.label_smoothing)

    @torch.no_grad()
    def _trajectory(
        self, batch: Batch, teacher: Tensor, logits: list[Tensor], fused: Tensor, lessons: list[Tensor]
    ) -> dict[str, Tensor]:
        """Where the self-learning teachers and their fused logits stand: divergence from the teacher, and top-1 in %."""
        found = {f"kl_teacher_self{i}": lesson.detach() for i, lesson in enumerate(lessons, 1)}
        found["kl_teacher_fused"] = divergence(fused, teacher, self.spec.temperature)
        named = {**{f"self{i}": z for i, z in enumerate(logits, 1)}, "fused": fused}
        hits = {f"top1_{name}": (z.argmax(1) == batch.labels).float().mean() for name, z in named.items()}
        return found | {name: 100 * share for name, share in hits.items()}

"""VSD: variable scale distillation ("Empowering Teachers with Enhanced Knowledge via Variable Scale Distillation").

The teacher sees every view of an image enlarged (32 → 64 pixels), and both networks learn the joint space of classes and
self-supervised transformations. The student mimics the teacher's joint logits (Eq. 5) and, through Rescale Blocks, the
joint logits of auxiliary heads on every stage (Eq. 4).

A trained network has a joint head. `single` inference takes the slice of the upright view (the headline), `marginal` the
sum of p(y, i) over i, `aggregate` the mean of the matching slices of all views, at the cost of M passes; `kd evaluate`
reports all three, since the paper does not say which it used.

Equation: L = λ1 · Σ_j mean_i KD_3(h_ji, g_ji) + λ2 · mean_i KD_3(s_i, t_i) + λ3 · mean_i CE(s_i, (y, i))
    + λ4 · Σ_j mean_i CE(h_ji, (y, i)) (Eq. 6) with λ = (1, 1, 1, 0), where s_i, t_i are the joint main logits of student and
    teacher for view i of M, h_ji, g_ji those of their heads on stage j, and KD_3 = 3² · KL(t ‖ s) at temperature 3.
Teacher: L = mean_i CE(t_i, (y, i)) + Σ_j mean_i CE(g_ji, (y, i)), from scratch, on enlarged images (Eq. 1 and its heads).
Reductions: means over the M·B rows; the KLs are summed over the K·M joint classes; sums over the stages j.
Source: "Empowering Teachers with Enhanced Knowledge via Variable Scale Distillation", a submission to ICLR 2025; no public
    code. With `main_head=class`, one scale and no Rescale Block the numbers equal those of HSAKD's released code.
Tensors: the main logits of both networks, and the maps of the taps that have heads (`head_taps`).
Cost: M passes of both networks, heads included, the teacher's on images of four times the area; wrn40_2 → wrn16_2 with 100
    classes: heads of 5.77 and 1.93 million parameters, the student's on maps of four times the area.
Our reading: the paper leaves much open. Where it is silent, the reading is that of HSAKD (arXiv 2107.13715 and 2109.03075),
    whose losses a reviewer and the authors equate with VSD's; every such choice is a setting whose docstring says so.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.errors import IncompatibleError, UsageError
from kdcli.gather import BatchNorm2d
from kdcli.losses import cross_entropy, divergence, exact
from kdcli.methods.base import Method, MethodSpec, Progress, Setting
from kdcli.methods.joint import joint_cross_entropies, require_heads, shared_stages
from kdcli.methods.pairing import backbone
from kdcli.methods.rescale import Pool, rescale_block
from kdcli.models.features import Features
from kdcli.models.heads import Headed, build_heads
from kdcli.models.network import Network, stage_shapes
from kdcli.models.panel import Panel
from kdcli.transforms import check, expand, joint_labels, rescale, views

# The settings that decide how a VSD teacher is trained; the rest is the student's.
_OF_TEACHER = ("teacher_scale", "scale_mode", "scale_policy", "teacher_heads", "main_head", "tau_ce")


class VSDSpec(MethodSpec):
    """Settings of VSD. The defaults are the combination that the paper's Figure 4 selects."""

    name: str = "vsd"
    """The method's name."""
    transform: str = "rot4"
    """Transformations spanning the joint label space: rot4, rot2, perm6, perm3, none, or a product such as rot4xperm6
    (paper, Fig. 3: rotations and channel permutations; rot4 is what Fig. 4a selects)."""
    teacher_transform: str | None = None
    """The teacher's transformations, if they differ from the student's (Fig. 4a keeps the student at rot4); then the
    networks are compared on class marginals, because the joint spaces differ (our reading: Eq. 5 is undefined there)."""
    teacher_scale: Literal[1, 2, 4] = 2
    """How much larger the teacher's images are per side (Section 3.1.1: 2; Fig. 4a also 4)."""
    scale_policy: Literal["fixed", "mixed"] = "fixed"
    """fixed: every batch at teacher_scale; mixed: every other batch at scale 1 (Section 1 speaks of varying resolutions,
    Section 3.1.1 of doubling; we read the former as the latter)."""
    teacher_heads: bool = True
    """Train the teacher's auxiliary heads with its main head (Eq. 1 has the main head only, but Eq. 4 needs
    distributions from the teacher's maps; HSAKD's joint teacher)."""
    main_head: Literal["joint", "class"] = "joint"
    """Width of the main heads: joint (M*N, the text of Section 3.1.2) or class (N, as in HSAKD)."""
    rescale: Literal["nearest", "bilinear", "tile", "transposed", "pool_teacher", "none"] = "nearest"
    """The Rescale Block on the student's maps; its inside is not described in the paper (a reviewer: it copies existing
    features, so nearest). pool_teacher averages the teacher's maps instead."""
    stages: int | None = Field(default=None, ge=1)
    """K, the number of stages distilled, counted from the last; default: all that both networks have."""
    lambda1: float = Field(default=1.0, ge=0)
    """Weight of the hierarchical distillation KD1 (Eq. 4); the paper gives no value, HSAKD uses 1."""
    lambda2: float = Field(default=1.0, ge=0)
    """Weight of the distillation of the main logits KD2 (Eq. 5); the paper gives no value, HSAKD uses 1."""
    lambda3: float = Field(default=1.0, ge=0)
    """Weight of the student's joint cross-entropy agg1 (Eq. 2); the paper gives no value, HSAKD uses 1."""
    lambda4: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy of the student's auxiliary heads agg2 (Eq. 3, read with the student's heads: as
    printed it has no gradient for the student); 0 in the final method (Section 4.1)."""
    tau_kd: float = Field(default=3.0, gt=0, le=1000)
    """Temperature of both distillation terms (not in the paper; HSAKD: 3)."""
    tau_ce: float = Field(default=1.0, gt=0, le=1000)
    """Temperature inside the cross-entropies (Eq. 1-3 write one; HSAKD: 1)."""
    tau2: bool = True
    """Multiply the distillation terms by tau_kd squared (not in Eq. 4 and 5; HSAKD does)."""
    kd1_target: Literal["head_logits", "spatial", "channel", "flat"] = "head_logits"
    """What fmap_j of Eq. 4 is: the joint logits of the auxiliary head (authors, to a reviewer: there is a linear
    classification step), or the map itself, softened over positions per channel, over channels per position, or over
    both."""
    kd2_space: Literal["joint", "class"] = "joint"
    """Space of KD2: the joint space (Eq. 5) or the class marginals."""
    kd2_times_k: bool = False
    """Count KD2 once per stage: Eq. 5 sums over K with no j inside, which we take for a slip."""

    @field_validator("transform")
    @classmethod
    def _known(cls, value: str) -> str:
        return check(value)

    @field_validator("teacher_transform")
    @classmethod
    def _known_too(cls, value: str | None) -> str | None:
        return None if value is None else check(value, "method.teacher_transform")


class VSD(Method):
    """L = λ1 Σ_j KD(head_j) + λ2 KD(main) + λ3 CE(main, joint labels) + λ4 Σ_j CE(head_j, joint labels)  (Eq. 6).

    KD(·) = τ² · mean over the M·B rows of KL(teacher ‖ student) at temperature τ, summed over the joint space; the
    cross-entropies are means over the M·B rows; sums over the stages j.
    """

    Spec: ClassVar[type[MethodSpec]] = VSDSpec
    nesterov: ClassVar[bool] = True
    fixed_stride: ClassVar[bool] = True
    mixes: ClassVar[bool] = False

    def __init__(
        self, spec: VSDSpec, setting: Setting, student: Network | None, teacher: Network | Headed | None
    ) -> None:
        super().__init__(spec, setting, student, teacher)
        self.m = views(spec.transform)
        self.same_space = spec.teacher_transform in (None, spec.transform)
        self.pool_teacher: nn.Module = nn.Identity()
        self.count = 0
        if student is None or teacher is None:
            return
        on_maps = spec.kd1_target != "head_logits"
        main = backbone(teacher)
        if spec.lambda1 > 0 and not on_maps:
            width = setting.classes * views(spec.teacher_transform or spec.transform)
            require_heads(teacher, width, "vsd", "method.lambda1=0")
        most = shared_stages(student, teacher)
        if (spec.stages or 1) > most:
            raise IncompatibleError(
                f"{student.arch} and {main.arch} share {most} stages, not {spec.stages}", field="method.stages"
            )
        count = self.count = spec.stages or most
        if spec.lambda1 == 0 and spec.lambda4 == 0:
            return
        self.taps = student.head_taps[-count:]
        self.teacher_taps = main.head_taps[-count:]
        shapes = stage_shapes(student, setting.image_size)
        blocks = nn.ModuleList(rescale_block(spec.rescale, spec.teacher_scale, shapes[t][0]) for t in self.taps)
        if spec.rescale == "pool_teacher":
            self.pool_teacher = Pool(spec.teacher_scale)
        if not on_maps or spec.lambda4:
            width = setting.classes * self.m
            self.student_heads = build_heads(student, width, count)
            if student.kind == "token":
                _check_sizes(self.student_heads, blocks, [shapes[t] for t in self.taps], student.arch)
        else:
            self.student_heads = nn.ModuleList()
        self.blocks = blocks
        self.connectors = nn.ModuleList()
        if on_maps and spec.lambda1:
            teacher_shapes = stage_shapes(main, setting.image_size * spec.teacher_scale)
            for tap, teacher_tap in zip(self.taps, self.teacher_taps, strict=True):
                self.connectors.append(_connector(shapes[tap][0], teacher_shapes[teacher_tap][0]))

    @classmethod
    def check(cls, spec: Any) -> None:
        """Raise `UsageError` for combinations that have no meaning."""
        if spec.lambda2 == 0 and spec.lambda3 == 0:
            raise UsageError(
                "lambda2 and lambda3 are both 0, so nothing trains the main head, which is what is evaluated",
                field="method.lambda3",
                hint="give one of them a weight",
            )
        if spec.teacher_scale == 1 and spec.scale_policy == "mixed":
            raise UsageError(
                "mixed needs a teacher_scale of 2 or 4", field="method.scale_policy", hint="fixed, or a larger scale"
            )
        if spec.lambda1 and spec.kd1_target == "head_logits" and not spec.teacher_heads:
            raise UsageError(
                "KD1 compares the heads' logits, so the teacher needs heads",
                field="method.teacher_heads",
                hint="set method.lambda1=0 or method.kd1_target=spatial",
            )
        if spec.kd1_target != "head_logits" and spec.teacher_transform not in (None, spec.transform):
            raise UsageError(
                "maps can be compared only between equal views",
                field="method.kd1_target",
                hint="use head_logits, or one transform for both networks",
            )

    @classmethod
    def student_outputs(cls, spec: VSDSpec, classes: int) -> int:
        """K*M for the joint main head, K for a class head."""
        return classes * views(spec.transform) if spec.main_head == "joint" else classes

    @classmethod
    def teacher_outputs(cls, spec: VSDSpec, classes: int) -> int:
        """K*M of the teacher's own transformations, or K."""
        return classes * views(spec.teacher_transform or spec.transform) if spec.main_head == "joint" else classes

    @classmethod
    def teacher_heads(cls, spec: VSDSpec, network: Network, classes: int) -> nn.ModuleList | None:
        """A head with K*M outputs for every tap of the network, unless `teacher_heads` is off."""
        if not spec.teacher_heads:
            return None
        return build_heads(network, classes * views(spec.teacher_transform or spec.transform))

    @classmethod
    def teacher_settings(cls, spec: VSDSpec) -> dict[str, Any]:
        """VSD itself with the teacher's transformations; what concerns only the student is left at its default."""
        kept = {key: getattr(spec, key) for key in _OF_TEACHER}
        if not spec.teacher_heads:
            kept["lambda1"] = 0.0
        return {"name": "vsd", "transform": spec.teacher_transform or spec.transform, **kept}

    @classmethod
    def inference(cls, spec: VSDSpec, role: str) -> dict[str, Any]:
        """Joint space of the role's transformations; a teacher's input is enlarged."""
        transform = (spec.teacher_transform or spec.transform) if role == "teacher" else spec.transform
        return {
            "transform": transform if spec.main_head == "joint" else "none",
            "scale": spec.teacher_scale if role == "teacher" else 1,
            "scale_mode": spec.scale_mode,
        }

    def variant(self, progress: Progress) -> Hashable | None:
        """Every other step has another scale under `scale_policy=mixed`."""
        return self.spec.scale_policy == "mixed" and progress.odd_step

    def student_views(self, batch: Batch, progress: Progress) -> Tensor:
        """[B*M,C,H,W], interleaved."""
        return expand(batch.images, self.spec.transform)

    def teacher_views(self, batch: Batch, progress: Progress) -> Tensor:
        """[B*M,C,sH,sW]: enlarged once, then transformed (interpolation commutes with rotations and permutations)."""
        factor = 1 if self.spec.scale_policy == "mixed" and progress.odd_step else self.spec.teacher_scale
        enlarged = rescale(batch.images, factor, self.spec.scale_mode)
        return expand(enlarged, self.spec.teacher_transform or self.spec.transform)

    def student_features(self, student: Network, views: Tensor) -> Features:
        """The student's pass, then Rescale Block and auxiliary head on each distilled stage."""
        features = student.features(views)
        if self.spec.lambda1 == 0 and self.spec.lambda4 == 0:
            return features
        if len(self.student_heads):
            scaled = (block(features.maps[tap]) for block, tap in zip(self.blocks, self.taps, strict=True))
            features.heads = tuple(head(x) for head, x in zip(self.student_heads, scaled, strict=True))
        return features

    def teacher_features(self, teacher: Network | Headed | Panel, views: Tensor) -> Features:
        """The teacher's pass; its heads are computed only if KD1 reads them."""
        read = self.spec.lambda1 > 0 and self.spec.kd1_target == "head_logits"
        features = backbone(teacher).features(views)
        if read and isinstance(teacher, Headed):
            first = len(teacher.heads) - self.count
            features.heads = tuple(
                teacher.heads[first + j](self.pool_teacher(features.maps[tap]))
                for j, tap in enumerate(self.teacher_taps)
            )
        return features

    def reads_teacher(self) -> bool:
        """Not with labels alone (lambda1 and lambda2 are 0)."""
        return self.spec.lambda1 > 0 or self.spec.lambda2 > 0

    def loss(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> dict[str, Tensor]:
        """{"kd1", "kd2", "agg1", "agg2"} of Eq. 6, without the terms whose weight is 0."""
        assert teacher is not None or not self.reads_teacher()
        spec, terms = self.spec, {}
        if spec.lambda1:
            assert teacher is not None
            terms["kd1"] = spec.lambda1 * torch.stack(self._hierarchical(student, teacher)).sum()
        if spec.lambda2:
            assert teacher is not None
            times = self.count if spec.kd2_times_k else 1
            terms["kd2"] = spec.lambda2 * times * self._compare(student.logits, teacher.logits, spec.kd2_space)
        if spec.lambda3:
            terms["agg1"] = spec.lambda3 * self._supervised(student.logits, batch.labels)
        if spec.lambda4:
            terms["agg2"] = spec.lambda4 * self._joint(student.heads, batch.labels)
        return terms

    def teacher_loss(self, batch: Batch, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """Eq. 1 on the main head, plus the same cross-entropy on each auxiliary head."""
        terms = {"ce": self._supervised(teacher.logits, batch.labels)}
        if teacher.heads:
            terms["heads"] = self._joint(teacher.heads, batch.labels)
        return terms

    def _supervised(self, logits: Tensor, labels: Tensor) -> Tensor:
        """CE of the main head: joint labels over all rows, or classes over the rows of view 0 (HSAKD)."""
        smoothing, tau = self.setting.label_smoothing, self.spec.tau_ce
        if self.spec.main_head == "class":
            return cross_entropy(logits[:: self.m], labels, smoothing, tau)
        return cross_entropy(logits, joint_labels(labels, self.m), smoothing, tau)

    def _joint(self, heads: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Cross-entropies of the auxiliary heads to the joint labels, summed over the heads."""
        return joint_cross_entropies(heads, labels, self.m, self.setting.label_smoothing, self.spec.tau_ce)

    def _compare(self, student: Tensor, teacher: Tensor, space: str) -> Tensor:
        """Divergence of logits [B*M,·]: in the joint space where both have it, else on the class marginals."""
        tau, scaled, classes = self.spec.tau_kd, self.spec.tau2, self.setting.classes
        if space == "joint" and self.same_space:
            return divergence(student, teacher, tau, scaled=scaled)
        s, t = _marginal(student / tau, classes), _marginal(teacher / tau, classes)
        if not self.same_space:  # one teacher distribution per image: the mean over its own views
            m = views(self.spec.teacher_transform or self.spec.transform)
            t = (t.unflatten(0, (-1, m)).logsumexp(1) - math.log(m)).repeat_interleave(self.m, 0)
        loss = divergence(s, t, 1.0)
        return loss * tau**2 if scaled else loss

    def _hierarchical(self, student: Features, teacher: Features) -> list[Tensor]:
        """One divergence per distilled stage (Eq. 4)."""
        if self.spec.kd1_target == "head_logits":
            return [self._compare(s, t, "joint") for s, t in zip(student.heads, teacher.heads, strict=True)]
        losses = []
        taps = zip(self.taps, self.teacher_taps, self.blocks, self.connectors, strict=True)
        for tap, teacher_tap, block, connector in taps:
            t = self.pool_teacher(exact(teacher.maps[teacher_tap]))
            s = connector(block(exact(student.maps[tap])))
            if s.shape[2:] != t.shape[2:]:
                s = nn.functional.interpolate(s, t.shape[2:], mode="nearest")
            s, t = _rows(s, self.spec.kd1_target), _rows(t, self.spec.kd1_target)
            losses.append(divergence(s, t, self.spec.tau_kd, scaled=self.spec.tau2))
        return losses


def _check_sizes(heads: nn.ModuleList, blocks: nn.ModuleList, shapes: list[tuple[int, int, int]], name: str) -> None:
    """Refuse heads that cannot read the rescaled maps: networks that mix a fixed number of patches."""
    for head, block, shape in zip(heads, blocks, shapes, strict=True):
        training = head.training
        try:
            with torch.no_grad():
                head.eval()(block(torch.zeros(1, *shape)))
        except RuntimeError:
            raise IncompatibleError(
                f"the auxiliary heads of {name} read maps of one size only",
                field="--student",
                hint="use --set method.rescale=pool_teacher or method.rescale=none",
            ) from None
        head.train(training)


def _connector(student: int, teacher: int) -> nn.Module:
    """1x1 convolution and BatchNorm to the teacher's width where the widths differ."""
    if student == teacher:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(student, teacher, 1, bias=False), BatchNorm2d(teacher))


def _marginal(joint: Tensor, classes: int) -> Tensor:
    """log p(y) [B,K] from joint logits [B,K*M] (or [B,K]): log-softmax over the joint space, summed over the views."""
    log_p = torch.log_softmax(exact(joint), 1)
    return torch.logsumexp(log_p.unflatten(1, (classes, -1)), 2)


def _rows(x: Tensor, target: str) -> Tensor:
    """[B,C,H,W] as rows to be softened: per channel over H*W, per position over C, or per image over all."""
    if target == "spatial":
        return x.flatten(2).flatten(0, 1)
    if target == "channel":
        return x.permute(0, 2, 3, 1).flatten(0, 2)
    return x.flatten(1)

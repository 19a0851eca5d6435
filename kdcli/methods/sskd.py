"""SSKD: the teacher's similarities between rotated and upright images, learned by the student beside its logits.

Both networks see four copies of each image, turned by 0, 90, 180 and 270 degrees. A small projection of the teacher's
pooled vector is trained first, on the frozen teacher, to find the upright copy of each turned one among all images of the
batch (`kd pretrain-teacher --method sskd`); the student has a projection of its own, trained with it.

Equation: L = 0.1 · CE(s, y) + 0.9 · KD_4(s, t) + 2.7 · KD_4(s', t') + 10 · KD_0.5(S, T), where s, t are the logits of upright
    images, s', t' those of turned ones, S, T [3B,B] the cosine similarities of the projections of turned and upright images,
    and KD_τ(s, t) = τ² · KL(t ‖ s) at temperature τ.
Teacher: L = CE(T, own upright image) without a temperature, on the projection of a finished network, for a quarter of the
    recipe's epochs.
Reductions: CE and the first KD are means over the B upright images; the other two are means over the selected of the 3B
    turned ones: all rows where the teacher is right (class for s', t'; own image for S, T) and the given ratio of the
    others (1.0; 0.75), those with the best rank of what is right first. Ranks and similarities are over the whole batch.
Source: Xu et al. 2020, arXiv 2006.07114, Section 3, Equation 8; losses, selection and gradients equal to the released code's.
Tensors: logits and pooled vectors of both networks.
Cost: four passes of the teacher and four of the student per image; projections of 2·(C² + C) parameters (wrn40_2 and
    wrn16_2: 33,024 each); similarities of 3B x B.
Our reading: the released code turns the image and then crops each copy on its own; we crop anew and then turn, which has
    the same distribution because the padding is even on all sides (`crops=shared`: one crop for all). A wrong row whose
    rank ties with the last one kept is taken in the order of the batch, where the released code sorts unstably; equal
    scores count for what is right. What SSKD in the framework of VSD means is not said there; we take it as
    `teacher_scale=2` with SSKD's own rotations and labels.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.errors import IncompatibleError, UsageError
from kdcli.gather import gathered
from kdcli.losses import cross_entropy, divergence, exact
from kdcli.methods.base import Method, MethodSpec, Progress, Setting
from kdcli.methods.pairing import backbone, require_same_outputs
from kdcli.models.features import Features
from kdcli.models.heads import Headed, Projection, build_projection
from kdcli.models.network import Network
from kdcli.models.panel import Panel
from kdcli.specs import TrainSpec
from kdcli.transforms import rescale

VIEWS = 4
"""Copies of each image, the upright one first."""


class SSKDSpec(MethodSpec):
    """Settings of SSKD."""

    name: str = "sskd"
    """The method's name."""
    ce_weight: float = Field(default=0.1, ge=0)
    """Weight λ1 of the cross-entropy of the upright images."""
    kd_weight: float = Field(default=0.9, ge=0)
    """Weight λ2 of the divergence of the upright images."""
    tf_weight: float = Field(default=2.7, ge=0)
    """Weight of the divergence of the turned images, λ4 in the paper's Eq. 8. With ss_weight (tf, ss) = (2.7, 10) in the
    released code, which is the default; arXiv prints (10, 2.7), the supplement of the ECCV version (5, 3)."""
    ss_weight: float = Field(default=10.0, ge=0)
    """Weight of the divergence of the similarities, λ3 in the paper's Eq. 8; see tf_weight."""
    kd_temperature: float = Field(default=4.0, gt=0, le=1000)
    """Temperature of the upright images' logits."""
    tf_temperature: float = Field(default=4.0, gt=0, le=1000)
    """Temperature of the turned images' logits."""
    ss_temperature: float = Field(default=0.5, gt=0, le=1000)
    """Temperature of the similarities."""
    tf_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the turned images that the teacher misclassifies from which the student learns nevertheless."""
    ss_ratio: float = Field(default=0.75, ge=0, le=1)
    """Share of the turned images whose upright copy the teacher does not find from which the student learns."""
    crops: Literal["independent", "shared"] = "independent"
    """independent: another random crop for each copy (released code); shared: one crop, turned."""
    head_epochs: int | None = Field(default=None, ge=1)
    """Epochs of the teacher's projection; default: a quarter of the recipe's (released code: 60 of 240)."""


class SSKD(Method):
    """L = ce_weight · l1 + kd_weight · l2 + tf_weight · l3 + ss_weight · l4, as in the module's first lines."""

    Spec: ClassVar[type[MethodSpec]] = SSKDSpec
    mixes: ClassVar[bool] = False

    def __init__(
        self, spec: SSKDSpec, setting: Setting, student: Network | None, teacher: Network | Headed | Panel | None
    ) -> None:
        super().__init__(spec, setting, student, teacher)
        if student is None or teacher is None:
            return
        main = backbone(teacher)
        require_same_outputs(student, teacher)
        if spec.ss_weight == 0:
            return
        if not _projects(teacher):
            raise IncompatibleError(
                "the teacher has no projection of its pooled vector, whose similarities SSKD compares",
                field="--teacher",
                hint=f"make one: kd pretrain-teacher --method sskd --teacher {main.arch} (or a checkpoint)",
            )
        self.projection: nn.Module = Projection(student.pooled_dim)

    @classmethod
    def check(cls, spec: Any) -> None:
        """Raise `UsageError` where nothing would train the student's logits."""
        if spec.ce_weight == spec.kd_weight == spec.tf_weight == 0:
            raise UsageError(
                "ce_weight, kd_weight and tf_weight are all 0, so nothing trains the logits that are evaluated",
                field="method.ce_weight",
                hint="give one of them a weight",
            )

    @classmethod
    def for_pair(cls, given: dict[str, Any], teacher: str, student: str, dataset: str) -> dict[str, Any]:
        """ImageNet's weight of the cross-entropy and epochs of the projection (torchdistill's; the authors give none)."""
        return {"ce_weight": 1.0, "head_epochs": 30} if dataset == "imagenet" else {}

    @classmethod
    def augmentations(cls, spec: SSKDSpec) -> tuple[Literal["crop", "strong"], ...]:
        """A further crop for each turned copy, unless one is shared."""
        return ("crop",) * (VIEWS - 1) if spec.crops == "independent" else ()

    @classmethod
    def teacher_heads(cls, spec: SSKDSpec, network: Network, classes: int) -> nn.ModuleList:
        """A projection of the pooled vector."""
        return build_projection(network)

    @classmethod
    def teacher_settings(cls, spec: SSKDSpec) -> dict[str, Any]:
        """SSKD itself; what concerns only the student is left at its default."""
        return {"name": "sskd", "crops": spec.crops, "head_epochs": spec.head_epochs, **cls.scale_settings(spec)}

    @classmethod
    def teacher_backbone(cls, spec: SSKDSpec) -> dict[str, Any]:
        """An ordinary classifier, at the scale at which it will teach."""
        return {"name": "none", **cls.scale_settings(spec)}

    @classmethod
    def teacher_recipe(cls, spec: SSKDSpec, recipe: TrainSpec) -> TrainSpec:
        """A quarter of the epochs (or head_epochs), the rate falling after half and three quarters of them."""
        epochs = spec.head_epochs or max(1, recipe.epochs // 4)
        return recipe.model_copy(update={"epochs": epochs, "schedule": "step", "milestones": (0.5, 0.75)})

    def student_views(self, batch: Batch, progress: Progress) -> Tensor:
        """[4B,C,H,W], interleaved: row 4b+k is image b turned by k times 90 degrees."""
        copies = (batch.images, *batch.extra) if self.spec.crops == "independent" else (batch.images,) * VIEWS
        turned = [torch.rot90(x, k, (2, 3)) for k, x in zip(range(VIEWS), copies, strict=True)]
        rows = torch.stack(turned, 1).flatten(0, 1)
        channels_last = batch.images.is_contiguous(memory_format=torch.channels_last)
        return rows.contiguous(memory_format=torch.channels_last) if channels_last else rows

    def teacher_views(self, batch: Batch, progress: Progress) -> Tensor:
        """The student's views, enlarged: [4B,C,sH,sW]."""
        return rescale(self.student_views(batch, progress), self.spec.teacher_scale, self.spec.scale_mode)

    def teacher_features(self, teacher: Network | Headed | Panel, views: Tensor) -> Features:
        """The teacher's pass with its projection, where that is read."""
        if self.spec.ss_weight and _projects(teacher):
            return teacher.features(views)
        return super().teacher_features(teacher, views)

    def loss(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> dict[str, Tensor]:
        """{"ce", "kd", "tf", "ss"}, the last two where they have a weight."""
        assert teacher is not None
        spec = self.spec
        s, t = exact(student.logits), exact(teacher.logits).detach()
        ce = cross_entropy(s[::VIEWS], batch.labels, self.setting.label_smoothing)
        terms = {
            "ce": spec.ce_weight * ce,
            "kd": spec.kd_weight * divergence(s[::VIEWS], t[::VIEWS], spec.kd_temperature),
        }
        if spec.tf_weight:
            s, t = (gathered(_turned(x), batch) for x in (s, t))
            classes = gathered(batch.labels, batch).repeat_interleave(VIEWS - 1)
            keep = selected(t, classes, spec.tf_ratio)
            terms["tf"] = spec.tf_weight * _divergence_of(keep, s, t, spec.tf_temperature)
        if spec.ss_weight:
            s = self._similarities(self.projection(exact(student.pooled)), batch)
            t = self._similarities(teacher.heads[0].detach(), batch)
            keep = selected(t, _own(t), spec.ss_ratio)
            terms["ss"] = spec.ss_weight * _divergence_of(keep, s, t, spec.ss_temperature)
        return terms

    def teacher_loss(self, batch: Batch, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"ss"}: the similarities [3B,B] of the teacher's projection as logits, each row's own upright image right."""
        similarities = self._similarities(teacher.heads[0], batch)
        return {"ss": cross_entropy(similarities, _own(similarities))}

    def _similarities(self, projected: Tensor, batch: Batch) -> Tensor:
        """Cosine similarities [3B,B] of turned with upright images, of all ranks, from this rank's projections [4b,C]."""
        unit = gathered(F.normalize(exact(projected), dim=1), batch)
        return _turned(unit) @ unit[::VIEWS].T


def selected(teacher: Tensor, right: Tensor, ratio: float) -> Tensor:
    """Which rows the student learns from: all where the teacher is right, and the best of the others.

    The rank of a row is how many entries the teacher puts before the right one. With w rows of a rank above 0, the
    int(ratio·w) best of them are kept.

    Args:
        teacher: scores [N,K].
        right: int64 [N], the right entry of each row.
        ratio: share of the wrong rows to keep.

    Returns:
        bool [N].
    """
    rank = (teacher > teacher.gather(1, right[:, None])).sum(1)
    wrong = (rank > 0).sum()
    kept = len(rank) - wrong + (wrong.double() * ratio).long()
    order = rank.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return place < kept


def _divergence_of(keep: Tensor, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student) of rows [N,K], mean over those that `keep` [N] marks; 0 if there are none."""
    target = F.log_softmax(teacher / temperature, 1)
    rows = F.kl_div(F.log_softmax(student / temperature, 1), target, reduction="none", log_target=True).sum(1)
    return temperature**2 * (rows * keep).sum() / keep.sum().clamp(min=1)


def _turned(rows: Tensor) -> Tensor:
    """[4B,...] → [3B,...], without the upright images' rows."""
    return rows.unflatten(0, (-1, VIEWS))[:, 1:].flatten(0, 1)


def _own(similarities: Tensor) -> Tensor:
    """int64 [3B]: the column of each row's own upright image."""
    return torch.arange(similarities.shape[1], device=similarities.device).repeat_interleave(VIEWS - 1)


def _projects(teacher: Network | Headed | Panel) -> bool:
    return isinstance(teacher, Headed) and teacher.projects

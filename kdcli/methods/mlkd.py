"""MLKD: softened logits aligned at three levels (instance, batch, class) and five temperatures, on two views of each image.

Both networks see every image twice: the ordinary augmentation (weak) and RandAugment with a cut-out (strong). Where the
teacher is confident of an image or a class, the weak view's terms are masked out.

Equation: L = a · (CE(s, y) + CE(s⁺, y)) + b · (KD + CC + BC), s the logits of the weak and s⁺ of the strong view;
    Θ = {T, 3, 5, 2, 6};
    KD = ρ_i · Σ_Θ KD_θ(s, t) + Σ_{T,3,5} KD_θ(s⁺, t⁺) + Σ_{2,6} KD_θ(s, t), KD_θ = θ² · KL(softmax(t/θ) ‖ softmax(s/θ));
    CC = ρ_c · Σ_Θ ‖PᵗᵀPᵗ - PˢᵀPˢ‖² / K, BC = ρ_i · Σ_Θ ‖PᵗPᵗᵀ - PˢPˢᵀ‖² / B, P = softmax(·/θ) [B,K], no θ²;
    ρ_i, ρ_c: the shares of images and classes whose confidence (the teacher's largest probability; the class's summed
    probability) is at most the median, both at temperature 1 on the weak view.
Reductions: CE and KL are means over the batch; medians, CC and BC are taken over the batch of all ranks.
Source: Jin, Wang & Lin 2023 (CVPR); losses equal to those of the released code with a = 0.1, b = 0.9, T = 4.
Tensors: the logits of both networks for both views and the labels.
Cost: two views, so twice the forward passes of both networks; no extra parameters; memory B² + K² for the Gram matrices.
Our reading: the released code multiplies the masks with losses that are averaged already, so they are factors of about one
    half (`masks=scalar`; `per_sample` masks images and classes); it compares the weak view in two of the five terms of the
    strong one (`strong_terms=released`; `paper` does not), and computes class and batch terms of the strong view without
    using them, which we do not. Both views pass through the student together, so BatchNorm sees them as one batch; the
    released code passes them one after the other. Published runs use a base rate of 0.025 and up to 960 epochs (recipe).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.gather import gathered
from kdcli.losses import cross_entropy, exact
from kdcli.methods.base import MethodSpec, Progress
from kdcli.methods.logits import LogitMethod, LogitSpec
from kdcli.models.features import Features
from kdcli.transforms import rescale

FURTHER = (3.0, 5.0, 2.0, 6.0)  # the temperatures beside T
SWAPPED = 2  # at how many of the last temperatures the released code compares the weak view in place of the strong one


class MLKDSpec(LogitSpec):
    """Settings of MLKD."""

    name: str = "mlkd"
    """The method's name."""
    ce_weight: float = Field(default=0.1, ge=0)
    """Weight a of the cross-entropies to the labels, one for each view."""
    kd_weight: float = Field(default=0.9, ge=0)
    """Weight b of the terms of all three levels."""
    temperature: float = Field(default=4.0, gt=0, le=1000)
    """T, the first of the five temperatures; the others are 3, 5, 2 and 6."""
    masks: Literal["scalar", "per_sample"] = "scalar"
    """How confident images and classes are masked out: scalar multiplies each loss by the share that is kept (the released
    code, which made the published numbers); per_sample leaves the others out of the sums."""
    strong_terms: Literal["released", "paper"] = "released"
    """Which view the unmasked terms at temperatures 2 and 6 compare: the weak one (the released code, which made the
    published numbers) or, as at the other three, the strong one (the paper)."""


class MLKD(LogitMethod):
    """L = ce_weight · (CE weak + CE strong) + kd_weight · (instance + class + batch level) over five temperatures."""

    Spec: ClassVar[type[MethodSpec]] = MLKDSpec

    @classmethod
    def augmentations(cls, spec: Any) -> tuple[Literal["crop", "strong"], ...]:
        """A strongly augmented copy of each image."""
        return ("strong",)

    def student_views(self, batch: Batch, progress: Progress) -> Tensor:
        """Weak and strong view of each image, interleaved: [2B,C,H,W], row 2b weak, row 2b+1 strong."""
        weak = batch.images
        channels_last = weak.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return torch.stack([weak, batch.extra[0]], 1).flatten(0, 1).contiguous(memory_format=layout)

    def teacher_views(self, batch: Batch, progress: Progress) -> Tensor:
        """The same views, enlarged by the teacher's scale s: [2B,C,sH,sW]."""
        return rescale(self.student_views(batch, progress), self.spec.teacher_scale, self.spec.scale_mode)

    def supervised(self, batch: Batch, student: Features) -> Tensor:
        """The sum of both views' cross-entropies, each a mean over B."""
        smoothing = self.setting.label_smoothing
        weak, strong = (cross_entropy(view, batch.targets, smoothing) for view in views(student.logits))
        return weak + strong

    def distil(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"kd", "cc", "bc"} from the logits [2B,K] of both networks: the instance, class and batch level."""
        weak, strong = views(gathered(exact(student.logits), batch))
        taught, taught_strong = views(gathered(exact(teacher.logits.detach()), batch))
        confidence = taught.softmax(1)
        images, classes = unsure(confidence.amax(1)), unsure(confidence.sum(0))
        instance = self.prepare(weak), self.prepare(taught)
        temperatures = (self.spec.temperature, *FURTHER)
        swapped = SWAPPED if self.spec.strong_terms == "released" else 0
        unmasked = [(self.prepare(strong), self.prepare(taught_strong))] * (5 - swapped) + [instance] * swapped
        kd, cc, bc = [], [], []
        for theta, pair in zip(temperatures, unmasked, strict=True):
            kd += [self.masked(instance_level(*instance, theta), images), instance_level(*pair, theta).sum()]
            cc += [self.masked(class_level(weak, taught, theta), classes)]
            bc += [self.masked(batch_level(weak, taught, theta), images)]
        levels = {"kd": kd, "cc": cc, "bc": bc}
        return {name: self.spec.kd_weight * torch.stack(terms).sum() for name, terms in levels.items()}

    def masked(self, parts: Tensor, keep: Tensor) -> Tensor:
        """The sum of `parts` [N] under the mask `keep` (bool [N]), as the setting `masks` says."""
        mask = keep.to(parts)
        return parts.sum() * mask.mean() if self.spec.masks == "scalar" else (parts * mask).sum()


def views(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Interleaved logits [2B,K] → those of the weak and of the strong views, [B,K] each."""
    return logits[0::2], logits[1::2]


def unsure(confidence: Tensor) -> Tensor:
    """Bool [N]: where `confidence` [N] is at most its median (the mean of the middle two for an even N)."""
    return confidence <= torch.quantile(confidence, 0.5)


def instance_level(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Each image's share [B] of θ² · KL(teacher ‖ student), whose sum is the mean over the batch; from logits [B,K]."""
    s, t = F.log_softmax(student / temperature, 1), F.log_softmax(teacher / temperature, 1)
    rows = F.kl_div(s, t, reduction="none", log_target=True).sum(1)
    return rows * temperature**2 / student.shape[0]


def class_level(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Each class's share [K] of ‖PᵗᵀPᵗ - PˢᵀPˢ‖² / K, P = softmax(logits/θ) [B,K]."""
    s, t = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    return (t.T @ t - s.T @ s).square().sum(0) / s.shape[1]


def batch_level(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Each image's share [B] of ‖PᵗPᵗᵀ - PˢPˢᵀ‖² / B, P = softmax(logits/θ) [B,K]."""
    s, t = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    return (t @ t.T - s @ s.T).square().sum(0) / s.shape[0]

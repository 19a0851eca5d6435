"""ReKD (our reading): the teacher's maps become regions, Gaussians from which the student chooses its targets.

This is our reading. Of the paper only the abstract is public: the teacher's features are turned into latent variables
by variational inference with a Gaussian posterior, so that the target is a region and not a point; the student chooses
suitable targets from it; and the student's features are a prior that regularises the posterior in return. All that
makes this a method is our design, and none of the paper's accuracies are ours to expect. Where the abstract leaves a
choice, it is a setting.

A posterior alone relaxes nothing: the expected gradient to a random sample is that to the mean. What does is to choose
among samples, and only where few values are at stake, which is why groups of channels choose for themselves at every
location (`scope`); or a loss that knows the deviation (`match=nll`, `match=hinge`).

Equation: L = CE(s, y) + mean_l [ λ_f · min(1, epoch/20) · L_feat + λ_e · (L_rec + β · L_kl) ], λ_f = 5, λ_e = 1, β =
    0.1. For each stage l: F is the teacher's map, normalised without affine; q(z | F) = N(μ, σ²), element by element,
    with r = ReLU(BN(conv1x1(F))), μ = F + conv1x1(r), ln σ² = conv1x1(r), kept between -6 and 2, both last
    convolutions starting at weight 0, biases 0 and -2; z_m = μ + σ · ε_m, m = 1..8; h = BN(conv1x1(map of the
    student)). L_rec = ½ mean (conv1x1(z_m) - F)², the convolution starting as the identity; L_kl = KL(q ‖ N(h, 1)) = ½
    mean (σ² + (μ - h)² - 1 - ln σ²); L_feat = mean Σ_m w_m · d_m, with d_m the mean of (h - z_m)² over the 8 channels
    of a group at a location, and w_m = softmax_m(-d_m / 0.1), a constant
Reductions: CE is a mean over the batch; the three others are means over batch, channels, locations and samples, and
    over the stages.
Source: "Relaxed Knowledge Distillation", International Journal of Computer Vision 134(3), article 101, 2026: the
    abstract; no code. λ_f and its
    warm-up are those of ReviewKD and FCFD on CIFAR-100, for want of better.
Tensors: the maps of all stages of both networks before their closing ReLU, where they have one; of token networks
    their patches. The larger map is averaged down to the smaller. With `likelihood=task` also the teacher's remaining
    layers.
Cost: one teacher forward; with D = C_t latent channels, 4·D² + C_s·D + 7·D parameters per stage (wrn40_2 → wrn16_2:
    109,088) and 8 samples of every map, with gradients. A step of that pair with 64 images took 3 to 5 times as long
    as KD's on two CPU cores, with `samples=1` 1.4 times.
Our reading: everything but the abstract. L_feat moves student and connector alone, L_rec encoder and decoder, L_kl the
    encoder (`prior_gradient=both`: the student too; the abstract does not settle it). Decoder and deviation have no
    weight decay, which would be a prior of its own. Where one network has more stages, its shallowest are left out.
    The log of an epoch follows the deviation sigma, how far μ is from teacher (`shift`) and student (`distance`), the
    three losses and the effective number of samples; a region that has become a point, or a copy of the student, is
    reported.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.errors import IncompatibleError, UsageError
from kdcli.losses import cross_entropy, divergence
from kdcli.methods.base import Method, MethodSpec, Outcome, Progress, Setting
from kdcli.methods.feature import FeatureSpec, aligned
from kdcli.methods.pairing import backbone, network_of, require_same_outputs
from kdcli.methods.preactivation import preactivated
from kdcli.methods.region import Comparison, Regions, RegionSpec, Rest, complaint
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network, dry_run, stage_shapes
from kdcli.models.panel import Panel


class ReKDSpec(RegionSpec, FeatureSpec):
    """Settings of ReKD (our reading)."""

    name: str = "rekd"
    """The method's name."""
    weight: float = Field(default=5.0, ge=0)
    """Weight λ_f of the student's match with the regions, mean over the stages."""
    warmup: int = Field(default=20, ge=0)
    """Epochs over which that weight grows linearly, the first counting as 1; 0: none. 20 of the literature's 240."""
    encoder_weight: float = Field(default=1.0, ge=0)
    """Weight λ_e of what trains the posterior: likelihood and divergence, mean over the stages."""
    beta: float = Field(default=0.1, ge=0)
    """Weight β of the divergence from the prior against the likelihood: the region's size and its pull to the student."""
    warm_start: int = Field(default=0, ge=0)
    """Epochs at first in which the posterior is trained by its likelihood alone, and the student by the labels; the
    `warmup` comes after them."""
    stages: Literal["all", "last"] = "all"
    """Which stages have a region."""
    likelihood: Literal["recon", "task"] = "recon"
    """What keeps samples true to the teacher: that its map can be decoded from them, or that its remaining layers, frozen,
    still tell the class from the decoded map (of one sample, for its cost)."""


class ReKD(Method):
    """L = ce_weight · CE(s, y) [+ kd_weight · KD_T] + the means over the stages of the losses of `Region`.

    Raises:
        IncompatibleError: the networks share no stages or have different numbers of outputs; or, with likelihood=task, the
            teacher's remaining layers cannot be fed with a map alone.
    """

    Spec: ClassVar[type[MethodSpec]] = ReKDSpec

    def __init__(
        self, spec: ReKDSpec, setting: Setting, student: Network | None, teacher: Network | Headed | Panel | None
    ) -> None:
        super().__init__(spec, setting, student, teacher)
        self.regions = Regions(spec, [])
        if student is None or teacher is None:
            return
        require_same_outputs(student, teacher)
        network = backbone(teacher)
        pairs = self._pairs(student.n_stages, network.n_stages)
        if not pairs:
            raise IncompatibleError(f"{student.arch} and {network.arch} share no stages")
        s_shapes = stage_shapes(student, setting.image_size)
        t_shapes = stage_shapes(network, setting.teacher_size)
        if spec.likelihood == "task":
            _require_remaining(network, [j for _, j in pairs], setting.teacher_size)
        self.regions = Regions(spec, [(s_shapes[i][0], t_shapes[j][0]) for i, j in pairs])

    @classmethod
    def check(cls, spec: ReKDSpec) -> None:
        """Refuse a point that would need a deviation, and mutual gradients without the student's prior."""
        if spec.target == "point" and spec.match in ("nll", "hinge"):
            raise UsageError(
                f"a point has no deviation, which match={spec.match} divides by",
                field="method.match",
                hint="leave it out, or use --set method.target=region",
            )
        if spec.prior_gradient == "both" and spec.prior != "student":
            raise UsageError(
                f"with prior={spec.prior} the student has no part in the prior",
                field="method.prior_gradient",
                hint="leave it out, or use --set method.prior=student",
            )

    def student_features(self, student: Network, views: Tensor) -> Features:
        """One pass of the student, its stages before their closing ReLU."""
        return preactivated(student.features(views))

    def teacher_features(self, teacher: Network | Headed | Panel, views: Tensor) -> Features:
        """One pass of the teacher, its stages before their closing ReLU."""
        return preactivated(backbone(teacher).features(views))

    def loss(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> dict[str, Tensor]:
        """The terms of `outcome`."""
        return self.outcome(batch, student, teacher, progress).terms

    def outcome(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> Outcome:
        """{"ce", "kd" where it has a weight, "feature", "likelihood", "kl" where there is a prior}, and what is followed."""
        assert teacher is not None
        spec = self.spec
        pairs = self._pairs(len(student.stages), len(teacher.stages))
        found = self.regions(
            [student.stages[i - 1] for i, _ in pairs],
            [teacher.stages[j - 1] for _, j in pairs],
            [_rest(batch, teacher, j) for _, j in pairs] if spec.likelihood == "task" else None,
        )
        feature = torch.stack([one.feature for one in found]).mean()
        likelihood = torch.stack([one.likelihood for one in found]).mean()
        begun = ((progress.epoch - spec.warm_start) / max(spec.warmup, 1)).clamp(0, 1)
        terms = {"ce": spec.ce_weight * cross_entropy(student.logits, batch.targets, self.setting.label_smoothing)}
        if spec.kd_weight:
            terms["kd"] = spec.kd_weight * divergence(student.logits, teacher.logits, spec.temperature)
        terms["feature"] = spec.weight * begun * feature
        terms["likelihood"] = spec.encoder_weight * likelihood
        followed = {"feature": feature, "likelihood": likelihood}
        divergences = [one.divergence for one in found if one.divergence is not None]
        if divergences:
            kl = torch.stack(divergences).mean()
            terms["kl"] = spec.encoder_weight * spec.beta * (progress.epoch > spec.warm_start) * kl
            followed["kl"] = kl
        return Outcome(terms, {k: v.detach() for k, v in followed.items()} | _followed(found, [i for i, _ in pairs]))

    def alarms(self, followed: dict[str, float]) -> list[str]:
        """A sentence for each stage whose region is none any more."""
        found = []
        for name, sigma in followed.items():
            stage = name.removeprefix("sigma_stage")
            if stage == name:
                continue
            problem = complaint(self.spec, sigma, followed[f"distance_stage{stage}"])
            if problem is not None:
                found.append(f"the region of the student's stage {stage} {problem}")
        return found

    def undecayed(self) -> tuple[nn.Parameter, ...]:
        """Decoders and where the deviations start."""
        return self.regions.undecayed()

    def _pairs(self, student: int, teacher: int) -> list[tuple[int, int]]:
        """The stages of student and teacher that belong together, given how many each has."""
        pairs = aligned(range(1, student + 1), range(1, teacher + 1), "last")
        return pairs[-1:] if self.spec.stages == "last" else pairs


def _followed(found: list[Comparison], stages: list[int]) -> dict[str, Tensor]:
    """Means over the stages; the deviation and the distance of each stage too, by the student's number."""
    values = {name: torch.stack([one.followed[name] for one in found]).mean() for name in found[0].followed}
    for stage, one in zip(stages, found, strict=True):
        values |= {f"{name}_stage{stage}": one.followed[name] for name in ("sigma", "distance") if name in one.followed}
    return values


def _rest(batch: Batch, teacher: Features, j: int) -> Rest:
    """The loss of the teacher's layers behind stage j, given a map of that stage before its closing ReLU."""
    return partial(_task_loss, network_of(teacher), j, teacher.stages[j - 1].shape[2:], batch.targets)


def _task_loss(network: Network, j: int, grid: torch.Size, targets: Tensor, decoded: Tensor) -> Tensor:
    # On a map that was averaged down for the student, each value stands for those it is the mean of.
    if decoded.shape[2:] != grid:
        decoded = nn.functional.interpolate(decoded, list(grid), mode="nearest")
    return cross_entropy(remaining(network, j, decoded), targets)


def remaining(network: Network, j: int, preact: Tensor) -> Tensor:
    """[B,C,H,W], stage j before its closing ReLU, through the layers behind it → logits [B,K]."""
    x = network.close(j, network.raw_of(j, preact))
    for stage in range(j + 1, network.n_stages + 1):
        x = network.stage(stage, x)
    return network.tail(x)[1]


class _Native(nn.Module):
    """Whether each stage's tensor is the same size after a detour through its map."""

    def __init__(self, network: Network, stages: list[int]) -> None:
        super().__init__()
        self.network, self.stages = network, stages

    def detours(self, images: Tensor) -> bool:
        network, same = self.network, []
        x = network.stem(images)
        for i in range(1, network.n_stages + 1):
            raw = network.raw_stage(i, x)
            same.append(i not in self.stages or network.raw_of(i, network.preact(i, raw)).shape == raw.shape)
            x = network.close(i, raw)
        return all(same)


def _require_remaining(network: Network, stages: list[int], size: int) -> None:
    """Refuse a teacher whose stages cannot be called one by one, or pass on more than their maps."""
    try:
        whole = dry_run(_Native(network, stages), "detours", size)
    except IncompatibleError:  # it says so in words of its own, which are about heads
        whole = False
    if not whole:
        raise IncompatibleError(
            f"the layers of {network.arch} behind a stage cannot be fed with its map alone",
            field="method.likelihood",
            hint="use method.likelihood=recon, or a teacher without class tokens that can be cut into stages",
        )

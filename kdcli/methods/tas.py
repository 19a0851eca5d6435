"""TAS: a hybrid assistant, spliced from stages of student and teacher, bridges any two networks (CNN, ViT, MLP).

The assistant is the front stages of one network, a bridge from local to global features, and the last stage of the other.
Only the bridge is new, and it is gone at inference. Three pairs are compared, teacher and student, teacher and assistant,
assistant and student: their spatially smoothed features by InfoNCE with a learned temperature, their logits by OFA's loss.
Each epoch records the assistant's accuracy on the training images (`followed`) and wherever the student is measured
(`companions`); it should lie between the teacher's and the student's.

Equation: L = w · CE(s, y) + Σ_{i→j} [a · NCE(f_i, f_j) + b · O(p_i, p_j)] over t→s, t→f, f→s, with the assistant f,
    NCE(f_i, f_j) = -ln [exp(e^τ ⟨z_j, z_i⟩) / Σ_b' exp(e^τ ⟨z_j, z_i,b'⟩)], z = W f / ‖W f‖₂, and
    O(p_i, p_j) = -Σ_c ((p_i,c + 1[c = y])^γ - 1[c = y]) · ln p_j,c
Reductions: CE, NCE and O are means over the batch; negatives are the batch of all ranks; O is summed over the classes; the
    pairs are summed.
Source: "TAS", whose abstract alone is public; it was renamed "Fuse Before Transfer: Knowledge Fusion for Heterogeneous
    Distillation" (arXiv 2410.12342v2), known to us from its abstract and from third-party notes: the assistant, its
    direction, the three unweighted pairs, pooled features, InfoNCE with a learned temperature, OFA's loss. O equals the
    released code of OFA (arXiv 2310.19444).
Tensors: the front network's map before its last stage; last features (pooled, or the last map) and logits of all three.
Cost: one teacher forward; forward and backward of the bridge and of the back network's last stage. wrn40_2 → wrn16_2: 0.05
    million parameters in the bridge; a ViT-S teaching ResNet-18 at 224 pixels: 1.9 million.
Our reading: whatever the notes leave open. The student alone has a cross-entropy to the labels (`assistant_ce`); targets are
    constants, also the assistant's (`detach_fused`), while its gradient does reach the student's front stages
    (`share_front`); W maps to the teacher's width where the width differs, one for all features of a width; the mean of the
    patch tokens stands for a network with a class token (`vit_pool`). A copy of that token is put before the bridge's
    patches, plus a linear map of their mean (`class_token`): a last stage cannot gather an image into a token that knows
    nothing of it. Windows of 7, or 4, or the whole grid, D/32 heads; BatchNorm in a frozen stage keeps its statistics
    (`ghost_bn`); γ = 1. Two networks without a convolution are spliced like two with: the student in front. Networks of
    three stages lend two.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.errors import IncompatibleError, UsageError
from kdcli.losses import cross_entropy, divergence, exact
from kdcli.methods.adapted import adapted
from kdcli.methods.assistant import Assistant, Whole
from kdcli.methods.base import Method, MethodSpec, Outcome, Progress, Setting
from kdcli.methods.contrast import Contrast
from kdcli.methods.feature import shrink
from kdcli.methods.pairing import backbone, network_of, require_same_outputs
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.hooked import Hooked
from kdcli.models.network import Network, dry_run
from kdcli.models.panel import Panel

Pair = Literal["ts", "tf", "fs"]


class TASSpec(MethodSpec):
    """Settings of TAS."""

    name: str = "tas"
    """The method's name."""
    assistant: Literal["none", "conv", "conv+attention", "attention", "full"] = "full"
    """What stands between the networks: none; the front with the embedding of patches alone (conv); with the attention
    block behind it (conv+attention); with the back network's last stage instead (attention); with both (full)."""
    pairs: tuple[Pair, ...] = ("ts", "tf", "fs")
    """The pairs that are compared, the target's letter first: t the teacher, s the student, f the (fused) assistant. Those
    with f count only where there is an assistant."""
    feature_loss: Literal["infonce", "mse", "none"] = "infonce"
    """How features are compared."""
    feature_weight: float = Field(default=1.0, ge=0)
    """a, the weight of every comparison of features."""
    smoothing: Literal["gap", "none"] | Annotated[int, Field(ge=1)] = "gap"
    """Spatial smoothing of the features: their mean over all positions (gap), a number k for k x k means, or none: the
    learner's map is resized to the target's."""
    symmetric: bool = False
    """InfoNCE in both directions, half each; default: the learner looks for its target."""
    mask_same_class: bool = False
    """Leave images of the same class out of the negatives."""
    logit_loss: Literal["ofa", "kd", "none"] = "ofa"
    """How logits are compared: OFA's adapted cross-entropy, or Hinton's divergence."""
    logit_weight: float = Field(default=1.0, ge=0)
    """b, the weight of every comparison of logits."""
    gamma: float = Field(default=1.0, gt=0)
    """γ, the exponent that raises the target's confidence in the right class (OFA's ε)."""
    temperature: float = Field(default=4.0, gt=0, le=1000)
    """T of the divergence, for logit_loss=kd."""
    ce_weight: float = Field(default=1.0, ge=0)
    """w, the weight of the student's cross-entropy to the labels."""
    assistant_ce: float = Field(default=0.0, ge=0)
    """Weight of the assistant's cross-entropy to the labels."""
    vit_pool: Literal["avg", "cls"] = "avg"
    """The feature of a network with a class token: the mean of its patch tokens, or what its classifier reads."""
    class_token: Literal["pooled", "copy"] = "pooled"
    """What stands before the bridge's patches where the back network has a class token: a learned copy of it and, with
    pooled, a linear map of the patches' mean."""
    add_pos: bool = False
    """Add the back network's position embeddings to the bridge's patches."""
    ghost_bn: bool = False
    """Give BatchNorm layers of a frozen back network statistics of their own for the assistant's path; else it uses the
    teacher's."""
    detach_fused: bool = True
    """Hold the assistant constant where it teaches the student; off, that comparison moves the assistant too."""
    share_front: bool = True
    """Let the assistant's gradient reach the student's front stages; off, they are constants to it."""
    warmup: int = Field(default=0, ge=0)
    """Epochs over which a, and all that the assistant teaches the student, rise linearly to their weights."""


class TAS(Method):
    """L = ce_weight · CE + Σ over the pairs of feature_weight · NCE + logit_weight · O, means over B.

    Raises:
        IncompatibleError: the networks were made for different numbers of classes, or one of them has no callable stages.
    """

    Spec: ClassVar[type[MethodSpec]] = TASSpec

    def __init__(
        self, spec: TASSpec, setting: Setting, student: Network | None, teacher: Network | Headed | Panel | None
    ) -> None:
        super().__init__(spec, setting, student, teacher)
        self.features_compared = spec.feature_loss != "none" and spec.feature_weight > 0
        self.logits_compared = spec.logit_loss != "none" and spec.logit_weight > 0
        compared = self.features_compared or self.logits_compared
        self.pairs = tuple(p for p in spec.pairs if compared and (spec.assistant != "none" or p == "ts"))
        fused = any("f" in pair for pair in self.pairs) or (spec.assistant != "none" and spec.assistant_ce > 0)
        self.assistant: Assistant | None = None
        self.contrast: Contrast | None = None
        self.projections = nn.ModuleDict()
        if student is None or teacher is None:
            return
        main = backbone(teacher)
        require_same_outputs(student, main)
        if fused:
            self.assistant = self._assistant(student, main)
        if self.features_compared and self.pairs:
            if spec.feature_loss == "infonce":
                self.contrast = Contrast(symmetric=spec.symmetric, mask_same_class=spec.mask_same_class)
            self._add_projections(student, main)

    @classmethod
    def check(cls, spec: TASSpec) -> None:
        """A pair is named once, and without an assistant one is left."""
        if len(set(spec.pairs)) != len(spec.pairs):
            raise UsageError("a pair is named twice", field="method.pairs", hint="for example ts,tf")
        if spec.assistant == "none" and "ts" not in spec.pairs:
            raise UsageError(
                "without an assistant nothing is left to compare", field="method.pairs", hint="name ts, or an assistant"
            )

    def _assistant(self, student: Network, teacher: Network) -> Assistant:
        spec = self.spec
        for network in (student, teacher):
            if isinstance(network, Hooked):
                raise IncompatibleError(
                    f"{network.arch} is tapped by hooks and has no stages to splice",
                    field="--method",
                    hint="use a ResNet, ViT, Swin, ConvNeXt, Mixer or MobileNet, or --set method.assistant=none",
                )
        made = Assistant(
            student,
            teacher,
            self.setting.image_size,
            self.setting.teacher_size,
            kind=spec.assistant,
            summary=spec.class_token == "pooled",
            add_pos=spec.add_pos,
            ghost=spec.ghost_bn,
        )
        taught = "tf" in self.pairs or ("fs" in self.pairs and not spec.detach_fused) or spec.assistant_ce > 0
        return made.requires_grad_(taught)

    def _add_projections(self, student: Network, teacher: Network) -> None:
        """W for each width of a feature that differs from the teacher's."""
        widths = {"t": self._width(teacher, self.setting.teacher_size)}
        widths["s"] = self._width(student, self.setting.image_size)
        if self.assistant is not None:
            back, name = (student, "s") if self.assistant.teacher_first else (teacher, "t")
            widths["f"] = widths[name] if self.assistant.last_stage else back.pooled_dim
        for name in sorted({name for pair in self.pairs for name in pair} - {"t"}):
            if widths[name] != widths["t"]:
                self.projections[str(widths[name])] = nn.Conv2d(widths[name], widths["t"], 1)
        # What only makes targets is never taught.
        learners = {pair[1] for pair in self.pairs} | ({"f"} if not self.spec.detach_fused else set())
        learned = {str(widths[name]) for name in learners & widths.keys()}
        for width, projection in self.projections.items():
            projection.requires_grad_(width in learned)

    def _width(self, network: Network, size: int) -> int:
        """Channels of what `_grid` makes of a network's features."""
        if self.spec.smoothing == "gap":
            return network.pooled_dim
        made = dry_run(network, "features", size)
        assert isinstance(made, Features)
        if not made.maps:
            raise IncompatibleError(
                f"{network.arch} has no maps whose grid could be kept",
                field="method.smoothing",
                hint="use --set method.smoothing=gap",
            )
        return (made.maps[-1] if made.final is None else made.final).shape[1]

    def needs_batchnorm(self) -> bool:
        """If the assistant keeps statistics of its own for them."""
        return self.spec.ghost_bn

    def joint_features(self, student: Features, teacher: Features | None) -> Features:
        """The student's features and, as its `assistants`, those of the hybrid assistant."""
        if self.assistant is None:
            return student
        assert teacher is not None
        front, back = (teacher, student) if self.assistant.teacher_first else (student, teacher)
        x = front.maps[-2] if self.spec.share_front else front.maps[-2].detach()
        return replace(student, assistants=(self.assistant(x, network_of(back)),))

    def loss(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> dict[str, Tensor]:
        """The terms of `outcome`."""
        return self.outcome(batch, student, teacher, progress).terms

    def outcome(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> Outcome:
        """{"ce"}, {"ce_assistant"} where it has a weight, and {"feature_ts", "logit_ts"} and their like for each pair;
        followed: the assistant's top-1 on the training images in percent, and e^τ."""
        assert teacher is not None
        spec, smoothing = self.spec, self.setting.label_smoothing
        terms = {"ce": spec.ce_weight * cross_entropy(student.logits, batch.targets, smoothing)}
        followed: dict[str, Tensor] = {}
        networks = {"t": teacher, "s": student}
        if self.assistant is not None:
            (fused,) = student.assistants
            networks["f"] = fused
            hits = (fused.logits.argmax(1) == batch.labels).float().mean()
            followed["top1_assistant"] = 100 * hits
            if spec.assistant_ce:
                terms["ce_assistant"] = spec.assistant_ce * cross_entropy(fused.logits, batch.targets, smoothing)
        rise = (progress.epoch / spec.warmup).clamp(max=1) if spec.warmup else 1.0
        used = sorted({name for pair in self.pairs for name in pair})
        grids = {name: self._projected(networks[name]) for name in used} if self.features_compared else {}
        for pair in self.pairs:
            i, j = pair
            held = pair != "fs" or spec.detach_fused
            late = rise if pair == "fs" else 1.0
            if self.features_compared:
                weight = spec.feature_weight * rise
                terms[f"feature_{pair}"] = weight * self._compared(grids[j], _constant(grids[i], held), batch)
            if self.logits_compared:
                logits = self._adapted(networks[j].logits, networks[i].logits, batch, held=held)
                terms[f"logit_{pair}"] = spec.logit_weight * late * logits
        if self.contrast is not None:
            followed["scale"] = self.contrast.scale
        return Outcome(terms, followed)

    def _adapted(self, learner: Tensor, target: Tensor, batch: Batch, *, held: bool) -> Tensor:
        """The comparison of logits [B,K], mean over B."""
        if self.spec.logit_loss == "kd":
            return divergence(learner, target, self.spec.temperature, constant=held)
        return adapted(learner, _constant(target, held), batch.labels, self.spec.gamma)

    def _grid(self, features: Features) -> Tensor:
        """The feature as a map [B,C,h,w] in fp32 or better: 1 x 1 where it is the mean over all positions."""
        network, smoothing = network_of(features), self.spec.smoothing
        if smoothing == "gap" and not (features.final is None and network.pools_tokens and self.spec.vit_pool == "avg"):
            return exact(features.pooled)[:, :, None, None]
        last = network.normed(exact(features.maps[-1])) if features.final is None else exact(features.final)
        if smoothing == "none":
            return last
        k = 1 if smoothing == "gap" else smoothing
        return shrink(last, (k, k))

    def _projected(self, features: Features) -> Tensor:
        """The feature [B,D,h,w] at the teacher's width D."""
        grid = self._grid(features)
        name = str(grid.shape[1])
        return self.projections[name](grid) if name in self.projections else grid

    def _compared(self, learner: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """The comparison of features [B,D,h,w]: InfoNCE of the flattened maps, or the mean squared difference."""
        if learner.shape[2:] != target.shape[2:]:
            learner = F.interpolate(learner, target.shape[2:], mode="bilinear", align_corners=False)
        if self.contrast is None:
            return F.mse_loss(learner, target)
        return self.contrast(learner.flatten(1), target.flatten(1), batch)

    def companions(self, student: Network, teacher: Network | Headed | Panel | None) -> dict[str, nn.Module]:
        """{"assistant"}, from images to logits, with the student's weights at that moment."""
        if self.assistant is None:
            return {}
        assert teacher is not None
        whole = Whole(self.assistant, student, backbone(teacher), self.spec.teacher_scale, self.spec.scale_mode)
        return {"assistant": whole}

    def undecayed(self) -> tuple[nn.Parameter, ...]:
        """All but weight matrices: temperature, normalisations, biases, prefix tokens, tables of positions."""
        return tuple(
            parameter
            for name, parameter in self.named_parameters()
            if parameter.dim() < 2 or name.rpartition(".")[2] != "weight"
        )


def _constant(x: Tensor, held: bool) -> Tensor:
    return x.detach() if held else x

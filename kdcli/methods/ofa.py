"""OFA: one for all, the student's stages compared in logit space, where networks of any two families can meet.

A small head turns each stage of the student into logits, and these, like the student's own, follow the teacher's, whose
confidence in the right class is raised.

Equation: L = a · CE(s, y) + b · O(s) + c · Σ_k O(head_k(F_k)), with O(z) = -Σ_c ((p_c + 1[c = y])^ε - 1[c = y]) · ln q_c,
    p = softmax(t/T), q = softmax(z/T)
Reductions: CE and O are means over the batch, O is summed over the classes; the stages are summed.
Source: Hao et al. 2023, arXiv 2310.19444, Section 3.2; O and its gradient equal to the released code's. a = b = c = 1, T = 1,
    ε = 1 on CIFAR-100 and 1.5 on ImageNet.
Tensors: the teacher's logits; the student's logits and the maps of its last four stages (all, if it has fewer).
Cost: one teacher forward; a head per stage of the student (wrn16_2: separable convolutions that halve the map until the last
    stage's size, one 1x1 convolution behind it, a linear layer each).
Our reading: with ε = 1 O is the cross-entropy to the teacher's probabilities. The paper's text raises the right class's
    factor instead, (1 + p_y)^ε, which is the released form plus the cross-entropy to the label. There is no factor T². The
    released heads are written for four stages at 224 pixels; here they are counted from the last stage, halve maps down to
    1x1 at most, and merge patches only where a grid has 14 or more to a side. Of a student with a class token they read the
    mean patch, since a stage's map holds the patches alone.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.gather import BatchNorm2d
from kdcli.losses import cross_entropy, exact
from kdcli.methods.adapted import adapted
from kdcli.methods.base import Method, MethodSpec, Progress, Setting
from kdcli.methods.pairing import backbone, require_same_outputs
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network, stage_shapes
from kdcli.models.panel import Panel

_GRID = 7  # patches to a side that a token head works on, where there are more


class OFASpec(MethodSpec):
    """Settings of OFA."""

    name: str = "ofa"
    """The method's name."""
    ce_weight: float = Field(default=1.0, ge=0)
    """Weight a of the cross-entropy to the labels."""
    logit_weight: float = Field(default=1.0, ge=0)
    """Weight b of the student's own logits."""
    stage_weight: float = Field(default=1.0, ge=0)
    """Weight c of each stage's."""
    eps: float = Field(default=1.0, gt=0)
    """ε, the exponent that raises the teacher's confidence in the right class; 1.5 on ImageNet."""
    temperature: float = Field(default=1.0, gt=0, le=1000)
    """T, by which all logits are divided (no factor T²)."""
    stages: int = Field(default=4, ge=1)
    """How many stages have heads, counted from the last, as far as the student has them."""


class OFA(Method):
    """L = ce_weight · CE + logit_weight · O(s) + stage_weight · Σ_k O(head_k).

    Raises:
        IncompatibleError: the networks were made for different numbers of classes.
    """

    Spec: ClassVar[type[MethodSpec]] = OFASpec

    def __init__(
        self, spec: OFASpec, setting: Setting, student: Network | None, teacher: Network | Headed | Panel | None
    ) -> None:
        super().__init__(spec, setting, student, teacher)
        self.stages: tuple[int, ...] = ()
        self.heads = nn.ModuleList()
        if student is None or teacher is None:
            return
        main = backbone(teacher)
        require_same_outputs(student, teacher)
        if not spec.stage_weight:
            return
        shapes = stage_shapes(student, setting.image_size)
        last = len(shapes) - 1
        self.stages = tuple(range(max(1, last - spec.stages + 1), last + 1))
        width = max(student.pooled_dim, main.pooled_dim)
        for stage in self.stages:
            channels, side, _ = shapes[stage]
            token = student.kind == "token"
            head = TokenHead if token else ConvHead
            self.heads.append(head(channels, side, last - stage, width, student.outputs))

    @classmethod
    def for_pair(cls, given: dict[str, Any], teacher: str, student: str, dataset: str) -> dict[str, Any]:
        """ε of the data set."""
        return {"eps": 1.5} if dataset == "imagenet" else {}

    def loss(self, batch: Batch, student: Features, teacher: Features | None, progress: Progress) -> dict[str, Tensor]:
        """{"ce", "ofa"}, and {"stages"} where it has a weight, from logits [B,K] and the student's maps [B,C,H,W]."""
        assert teacher is not None
        spec = self.spec
        terms = {
            "ce": spec.ce_weight * cross_entropy(student.logits, batch.targets, self.setting.label_smoothing),
            "ofa": spec.logit_weight * self._adapted(student.logits, teacher.logits, batch.labels),
        }
        if spec.stage_weight:
            made = [head(exact(student.maps[i])) for head, i in zip(self.heads, self.stages, strict=True)]
            each = [self._adapted(logits, teacher.logits, batch.labels) for logits in made]
            terms["stages"] = spec.stage_weight * torch.stack(each).sum()
        return terms

    def _adapted(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """O of logits [B,K]: mean over the batch."""
        return adapted(student, teacher.detach(), labels, self.spec.eps, self.spec.temperature)


class _Separable(nn.Sequential):
    """[B,c,H,W] → [B,d,H/2,W/2]: depthwise 3x3 of stride 2 and 1x1, depthwise 3x3 and 1x1, each with BatchNorm and ReLU."""

    def __init__(self, c: int, d: int) -> None:
        super().__init__(
            nn.Conv2d(c, c, 3, stride=2, padding=1, groups=c, bias=False),
            nn.Conv2d(c, c, 1, bias=False),
            BatchNorm2d(c),
            nn.ReLU(),
            nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False),
            nn.Conv2d(c, d, 1, bias=False),
            BatchNorm2d(d),
            nn.ReLU(),
        )


class ConvHead(nn.Module):
    """A stage's map [B,C,H,H] to logits [B,K]: halved as often as later stages would, pooled, classified.

    Args:
        channels, side: C and H.
        later: how many stages come behind this one; 0: a 1x1 convolution instead.
        width: of the vector that is classified, the larger of the two networks'.
        outputs: K.
    """

    def __init__(self, channels: int, side: int, later: int, width: int, outputs: int) -> None:
        super().__init__()
        widths = [channels * 2**j for j in range(later)] + [width]
        blocks: list[nn.Module] = [_Separable(a, b) for a, b in itertools.pairwise(widths)]
        self.blocks = nn.Sequential(*(blocks or [nn.Conv2d(channels, width, 1)]))
        self.classifier = nn.Linear(width, outputs)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,H] → [B,K]."""
        return self.classifier(self.blocks(x).mean((2, 3)))


class TokenHead(nn.Module):
    """A stage's tokens as a map [B,C,H,H] to logits [B,K]: patches merged, attention, the mean token classified.

    Args:
        channels, side: C and H.
        later: how many stages come behind this one: as many attention blocks, at least one.
        width: not used; token stages keep their width.
        outputs: K.
    """

    def __init__(self, channels: int, side: int, later: int, width: int, outputs: int) -> None:
        super().__init__()
        factor = max(1, side // _GRID)
        self.merge = nn.Conv2d(channels, channels, factor, stride=factor) if factor > 1 else nn.Identity()
        heads = 4 if channels % 4 == 0 else 1
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    channels, heads, 4 * channels, 0.0, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(max(later, 1))
            )
        )
        self.classifier = nn.Linear(channels, outputs)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,H] → [B,K]."""
        tokens = self.merge(x).flatten(2).mT
        return self.classifier(self.blocks(tokens).mean(1))


def _initialise(head: nn.Module) -> None:
    """He-normal convolutions, linear layers from a normal of 0.02 cut off at two deviations."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

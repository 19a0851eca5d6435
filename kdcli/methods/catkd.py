"""CAT-KD: class attention transfer, where each class's evidence lies in the last map.

A class activation map is the classifier's weight applied to every position of the last map; its mean over the positions is
the class's logit, up to the bias.

Equation: L = CE(s, y) + β · MSE(pool(A_s), pool(A_t)), A = W · F the class activation maps of the classifier's weight W
    [K,C] on the last map F [C,H,W], pool the average over r x r cells
Reductions: CE is a mean over the batch, the MSE a mean over batch, classes and cells.
Source: Guo et al. 2023 (CVPR), "Class Attention Transfer Based Knowledge Distillation", Section 3.2; numbers equal to the
    released code, which also gives β, r and the normalisation for each pair.
Tensors: the map whose mean over the positions is the pooled vector, and the classifiers' weights, of both networks.
Cost: one teacher forward; no extra parameters.
Our reading: the released student has no bias in its classifier and is a 1x1 convolution; here every network keeps the head
    of its architecture, bias included, so that its checkpoint is like any other. "KD" in the name does not add Hinton's
    divergence (`kd_weight` does). Cells are averaged before the weight is applied, which is the same and cheaper, except
    with `binarize`. Where r exceeds a map's size the cells are the map's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.errors import IncompatibleError
from kdcli.losses import exact
from kdcli.methods.base import MethodSpec, Progress, Setting
from kdcli.methods.feature import FeatureMethod, FeatureSpec, shrink
from kdcli.methods.pairing import backbone
from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network, dry_run
from kdcli.models.panel import Panel

# (β, r, normalised) by pair, from the released commands.
PAIRS: dict[tuple[str, str], tuple[float, int, bool]] = {
    ("resnet32x4", "resnet8x4"): (15, 2, False),
    ("wrn40_2", "wrn16_2"): (12, 2, False),
    ("wrn40_2", "wrn40_1"): (1.5, 2, False),
    ("resnet56", "resnet20"): (0.7, 2, False),
    ("resnet110", "resnet32"): (1.8, 2, False),
    ("vgg13", "vgg8"): (4.5, 2, False),
    ("vgg13", "mobilenetv2"): (15, 2, True),
    ("resnet50", "mobilenetv2"): (40, 2, True),
    ("resnet32x4", "shufflenetv1"): (600, 4, True),
    ("resnet32x4", "shufflenetv2"): (600, 4, True),
    ("wrn40_2", "shufflenetv1"): (80, 4, True),
}
IMAGENET: dict[tuple[str, str], tuple[float, int, bool]] = {
    ("resnet34", "resnet18"): (0.5, 4, False),
    ("resnet50", "mobilenetv1"): (10, 2, True),
}


class CATKDSpec(FeatureSpec):
    """Settings of CAT-KD."""

    name: str = "catkd"
    """The method's name."""
    weight: float = Field(default=15.0, ge=0)
    """Weight β of the transfer; default: that of the pair of networks, 15 where none is published."""
    resolution: int = Field(default=2, ge=1)
    """r, the side of the grid of cells to which the class activation maps are averaged."""
    normalize: bool = False
    """Divide each class's cells by their L2 norm (the released setting for networks of different families)."""
    binarize: bool = False
    """Replace the teacher's maps by 1 where they exceed the mean magnitude of their class's map, else 0 (the paper's
    ablation)."""
    classes: int | None = Field(default=None, ge=2)
    """N: transfer only the classes of the N highest teacher logits of each image (the paper's ablation); default: all."""
    select: Literal["highest", "lowest"] = "highest"
    """Which N classes."""
    released_count: bool = True
    """Count as the released code does: the N highest are N-1 classes, the N lowest are N+1."""


class CATKD(FeatureMethod):
    """L = CE(s, y) + weight · MSE of the averaged class activation maps.

    Raises:
        IncompatibleError: a network's pooled vector is not the mean of a map (class tokens, hook-tapped networks).
    """

    Spec: ClassVar[type[MethodSpec]] = CATKDSpec

    def __init__(
        self, spec: CATKDSpec, setting: Setting, student: Network | None, teacher: Network | Headed | Panel | None
    ) -> None:
        super().__init__(spec, setting, student, teacher)
        if student is None or teacher is None:
            return
        sizes = ((student, setting.image_size, "--student"), (backbone(teacher), setting.teacher_size, "--teacher"))
        for network, size, field in sizes:
            features = dry_run(network, "features", size)
            if not isinstance(features, Features) or features.final is None:
                raise IncompatibleError(
                    f"the pooled vector of {network.arch} is not the mean of a map, so it has no class activation maps",
                    field=field,
                    hint="use a convolutional network with global average pooling",
                )

    @classmethod
    def for_pair(cls, given: dict[str, Any], teacher: str, student: str, dataset: str) -> dict[str, Any]:
        """β, r and the normalisation of the pair."""
        found = PAIRS.get((teacher, student))
        if dataset == "imagenet":
            found = IMAGENET.get((teacher.removeprefix("torchvision:"), student.removeprefix("torchvision:")))
        return {} if found is None else dict(zip(("weight", "resolution", "normalize"), found, strict=True))

    def student_features(self, student: Network, views: Tensor) -> Features:
        """The student's pass, with the weight of its classifier."""
        return replace(student.features(views), classifier=student.classifier_weight)

    def teacher_features(self, teacher: Network | Headed | Panel, views: Tensor) -> Features:
        """The teacher's pass, with the weight of its classifier."""
        network = backbone(teacher)
        return replace(network.features(views), classifier=network.classifier_weight)

    def compare(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"cat"} from the final maps [B,C,H,W] and the classifiers' weights [K,C] of both networks."""
        spec = self.spec
        s, t = self._cells(student, binarize=False), self._cells(teacher, binarize=spec.binarize).detach()
        size = [min(a, b) for a, b in zip(s.shape[2:], t.shape[2:], strict=True)]
        s, t = shrink(s, size), shrink(t, size)
        if spec.normalize:
            s, t = (F.normalize(x.flatten(2), dim=2).view_as(x) for x in (s, t))
        if spec.classes is None:
            return {"cat": spec.weight * F.mse_loss(s, t)}
        chosen = self.chosen(teacher.logits)
        squares = (s - t).square().mean((2, 3)) * chosen
        return {"cat": spec.weight * squares.sum() / chosen.sum()}

    def _cells(self, features: Features, *, binarize: bool) -> Tensor:
        """Class activation maps averaged over the cells, [B,K,r,r]."""
        assert features.final is not None
        assert features.classifier is not None
        final, weight = exact(features.final), exact(features.classifier)
        size = [min(self.spec.resolution, side) for side in final.shape[2:]]
        if not binarize:
            return F.conv2d(shrink(final, size), weight[:, :, None, None])
        maps = F.conv2d(final, weight[:, :, None, None])
        return shrink((maps > maps.abs().mean((2, 3), keepdim=True)).to(maps), size)

    def chosen(self, logits: Tensor) -> Tensor:
        """Which classes of each image are transferred, by the teacher's logits [B,K] → bool [B,K]."""
        spec = self.spec
        assert spec.classes is not None
        highest = spec.select == "highest"
        count = spec.classes + ((-1 if highest else 1) if spec.released_count else 0)
        rank = exact(logits).argsort(dim=1, descending=highest, stable=True).argsort(dim=1)
        return rank < count

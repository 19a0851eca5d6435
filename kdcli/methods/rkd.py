"""RKD: relational knowledge distillation, distances and angles between the images of a batch.

Equation: L = CE(s, y) + b_d · mean_ij h(d_ij of the student - d_ij of the teacher) + b_a · mean_ijk h(cos_ijk -
    cos_ijk), with d_ij = ‖f_i - f_j‖ / the mean of all positive distances, cos_ijk the cosine at f_i between the ways
    to f_j and to f_k, and h the Huber loss (x²/2 up to |x| = 1, then |x| - 1/2)
Reductions: CE is a mean over the batch; the two others are means over all B² and B³ entries, degenerate ones (j or
    k equal to i: 0) included.
Source: Park et al. 2019, arXiv 1904.05068, Section 3.2; numbers equal to RepDistiller and mdistiller. b_d = 25, b_a = 50
    (CRD's tables).
Tensors: the pooled vectors of both networks.
Cost: one teacher forward; no extra parameters; B² · C differences and B³ angles, B being the whole batch of all
    ranks. Above 2²⁴ of them they are computed (and in the backward pass computed again) for a few images i at a time.
    Memory in a step: 4·(B²·C + B³) bytes for each network, no more than 64 MiB of them at once, and as much again for
    the loss: counted 7 MiB more than KD at B = 64, 37 at 128, 100 at 256 (wrn40_2 → wrn16_2, C = 128).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdcli.data.loader import Batch
from kdcli.gather import gathered
from kdcli.losses import exact
from kdcli.methods.base import MethodSpec, Progress
from kdcli.methods.feature import FeatureMethod, FeatureSpec
from kdcli.models.features import Features

# How many differences and cosines of one network may exist at once: 64 MiB in fp32.
_ENTRIES = 2**24
_EPSILON = 1e-12


class RKDSpec(FeatureSpec):
    """Settings of RKD."""

    name: str = "rkd"
    """The method's name."""
    distance_weight: float = Field(default=25.0, ge=0)
    """Weight b_d of the distances."""
    angle_weight: float = Field(default=50.0, ge=0)
    """Weight b_a of the angles."""


class RKD(FeatureMethod):
    """L = CE(s, y) + distance_weight · Huber over the B² distances + angle_weight · Huber over the B³ angles (means)."""

    Spec: ClassVar[type[MethodSpec]] = RKDSpec

    def compare(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"distance", "angle"} from the pooled vectors [B,C], whose widths may differ; one with weight 0 is left out."""
        spec, terms = self.spec, {}
        s, t = (gathered(exact(x), batch) for x in (student.pooled, teacher.pooled.detach()))
        if spec.distance_weight:
            terms["distance"] = spec.distance_weight * F.smooth_l1_loss(_distances(s), _distances(t))
        if spec.angle_weight:
            terms["angle"] = spec.angle_weight * _angles(s, t)
        return terms


def _distances(x: Tensor) -> Tensor:
    """[B,C] → [B,B]: Euclidean distances divided by the mean of the positive ones; 0 on the diagonal."""
    x = x - x.mean(0)  # no distance changes, and the differences below cancel less: vectors can be far from 0 and close
    squares = x.square().sum(1)
    squared = squares[:, None] + squares - 2 * x @ x.T
    apart = 1 - torch.eye(x.shape[0], dtype=x.dtype, device=x.device)
    distances = squared.clamp(min=_EPSILON).sqrt() * apart  # clamped ones, of equal vectors, still count as positive
    mean = distances.sum() / apart.sum().clamp(min=1)
    return distances / mean.clamp(min=_EPSILON)  # a batch of one image has no distance


def _angles(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over all (i, j, k) of the Huber loss between the cosines at image i of student and teacher [B,C]."""
    b, c = student.shape[0], max(student.shape[1], teacher.shape[1])
    at_once = max(1, _ENTRIES // (b * (b + c)))
    if at_once >= b:
        return _of_anchors(student, teacher, student, teacher) / b**3
    parts = zip(student.split(at_once), teacher.split(at_once), strict=True)
    sums = [checkpoint(_of_anchors, s, t, student, teacher, use_reentrant=False) for s, t in parts]
    return torch.stack(sums).sum() / b**3


def _of_anchors(s: Tensor, t: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    """The sum of the Huber losses at the images s, t [b,C] between all images `student`, `teacher` [B,C]."""
    return F.smooth_l1_loss(_cosines(s, student), _cosines(t, teacher), reduction="sum")


def _cosines(anchors: Tensor, x: Tensor) -> Tensor:
    """[b,C], [B,C] → [b,B,B]: the cosine between x_j and x_k as seen from each anchor; 0 where one is the anchor."""
    ways = F.normalize(x - anchors[:, None], dim=2)
    return ways @ ways.mT

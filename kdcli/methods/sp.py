"""SP: similarity-preserving distillation, which images of a batch activate a network alike.

Equation: L = CE(s, y) + b · ‖G_s - G_t‖²_F / B², with G = F·Fᵀ of the flattened last maps, each row divided by its
    length
Reductions: CE is a mean over the batch; the squared differences are a mean over the B² pairs.
Source: Tung & Mori 2019, arXiv 1907.09682, Section 3; numbers equal to RepDistiller and mdistiller. b = 3000 (CRD's
    tables).
Tensors: the last stage's map of both networks.
Cost: one teacher forward; no extra parameters; the B x B similarities, B being the whole batch of all ranks, whose
    last maps every rank gathers. Memory in a step: 4·B² bytes a matrix, some ten of them (64: 16 KiB, 1024: 4 MiB each),
    and copies of both flattened maps, 4·B·C·H·W: counted 2 MiB more than KD at B = 64, 9 at 256 (wrn40_2 → wrn16_2).
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.gather import gathered
from kdcli.losses import exact
from kdcli.methods.base import MethodSpec, Progress
from kdcli.methods.feature import FeatureMethod, FeatureSpec
from kdcli.models.features import Features


class SPSpec(FeatureSpec):
    """Settings of SP."""

    name: str = "sp"
    """The method's name."""
    weight: float = Field(default=3000.0, ge=0)
    """Weight b of the difference of the similarities."""


class SP(FeatureMethod):
    """L = CE(s, y) + weight · mean over the B² pairs of (G_s - G_t)²."""

    Spec: ClassVar[type[MethodSpec]] = SPSpec

    def compare(self, batch: Batch, student: Features, teacher: Features, progress: Progress) -> dict[str, Tensor]:
        """{"sp"} from the last maps [B,C,H,W], which may differ in C, H and W."""
        s = _similarities(gathered(exact(student.maps[-1]), batch))
        t = _similarities(gathered(exact(teacher.maps[-1].detach()), batch))
        return {"sp": self.spec.weight * F.mse_loss(s, t)}


def _similarities(x: Tensor) -> Tensor:
    """[B,C,H,W] → [B,B]: inner products of the flattened maps, rows of length 1."""
    flat = x.flatten(1)
    return F.normalize(flat @ flat.T, dim=1)

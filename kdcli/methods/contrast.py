"""InfoNCE between two networks' features of the same images, with a temperature that is learned."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcli.data.loader import Batch
from kdcli.gather import gathered

_START, _LARGEST = math.log(1 / 0.07), math.log(100)


class Contrast(nn.Module):
    """-1/B · Σ_b ln [exp(e^s ⟨z_b, t_b⟩) / Σ_b' exp(e^s ⟨z_b, t_b'⟩)] of unit vectors z (learner) and t (target).

    InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, Eq. 4) with the learned scale of CLIP (arXiv 2103.00020): s starts
    at ln(1/0.07), and e^s is at most 100. Positives are the two features of one image, negatives those of the other images
    of the batch of all ranks.

    Args:
        symmetric: the mean with the same loss in which each target looks for its learner.
        mask_same_class: leave images of the same class out of the negatives.
    """

    def __init__(self, *, symmetric: bool = False, mask_same_class: bool = False) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(_START))
        self.symmetric, self.mask_same_class = symmetric, mask_same_class

    @property
    def scale(self) -> Tensor:
        """e^s, [], without gradient."""
        return self.log_scale.detach().clamp(max=_LARGEST).exp()

    def forward(self, learner: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """Vectors [B,D] of this rank's part of the batch to the mean over the whole one, []."""
        with torch.no_grad():  # the parameter itself is held, as CLIP does: beyond the bound it would get no gradient
            self.log_scale.clamp_(max=_LARGEST)
        z, t = (gathered(F.normalize(x, dim=1), batch) for x in (learner, target))
        similar = self.log_scale.exp() * z @ t.mT
        if self.mask_same_class:
            labels = gathered(batch.labels, batch)
            other = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
            similar = similar.masked_fill((labels[:, None] == labels) & other, -math.inf)
        own = torch.arange(similar.shape[0], device=similar.device)
        loss = F.cross_entropy(similar, own)
        return (loss + F.cross_entropy(similar.mT, own)) / 2 if self.symmetric else loss

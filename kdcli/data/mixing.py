"""Mixup and cutmix: pairs of images of a batch made one, and their labels shared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdcli.data.randomness import mix

Box = tuple[int, int, int, int]
"""(top, bottom, left, right), the ends exclusive."""


@dataclass(frozen=True)
class Draw:
    """How one batch is mixed.

    Attributes:
        share: λ, what an image keeps of itself; 1 leaves the batch as it is.
        box: what its partner covers (cutmix), or None (mixup).
    """

    share: float
    box: Box | None = None


@dataclass(frozen=True)
class Mixing:
    """One λ for a whole batch, as timm's Mixup in its mode `batch` draws it.

    Mixup (Zhang et al. 2018, arXiv 1710.09412) blends, λ·x + (1-λ)·x'; cutmix (Yun et al. 2019, arXiv 1905.04899) pastes
    a box of x' into x, and λ becomes the share of the area that is left.

    Attributes:
        mixup, cutmix: a of the Beta(a, a) that λ is drawn from; 0 is off.
        prob: probability that a batch is mixed at all.
        switch: probability of cutmix where both are on.
    """

    mixup: float
    cutmix: float
    prob: float = 1.0
    switch: float = 0.5

    def draw(self, height: int, width: int, *parts: int | str) -> Draw:
        """A pure function of its arguments: the ranks that share a batch draw the same.

        Numbers are drawn in timm's order, from the generator that it takes from numpy, whose stream never changes.
        """
        random = np.random.RandomState(mix(*parts) % 2**32)
        if random.rand() >= self.prob:
            return Draw(1.0)
        cut = self.cutmix > 0 and (self.mixup == 0 or random.rand() < self.switch)
        alpha = self.cutmix if cut else self.mixup
        share = float(random.beta(alpha, alpha))
        if not cut:
            return Draw(share)
        ratio = math.sqrt(1 - share)
        tall, wide = int(height * ratio), int(width * ratio)
        y, x = int(random.randint(0, height)), int(random.randint(0, width))
        top, bottom = max(0, y - tall // 2), min(height, y + (tall + 1) // 2)
        left, right = max(0, x - wide // 2), min(width, x + (wide + 1) // 2)
        return Draw(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def partners(count: int, device: torch.device) -> Tensor:
    """int64 [count], each image's partner: its neighbour. The last of an odd batch is its own.

    A batch is in random order, so neighbours are as good as timm's first and last, and they mostly are on one rank.
    """
    return (torch.arange(count, device=device) ^ 1).clamp_(max=count - 1)


def mixed_images(images: Tensor, drawn: Draw) -> Tensor:
    """float [b,3,H,W], each image mixed with its partner; the arguments are left as they are."""
    if drawn.share == 1:
        return images
    others = images[partners(len(images), images.device)]
    if drawn.box is None:
        return torch.lerp(others, images, drawn.share)
    top, bottom, left, right = drawn.box
    images = images.clone(memory_format=torch.preserve_format)
    images[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
    return images


def mixed_labels(labels: Tensor, classes: int, drawn: Draw) -> tuple[Tensor, Tensor]:
    """int64 [b], the class of the larger share, and float [b,classes], the shares; from labels int64 [b]."""
    others = labels[partners(len(labels), labels.device)]
    shares = torch.zeros(len(labels), classes, device=labels.device)
    shares.scatter_add_(1, labels[:, None], torch.full_like(shares[:, :1], drawn.share))
    shares.scatter_add_(1, others[:, None], torch.full_like(shares[:, :1], 1 - drawn.share))
    return (labels if drawn.share >= 0.5 else others), shares

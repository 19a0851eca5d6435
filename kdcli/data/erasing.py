"""Random erasing (Zhong et al. 2020, arXiv 1708.04896): a rectangle of noise in some images, after normalisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcli.data.randomness import generator

_AREA = (0.02, 1 / 3)
_RATIO = (0.3, 1 / 0.3)
_TRIES = 10


@dataclass(frozen=True)
class Erasing:
    """timm's RandomErasing in its mode `pixel`, one rectangle an image, as a function of seed, epoch and image.

    The rectangle's area is uniform in 2 % to a third of the image, the logarithm of height over width uniform between
    those of 0.3 and 1/0.3; of ten drawn the first that fits is taken. It is filled with standard normal noise.

    Attributes:
        probability: of erasing an image.
    """

    probability: float

    def draw(self, count: int, size: int, *parts: int | str) -> Tensor:
        """int64 [count,4]: top, left, height and width for each image of `size` pixels a side; height 0 erases nothing."""
        g = generator(*parts)
        uniform = torch.rand(_TRIES, 4, count, generator=g, dtype=torch.float64)
        chosen = torch.rand(count, generator=g) < self.probability
        low, high = (math.log(r) for r in _RATIO)
        area = (_AREA[0] + (_AREA[1] - _AREA[0]) * uniform[:, 0]) * size**2
        ratio = (low + (high - low) * uniform[:, 1]).exp()
        height, width = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (height < size) & (width < size)
        first = fits.int().argmax(0, keepdim=True)  # the first of those that fit
        top, left = ((size - side + 1) * u for side, u in ((height, uniform[:, 2]), (width, uniform[:, 3])))
        boxes = torch.stack([x.gather(0, first)[0] for x in (top, left, height, width)], 1).long()
        return boxes * (chosen & fits.any(0))[:, None]


def erase(images: Tensor, boxes: list[list[int]], where: list[tuple[int | str, ...]]) -> Tensor:
    """Fill each image's box with noise, in place.

    Args:
        images: float [b,3,S,S], normalised.
        boxes: as `Erasing.draw` gives them, of these images.
        where: what each image's noise is a function of.
    """
    for image, (top, left, height, width), parts in zip(images, boxes, where, strict=True):
        if height:
            # Drawn on the CPU: a device's own generator would make the images depend on the device.
            noise = torch.randn(3, height, width, generator=generator(*parts))
            image[:, top : top + height, left : left + width] = noise.to(image.device, non_blocking=True)
    return images

"""Strong augmentation: RandAugment and a cut-out behind the ordinary augmentation (MLKD's second view)."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcli.data.transforms import Transform

_BINS = 31  # magnitudes 0..30, as in RandAugment
_GREY = 128


class Strong:
    """The ordinary augmentation, two operations of RandAugment, each of random magnitude, and a grey square.

    MLKD draws two of 14 operations with replacement, the magnitude of each uniformly from its range, and then covers a
    square whose side is up to half the image's. torchvision's RandAugment has the same 14 operations; its ranges differ a
    little (shear to 0.3 and not beyond, translation to 0.47 of the side, rotation to 30 degrees, colour, contrast,
    brightness and sharpness by ±0.9, posterise down to 4 bits), and its magnitudes are one of 31 steps.

    Args:
        base: the ordinary augmentation, uint8 [3,H,W] → uint8 [3,S,S].
    """

    def __init__(self, base: Transform) -> None:
        self.base = base

    def __call__(self, image: Tensor) -> Tensor:
        from torchvision.transforms import v2

        image = self.base(image)
        for magnitude in torch.randint(0, _BINS, (2,)).tolist():
            image = v2.RandAugment(num_ops=1, magnitude=magnitude, num_magnitude_bins=_BINS)(image)
        return cut_out(image)


def cut_out(image: Tensor) -> Tensor:
    """uint8 [3,S,S] with a grey square of a side uniform in 0..S/2 around a uniform centre, cut off at the border."""
    size = image.shape[-1]
    side = int(torch.rand(()).item() * size / 2)
    if side == 0:
        return image
    top, left = (int(c) - side // 2 for c in torch.randint(0, size, (2,)).tolist())
    image = image.clone()
    image[:, max(0, top) : top + side, max(0, left) : left + side] = _GREY
    return image

"""Strong augmentation: RandAugment and a cut-out behind the ordinary augmentation (MLKD's second view)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kdcli.data.transforms import Transform

_GREY = 128

Operation = tuple[Callable[[Tensor, float], Tensor], float, float]
"""(function of image and magnitude, lowest, highest magnitude)"""


class Strong:
    """The ordinary augmentation, two operations of RandAugment, each of random magnitude, and a grey square.

    As MLKD's released code does: two of the 14 operations, drawn with replacement, the magnitude of each uniform in its
    range (see `operations`), then a square whose side is up to half the image's. v2.RandAugment has the same operations
    with other ranges: translation to 0.45 of the side, colours strengthened as well as weakened, 31 magnitudes each.

    Args:
        base: the ordinary augmentation, uint8 [3,H,W] → uint8 [3,S,S].
    """

    def __init__(self, base: Transform) -> None:
        self.base = base

    def __call__(self, image: Tensor) -> Tensor:
        image = self.base(image)
        choices = list(operations().values())
        for number in torch.randint(len(choices), (2,)).tolist():
            operation, low, high = choices[number]
            image = operation(image, low + (high - low) * torch.rand(()).item())
        return cut_out(image)


@cache
def operations() -> dict[str, Operation]:
    """The 14 operations on uint8 [3,H,W]; what a shift, shear or rotation uncovers is black."""
    from torchvision.transforms.v2 import functional as F

    def affine(image: Tensor, right: float = 0.0, down: float = 0.0, x: float = 0.0, y: float = 0.0) -> Tensor:
        """Shift by shares of the sides, shear by tangents about the top left corner."""
        height, width = image.shape[-2:]
        degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
        shift = [right * width, down * height]
        return F.affine(image, angle=0.0, translate=shift, scale=1.0, shear=degrees, center=[0.0, 0.0])

    return {
        "identity": (lambda image, _: image, 0, 1),
        "autocontrast": (lambda image, _: F.autocontrast(image), 0, 1),
        "equalize": (lambda image, _: F.equalize(image), 0, 1),
        "brightness": (F.adjust_brightness, 0.05, 0.95),
        "colour": (F.adjust_saturation, 0.05, 0.95),
        "contrast": (F.adjust_contrast, 0.05, 0.95),
        "sharpness": (F.adjust_sharpness, 0.05, 0.95),
        "posterize": (lambda image, bits: F.posterize(image, int(bits)), 4, 8),
        "solarize": (F.solarize, 0, 255),  # the reference's 256 leaves every pixel alone; torchvision refuses it
        "rotate": (F.rotate, -30, 30),
        "shear-x": (lambda image, tangent: affine(image, x=tangent), -0.3, 0.3),
        "shear-y": (lambda image, tangent: affine(image, y=tangent), -0.3, 0.3),
        "translate-x": (lambda image, share: affine(image, right=share), -0.3, 0.3),
        "translate-y": (lambda image, share: affine(image, down=share), -0.3, 0.3),
    }


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

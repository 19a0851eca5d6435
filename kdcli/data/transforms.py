"""Per-sample transforms of streamed images: torchvision's v2 on uint8 [3,H,W]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdcli.data.randomness import mix
from kdcli.data.resize import centre, shorter_side, square

Transform = Callable[[Tensor], Tensor]


class _Square:
    """Resize the shorter side, crop the centre. A class, so that workers started afresh can be sent it."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        return square(image, self.size)


def evaluated_side(size: int, *, files: bool) -> int:
    """What the shorter side of an image is brought to, in pixels, before its centre of `size` is evaluated.

    Files of at least 128 pixels are seen with ImageNet's margin: S*256/224 (METHODS 2.2); all else whole.
    """
    return int(size * 256 / 224) if files and size >= 128 else size


class Evaluation:
    """The evaluation view: the shorter side brought to `side`, then the centre of `size`, in pixels."""

    def __init__(self, size: int, side: int) -> None:
        self.size, self.side = size, side

    def __call__(self, image: Tensor) -> Tensor:
        return centre(shorter_side(image, self.side), self.size)


class Flipped:
    """A geometric augmentation and, behind it, a horizontal flip with probability 1/2.

    Both can be had apart, for a further crop that is to be flipped like the first.
    """

    def __init__(self, geometric: Transform) -> None:
        self.geometric = geometric

    def __call__(self, image: Tensor) -> Tensor:
        return self.parts(image)[0]

    def parts(self, image: Tensor) -> tuple[Tensor, bool]:
        """The augmented image, and whether it was flipped."""
        image = self.geometric(image)
        flip = torch.rand(1).item() < 0.5
        return (image.flip(-1) if flip else image), flip


def transform(size: int, augment: str, *, train: bool, files: bool) -> Transform:
    """What turns one image into uint8 [3,size,size].

    Training: `resized-crop` (area 0.08..1, ratio 3/4..4/3) and `rotation` (up to 20 degrees, METHODS 2.3), each with a
    horizontal flip; `crop` (zeros of S/8, METHODS 2.1) with a flip, `flip`, `none`. Evaluation: the centre, for files
    of at least 128 pixels with ImageNet's margin.
    """
    if not train:
        return Evaluation(size, evaluated_side(size, files=files))
    from torchvision.transforms import v2

    if augment == "resized-crop":
        return Flipped(v2.RandomResizedCrop(size, antialias=True))
    if augment == "rotation":
        return Flipped(v2.Compose([_Square(size), v2.RandomRotation([-20, 20])]))
    if augment == "crop":
        return Flipped(v2.Compose([_Square(size), v2.RandomCrop(size, padding=size // 8)]))
    return Flipped(_Square(size)) if augment == "flip" else _Square(size)


def seeded(function: Transform, image: Tensor, *parts: int | str) -> Tensor:
    """`function(image)` with the randomness of `parts` alone; torch's global CPU generator is left as it was.

    torchvision's transforms draw from that generator and take no other.
    """
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(mix(*parts))
    try:
        return function(image)
    finally:
        torch.default_generator.set_state(state)

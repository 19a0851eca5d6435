"""Resizing of uint8 images: bilinear with antialiasing, as the transforms of torchvision do it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """uint8 [N,3,H,W] -> uint8 [N,3,height,width]; the input itself where nothing changes.

    In pieces of 1,000 images, so that a large set needs no second copy of itself in floating point.
    """
    if images.shape[-2:] == (height, width):
        return images
    out = torch.empty((len(images), 3, height, width), dtype=torch.uint8)
    for at in range(0, len(images), 1000):
        piece = images[at : at + 1000]
        out[at : at + 1000] = interpolate(piece, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return out


def shorter_side(image: Tensor, size: int) -> Tensor:
    """uint8 [3,H,W] with its shorter side brought to `size`, the other scaled alike (rounded down)."""
    height, width = image.shape[-2:]
    if height <= width:
        target = (size, max(size, size * width // height))
    else:
        target = (max(size, size * height // width), size)
    return resize(image[None], *target)[0]


def centre(image: Tensor, size: int) -> Tensor:
    """The central size x size of [...,H,W]; both sides must be at least `size`."""
    height, width = image.shape[-2:]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[..., top : top + size, left : left + size]


def square(image: Tensor, size: int) -> Tensor:
    """uint8 [3,H,W] -> uint8 [3,size,size]: shorter side resized, centre cropped."""
    return centre(shorter_side(image, size), size)


def resident(images: Tensor, size: int, limit: int) -> Tensor:
    """Images at the size wanted if `limit` bytes allow it, else as they are: the loader then resizes batch by batch."""
    return resize(images, size, size) if len(images) * 3 * size * size <= limit else images

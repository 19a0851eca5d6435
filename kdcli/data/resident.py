"""Batches from images that live on the device: one gather does crop and flip, one fused multiply-add normalises."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from kdcli.data.randomness import generator


@dataclass(frozen=True)
class Draws:
    """The augmentation of every sample of an epoch, by position in the split.

    Attributes:
        top, left: int64 [N], the crop's corner in the padded image, 0..2*padding.
        flip: bool [N].
    """

    top: Tensor
    left: Tensor
    flip: Tensor


def draw(count: int, padding: int, seed: int, epoch: int) -> Draws:
    """Crops and flips of one epoch: a pure function of its arguments, drawn on the CPU at once."""
    g = generator(seed, epoch, "augment")
    top, left = torch.randint(0, 2 * padding + 1, (2, count), generator=g)
    return Draws(top, left, torch.rand(count, generator=g) < 0.5)


def draw_crop(draws: Draws, padding: int, seed: int, epoch: int, number: int) -> Draws:
    """Other crops with the same flips, for the further view `number`."""
    g = generator(seed, epoch, "crop", number)
    top, left = torch.randint(0, 2 * padding + 1, (2, draws.flip.shape[0]), generator=g)
    return Draws(top, left, draws.flip)


@dataclass(frozen=True)
class Plan:
    """What an epoch's batches need, on the device, in the order of the epoch.

    Attributes:
        start: int64 [N], the place in the table of the pixel that becomes the top left one.
        step: int64 [N], 1, or -1 where the image is flipped.
    """

    start: Tensor
    step: Tensor


class Resident:
    """uint8 images as a table of pixels [N*Hp*Wp, 3], zero-padded once, on the device.

    Pixels are the rows because a crop is then a single `index_select`, flipped or not, and its result already is in
    channels-last order. Padding the set instead of each batch costs memory (1.6 times at 32x32) and saves a mask.
    """

    def __init__(self, images: Tensor, *, padding: int, device: torch.device, scale: Tensor, shift: Tensor) -> None:
        self.count, _, self.height, self.width = images.shape
        self.padding = padding
        padded = pad(images, (padding,) * 4) if padding else images
        self.padded_height, self.padded_width = padded.shape[-2:]
        self.table = padded.permute(0, 2, 3, 1).contiguous().view(-1, 3).to(device)
        self.scale, self.shift = scale.to(device), shift.to(device)
        self.columns = torch.arange(self.width, device=device)
        self.rows = (torch.arange(self.height, device=device) * self.padded_width)[:, None]
        self.device = device

    def plan(self, order: Tensor, draws: Draws | None, crop: bool) -> Plan:
        """The gathers of an epoch in `order` (int64 [N], positions); no draws: the images as they are."""
        start = order * (self.padded_height * self.padded_width)
        if draws is None:
            return Plan(start.to(self.device), torch.ones_like(start).to(self.device))
        if crop:
            start = start + draws.top[order] * self.padded_width + draws.left[order]
        flip = draws.flip[order]
        start = start + flip * (self.width - 1)
        return Plan(start.to(self.device), (1 - 2 * flip.long()).to(self.device))

    def batch(self, plan: Plan, start: int, stop: int, size: int) -> Tensor:
        """Normalised float [b,3,size,size] in channels-last order, of the plan's samples [start, stop)."""
        line = plan.start[start:stop, None] + plan.step[start:stop, None] * self.columns
        at = (line[:, None, :] + self.rows).view(-1)
        pixels = self.table.index_select(0, at).view(stop - start, self.height, self.width, 3)
        images = torch.addcmul(self.shift, pixels, self.scale).permute(0, 3, 1, 2)
        if (self.height, self.width) != (size, size):
            # Images too many to keep at this size. Interpolation and normalisation commute: its weights sum to one.
            images = interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return images

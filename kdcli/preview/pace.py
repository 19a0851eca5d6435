"""How long work on a batch will take, measured on a few images and carried over to the batch."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from kdcli.data.dataset import DataSet
from kdcli.data.loader import Batch
from kdcli.engine.device import Device
from kdcli.engine.step import Step
from kdcli.methods.base import Progress

FEW = 4
"""Images in the smallest batch that is timed."""


def noise(count: int, dataset: DataSet, device: Device, *, extra: int = 0) -> Batch:
    """A batch of `count` images [count,3,H,W] of noise at the data set's size, with `extra` further copies of them."""
    size = dataset.image_size
    index = torch.arange(count, device=device.torch) % len(dataset.train)
    images = torch.randn(count, 3, size, size, device=device.torch).to(memory_format=torch.channels_last)
    return Batch(images, index % len(dataset.classes), index, 1.0, tuple(images.flip(3) for _ in range(extra)))


def start(device: Device) -> Progress:
    """The first step of the first epoch."""
    return Progress(torch.ones((), device=device.torch), torch.zeros((), device=device.torch), False)


def seconds_for(work: Callable[[Batch], object], images: int, batch: Callable[[int], Batch], device: Device) -> float:
    """Seconds that `work` will take on a batch of `images` images, from batches of 4 and 16.

    Args:
        work: what is timed, on the device.
        batch: makes a batch of so many images.
    """

    def seconds(few: Batch) -> float:
        best = float("inf")
        for _ in range(3):  # the first pays for allocation and the choice of kernels
            started = time.monotonic()
            work(few)
            device.synchronize()
            best = min(best, time.monotonic() - started)
        return best

    few, more = min(FEW, images), min(4 * FEW, images)
    at_few = seconds(batch(few))
    if at_few >= 1 or more == few:
        return at_few * images / few
    at_more = seconds(batch(more))  # work has fixed costs: two sizes tell them from those of an image
    return at_more + max(0.0, at_more - at_few) / (more - few) * (images - more)


def seconds_per_step(step: Step, images: int, batch: Callable[[int], Batch], device: Device) -> float:
    """Seconds that a step of `images` images will take, forward and backward; as in `seconds_for`."""
    progress = start(device)
    return seconds_for(lambda few: step(few, progress).total.backward(), images, batch, device)

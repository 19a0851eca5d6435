"""Generated images: the same on every machine, learnable, and free. For smoke tests and timing, never for results."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdcli.data.dataset import DataSet, Split
from kdcli.data.normalisation import constants
from kdcli.data.randomness import generator
from kdcli.data.request import Request

TRAIN, TEST = 2_000, 500


def read(request: Request) -> DataSet:
    """K classes (10 unless `synthetic:K`), each a low-frequency colour pattern under noise; labels in turn.

    2,000 training and 500 test images, or 4 and 1 a class where K is larger than that allows.
    """
    classes = int(request.argument or 10)
    patterns = _patterns(classes, request.size)
    width = len(str(classes - 1))
    names = tuple(f"class-{i:0{width}d}" for i in range(classes))
    mean, std = constants(request.name)
    train = _split(patterns, max(TRAIN, 4 * classes), "train")
    test = _split(patterns, max(TEST, classes), "test")
    return DataSet(request.name, names, request.size, mean, std, train, test)


def _patterns(classes: int, size: int) -> Tensor:
    """[K,3,S,S] within -1..1: per class and channel a sum of three plane waves of at most two cycles."""
    g = generator("synthetic", "patterns", classes)
    shape = (classes, 3, 3, 1, 1)
    frequency = torch.rand((2, *shape), generator=g) * 4 - 2
    phase = torch.rand(shape, generator=g) * 2 * math.pi
    axis = (torch.arange(size) + 0.5) / size
    waves = torch.cos(2 * math.pi * (frequency[0] * axis[:, None] + frequency[1] * axis) + phase)
    return waves.mean(dim=2)


def _split(patterns: Tensor, count: int, which: str) -> Split:
    """`count` images: mid-grey + the class pattern at a random strength + pixel noise, rounded to bytes."""
    classes, _, size, _ = patterns.shape
    labels = torch.arange(count) % classes
    images = torch.empty((count, 3, size, size), dtype=torch.uint8)
    for at in range(count):
        g = generator("synthetic", which, at)
        strength = 40 + 60 * torch.rand((), generator=g)
        noise = 40 * torch.randn((3, size, size), generator=g)
        images[at] = (127.5 + strength * patterns[labels[at]] + noise).round_().clamp_(0, 255).to(torch.uint8)
    return Split.of(labels, images=images)

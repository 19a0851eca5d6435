"""The images that are timed: the data set if it is there, else noise of its shape."""

from __future__ import annotations

import torch

from kdcli.building import load_data
from kdcli.data import names
from kdcli.data.dataset import DataSet, Split
from kdcli.data.normalisation import constants
from kdcli.data.randomness import generator
from kdcli.errors import InputError, UsageError
from kdcli.output import Story
from kdcli.specs import RunSpec

# Data set → classes and training images: what decides the width of the heads and the size of memory banks.
_SHAPES = {
    "cifar100": (100, 50_000),
    "cifar10": (10, 50_000),
    "stl10": (10, 5_000),
    "tinyimagenet": (200, 100_000),
    "imagenet": (1000, 1_281_167),
}
_MOST = 256 * 2**20  # bytes of made-up images


def images_for(spec: RunSpec, story: Story) -> tuple[DataSet, bool]:
    """The spec's data set, and whether it was made up because it is not there (which is said).

    Raises:
        UsageError: a batch of one image, or fewer images than one batch, so that there is no full step to time.
        InputError: it is not there and nobody knows its shape (`folder:PATH`).
    """
    size = spec.train.batch_size
    if size == 1:
        raise UsageError("BatchNorm cannot train on a batch of one", field="--batch-size", hint="use 2 or more")
    try:
        dataset, made_up = load_data(spec, story), False
    except InputError as problem:
        if spec.data.dataset not in _SHAPES:
            raise
        story.note(f"noise of the shape of {spec.data.dataset} is timed, since it cannot be read: {problem.message}")
        dataset, made_up = _stand_in(spec), True
    count = len(dataset.train)
    if count < size:
        raise UsageError(f"{size} images, and {dataset.name} has {count} to train on", field="--batch-size")
    return dataset, made_up


def _stand_in(spec: RunSpec) -> DataSet:
    """Uniform noise, labels in turn; as many images as the data set has, or as fit in 256 MiB."""
    name = spec.data.dataset
    classes, count = _SHAPES[name]
    size = spec.data.image_size or names.default_size(name)
    count = max(min(count, _MOST // (3 * size * size)), classes, spec.train.batch_size)
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator("bench", name))
    split = Split.of(torch.arange(count) % classes, images=pixels)
    mean, std = constants(name)
    test = split.subset(torch.arange(classes))
    return DataSet(name, tuple(f"class-{i}" for i in range(classes)), size, mean, std, split, test)

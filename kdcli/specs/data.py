"""Which images."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from kdcli.data.names import canonical as canonical_dataset
from kdcli.data.names import default_size, preparation
from kdcli.specs.section import Section, aside

Augment = Literal["auto", "crop", "flip", "none", "resized-crop", "rotation"]

# Magnitude, number of operations, probability of each, spread and bound of the magnitude, rising magnitudes, their set.
_POLICY = re.compile(
    r"rand(-(m\d{1,2}|n[1-9]|p(0(\.\d+)?|1(\.0+)?)|mstd\d+(\.\d+)?|mmax[1-9]\d?|inc[01]|t(weights|3a|3aw)))*"
)


class DataSpec(Section):
    """Which images, which part of them, and how they are augmented."""

    dataset: str = "cifar100"
    """Data set: cifar100, cifar10, stl10, tinyimagenet, imagenet, digits, synthetic or folder:PATH."""
    data_dir: str | None = aside(None)
    """Where the data sets lie; default $KD_DATA_DIR, else ./data."""
    download: bool = aside(False)
    """Fetch the data set if it is not there (needs a network)."""
    image_size: int | None = Field(default=None, ge=4, le=1024)
    """Side of the images in pixels; default: the data set's own."""
    augment: Augment = "auto"
    """Training augmentation: crop (zero-pad, random crop, flip), flip, resized-crop, rotation (20 degrees, flip), none;
    auto is crop up to 96 pixels and resized-crop above."""
    rand_augment: str | None = None
    """RandAugment behind it, as timm's policy string, for example rand-m9-mstd0.5-inc1."""
    color_jitter: float = Field(default=0.0, ge=0)
    """Random brightness, contrast and saturation, each by a factor within 1 ± this; as in timm not where RandAugment
    changes the colours already (unless its set of operations is 3a)."""
    erasing: float = Field(default=0.0, ge=0, le=1)
    """Probability of erasing a rectangle of an image, filled with noise after normalisation (timm's mode pixel)."""
    mixup: float = Field(default=0.0, ge=0)
    """Blend pairs of images of a batch and their labels, the share drawn from Beta(a, a) with this a; 0 is off."""
    cutmix: float = Field(default=0.0, ge=0)
    """Paste a box of one image of a pair into the other, its area drawn from Beta(a, a) with this a; 0 is off."""
    mix_prob: float = Field(default=1.0, ge=0, le=1)
    """Probability that a batch is mixed, where mixup or cutmix is on."""
    mix_switch: float = Field(default=0.5, ge=0, le=1)
    """Probability of cutmix where mixup and cutmix are both on."""
    train_fraction: float = Field(default=1.0, gt=0, le=1)
    """Share of the training images used, stratified by class; the teacher sees the same share."""
    ratio: float = Field(default=1.0, gt=0, le=1)
    """Few-shot ratio: share of the training images the student sees; the teacher still sees all of them."""
    val_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training images held out for validation, seeded and stratified."""
    split_seed: int = Field(default=0, ge=0)
    """Seed of the stratified splits; the same for every method and seed, so that all see the same images."""
    resident_mib: int = aside(2048, ge=0)
    """Data sets up to this size (MiB, decoded) are held on the device and augmented there; larger ones stream. Where that
    changes the images (folder: up to 96 pixels, tinyimagenet, other sizes than a set's own), it is another run."""

    @field_validator("dataset")
    @classmethod
    def _known_dataset(cls, value: str) -> str:
        return canonical_dataset(value)

    @field_validator("rand_augment")
    @classmethod
    def _known_policy(cls, value: str | None) -> str | None:
        if value is None or (_POLICY.fullmatch(value) and len(_keys(value)) == len(set(_keys(value)))):
            return value
        raise ValueError(f"{value!r} is no RandAugment policy of timm, for example rand-m9-mstd0.5-inc1")

    @property
    def identifying(self) -> dict[str, Any]:
        """`resident_mib`, where it brings the images to their size in another way than its default would."""
        size = default_size(self.dataset) if self.image_size is None else self.image_size
        usual = type(self).model_fields["resident_mib"].default
        ways = [preparation(self.dataset, size, mib) for mib in (self.resident_mib, usual)]
        return {} if ways[0] == ways[1] else {"resident_mib": self.resident_mib}

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed, so that targets are shares of the classes."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)


def _keys(policy: str) -> list[str]:
    """The parts that a policy sets, without their values."""
    return [re.match(r"t|[a-z]+", part)[0] for part in policy.split("-")[1:]]  # type: ignore[index]

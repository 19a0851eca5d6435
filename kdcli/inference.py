"""From a trained network to class logits: input scale, joint head, and the three ways of inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.errors import IncompatibleError, UsageError, nearest
from kdcli.transforms import INFERENCE, expand, fold, rescale, views


@dataclass(frozen=True)
class Use:
    """How a network is to be used.

    Attributes:
        transform: what spans its joint label space; `none` if its outputs are the K classes.
        scale: how much its input is enlarged per side.
        scale_mode: interpolation of the enlargement.
    """

    transform: str = "none"
    scale: int = 1
    scale_mode: str = "bilinear"

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> Use:
        """Read from a checkpoint's `inference` entry; an absent one is a plain classifier."""
        return cls(**metadata.get("inference", {}))

    @property
    def modes(self) -> tuple[str, ...]:
        """The inference modes that differ for this network: all three with a joint head, else only `single`."""
        return INFERENCE if views(self.transform) > 1 else ("single",)


def class_logits(network: nn.Module, images: Tensor, use: Use, modes: tuple[str, ...]) -> dict[str, Tensor]:
    """Class logits [B,K] for each mode, from normalised images [B,C,H,W].

    The un-transformed view is computed once for all modes; the other M-1 views only for `aggregate`. Views are passed
    one by one, so memory stays that of one batch.
    """
    m = views(use.transform)
    enlarged = rescale(images, use.scale, use.scale_mode)
    first = network(enlarged).float()
    result = {mode: fold(first, m, mode) for mode in modes if mode != "aggregate" or m == 1}
    if "aggregate" in modes and m > 1:
        rows = expand(enlarged, use.transform)
        joint = [first, *(network(_like(rows[i::m], images)).float() for i in range(1, m))]
        result["aggregate"] = fold(torch.stack(joint, 1).flatten(0, 1), m, "aggregate")
    return {mode: result[mode] for mode in modes}


def _like(view: Tensor, images: Tensor) -> Tensor:
    """`view` contiguous in the memory format of `images`."""
    last = images.is_contiguous(memory_format=torch.channels_last)
    return view.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class Classifier(nn.Module):
    """A trained network with its preprocessing and class names: what `kdcli.load` returns.

    `forward` takes float images in 0..1 or uint8 images, [B,3,H,W] at `image_size`, and returns class logits [B,K].

    Raises:
        UsageError: an unknown inference mode.
        IncompatibleError: the metadata has no normalisation (a foreign checkpoint imported without its data set).
    """

    def __init__(self, network: nn.Module, use: Use, metadata: dict[str, Any], inference: str = "single") -> None:
        super().__init__()
        if inference not in INFERENCE:
            raise UsageError(f"no inference mode {inference!r}", field="inference", hint=nearest(inference, INFERENCE))
        self.network, self.use, self.inference = network, use, inference
        self.metadata = metadata
        self.classes: tuple[str, ...] = tuple(metadata["classes"])
        self.image_size: int = metadata["image_size"]
        normalization = metadata["normalization"]
        if normalization is None:
            raise IncompatibleError(
                "the checkpoint does not say how its images were normalised", hint="import it again with --dataset"
            )
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(normalization["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(normalization["std"]).view(1, 3, 1, 1), persistent=False)

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 or 0..1 float images [B,3,H,W] → normalised float images."""
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images
        return (scaled - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        return class_logits(self.network, self.preprocess(images), self.use, (self.inference,))[self.inference]

"""From an image file to the pixels a network sees, as in its own evaluation. Normalising them is the network's part."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcli.data.dataset import Split
from kdcli.data.decode import read_tensor
from kdcli.data.resize import resize
from kdcli.data.transforms import Evaluation, evaluated_side
from kdcli.errors import InputError


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before its pixels are normalised.

    Attributes:
        size: side in pixels of the square that is left.
        side: what the shorter side is brought to first (bilinear, antialiased), in pixels; at least `size`.
    """

    size: int
    side: int

    @classmethod
    def of(cls, metadata: dict[str, Any]) -> Preprocessing:
        """Read from a network's metadata; those of an early kd, or of an imported network, do not name the side."""
        size, side = metadata["image_size"], metadata.get("resize")
        if side is None:
            kind = str(metadata.get("dataset") or "folder").partition(":")[0]
            side = evaluated_side(size, files=kind in ("folder", "imagenet"))
        return cls(size, max(size, side))

    def described(self) -> dict[str, Any]:
        """The same in words and numbers, for those who do it with another program."""
        return {
            "colours": "RGB",
            "resize_shorter_side": self.side,
            "interpolation": "bilinear, antialiased",
            "crop": "centre",
            "size": self.size,
        }

    def read(self, path: str | os.PathLike[str]) -> Tensor:
        """An image file as uint8 [3,size,size].

        Raises:
            InputError: it is missing, no regular file, or no image that can be used.
        """
        try:
            regular = stat.S_ISREG(os.stat(path).st_mode)  # a FIFO would be waited for without end
        except (OSError, ValueError) as problem:
            reason = getattr(problem, "strerror", None) or str(problem)
            raise InputError(f"{os.fspath(path)} cannot be read: {reason}") from None
        if not regular:
            raise InputError(f"{os.fspath(path)} is not a file")
        return Evaluation(self.size, self.side)(read_tensor(path))

    def of_split(self, split: Split) -> Tensor:
        """All images of a (small) split as uint8 [N,3,size,size]."""
        if split.images is not None:
            return resize(split.images, self.size, self.size)
        assert split.paths is not None
        return torch.stack([self.read(path) for path in split.paths])

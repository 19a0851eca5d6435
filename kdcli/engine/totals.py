"""An epoch's running sums, on the device: read once an epoch, so that the host never waits for a step."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcli.engine.step import StepOutput

FOLLOWED = "followed."
"""In front of the names of values that are not terms of the loss."""


class Totals:
    """Sums over the images of an epoch, by name, each float64 [].

    They are added to in place, since a recorded step (`engine.record`) writes to the same memory whenever it is replayed.

    Attributes:
        values: terms of the loss and followed values (`FOLLOWED` in front), each times its images; how many were `correct`;
            and how many `images` there were.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.values: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Begin a new epoch."""
        for value in self.values.values():
            value.zero_()

    def add(self, output: StepOutput, count: int) -> None:
        """Add what a step gave for `count` images: its means, weighted by them."""
        for name, value in output.terms.items():
            self._add(name, value.double() * count)
        for name, value in output.followed.items():
            self._add(f"{FOLLOWED}{name}", value.double() * count)
        self._add("correct", output.correct.double() if count else output.correct.double() * 0)
        self._add("images", torch.full((), float(count), dtype=torch.float64, device=self.device))

    def _add(self, name: str, value: Tensor) -> None:
        if name in self.values:
            self.values[name] += value
        else:
            self.values[name] = value

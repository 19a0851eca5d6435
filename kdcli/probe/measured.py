"""What a probe measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measured:
    """What a probe measured.

    Attributes:
        metrics: split → metrics of the last epoch.
        best: the best metrics on the test set over the epochs; a labelled extra, never *the* number.
        seconds: of training and evaluation.
    """

    metrics: dict[str, dict[str, Any]]
    best: dict[str, Any] | None
    seconds: float

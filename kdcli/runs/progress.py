"""How far a training is, as it stands in the files of its run. Imports no torch.

The files may come from anyone: what does not look as it should counts as not there.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdcli import durable
from kdcli.errors import InputError

FILE = "progress.json"
"""In the folder of the resume states, so that it goes when they go."""


class Best(BaseModel):
    """The best top-1 on the test set so far, percent, and its epoch."""

    model_config = ConfigDict(strict=True)

    top1: float
    epoch: int


class Now(BaseModel):
    """Where a session stands.

    Attributes:
        phase: `training`, or what else it does.
        step, steps: optimiser steps done, and in the whole run.
        terms: means over the epoch so far of the loss's terms, by name (of the first rank's images).
        images_per_second, eta_seconds: of this session.
        peak_mib: the most memory used; null where it could not be told from that of an earlier run of the process.
        best: the best top-1 on the test set, percent, and its epoch.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    title: str
    phase: str
    epoch: int
    epochs: int
    step: int = Field(ge=0)
    steps: int = Field(ge=1)
    terms: dict[str, float]
    lr: float
    images_per_second: float
    eta_seconds: int | None = Field(ge=0, le=10**10)
    peak_mib: float | None
    best: Best | None

    def facts(self) -> list[str]:
        """For people: epoch, step, losses by term, learning rate, speed, time left, memory, best top-1."""
        parts = [f"epoch {self.epoch}/{self.epochs}", f"step {self.step}/{self.steps}"]
        parts += [self.phase] if self.phase != "training" else []
        parts += [f"{name} {value:.4g}" for name, value in self.terms.items()]
        parts += [f"lr {self.lr:.3g}", f"{self.images_per_second:.0f} img/s"]
        parts += [] if self.eta_seconds is None else [f"{timedelta(seconds=self.eta_seconds)} left"]
        parts += [] if self.peak_mib is None else [f"{self.peak_mib:.0f} MiB"]
        parts += [] if self.best is None else [f"best {self.best.top1:.2f} % (epoch {self.best.epoch})"]
        return parts


def read_now(path: Path) -> Now | None:
    """What the session under way has written; None if there is nothing, or nothing that makes sense."""
    try:
        return Now.model_validate(durable.read_json(path))
    except (InputError, ValidationError):
        return None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of `metrics.jsonl` that make sense; none if there is no log."""
    try:
        with open(durable.open_regular(path), "rb") as file:
            content = file.read()
    except (InputError, OSError):
        return []
    found = []
    for line in content.split(b"\n")[:-1]:  # what follows the last newline is torn
        with contextlib.suppress(ValueError, RecursionError):
            values = durable.strict_json(line)
            if isinstance(values, dict) and isinstance(values.get("step"), int):
                found.append(values)
    return found

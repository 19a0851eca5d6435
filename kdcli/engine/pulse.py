"""Where a training is right now: a line for the terminal, and a small file for `kd watch`, rewritten every few seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcli import durable
from kdcli.engine import distributed
from kdcli.engine.device import Device
from kdcli.engine.totals import FOLLOWED, Totals
from kdcli.errors import WriteError
from kdcli.runs.progress import FILE, Best, Now

_EVERY = 2.0  # seconds between writes
_REREAD = 1.0  # seconds between looks at the losses: on a GPU each look waits for the device


class Pulse:
    """Follows one session of a training.

    Args:
        folder: of the resume states.
        begun: the step at which this session began; speed and remaining time are its own.
        rate: step → learning rate.
    """

    def __init__(
        self,
        folder: Path,
        title: str,
        *,
        begun: int,
        steps: int,
        per_epoch: int,
        epochs: int,
        totals: Totals,
        device: Device,
        rate: Callable[[int], float],
    ) -> None:
        self._file, self._title, self._begun, self._steps = folder / FILE, title, begun, steps
        self._per_epoch, self._epochs = per_epoch, epochs
        self._totals, self._device, self._rate = totals, device, rate
        self._started = self._written = time.monotonic()
        self._losses: dict[str, float] = {}
        self._looked = float("-inf")
        self._at, self._images, self._phase = begun, 0, "training"
        self._best: dict[str, Any] | None = None

    def beat(self, at: int, images: int, best: dict[str, Any] | None, phase: str = "training") -> None:
        """`at` steps are done, and `images` of this session seen; writes the file when it is time."""
        self._at, self._images, self._best, self._phase = at, images, best, phase
        if time.monotonic() - self._written >= _EVERY and distributed.rank() == 0:
            self._written = time.monotonic()
            with contextlib.suppress(WriteError):  # no training ends because nobody can watch it
                durable.write_bytes(self._file, self._now().model_dump_json().encode(), sync=False)

    def line(self) -> str:
        """All of it on one line, for people."""
        return "  ".join(self._now().facts())

    def _now(self) -> Now:
        seconds, done = time.monotonic() - self._started, self._at - self._begun
        best = self._best
        # Unchecked: no training ends because of what is told about it.
        return Now.model_construct(
            title=self._title,
            phase=self._phase,
            epoch=min(self._epochs, max(self._at - 1, 0) // self._per_epoch + 1),
            epochs=self._epochs,
            step=self._at,
            steps=self._steps,
            terms=self._means(),
            lr=self._rate(max(self._at - 1, 0)),
            images_per_second=round(self._images / max(seconds, 1e-9), 1),
            eta_seconds=min(round(seconds / done * (self._steps - self._at)), 10**9) if done else None,
            peak_mib=self._device.peak_mib(),
            best=None if best is None else Best.model_construct(top1=best["top1"], epoch=best["epoch"]),
        )

    def _means(self) -> dict[str, float]:
        if time.monotonic() - self._looked >= _REREAD:
            self._looked = time.monotonic()
            sums = {name: value.item() for name, value in self._totals.values.items() if not name.startswith(FOLLOWED)}
            images = max(sums.pop("images", 0.0), 1.0)
            sums.pop("correct", None)
            self._losses = {name: round(value / images, 6) for name, value in sums.items()}
        return self._losses

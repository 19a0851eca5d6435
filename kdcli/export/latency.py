"""How long an answer takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

BATCHES = (1, 32)
_SECONDS, _FEWEST, _MOST = 0.3, 5, 50


@torch.no_grad()
def milliseconds(run: Callable[[Tensor], Tensor], image_size: int) -> dict[str, float]:
    """Milliseconds an image, by batch size: the median of 5 to 50 passes (as many as fit in 0.3 s) behind two others."""
    found = {}
    for batch in BATCHES:
        images = torch.randint(0, 256, (batch, 3, image_size, image_size), dtype=torch.uint8)
        for _ in range(2):  # they pay for memory and the choice of kernels
            run(images)
        times: list[float] = []
        while len(times) < _FEWEST or (sum(times) < _SECONDS and len(times) < _MOST):
            started = time.perf_counter()
            run(images)
            times.append(time.perf_counter() - started)
        found[str(batch)] = round(1000 * statistics.median(times) / batch, 4)
    return found

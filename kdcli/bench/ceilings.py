"""What the device can do at best, measured in the same minutes as the training: one product, one copy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kdcli.engine.device import Device

_SIDES = {False: (256, 512, 1024), True: (2048, 4096, 8192)}  # on the CPU, on a GPU
_COPY = {False: 32 * 2**20, True: 512 * 2**20}  # floats: larger than any cache
_SECONDS = {False: 0.04, True: 0.02}  # of repetition, for each product and the copy


@dataclass
class Ceilings:
    """The best seen so far.

    Attributes:
        macs: multiply-accumulates a second of a square matrix product in the precision of the networks.
        side: of that product's matrices.
        bytes: bytes a second, read and written, of a large copy.
    """

    macs: float = 0.0
    side: int = 0
    bytes: float = 0.0


class Prober:
    """Measures the ceilings again and again and keeps the best, since other work on a machine can only slow them."""

    def __init__(self, device: Device) -> None:
        self.device, self.best = device, Ceilings()
        dtype = torch.bfloat16 if device.precision == "bf16" else torch.float32
        place: dict[str, Any] = {"device": device.torch, "dtype": dtype}
        self._triples = [tuple(torch.randn(n, n, **place) for _ in range(3)) for n in _SIDES[device.cuda]]
        self._source = torch.ones(_COPY[device.cuda], device=device.torch)
        self._target = torch.empty_like(self._source)

    def probe(self) -> Ceilings:
        """Measure once more; the best so far."""
        with torch.no_grad(), _as_convolutions(self.device):
            for a, b, out in self._triples:
                seconds = self._shortest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
                side = a.shape[0]
                if side**3 / seconds > self.best.macs:
                    self.best.macs, self.best.side = side**3 / seconds, side
            seconds = self._shortest(lambda: self._target.copy_(self._source))
            self.best.bytes = max(self.best.bytes, 2 * self._source.nbytes / seconds)
        return self.best

    def _shortest(self, function: Callable[[], object]) -> float:
        """The shortest time of `function`, repeated for a while."""
        function()
        self.device.synchronize()
        shortest, until = float("inf"), time.perf_counter() + _SECONDS[self.device.cuda]
        while True:
            began = time.perf_counter()
            function()
            self.device.synchronize()
            now = time.perf_counter()
            shortest = min(shortest, now - began)
            if now >= until:
                return shortest


@contextlib.contextmanager
def _as_convolutions(device: Device) -> Iterator[None]:
    """Let products use TF32 where cuDNN's convolutions do: a ceiling that the work can pass would be none."""
    if not device.cuda:
        yield
        return
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before

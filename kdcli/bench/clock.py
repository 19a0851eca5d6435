"""Where the time of a training step goes, seen from inside the step that training takes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kdcli.engine.fit import Training


class Clock:
    """Seconds by name.

    Args:
        wait: called before each look at the clock, to wait for the device.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait
        self.seconds = {"data": 0.0, "compute": 0.0, "optimiser": 0.0}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time added to `name`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.wait()
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.wait()
            self.seconds[name] += time.perf_counter() - began
            return result

        return run

    @contextlib.contextmanager
    def watching(self, training: Training) -> Iterator[None]:
        """Time the forward pass, the backward pass (both `compute`) and the optimiser of every step taken inside.

        Steps are taken unrecorded meanwhile: a CUDA graph has no inside to look at.
        """
        update, optimizer, recorder = training.update, training.optimizer, training.take
        forward, backward, recording = update.forward, torch.Tensor.backward, recorder.enabled
        update.forward = self.timed("compute", forward)
        torch.Tensor.backward = self.timed("compute", backward)  # type: ignore[method-assign]
        optimizer.step = self.timed("optimiser", optimizer.step)  # type: ignore[method-assign]
        recorder.enabled = False
        try:
            yield
        finally:
            update.forward, recorder.enabled = forward, recording
            torch.Tensor.backward = backward  # type: ignore[method-assign]
            del optimizer.step  # the class's own again

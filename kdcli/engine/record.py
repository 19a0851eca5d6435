"""CUDA graphs: the kernels of a step, recorded once and launched together; a small network waits for the host otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from kdcli.data.loader import Batch
from kdcli.engine.step import StepOutput
from kdcli.engine.update import Update

_WARM = 3  # steps of a kind taken as they are first: kernels are chosen, the optimiser's memory is made


class Recorder:
    """Takes the steps of an `Update`, from a recording where there can be one.

    A step can be recorded if all that differs between it and the next one of its kind is in tensors. A method says so with
    `Method.variant`; batches of another size are another kind. The first steps of a kind, and every one of a method that
    decides on the host, run as they are. So do all steps once CUDA has refused to record one (said once).

    Whoever trains does so on a stream of its own (`Device.stream`): CUDA does not record the default one.

    Args:
        tell: takes one line for the user.
    """

    def __init__(self, update: Update, tell: Callable[[str], None]) -> None:
        self.update, self.tell = update, tell
        self.enabled = True
        self._recordings: dict[Hashable, _Recording] = {}
        self._seen: Counter[Hashable] = Counter()
        self._pool: Any = None

    def __call__(self, batch: Batch, variant: Hashable | None, *, odd: bool, seed: int) -> StepOutput:
        """Take the step; what its last part gave (of a recording: the memory that the next step overwrites)."""
        if not self.enabled or variant is None:
            return self.update(batch, odd=odd, seed=seed)
        kind = (variant, _shapes(batch))
        if kind not in self._recordings:
            self._seen[kind] += 1
            if self._seen[kind] <= _WARM or not self._record(kind, batch, odd=odd):
                return self.update(batch, odd=odd, seed=seed)
        return self._recordings[kind].replay(batch)

    def _record(self, kind: Hashable, batch: Batch, *, odd: bool) -> bool:
        graph, held = torch.cuda.CUDAGraph(), _map(torch.clone, batch)
        try:
            # thread_local: a worker's thread that pins memory meanwhile does no harm.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
            ):
                output = self.update(held, odd=odd, seed=0)
        except RuntimeError as problem:
            self.enabled = False
            reason = (str(problem).splitlines() or ["unknown reason"])[0]
            self.tell(f"the step cannot be recorded as a CUDA graph ({reason}); it runs unrecorded")
            return False
        # One pool for all: what a recording allocates is dead when the next one runs.
        self._pool = graph.pool()
        self._recordings[kind] = _Recording(graph, held, output)
        return True


class _Recording:
    """A recorded step, with the memory it reads its batch from."""

    def __init__(self, graph: torch.cuda.CUDAGraph, batch: Batch, output: StepOutput) -> None:
        self.graph, self.batch, self.output = graph, batch, output

    def replay(self, batch: Batch) -> StepOutput:
        for held, given in zip(_tensors(self.batch), _tensors(batch), strict=True):
            held.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.output


def _tensors(batch: Batch) -> list[Tensor]:
    soft = [] if batch.soft is None else [batch.soft]
    return [batch.images, batch.labels, batch.index, *batch.extra, *soft]


def _shapes(batch: Batch) -> Hashable:
    return (*(tuple(x.shape) for x in _tensors(batch)), batch.weight)


def _map(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """The batch with `function` applied to each of its tensors."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value)
        return tuple(map(function, value)) if isinstance(value, tuple) else value

    return Batch(**{field.name: of(getattr(batch, field.name)) for field in fields(batch)})

"""Teacher and student by themselves: what a step would cost without the method between them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli.bench.ours import Ours


class Alone:
    """Passes of teacher and student on one batch of the run, compiled if the run is.

    The whole batch at once, also where the run takes it in parts (`accumulate`).
    """

    def __init__(self, ours: Ours, *, compiled: bool) -> None:
        device, parts, method = ours.device, ours.parts, ours.parts.step.method
        batch, progress = ours.batch(), ours.progress()
        student, teacher = parts.student, parts.teacher
        self.device, self._student, self.taught = device, student, teacher is not None
        with torch.no_grad(), device.autocast():
            views = method.student_views(batch, progress)
        labels = torch.arange(len(views), device=device.torch) % student.outputs

        def teach() -> list[Tensor]:
            if teacher is None:
                return []
            with torch.no_grad(), device.autocast():
                features = method.teacher_features(teacher, method.teacher_views(batch, progress))
            # A compiler leaves out what nobody asks for.
            return [features.logits, *features.heads, *(other.logits for other in features.assistants)]

        def learn() -> Tensor:
            with device.autocast():
                logits = student(views)
            return F.cross_entropy(logits.float(), labels)

        self._teach: Callable[[], list[Tensor]] = torch.compile(teach, dynamic=False) if compiled else teach
        self._learn: Callable[[], Tensor] = torch.compile(learn, dynamic=False) if compiled else learn

    def teacher(self, times: int) -> float:
        """Seconds of the teacher's views and forward pass; 0 without a teacher."""
        return self._each(self._teach, times) if self.taught else 0.0

    def student(self, times: int) -> float:
        """Seconds of the student's forward and backward pass with a plain cross-entropy, on all the views it sees."""

        def learn() -> None:
            self._student.zero_grad(set_to_none=True)
            self._learn().backward()

        return self._each(learn, times)

    def _each(self, function: Callable[[], object], times: int) -> float:
        """Mean seconds, the device waited for each time, as where the parts of a step are timed."""
        self.device.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            function()
            self.device.synchronize()
        return (time.perf_counter() - began) / times

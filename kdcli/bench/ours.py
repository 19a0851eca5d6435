"""Training as `kd distill` does it, step by step and without a run directory to write to."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcli.bench.clock import Clock
from kdcli.bench.parts import Parts
from kdcli.building import make_loader
from kdcli.data.dataset import DataSet
from kdcli.data.loader import Batch
from kdcli.data.randomness import mix
from kdcli.engine import optim
from kdcli.engine.device import Device
from kdcli.engine.fit import Job, Training
from kdcli.engine.signals import StopFlag
from kdcli.engine.step import StepOutput
from kdcli.methods.base import Progress
from kdcli.output import Story
from kdcli.runs.directory import Run
from kdcli.specs import RunSpec

_WARM = {False: 2, True: 12}  # steps, on the CPU and on a GPU, where a step is recorded after a few of its kind
_WATCHED = 10  # on a GPU every tenth step is timed part by part


@dataclass(frozen=True)
class Round:
    """Seconds a step.

    Attributes:
        step: of an undisturbed step.
        parts: `data`, `compute` (forward and backward passes, losses) and `optimiser`.
        whole: of the steps whose parts were timed; on the CPU they are the same steps.
    """

    step: float
    parts: dict[str, float]
    whole: float


class Ours:
    """The engine's own loop body, update, optimiser, step and loader.

    It stands in the middle of its training, where warm-ups are over. Nothing is saved or evaluated.

    Args:
        tell: takes one line for the user.
    """

    def __init__(self, spec: RunSpec, dataset: DataSet, parts: Parts, device: Device, tell: Callable[[str], None]):
        self.parts, self.device, self.batch_size = parts, device, spec.train.batch_size
        if parts.teacher is not None:
            device.place(parts.teacher)
        self.loader = make_loader(spec, dataset, dataset.train, device, train=True)
        story = _Told(tell)
        stop = StopFlag(None, False)
        # A new run is only written to when it saves, which this one never does: the directory is never made.
        nowhere = Path(tempfile.gettempdir(), f"kd-bench-{secrets.token_hex(8)}")
        job = Job(
            Run(nowhere, "new", "", spec), parts.step, parts.use, device, self.loader, {}, spec.train, story, stop, ""
        )
        self.training = Training(job)
        self.training.session_images = 0
        self._restart()
        self.training.module.train()
        self._batches = self._endless()

    def _restart(self) -> None:
        self.training.at = self.training.total // 2
        self.training.started = self.training.saved = time.monotonic()

    def _endless(self) -> Iterator[Batch]:
        """Full batches, epoch after epoch: a last, smaller one would be another amount of work."""
        epoch = 0
        while True:
            for batch in self.loader.epoch(epoch):
                if len(batch.labels) == self.batch_size:
                    yield batch
            epoch += 1

    def batch(self) -> Batch:
        """The next batch."""
        return next(self._batches)

    def progress(self) -> Progress:
        """Where the training stands, as the loop would say it to the step."""
        training = self.training
        rate = optim.rate(training.recipe, training.at, training.per_epoch)
        training.update.moment(training.at, training.total, training.per_epoch, rate)
        return training.update.progress(odd=bool(training.at % 2), seed=mix(training.spec.seed, "batch", training.at))

    def step(self, batch: Batch) -> None:
        """Everything the loop does with a batch between two evaluations, saving aside."""
        training = self.training
        if training.at + 1 >= training.total:
            self._restart()
        training.step(training.at // training.per_epoch, batch)
        training.stop_code()
        training.save_due()

    def loss(self, batch: Batch) -> float:
        """Take a step; its loss before the update."""
        training, take = self.training, self.training.take
        outputs: list[float] = []

        def noting(*args: Any, **kwargs: Any) -> StepOutput:
            output = take(*args, **kwargs)
            outputs.append(output.total.item())
            return output

        training.take = noting  # type: ignore[assignment]
        try:
            self.step(batch)
        finally:
            training.take = take
        return outputs[0]

    def warm_up(self) -> tuple[float, float]:
        """Take a few steps: the seconds of the first, which compiles, and of a later one."""
        first = self._run(1, self.batch)
        self._run(_WARM[self.device.cuda] - 2, self.batch)
        return first, self._run(1, self.batch)

    def _run(self, steps: int, batch: Callable[[], Batch]) -> float:
        """Seconds that `steps` steps take."""
        self.device.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            self.step(batch())
        self.device.synchronize()
        return time.perf_counter() - began

    def round(self, steps: int) -> Round:
        """Time `steps` steps.

        Timing the parts costs nothing on the CPU. A GPU works behind the host's back, replays recorded steps whole, and
        knowing when a part is done means waiting for it: there the parts are those of further steps, which take longer.
        """
        if not self.device.cuda:
            parts, whole = self._split(steps)
            return Round(whole, parts, whole)
        undisturbed = self._run(steps, self.batch) / steps
        parts, whole = self._split(max(3, steps // _WATCHED))
        return Round(undisturbed, parts, whole)

    def _split(self, steps: int) -> tuple[dict[str, float], float]:
        clock = Clock(self.device.synchronize)
        with clock.watching(self.training):
            whole = self._run(steps, clock.timed("data", self.batch))
        return {name: seconds / steps for name, seconds in clock.seconds.items()}, whole / steps

    def close(self) -> None:
        """End the loader's workers."""
        self.loader.close()


class _Told(Story):
    """A story without progress whose notes go elsewhere: a bar that moves is no part of what is timed."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(quiet=True)
        self._tell = tell

    def note(self, text: str) -> None:
        self._tell(text)

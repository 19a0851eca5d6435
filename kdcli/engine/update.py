"""One optimiser step: forward and backward pass, running sums, the guard against NaN, the update."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from kdcli.data.loader import Batch
from kdcli.engine import distributed
from kdcli.engine.device import Device
from kdcli.engine.step import Step, StepOutput
from kdcli.engine.totals import Totals
from kdcli.errors import NotFiniteError
from kdcli.methods.base import Progress
from kdcli.specs import TrainSpec

_READ_EVERY = 50  # steps between looks at the device's not-finite flag on a GPU


class Update:
    """A step's work, apart from choosing the batch and the rate.

    On a GPU nothing in a call waits for the device, and all that changes from step to step is in tensors: so a call can be
    recorded once and replayed (`engine.record`).

    Args:
        forward: the step as it is called: compiled, synchronised over ranks, or `step` itself.
        totals: to which every part's terms are added.
        state: where the last good state is, for the message.
    """

    def __init__(
        self,
        step: Step,
        forward: Callable[[Batch, Progress], StepOutput],
        optimizer: torch.optim.Optimizer,
        recipe: TrainSpec,
        device: Device,
        totals: Totals,
        state: Path,
    ) -> None:
        self.step, self.forward, self.optimizer, self.totals = step, forward, optimizer, totals
        self.recipe, self.device, self.state = recipe, device, state
        place = device.torch
        self.epoch, self.fraction = torch.ones((), device=place), torch.zeros((), device=place)
        self.at = torch.zeros((), dtype=torch.int64, device=place)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=place)

    def moment(self, at: int, total: int, per_epoch: int, rate: float) -> None:
        """Say where training stands and how fast it learns: step `at` of `total`. A fill is no copy, so nothing waits."""
        self.at.fill_(at)
        self.epoch.fill_(at // per_epoch + 1)
        self.fraction.fill_(at / total)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def progress(self, *, odd: bool, seed: int) -> Progress:
        """Where training stands, as a method sees it."""
        return Progress(self.epoch, self.fraction, odd, seed)

    def __call__(self, batch: Batch, *, odd: bool, seed: int) -> StepOutput:
        """Take the step; what its last part gave.

        Raises:
            NotFiniteError: on the CPU, before the update. On a GPU `check` says it.
        """
        self.optimizer.zero_grad(set_to_none=True)
        pieces = parts(batch, self.recipe.accumulate)
        count = batch.labels.shape[0]
        bad = torch.zeros((), dtype=torch.bool, device=self.device.torch)
        output: StepOutput | None = None
        for number, part in enumerate(pieces):
            share = part.labels.shape[0] / count * batch.weight
            with _no_sync(self.forward, number < len(pieces) - 1):
                output = self.forward(part, self.progress(odd=odd, seed=seed + number))
                (output.total if share == 1 else output.total * share).backward()
            bad |= ~torch.isfinite(output.total.detach())
            # Weight 0: a sample that only keeps a rank busy.
            self.totals.add(output, part.labels.shape[0] if batch.weight else 0)
        assert output is not None
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm(gradients)
        bad |= ~torch.isfinite(norm)
        self._guard(bad, output)
        if self.recipe.clip_grad is not None:
            torch._foreach_mul_(gradients, (self.recipe.clip_grad / (norm + 1e-6)).clamp(max=1.0))
        self.optimizer.step()
        return output

    def _guard(self, bad: Tensor, output: StepOutput) -> None:
        """Stop before the update if anything is not finite.

        On the CPU the flag is read at once. On a GPU the fused optimiser skips the update from the first step on for which
        the flag is set, and the host reads that step now and then, see `check`.
        """
        if distributed.world() > 1:
            bad = ~distributed.all_true(~bad)
        if not self.device.cuda:
            if bool(bad):
                raise self._not_finite(int(self.at), output)
            return
        self.first_bad.copy_(torch.where((self.first_bad < 0) & bad, self.at, self.first_bad))
        self.optimizer.found_inf = (self.first_bad >= 0).float()  # type: ignore[attr-defined]

    def check(self, at: int | None = None, output: StepOutput | None = None) -> None:
        """Read the flag of a GPU: every 50 steps if `at` (steps done) is given, else now.

        Raises:
            NotFiniteError: some step was not finite. No update was applied since.
        """
        if not self.device.cuda or (at is not None and at % _READ_EVERY):
            return
        if (step := int(self.first_bad.item())) >= 0:
            raise self._not_finite(step, output)

    def _not_finite(self, step: int, output: StepOutput | None) -> NotFiniteError:
        terms = [] if output is None else [n for n, t in output.terms.items() if not bool(torch.isfinite(t))]
        if terms:
            what = f"the loss term {' and '.join(terms)}"
        else:
            names = [n for n, p in self.step.named_parameters() if p.grad is not None and not _finite(p.grad)]
            what = f"the gradient of {names[0]}" if names else "a gradient"
        return NotFiniteError(
            f"{what} is not finite at step {step}; the update was not applied, the last good state is in {self.state}",
            hint="a smaller --lr, --clip-grad, or --precision fp32",
        )


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def parts(batch: Batch, count: int) -> list[Batch]:
    """The batch cut into at most `count` parts of nearly equal size, into equally many on every rank.

    Ranks that hold an image more or less than others must not take another number of parts: each part may talk to the
    other ranks.
    """
    n = batch.labels.shape[0]
    ranks = distributed.world()
    if ranks > 1:  # the share of the smallest part of the batch, which every rank can tell from its own
        whole = round(n * ranks / batch.weight) if batch.weight else 0
        count = min(count, max(1, whole // ranks))
    if count == 1 or n == 1:
        return [batch]
    cuts = [round(i * n / count) for i in range(count + 1)]
    return [
        Batch(
            batch.images[a:b],
            batch.labels[a:b],
            batch.index[a:b],
            batch.weight,
            tuple(x[a:b] for x in batch.extra),
            None if batch.soft is None else batch.soft[a:b],
        )
        for a, b in itertools.pairwise(cuts)
        if b > a
    ]


def _no_sync(forward: Any, more_to_come: bool) -> Any:
    """DDP's `no_sync` for all but the last part of an accumulated batch."""
    if more_to_come and isinstance(forward, DistributedDataParallel):
        return forward.no_sync()
    return torch.enable_grad()

"""The loop: every training run of every command, for any method.

It trains a `Step` on a loader, evaluates, keeps a resume state that makes a stopped run go on bit for bit, and returns
what was measured. It never asks which method it trains.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdcli import checkpoint, durable
from kdcli.data.loader import Batch, Loader
from kdcli.data.randomness import mix
from kdcli.engine import distributed, optim, state, trackers
from kdcli.engine.device import Device, guarded
from kdcli.engine.evaluate import evaluate
from kdcli.engine.pulse import Pulse
from kdcli.engine.record import Recorder
from kdcli.engine.signals import StopFlag, listening, stopped
from kdcli.engine.step import Step, StepOutput, deploy
from kdcli.engine.totals import FOLLOWED, Totals
from kdcli.engine.update import Update, parts
from kdcli.errors import IncompatibleError, InputError, NotFiniteError, UsageError
from kdcli.inference import Use
from kdcli.metadata import require_state
from kdcli.methods.base import Progress
from kdcli.models import winograd
from kdcli.output import Story
from kdcli.runs.directory import Run
from kdcli.specs import TrainSpec

_SAVE_SECONDS = 30.0


@dataclass
class Job:
    """Everything a training run is made of.

    Attributes:
        tests: what to evaluate on, by split name; `test` is never used to choose anything.
        recipe: how it is trained; the spec's, or what the method makes of it for its teacher.
        facts: what identifies the inputs (the teacher's digest, the classes); a resumed run must have the same.
    """

    run: Run
    step: Step
    use: Use
    device: Device
    train: Loader
    tests: dict[str, Loader]
    recipe: TrainSpec
    story: Story
    stop: StopFlag
    title: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Fitted:
    """What a finished run measured.

    Attributes:
        network: the trained network, with averaged weights where an average was kept.
        metrics: split → inference mode → metrics of the last epoch.
        companions: name → split → metrics of the last epoch, of the networks evaluated beside it.
        best: the best single-inference metrics on the test set over the epochs; a labelled extra, never *the* number.
    """

    network: nn.Module
    metrics: dict[str, dict[str, dict[str, Any]]]
    companions: dict[str, dict[str, dict[str, Any]]]
    best: dict[str, Any] | None
    seconds: float
    images_per_second: float
    steps: int


@dataclass
class _Measured:
    """What an evaluation gave: `metrics` and `companions` as in `Fitted`."""

    metrics: dict[str, dict[str, dict[str, Any]]]
    companions: dict[str, dict[str, dict[str, Any]]]


def fit(job: Job) -> Fitted:
    """Train `job.step` to the end of its recipe, continuing from the newest sound state of the run directory.

    Raises:
        Stopped: a signal or `--max-minutes` ended it early, after saving.
        NotFiniteError: a term, gradient or output became NaN or infinite; the update was not applied.
        WriteError: a state could not be written; the previous one is intact.
        OutOfMemoryError, WorkerError: as their names say.
    """
    with guarded(), listening(job.stop), job.device.stream():
        training = Training(job)
        with trackers.following(job.run, job.story) as training.tell:
            return training.run()


class Training:
    """The state of one call of `fit`; its loop body, `step`, can be driven from outside (`kd bench`)."""

    def __init__(self, job: Job) -> None:
        self.job, self.spec, self.recipe = job, job.run.spec, job.recipe
        recipe, device = job.recipe, job.device
        self.module = device.place(job.step)
        self.optimizer = optim.optimizer(recipe, self.module, device.cuda, job.step.undecayed())
        self.average = self._averaged() if recipe.ema is not None else None
        self.totals = Totals(device.torch)
        self.at = 0  # optimiser steps done
        self.lines = 0  # lines of metrics.jsonl written
        self.best: dict[str, Any] | None = None
        self.spent = 0.0  # seconds of training in earlier sessions
        self.per_epoch = job.train.steps
        self.total = recipe.epochs * self.per_epoch
        self.end = min(self.total, recipe.max_steps or self.total)
        self.tell: Callable[[dict[str, Any]], None] = lambda line: None
        self._resume()
        self.pulse = Pulse(
            job.run.state,
            job.title,
            begun=self.at,
            steps=self.end,
            per_epoch=self.per_epoch,
            epochs=recipe.epochs,
            totals=self.totals,
            device=device,
            rate=lambda at: optim.rate(recipe, at, self.per_epoch),
        )
        self.update = Update(job.step, self._wrapped(), self.optimizer, recipe, device, self.totals, job.run.state)
        self.take = Recorder(self.update, job.story.note)
        self.take.enabled = device.cuda and distributed.world() == 1 and self.spec.system.cuda_graphs

    def _averaged(self) -> AveragedModel:
        decay = self.recipe.ema
        assert decay is not None
        return AveragedModel(
            self.job.step.trained, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
        ).requires_grad_(False)

    def _wrapped(self) -> Callable[[Batch, Progress], StepOutput]:
        """The step as it is called: compiled if asked for, synchronised over ranks if there are several."""
        module: nn.Module = self.module
        compiled = self.spec.system.compile
        if compiled and not self.job.device.cuda and self.job.device.precision == "fp32":
            winograd.adopt(module, frozen=False)
            for network in self.job.step.frozen():
                winograd.adopt(network, frozen=True)
        if distributed.world() > 1 and any(p.requires_grad for p in module.parameters()):
            with warnings.catch_warnings():
                # Newer torch calls the argument forward_sync_buffers, which 2.10 does not know.
                warnings.simplefilter("ignore", FutureWarning)
                module = DistributedDataParallel(module, broadcast_buffers=False)
        # dynamic=False: a graph per batch size; a graph made general half-way would change the bits of a resumed run.
        return torch.compile(module, dynamic=False) if compiled else module

    # ------------------------------------------------------------------------------------------------------ the loop

    def run(self) -> Fitted:
        job, recipe, story = self.job, self.recipe, self.job.story
        self.started = self.saved = time.monotonic()
        self.session_images = 0
        if self.at == 0:
            self._save()  # a full or read-only disk shows itself now, and not after an epoch
        story.begin(job.title, self.end, self.at)
        first, evaluated = self.at // self.per_epoch, None
        if self.at > 0 and self.at % self.per_epoch == 0 and self.lines < first:
            first -= 1  # stopped between the last step of an epoch and its evaluation
        last_epoch = max(0, math.ceil(self.end / self.per_epoch) - 1)
        for epoch in range(first, last_epoch + 1):
            self._epoch(epoch)
            due = (epoch + 1) % recipe.eval_every == 0 or epoch == last_epoch
            evaluated = self._evaluate(epoch, job.use.modes if epoch == last_epoch else ("single",)) if due else None
            if self.lines <= epoch:
                self._record(epoch, evaluated)
        if evaluated is None:  # everything was done, only the summary was missing
            evaluated = self._evaluate(last_epoch, job.use.modes)
        story.end()
        seconds = self.spent + time.monotonic() - self.started
        speed = self.session_images / max(time.monotonic() - self.started, 1e-9)
        network = self.average.module if self.average is not None else job.step.trained
        return Fitted(network, evaluated.metrics, evaluated.companions, self.best, seconds, speed, self.at)

    def _epoch(self, epoch: int) -> None:
        """Train from where the epoch stands to its end, or to the last step of the run."""
        begun = self.at - epoch * self.per_epoch
        if begun >= self.per_epoch or self.at >= self.end:
            return
        if begun == 0:
            self.totals.clear()
        self.module.train()
        for batch in self.job.train.epoch(epoch, begun):
            self.step(epoch, batch)
            if code := self.stop_code():
                self._save()
                raise stopped(code, f"at step {self.at} of {self.end}")
            if self.save_due():
                self._save()
            if self.at >= self.end:
                break
        self.update.check()

    def step(self, epoch: int, batch: Batch) -> None:
        """Train on one batch of an epoch."""
        recipe, seed = self.recipe, self.spec.seed
        self.update.moment(self.at, self.total, self.per_epoch, optim.rate(recipe, self.at, self.per_epoch))
        # Dropout and its like draw from torch's own generator: seeded per step, a resumed run draws the same.
        torch.manual_seed(mix(seed, "step", self.at, distributed.rank()))
        odd = bool(self.at % 2)
        variant = self.job.step.variant(self.update.progress(odd=odd, seed=0))
        output = self.take(batch, variant, odd=odd, seed=mix(seed, "batch", self.at))
        if self.average is not None:
            self.average.update_parameters(self.job.step.trained)
        self.at += 1
        self.update.check(self.at, output)
        self.session_images += batch.labels.shape[0] * distributed.world()
        self.pulse.beat(self.at, self.session_images, self.best)
        self.job.story.step(self.at, self.pulse.line)

    def stop_code(self) -> int:
        """The stop flag; ranks agree on it every few steps, since asking costs a collective."""
        if distributed.world() == 1:
            return self.job.stop.code
        if self.at % 10 and self.at != self.end:
            return 0
        return distributed.any_of(self.job.stop.code, self.job.device.torch)

    # ------------------------------------------------------------------------------------------- evaluating, recording

    def _evaluate(self, epoch: int, modes: tuple[str, ...]) -> _Measured:
        network = deploy(self.average.module if self.average is not None else self.job.step.trained)
        distributed.share_buffers(network)  # each rank kept BatchNorm statistics of its own; the first's are exported

        def tick(done: int, of: int) -> None:
            self.pulse.beat(self.at, self.session_images, self.best, f"evaluating {done}/{of}")
            self.job.story.step(self.at, self.pulse.line)
            if distributed.world() == 1 and self.job.stop.signalled:
                code = self.job.stop.code
                self._save()
                raise stopped(code, f"at step {self.at} of {self.end}")

        def measure(module: nn.Module, use: Use, split: str, modes: tuple[str, ...]) -> dict[str, dict[str, Any]]:
            try:
                return evaluate(module, use, self.job.tests[split], self.job.device, modes, tick=tick).modes
            except NotFiniteError as problem:
                where = f"({split}) after step {self.at}; the last good state is in {self.job.run.state}"
                raise NotFiniteError(f"{problem.message} {where}", hint="a smaller --lr, or --clip-grad") from None

        metrics = {split: measure(network, self.job.use, split, modes) for split in self.job.tests}
        # They see the student's images. Those that share modules with the student leave it as they found it.
        plain = Use(transform="none", scale=1, scale_mode=self.job.use.scale_mode)
        companions: dict[str, dict[str, dict[str, Any]]] = {}
        for name, module in self.job.step.companions().items():
            distributed.share_buffers(module)
            companions[name] = {split: measure(module, plain, split, ("single",))["single"] for split in self.job.tests}
        if "test" in metrics:
            single = metrics["test"]["single"]
            if self.best is None or single["top1"] > self.best["top1"]:
                self.best = {**single, "epoch": epoch + 1}
        return _Measured(metrics, companions)

    def _record(self, epoch: int, evaluated: _Measured | None) -> None:
        """One line for the epoch, in metrics.jsonl and on stderr."""
        # By name: a resumed run has its sums in the order of the file, and must add and write them alike.
        sums = {name: distributed.sum_(value.clone()) for name, value in sorted(self.totals.values.items())}
        images = sums.pop("images").item()
        means = {name: value.item() / images for name, value in sums.items()}
        followed = {name.removeprefix(FOLLOWED): means.pop(name) for name in list(means) if name.startswith(FOLLOWED)}
        line: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": self.at,
            "lr": optim.rate(self.recipe, max(self.at - 1, 0), self.per_epoch),
            "train": {"top1": round(100 * means.pop("correct"), 4), "loss": round(sum(means.values()), 8)},
            "terms": {name: round(value, 8) for name, value in means.items()},
        }
        if evaluated is not None:
            line |= evaluated.metrics
            if evaluated.companions:
                line["companions"] = evaluated.companions
        alarms: list[str] = []
        if followed:
            line["followed"] = {k: round(v, 8) if math.isfinite(v) else None for k, v in followed.items()}
            alarms = self.job.step.alarms(followed)
            if alarms:
                line["alarms"] = alarms
        self.lines += 1
        if distributed.rank() == 0:
            durable.append_line(self.job.run.metrics, json.dumps(line, allow_nan=False))
        self.tell(line)
        scores = [f"{s} {line[s]['single']['top1']:.2f}" for s in ("val", "test") if s in line]
        for name, splits in line.get("companions", {}).items():
            scores += [f"{name} {s} {splits[s]['top1']:.2f}" for s in ("val", "test") if s in splits]
        seconds = self.spent + time.monotonic() - self.started
        self.job.story.note(
            f"{self.job.title}: epoch {epoch + 1}/{self.recipe.epochs}  loss {line['train']['loss']:.4f}  "
            f"train {line['train']['top1']:.2f}  {'  '.join(scores)}  lr {line['lr']:.4g}  {seconds:.0f} s"
        )
        for alarm in alarms:
            self.job.story.note(f"{self.job.title}: {alarm}")

    # ------------------------------------------------------------------------------------------------- saving, resuming

    def save_due(self) -> bool:
        """Whether it is time to save: by the clock, or by steps where that is asked for or ranks have to agree."""
        every = self.spec.system.checkpoint_every
        if every is not None:
            return self.at % every == 0
        if distributed.world() > 1:  # ranks must agree without a collective a step
            return self.at % 200 == 0
        return time.monotonic() - self.saved >= _SAVE_SECONDS

    def _save(self) -> None:
        self.update.check()
        if distributed.world() > 1:
            for _, value in sorted(self.totals.values.items()):  # each rank has its part; the first keeps the sum
                distributed.sum_(value)
                if distributed.rank() != 0:
                    value.zero_()
        if distributed.rank() == 0:
            metadata = {
                "spec_digest": self.job.run.digest,
                "facts": self.job.facts,
                "threads": self.job.device.threads,
                "lines": self.lines,
                "best": self.best,
                "seconds": self.spent + time.monotonic() - self.started,
            }
            tensors = state.pack(self.module, self.optimizer, self.average, self.totals.values)
            if bad := state.not_finite(tensors, self.module):  # the next step would show it, but this state would stay
                raise NotFiniteError(
                    f"the tensor {bad} is not finite after step {self.at}, and was not saved; the last good state is in "
                    f"{self.job.run.state}",
                    hint="a smaller --lr, --clip-grad, or --precision fp32",
                )
            checkpoint.save_state(self.job.run.state, self.at, tensors, metadata)
        distributed.barrier()
        self.saved = time.monotonic()

    def _resume(self) -> None:
        found = checkpoint.load_state(self.job.run.state) if self.job.run.status == "unfinished" else None
        if found is None:
            if distributed.rank() == 0:
                durable.truncate_lines(self.job.run.metrics, 0)
            return
        tensors, metadata, notices = found
        for notice in notices:
            self.job.story.note(notice)
        file = self.job.run.state / f"step-{metadata['step']:09d}.safetensors"
        require_state(metadata, file)
        if metadata["step"] > self.end:
            raise InputError(
                f"{file} is of step {metadata['step']}, but the run has {self.end}", hint="start anew: --overwrite"
            )
        if bad := state.not_finite(tensors, self.module):
            raise NotFiniteError(f"{file}: the tensor {bad} is not finite", hint="start anew with --overwrite")
        for key, value in self.job.facts.items():
            if metadata["facts"].get(key) != value:
                raise IncompatibleError(
                    f"the run in {self.job.run.directory} was started with another {key}", hint="or use --overwrite"
                )
        if metadata["threads"] != self.job.device.threads:
            self.job.story.note(
                f"this run began with {metadata['threads']} threads and goes on with {self.job.device.threads}: "
                "the last bits may differ"
            )
        self.at = metadata["step"]
        self.totals.values = state.unpack(
            tensors, self.at, self.module, self.optimizer, self.average, self.job.device.torch
        )
        if distributed.rank() != 0:
            self.totals.clear()
        self.lines, self.best, self.spent = metadata["lines"], metadata["best"], metadata["seconds"]
        if distributed.rank() == 0:
            durable.truncate_lines(self.job.run.metrics, self.lines)
        self.job.story.note(f"{self.job.title}: going on at step {self.at} of {self.end}")


def check_batches(train: Loader, step: Step, recipe: TrainSpec) -> None:
    """Refuse, before training, what BatchNorm cannot train on: a batch of one image, or a part of one where it matters.

    Raises:
        UsageError: a step would see a single image, or a part (`--accumulate`, ranks) a single value per channel.
    """
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in step.modules()):
        return
    n, size = len(train.split.labels), recipe.batch_size
    if size == 1 or n % size == 1:
        raise UsageError(
            f"{n} training images in batches of {size} leave a batch of one, which BatchNorm cannot train on",
            field="--batch-size",
            hint=f"for example --batch-size {size + 1}",
        )
    smallest = min(_smallest_part(count, recipe.accumulate) for count in (min(size, n), n % size) if count)
    if smallest == 1 and not _trains_on_one(train, step):
        ranks = f" on {distributed.world()} ranks" if distributed.world() > 1 else ""
        raise UsageError(
            f"{n} training images in batches of {size} leave parts of one image{ranks}, and a single value per channel, "
            "which BatchNorm cannot train on",
            field="--accumulate" if recipe.accumulate > 1 else "--batch-size",
            hint=f"{'a smaller --accumulate, or ' if recipe.accumulate > 1 else ''}a batch size that leaves no such rest",
        )


def _smallest_part(count: int, accumulate: int) -> int:
    """Images in the smallest part that a rank computes of a batch of `count`, as `Update` cuts it."""
    share = max(1, count // distributed.world())
    return max(1, share // accumulate)


def _trains_on_one(train: Loader, step: Step) -> bool:
    """Whether a forward pass in training mode takes a single image: BatchNorm may see a map of it, or several views.

    The step is left as it was found.
    """
    batch = next(iter(train.epoch(0)))
    one = parts(batch, batch.labels.shape[0])[0]
    before = {name: value.clone() for name, value in step.state_dict().items()}
    started = torch.ones((), device=train.device)
    step.to(train.device).train()
    try:
        with torch.no_grad():
            step(one, Progress(started, torch.zeros_like(started), odd_step=False))
    except ValueError as problem:
        if "more than 1 value per channel" not in str(problem):
            raise
        return False
    finally:
        step.load_state_dict(before)
    return True

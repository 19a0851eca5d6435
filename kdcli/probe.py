"""Linear probe: one linear layer on the frozen pooled features of a network, on another data set.

The defaults are the protocol of HSAKD's code (METHODS 7.1): the encoder's BatchNorm in eval mode, RandomResizedCrop to the
encoder's input size and flip, SGD 0.9 nesterov, lr 0.1, no weight decay, 100 epochs, decay at 30, 60 and 90.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kdcli import checkpoint
from kdcli.building import load_data, make_loader
from kdcli.data.dataset import DataSet, Split
from kdcli.data.loader import Batch
from kdcli.data.randomness import generator, mix
from kdcli.engine import optim
from kdcli.engine.device import Device, guarded
from kdcli.engine.evaluate import Tally
from kdcli.engine.fit import Job, fit
from kdcli.engine.signals import StopFlag, stopped
from kdcli.engine.step import Step, StepOutput
from kdcli.errors import UsageError
from kdcli.inference import Use
from kdcli.losses import cross_entropy
from kdcli.methods.base import Progress
from kdcli.models.network import Network
from kdcli.networks import Loaded, load_network
from kdcli.output import Story, envelope
from kdcli.runs import Run, open_run
from kdcli.specs import RunSpec
from kdcli.training import open_recorded_device
from kdcli.transforms import rescale


class Probe(nn.Module):
    """A frozen encoder and a fresh linear layer on its pooled features [B,C]; forward gives logits [B,K].

    Args:
        device: in whose precision the encoder computes.
        adapt: keep the encoder's BatchNorm in training mode.
    """

    def __init__(self, encoder: Network, use: Use, classes: int, device: Device, *, adapt: bool) -> None:
        super().__init__()
        self.encoder, self.use, self.adapt = encoder.requires_grad_(False), use, adapt
        self.device = device
        self.linear = nn.Linear(encoder.pooled_dim, classes)

    def train(self, mode: bool = True) -> Probe:
        """Only the linear layer has a training mode, unless the encoder's BatchNorm is to adapt."""
        super().train(mode)
        self.encoder.train(mode and self.adapt)
        return self

    def pooled(self, images: Tensor) -> Tensor:
        """[B,C] fp32 features of normalised images, without gradient."""
        with torch.no_grad(), self.device.autocast():
            return self.encoder.features(rescale(images, self.use.scale, self.use.scale_mode)).pooled.float()

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.pooled(images))


class ProbeStep(Step):
    """One step of a probe's training: cross-entropy of the linear layer."""

    def __init__(self, probe: Probe, smoothing: float) -> None:
        super().__init__()
        self.trained, self.smoothing = probe, smoothing

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Loss of a batch: images [B,C,H,W], labels [B]."""
        logits = self.trained(batch.images)
        loss = cross_entropy(logits, batch.targets, self.smoothing)
        correct = (logits.detach().argmax(1) == batch.labels).sum()
        return StepOutput(loss, {"ce": loss.detach()}, {}, correct)


def probe(spec: RunSpec, story: Story, stop: StopFlag) -> dict[str, Any]:
    """Probe the encoder that `spec` (a `linear-probe` spec) names; the summary of the run."""
    assert spec.encoder is not None
    file = checkpoint.locate(spec.encoder)
    with guarded(), open_run(spec, {str(spec.encoder): checkpoint.digest(file)}) as run:
        if run.status == "finished":
            story.note(f"{run.directory} is finished already")
            return run.summary()
        _refuse_ignored(spec)
        device = open_recorded_device(spec, run)
        loaded = load_network(file)
        dataset = _dataset(spec, loaded, story)
        torch.manual_seed(mix(spec.seed, "probe"))
        adapt = spec.probe.batchnorm == "train"
        module = device.place(Probe(loaded.backbone, loaded.use, len(dataset.classes), device, adapt=adapt))
        story.note(f"probing {loaded.backbone.arch} on {dataset.name}: {len(dataset.train)} training images")
        if spec.probe.cached:
            metrics, best, seconds = _cached(spec, module, dataset, device, story, stop)
        else:
            facts = {"encoder": loaded.digest}
            metrics, best, seconds = _augmented(run, module, dataset, device, story, stop, facts)
        summary = envelope(
            "linear-probe",
            run=str(run.directory),
            checkpoint=str(file),
            spec_digest=run.digest,
            encoder={"arch": loaded.backbone.arch, "digest": loaded.digest},
            dataset=dataset.name,
            metrics={"test": {**metrics, "epoch": "last"}},
            best_on_test={**(best or {}), "note": "chosen on the test set: papers print it, do not select by it"},
            cost={"seconds": round(seconds, 2), "peak_mib": device.peak_mib()},
            seed=spec.seed,
        )
        run.finish(summary)
        return summary


def _refuse_ignored(spec: RunSpec) -> None:
    """Refuse settings that a probe on cached features would pass over.

    Raises:
        UsageError: one of them is set.
    """
    ignored = {
        "--ema": spec.train.ema is not None,
        "--clip-grad": spec.train.clip_grad is not None,
        "--accumulate": spec.train.accumulate > 1,
        "--batchnorm": spec.probe.batchnorm == "train",
    }
    for flag, given in ignored.items():
        if spec.probe.cached and given:
            raise UsageError("has no effect on cached features", field=flag, hint="leave it out, or use --no-cached")


def _dataset(spec: RunSpec, loaded: Loaded, story: Story) -> DataSet:
    """The probed data set at the encoder's input size, with the normalisation the spec asks for."""
    dataset = load_data(spec, story)
    # Images keep their own size in memory; the loader brings them to the encoder's.
    dataset = replace(dataset, image_size=loaded.metadata["image_size"])
    if spec.probe.normalization == "target":
        return dataset
    if spec.probe.normalization == "half":
        return replace(dataset, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    source = loaded.metadata["normalization"] or {"mean": dataset.mean, "std": dataset.std}
    return replace(dataset, mean=tuple(source["mean"]), std=tuple(source["std"]))


Measured = tuple[dict[str, Any], dict[str, Any] | None, float]


def _augmented(
    run: Run, module: Probe, dataset: DataSet, device: Device, story: Story, stop: StopFlag, facts: dict[str, Any]
) -> Measured:
    """Train through the engine's loop: every image augmented anew in every epoch, resumable.

    Args:
        facts: what a resumed run must find as it was.
    """
    spec = run.spec
    train = make_loader(spec, dataset, dataset.train, device, train=True)
    tests = {"test": make_loader(spec, dataset, dataset.test, device, train=False)}
    step = ProbeStep(module, spec.train.label_smoothing)
    job = Job(run, step, Use(), device, train, tests, spec.train, story, stop, f"probe on {dataset.name}", facts)
    with contextlib.closing(train):
        fitted = fit(job)
    return fitted.metrics["test"]["single"], fitted.best, fitted.seconds


def _cached(spec: RunSpec, module: Probe, dataset: DataSet, device: Device, story: Story, stop: StopFlag) -> Measured:
    """Train on features computed once; each epoch takes an image's features or its mirror image's, drawn anew."""
    import time

    started = time.monotonic()
    module.eval()
    plain, labels = _features(spec, module, dataset, dataset.train, device, stop)
    flipped, _ = _features(spec, module, dataset, dataset.train, device, stop, flip=True)
    test, answers = _features(spec, module, dataset, dataset.test, device, stop)
    recipe = spec.train
    optimizer = optim.optimizer(recipe, module.linear, device.cuda)
    steps = -(-len(labels) // recipe.batch_size)
    end = min(recipe.epochs * steps, recipe.max_steps or recipe.epochs * steps)
    story.begin(f"probe on {dataset.name}", end)
    best: dict[str, Any] | None = None
    for epoch in range(-(-end // steps)):
        draw = generator(spec.seed, epoch, "cached")
        order = torch.randperm(len(labels), generator=draw).to(device.torch)
        mirrored = (torch.rand(len(labels), generator=draw) < 0.5).to(device.torch)
        for number, rows in enumerate(order.split(recipe.batch_size)[: end - epoch * steps]):
            done = epoch * steps + number
            for group in optimizer.param_groups:
                group["lr"] = optim.rate(recipe, done, steps)
            inputs = torch.where(mirrored[rows][:, None], flipped[rows], plain[rows])
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(module.linear(inputs), labels[rows], recipe.label_smoothing).backward()
            optimizer.step()
            story.step(done + 1)
        if code := stop.code:
            raise stopped(code, "nothing: the cached probe starts over, it takes seconds")
        if (epoch + 1) % recipe.eval_every == 0 or (epoch + 1) * steps >= end:
            result = _score(module, test, answers, device)
            if best is None or result["top1"] > best["top1"]:
                best = {**result, "epoch": epoch + 1}
    story.end()
    return _score(module, test, answers, device), best, time.monotonic() - started


@torch.no_grad()
def _features(
    spec: RunSpec, module: Probe, dataset: DataSet, split: Split, device: Device, stop: StopFlag, flip: bool = False
) -> tuple[Tensor, Tensor]:
    """Pooled features [N,C] and labels [N] of a split, in its order, on the device."""
    features, labels = [], []
    for batch in make_loader(spec, dataset, split, device, train=False).epoch(0):
        features.append(module.pooled(batch.images.flip(3) if flip else batch.images))
        labels.append(batch.labels)
        if code := stop.code:
            raise stopped(code, "nothing: the cached probe starts over, it takes seconds")
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def _score(module: Probe, features: Tensor, labels: Tensor, device: Device) -> dict[str, Any]:
    tally = Tally(device.torch)
    for rows, answers in zip(features.split(1000), labels.split(1000), strict=True):
        tally.add(module.linear(rows), answers)
    return tally.result()

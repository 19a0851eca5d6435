"""A probe's fast path: features are computed once, each image's and its mirror image's, and the layer is trained on them."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from kdcli.building import make_loader
from kdcli.data.loader import Loader
from kdcli.data.randomness import generator
from kdcli.engine import optim
from kdcli.engine.device import Device
from kdcli.engine.evaluate import Tally
from kdcli.engine.signals import StopFlag, stopped
from kdcli.losses import cross_entropy
from kdcli.output import Story
from kdcli.probe.layer import Probe
from kdcli.probe.measured import Measured
from kdcli.probe.parts import Parts
from kdcli.specs import RunSpec


def train(
    spec: RunSpec, parts: Parts, tests: dict[str, Loader], device: Device, story: Story, stop: StopFlag
) -> Measured:
    """Each epoch takes an image's features or its mirror image's, drawn anew.

    Raises:
        Stopped: a signal or `--max-minutes` ended it; nothing is saved, since it takes seconds.
    """
    started = time.monotonic()
    dataset, module = parts.dataset, parts.module
    module.eval()
    images = make_loader(spec, dataset, dataset.train, device, train=False)
    plain, labels = _features(module, images, stop)
    flipped, _ = _features(module, images, stop, flip=True)
    answers = {split: _features(module, loader, stop) for split, loader in tests.items()}
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
        _heed(stop)
        if (epoch + 1) % recipe.eval_every == 0 or (epoch + 1) * steps >= end:
            result = _score(module, *answers["test"], device)
            if best is None or result["top1"] > best["top1"]:
                best = {**result, "epoch": epoch + 1}
    story.end()
    metrics = {split: _score(module, *known, device) for split, known in answers.items()}
    return Measured(metrics, best, time.monotonic() - started)


def _heed(stop: StopFlag) -> None:
    if code := stop.code:
        raise stopped(code, "nothing: the cached probe starts over, it takes seconds")


@torch.no_grad()
def _features(module: Probe, images: Loader, stop: StopFlag, *, flip: bool = False) -> tuple[Tensor, Tensor]:
    """Pooled features [N,C] and labels [N] of a loader's images, in its order, on the device."""
    features, labels = [], []
    for batch in images.epoch(0):
        features.append(module.pooled(batch.images.flip(3) if flip else batch.images))
        labels.append(batch.labels)
        _heed(stop)
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def _score(module: Probe, features: Tensor, labels: Tensor, device: Device) -> dict[str, Any]:
    tally = Tally(device.torch)
    for rows, answers in zip(features.split(1000), labels.split(1000), strict=True):
        tally.add(module.linear(rows), answers)
    return tally.result()

"""`kd linear-probe --dry-run`: what probes will do and cost, without training anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from kdcli import output
from kdcli.building import evaluation_batch, evaluation_loaders
from kdcli.data.loader import Batch, Loader
from kdcli.engine.device import Device, guarded, open_device
from kdcli.inference import Use
from kdcli.losses import cross_entropy
from kdcli.models.network import macs, parameters_of
from kdcli.preview import memory
from kdcli.preview.memory import Training
from kdcli.preview.pace import noise, seconds_for, seconds_per_step
from kdcli.probe.layer import ProbeStep
from kdcli.probe.parts import Parts, build
from kdcli.specs import RunSpec


def preview(specs: Sequence[RunSpec]) -> tuple[dict[str, Any], str]:
    """The resolved specs of probes of one encoder, what they read, and an estimate of time and memory.

    Raises:
        KdError: whatever would stop a probe before its first step.
    """
    with guarded():
        probes = [_preview(spec) for spec in specs]
    document = output.envelope("linear-probe", dry_run=True, probes=probes)
    return document, "\n\n".join(map(_text, probes))


def _preview(spec: RunSpec) -> dict[str, Any]:
    device = open_device(spec.system)
    parts = build(spec, device)
    dataset, module, recipe = parts.dataset, parts.module, spec.train
    backbone = parts.loaded.backbone
    tests = evaluation_loaders(spec, dataset, device)
    steps = math.ceil(len(dataset.train) / recipe.batch_size)
    total = min(steps * recipe.epochs, recipe.max_steps or steps * recipe.epochs)
    training = _training(spec, parts, tests, device)
    cost = {"memory_mib": round(memory.estimate([training]))}
    if spec.probe.cached:
        before = _encoding(parts, _cached_images(parts, tests), device)
        seconds = _fitting(parts, recipe.batch_size, device)
    else:
        before = 0.0
        step = training.step.train()
        seconds = seconds_per_step(step, recipe.batch_size, lambda n: noise(n, dataset, device), device)
    size = dataset.image_size * module.use.scale
    return {
        "spec": spec.model_dump(mode="json"),
        "encoder": {
            "arch": backbone.arch,
            "digest": parts.loaded.digest,
            "input_size": size,
            "features": backbone.pooled_dim,
            "params": sum(p.numel() for p in backbone.parameters()),
            "macs": macs(backbone, size),
        },
        "data": {
            "name": dataset.name,
            "train": len(dataset.train),
            "test": len(dataset.test),
            "classes": len(dataset.classes),
        },
        "trained_params": parameters_of(module.linear),
        "steps": {"per_epoch": steps, "total": total},
        "estimate": {
            **cost,
            "seconds_per_step": round(seconds, 4),
            "hours": round((before + total * seconds) / 3600, 3),
        },
    }


def _cached_images(parts: Parts, tests: dict[str, Loader]) -> int:
    """How many features a cached probe computes: of every image it reads, of training images twice."""
    return 2 * len(parts.dataset.train) + sum(len(loader.split) for loader in tests.values())


def _encoding(parts: Parts, images: int, device: Device) -> float:
    """Seconds for the features of so many images."""
    module, at_once = parts.module.eval(), min(evaluation_batch(parts.dataset.image_size, device), images)

    def encode(batch: Batch) -> object:
        return module.pooled(batch.images)

    return seconds_for(encode, at_once, lambda n: noise(n, parts.dataset, device), device) * images / at_once


def _fitting(parts: Parts, rows: int, device: Device) -> float:
    """Seconds for a step of the linear layer alone on the features of `rows` images."""
    layer, width = parts.module.linear, parts.module.linear.in_features

    def fit(batch: Batch) -> object:
        return cross_entropy(layer(batch.images), batch.labels).backward()

    def features(count: int) -> Batch:
        index = torch.arange(count, device=device.torch)
        return Batch(torch.randn(count, width, device=device.torch), index % layer.out_features, index, 1.0)

    return seconds_for(fit, rows, features, device)


def _training(spec: RunSpec, parts: Parts, tests: dict[str, Loader], device: Device) -> Training:
    """The training as far as its memory goes; cached features live beside it."""
    dataset = parts.dataset
    cached = _cached_images(parts, tests) if spec.probe.cached else 0
    return Training(
        device.place(ProbeStep(parts.module, spec.train.label_smoothing)),
        Use(),
        device,
        spec.train,
        lambda count: noise(count, dataset, device),
        images=min(spec.train.batch_size, len(dataset.train)),
        evaluated=max(min(loader.batch_size, len(loader.split)) for loader in tests.values()),
        kept=4 * cached * parts.loaded.backbone.pooled_dim,
    )


def _text(probe: dict[str, Any]) -> str:
    encoder, data, steps, estimate = (probe[key] for key in ("encoder", "data", "steps", "estimate"))
    return "\n".join(
        [
            output.document(probe["spec"]),
            "",
            f"encoder {encoder['arch']}: {encoder['params']:,} parameters, {encoder['macs']:,} multiply-accumulates at "
            f"{encoder['input_size']} pixels, frozen; {encoder['features']} features",
            f"linear layer: {probe['trained_params']:,} parameters, {data['classes']} classes of {data['name']}",
            f"steps: {steps['total']:,} ({steps['per_epoch']:,} an epoch, {data['train']:,} images)",
            f"estimate: {estimate['seconds_per_step']:.3f} s a step, {estimate['hours']:.2f} h in all without evaluation, "
            f"{estimate['memory_mib']:,} MiB",
        ]
    )

"""Optimisers and learning-rate schedules; a rate is a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from kdcli.specs import TrainSpec


def optimizer(spec: TrainSpec, parameters: Iterable[nn.Parameter], cuda: bool) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW, fused, over all trainable parameters in one group (weight decay on every one)."""
    assert spec.lr is not None
    parameters = list(parameters)
    fused = all(p.is_floating_point() for p in parameters)
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=spec.lr, weight_decay=spec.weight_decay, fused=fused)
    return torch.optim.SGD(
        parameters,
        lr=spec.lr,
        momentum=spec.momentum,
        weight_decay=spec.weight_decay,
        nesterov=bool(spec.nesterov) and spec.momentum > 0,
        fused=fused,
    )


def rate(spec: TrainSpec, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, counted from 0.

    `step` decays at the start of the epoch after a milestone (0-based epoch index ≥ milestone), as RepDistiller and HSAKD
    do; `cosine` and `onecycle` move every step. Warm-up of W steps rises linearly: lr·(step+1)/(W+1).
    """
    assert spec.lr is not None
    total = spec.epochs * steps_per_epoch
    warm = spec.warmup_epochs * steps_per_epoch
    if spec.schedule == "onecycle":
        rise = warm or 0.3 * total
        if step < rise:
            return spec.lr * (step + 1) / (rise + 1)
        share = (step - rise) / max(1.0, total - rise)
        return max(spec.min_lr, spec.lr * (1 - share) + spec.min_lr * share)
    if step < warm:
        return spec.lr * (step + 1) / (warm + 1)
    if spec.schedule == "cosine":
        share = min(1.0, (step - warm) / max(1.0, total - warm))
        return spec.min_lr + (spec.lr - spec.min_lr) * (1 + math.cos(math.pi * share)) / 2
    if spec.schedule == "step":
        epoch = step // steps_per_epoch
        passed = sum(epoch >= (m * spec.epochs if m < 1 else m) - 1e-9 for m in spec.milestones)
        return spec.lr * spec.gamma**passed
    return spec.lr

"""Optimisers and learning-rate schedules; a rate is a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from kdcli.specs import TrainSpec

# Class tokens and tables of positions by the names that timm and torchvision give them: vectors added to tokens or to
# attention, which are no weights of a map although they have two or more dimensions.
_TOKENS = frozenset(
    {
        *("cls_token", "class_token", "dist_token", "reg_token"),
        *("pos_embed", "pos_embedding", "absolute_pos_embed", "relative_position_bias_table"),
    }
)


def optimizer(
    spec: TrainSpec, module: nn.Module, cuda: bool, undecayed: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW, fused, over the trainable parameters of `module`.

    They are one group, or two where weight decay is not on all of them.

    Args:
        undecayed: parameters without weight decay, whatever `spec.decay` says.
    """
    assert spec.lr is not None
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    spared = {id(p) for p in undecayed}
    if spec.decay == "weights":
        spared |= {id(p) for name, p in trainable.items() if not _is_weight(name, p)}
    groups = [
        {"params": [p for p in trainable.values() if id(p) not in spared], "weight_decay": spec.weight_decay},
        {"params": [p for p in trainable.values() if id(p) in spared], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.is_floating_point() for p in trainable.values())
    # On a GPU the rate is a tensor, so that a recorded step reads the rate of the day.
    device = next(iter(trainable.values())).device
    lr = torch.tensor(spec.lr, device=device) if cuda else spec.lr
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, weight_decay=spec.weight_decay, fused=fused, capturable=cuda)
    return torch.optim.SGD(
        groups,
        lr=lr,
        momentum=spec.momentum,
        weight_decay=spec.weight_decay,
        nesterov=bool(spec.nesterov) and spec.momentum > 0,
        fused=fused,
    )


def _is_weight(name: str, parameter: nn.Parameter) -> bool:
    """timm's rule: a matrix or a filter, not a bias, a norm's scale, a token or a table of positions."""
    leaf = name.rpartition(".")[2]
    return parameter.ndim > 1 and leaf != "bias" and leaf not in _TOKENS


def rate(spec: TrainSpec, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step, counted from 0.

    `step` decays at the start of the epoch after a milestone (0-based epoch index ≥ milestone), as RepDistiller and HSAKD
    do; `cosine` and `onecycle` move every step. Warm-up of W steps rises linearly from
    w = warmup_lr: w + (lr - w)·(step+1)/(W+1).
    """
    assert spec.lr is not None
    total = spec.epochs * steps_per_epoch
    warm = spec.warmup_epochs * steps_per_epoch
    if spec.schedule == "onecycle":
        rise = warm or 0.3 * total
        if step < rise:
            return spec.warmup_lr + (spec.lr - spec.warmup_lr) * (step + 1) / (rise + 1)
        share = (step - rise) / max(1.0, total - rise)
        return max(spec.min_lr, spec.lr * (1 - share) + spec.min_lr * share)
    if step < warm:
        return spec.warmup_lr + (spec.lr - spec.warmup_lr) * (step + 1) / (warm + 1)
    if spec.schedule == "cosine":
        share = min(1.0, (step - warm) / max(1.0, total - warm))
        return spec.min_lr + (spec.lr - spec.min_lr) * (1 + math.cos(math.pi * share)) / 2
    if spec.schedule == "step":
        epoch = step // steps_per_epoch
        passed = sum(epoch >= (m * spec.epochs if m < 1 else m) - 1e-9 for m in spec.milestones)
        return spec.lr * spec.gamma**passed
    return spec.lr

"""The recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from kdcli.specs.section import Section


class TrainSpec(Section):
    """The recipe: optimiser, schedule, regularisation and length."""

    epochs: int = Field(default=240, ge=1)
    """Passes over the training images."""
    max_steps: int | None = Field(default=None, ge=1)
    """Finish after this many optimiser steps (smoke runs); the schedule stays that of the full run."""
    batch_size: int = Field(default=64, ge=1)
    """Images per optimiser step, over all ranks; methods with several views multiply it by their number."""
    accumulate: int = Field(default=1, ge=1)
    """Split each batch into this many parts and add up their gradients."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimiser: sgd (momentum) or adamw."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; default: base_lr, or light_lr for the MobileNet and ShuffleNet students."""
    teacher_lr: float | None = Field(default=None, gt=0)
    """Learning rate of a teacher trained on the way; default: lr if that is given, else as for a student."""
    base_lr: float = Field(default=0.05, gt=0)
    """The recipe's learning rate."""
    light_lr: float = Field(default=0.01, gt=0)
    """The recipe's learning rate for light networks (MobileNetV2, ShuffleNetV1, ShuffleNetV2)."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD momentum."""
    nesterov: bool | None = None
    """Nesterov momentum; default: for vsd, and for hsakd but on ImageNet, whose authors add it to the common recipe."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Weight decay, on the parameters that `decay` names."""
    decay: Literal["all", "weights"] = "all"
    """What weight decay is on: all parameters, or only weights (as timm does): no biases, norms, tokens or positions."""
    schedule: Literal["step", "cosine", "onecycle", "constant"] = "step"
    """Learning-rate schedule: step (by epoch), cosine or onecycle (by step), constant."""
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    """When the step schedule decays: values below 1 are shares of all epochs, others are epochs."""
    gamma: float = Field(default=0.1, gt=0, le=1)
    """Factor of each decay of the step schedule."""
    min_lr: float = Field(default=0.0, ge=0)
    """Where the cosine and onecycle schedules end."""
    warmup_epochs: float = Field(default=0.0, ge=0)
    """Linear warm-up to the learning rate, in epochs (for onecycle: the length of the rise)."""
    warmup_lr: float = Field(default=0.0, ge=0)
    """Where the warm-up starts."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing of the cross-entropy to the labels."""
    clip_grad: float | None = Field(default=None, gt=0)
    """Clip the gradient's L2 norm to this value."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights; it is what is evaluated and exported."""
    eval_every: int = Field(default=1, ge=1)
    """Epochs between evaluations; the last epoch is always evaluated."""

    @field_validator("milestones")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(m <= 0 for m in value) or list(value) != sorted(value):
            raise ValueError("milestones must be positive and rising")
        return value

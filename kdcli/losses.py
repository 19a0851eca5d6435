"""Losses shared by several methods. Everything is computed in fp32 or better, whatever the networks ran in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli.errors import IncompatibleError


def exact(logits: Tensor) -> Tensor:
    """The same numbers in fp32, or in float64 if they are: what every loss computes with."""
    return logits if logits.dtype == torch.float64 else logits.float()


def divergence(
    student: Tensor, teacher: Tensor, temperature: float, *, scaled: bool = True, constant: bool = True
) -> Tensor:
    """Hinton's distillation loss: T² · mean over rows of KL(softmax(teacher/T) ‖ softmax(student/T)), summed over K.

    Args:
        student, teacher: logits [B,K].
        temperature: T.
        scaled: multiply by T² (Hinton et al. 2015, Section 2.1), so that gradients keep their size as T grows.
        constant: the teacher's logits are constants; else the gradient reaches them too.

    Raises:
        IncompatibleError: the shapes differ (broadcasting would silently give a number).
    """
    if student.shape != teacher.shape:
        raise IncompatibleError(
            f"the student's logits are {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}"
        )
    target = F.log_softmax(exact(teacher.detach() if constant else teacher) / temperature, 1)
    logits = F.log_softmax(exact(student) / temperature, 1)
    loss = F.kl_div(logits, target, reduction="batchmean", log_target=True)
    return loss * temperature**2 if scaled else loss


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Cross-entropy to the labels, mean over rows.

    Args:
        logits: [B,K].
        labels: int64 [B], or shares of the classes [B,K] (mixed images).
        smoothing: share of the target spread evenly over the K classes.
        temperature: divides the logits (VSD, Eq. 2, writes one inside the cross-entropy).
    """
    scaled = exact(logits) if temperature == 1 else exact(logits) / temperature
    return F.cross_entropy(scaled, labels.to(scaled) if labels.dim() > 1 else labels, label_smoothing=smoothing)

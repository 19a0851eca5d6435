"""OFA's adapted cross-entropy between logits: the teacher's confidence in the right class is raised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli.losses import exact


def adapted(student: Tensor, teacher: Tensor, labels: Tensor, eps: float, temperature: float = 1.0) -> Tensor:
    """-Σ_c ((p_c + 1[c = y])^ε - 1[c = y]) · ln q_c, mean over rows: p of the teacher, q of the student.

    The released form of Hao et al. 2023 (arXiv 2310.19444, Section 3.2); with ε = 1 the cross-entropy to the teacher's
    probabilities.

    Args:
        student, teacher: logits [B,K]; the gradient reaches both.
        labels: int64 [B], the right classes; of mixed images those of the larger share.
        eps: ε.
        temperature: T, by which all logits are divided (no factor T²).
    """
    p = F.softmax(exact(teacher) / temperature, 1)
    log_q = F.log_softmax(exact(student) / temperature, 1)
    # F.one_hot looks at the labels, and would make the host wait for the device.
    right = (labels[:, None] == torch.arange(p.shape[1], device=p.device)).to(p)
    return -(((p + right) ** eps - right) * log_q).sum(1).mean()

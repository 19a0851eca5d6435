"""What methods have in common whose networks carry auxiliary heads over the joint label space (HSAKD, VSD)."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcli.errors import IncompatibleError
from kdcli.losses import cross_entropy
from kdcli.methods.pairing import backbone
from kdcli.models.heads import Headed
from kdcli.models.network import Network
from kdcli.transforms import joint_labels


def joint_heads(teacher: Network | Headed) -> int:
    """How many auxiliary heads a teacher has on its maps."""
    return len(teacher.heads) if isinstance(teacher, Headed) and not teacher.projects else 0


def shared_stages(student: Network, teacher: Network | Headed) -> int:
    """How many stages both networks can compare; counted from the last, so that the shallowest are left out."""
    return min(len(student.head_taps), joint_heads(teacher) or len(backbone(teacher).head_taps))


def require_heads(teacher: Network | Headed, outputs: int, method: str, otherwise: str) -> None:
    """Refuse a teacher without auxiliary heads of the right width.

    Args:
        outputs: how many logits each head must have.
        method: that trains such a teacher.
        otherwise: the setting that does without heads.

    Raises:
        IncompatibleError: with the command that makes a fitting teacher.
    """
    command = f"kd pretrain-teacher --method {method} --teacher {backbone(teacher).arch}"
    if not isinstance(teacher, Headed) or not joint_heads(teacher):
        raise IncompatibleError(
            "the teacher has no auxiliary heads, which the student's are compared with",
            field="--teacher",
            hint=f"make one with this run's settings: {command}, or --set {otherwise}",
        )
    found = getattr(teacher.heads[-1], "outputs", outputs)
    if found != outputs:
        raise IncompatibleError(
            f"the teacher's auxiliary heads have {found} outputs, and the method needs {outputs}",
            field="--teacher",
            hint=f"make one with this run's settings: {command}",
        )


def joint_cross_entropies(
    heads: tuple[Tensor, ...], labels: Tensor, m: int, smoothing: float, temperature: float = 1.0
) -> Tensor:
    """Cross-entropy of each head's logits [B*M,K*M] to the joint labels: means over the rows, summed over the heads.

    Args:
        labels: int64 [B], classes.
        m: M, the number of views.
        smoothing, temperature: as in `cross_entropy`.
    """
    joint = joint_labels(labels, m)
    return torch.stack([cross_entropy(logits, joint, smoothing, temperature) for logits in heads]).sum()

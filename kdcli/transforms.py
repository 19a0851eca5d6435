"""Self-supervised transformations, the joint label space they span, and how joint logits become class logits.

A transformation set has M views. Views are interleaved: row `M*b + i` of a transformed batch is view i of image b, and
view 0 is the image itself. The joint label of class y under view i is `M*y + i` (class-major), as in SLA
(arXiv 1910.05872) and HSAKD; VSD, Section 3.1.2, calls the product space the aggregated vector space.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcli.errors import UsageError, nearest

# Channel orders of SLA's colour permutation, identity first.
_PERM6 = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
_PERM3 = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
_VIEWS = {"none": 1, "rot4": 4, "rot2": 2, "perm6": 6, "perm3": 3}

INFERENCE = ("single", "marginal", "aggregate")


def check(transform: str, field: str = "method.transform") -> str:
    """`transform` if it names a set or a product of sets (`rot4xperm6`).

    Raises:
        UsageError: it does not.
    """
    parts = transform.split("x")
    for part in parts:
        if part not in _VIEWS:
            raise UsageError(f"no transformation named {transform!r}", field=field, hint=nearest(part, _VIEWS))
    families = [part.rstrip("0123456789") for part in parts]
    if len(set(families)) < len(families):
        raise UsageError(f"{transform} shows some view twice", field=field, hint="each kind of transformation once")
    return transform


def views(transform: str) -> int:
    """M, the number of views of a transformation set (4 for `rot4`, 24 for `rot4xperm6`)."""
    count = 1
    for part in transform.split("x"):
        count *= _VIEWS[part]
    return count


def _one(x: Tensor, transform: str) -> list[Tensor]:
    if transform == "rot4":
        return [x if k == 0 else torch.rot90(x, k, (2, 3)) for k in range(4)]
    if transform == "rot2":
        return [x, torch.rot90(x, 2, (2, 3))]
    if transform == "perm6":
        return [x if order == (0, 1, 2) else x[:, order] for order in _PERM6]
    if transform == "perm3":
        return [x if order == (0, 1, 2) else x[:, order] for order in _PERM3]
    return [x]


def expand(x: Tensor, transform: str) -> Tensor:
    """[B,C,H,W] → [B*M,C,H,W], interleaved; rotations are counter-clockwise multiples of 90 degrees over (H, W)."""
    if views(transform) == 1:
        return x
    stacks = [x]
    for part in transform.split("x"):
        stacks = [view for stack in stacks for view in _one(stack, part)]
    return torch.stack(stacks, 1).flatten(0, 1).contiguous(memory_format=_memory_format(x))


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def joint_labels(labels: Tensor, m: int) -> Tensor:
    """[B] class labels → [B*M] joint labels `M*y + i`, interleaved like the views."""
    return (labels[:, None] * m + torch.arange(m, device=labels.device)).flatten()


def rescale(x: Tensor, factor: float, mode: str = "bilinear") -> Tensor:
    """[B,C,H,W] enlarged by `factor` (VSD, Section 3.1.1); bilinear and bicubic with `align_corners=False`."""
    if factor == 1:
        return x
    corners = None if mode == "nearest" else False
    return F.interpolate(x, scale_factor=factor, mode=mode, align_corners=corners)


def fold(joint: Tensor, m: int, inference: str) -> Tensor:
    """Class logits [B,K] from the joint logits of the views.

    Args:
        joint: [B,K*M] of view 0 for `single` and `marginal`; [B*M,K*M], interleaved, for `aggregate`.
        m: the number of views M; 1 returns `joint` as it is.
        inference: `single` takes the slice y*M+0; `marginal` is log Σ_i exp, whose softmax is Σ_i p(y,i); `aggregate` is
            the mean over i of the slice y*M+i of view i (SLA's aggregated inference).
    """
    if m == 1:
        return joint
    if inference == "single":
        return joint[:, ::m]
    if inference == "marginal":
        return torch.logsumexp(joint.unflatten(1, (-1, m)), 2)
    per_view = joint.unflatten(0, (-1, m)).unflatten(2, (-1, m))  # [B, view, K, slice]
    return per_view.diagonal(dim1=1, dim2=3).mean(-1)

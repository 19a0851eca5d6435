"""What a loss over the whole batch needs where several ranks hold parts of it: all rows, with gradients.

Every rank computes the same loss from the gathered rows. The backward pass adds up what all ranks ask of a row, and DDP
divides by their number, so that a parameter gets exactly the gradient of one process (the engine's weights of uneven
parts add up to the number of ranks). In a single process nothing happens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from kdcli.data.loader import Batch
from kdcli.losses import exact


def world() -> int:
    """How many ranks hold parts of the batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def counts(rows: int, device: torch.device) -> list[int]:
    """The number of rows of every rank, in rank order, given this one's."""
    if world() == 1:
        return [rows]
    mine = torch.tensor([rows], device=device)
    found = [torch.empty_like(mine) for _ in range(world())]
    dist.all_gather(found, mine)
    return [int(count.item()) for count in found]


class _Rows(torch.autograd.Function):
    """Rows of all ranks, in rank order; the gradient of the own rows is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int]) -> Tensor:
        first = dist.get_rank()
        ctx.start, ctx.rows, ctx.own = sum(sizes[:first]), sizes[first], x.shape[0]
        padded = x.new_zeros(max(sizes), *x.shape[1:])  # ranks hold unequal parts, collectives want equal ones
        padded[: sizes[first]] = x[: sizes[first]]
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded)
        return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)  # autograd may hand it to others too
        dist.all_reduce(total)
        mine = total[ctx.start : ctx.start + ctx.rows]
        if ctx.rows == ctx.own:
            return mine, None
        return torch.cat([mine, total.new_zeros(ctx.own - ctx.rows, *total.shape[1:])]), None


class _Sum(torch.autograd.Function):
    """A tensor summed over the ranks; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def gathered(x: Tensor, batch: Batch) -> Tensor:
    """`x` [n,...] of this rank's part of the batch → the rows of all ranks, in rank order, with gradients.

    Integer tensors (labels, indices) are gathered too. A sample that only keeps a rank busy (`batch.weight` 0) is left
    out. With V rows per image, interleaved, the result has V rows per image of the whole batch.
    """
    if world() == 1:
        return x
    sizes = counts(x.shape[0] if batch.weight else 0, x.device)
    return _Rows.apply(x.contiguous(), sizes)  # type: ignore[no-any-return]


def share(batch: Batch) -> tuple[int, int]:
    """`(first, count)`: which images of the whole batch are this rank's (count 0: it is only kept busy)."""
    if world() == 1:
        return 0, batch.labels.shape[0]
    sizes = counts(batch.labels.shape[0] if batch.weight else 0, batch.labels.device)
    return sum(sizes[: dist.get_rank()]), sizes[dist.get_rank()]


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], variance [C] and number of values [1] of a channel of [B,C,H,W], over all ranks and with gradients."""
    dims = [0, 2, 3]
    count = x.new_tensor([x.numel() // x.shape[1]])
    if world() == 1:
        return x.mean(dims), x.var(dims, correction=0), count
    count = _Sum.apply(count)
    mean = _Sum.apply(x.sum(dims)) / count
    variance = _Sum.apply((x - mean[:, None, None]).square().sum(dims)) / count
    return mean, variance, count  # type: ignore[return-value]


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation [B,C,H,W] over the whole batch of all ranks, for the methods' own modules.

    `torch.nn.SyncBatchNorm` is the same for GPUs only. Student and teacher keep their own, per rank. In a batch of fewer
    images than ranks, the sample that keeps a rank busy counts here like any other. A batch that holds one value a channel
    has no variance: the running statistics stand in (an epoch's last batch may be a single image, with a 1x1 map).
    """

    def uses_batch(self, x: Tensor) -> bool:
        """Whether [B,C,H,W] is normalised by its own statistics, and not by those of the past."""
        return self.training and (world() > 1 or x.numel() > x.shape[1])

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the base class calls it so
        if self.training and not self.uses_batch(input):
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if not self.training or world() == 1:
            return super().forward(input)
        x = exact(input)
        mean, variance, count = moments(x)
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            momentum = 0.1 if self.momentum is None else self.momentum
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
            self.num_batches_tracked.add_(1)
        normalised = (x - mean[:, None, None]) * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.affine:
            normalised = normalised * self.weight[:, None, None] + self.bias[:, None, None]
        return normalised.to(input.dtype)

"""Which part of a global batch a rank computes."""

from __future__ import annotations


def share(low: int, high: int, rank: int, world: int, *, train: bool) -> tuple[int, int, float]:
    """`(start, stop, weight)` of the contiguous slice of the global batch [low, high) that this rank takes.

    Slices in rank order concatenate to the global batch. `weight = n_local * world / n_global`, so that the mean over
    ranks of `weight * local mean` is the mean over the global batch. In training a rank without a sample gets the
    batch's first one with weight 0, because every rank must take part in the backward pass; in evaluation its slice is
    empty, so that each sample counts once.
    """
    count = high - low
    start, stop = low + count * rank // world, low + count * (rank + 1) // world
    if start == stop:
        return (low, low + 1, 0.0) if train else (low, low, 0.0)
    return start, stop, (stop - start) * world / count

"""NST against the released code, in both ways of computing it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden import PRECISIONS, PROGRESS, Case, batch, features, near, setting
from torch import Tensor

from kdcli.methods.nst import NST, NSTSpec


def discrepancy_of(student: list[Tensor], teacher: list[Tensor], **settings: Any) -> Tensor:
    """The method's own term for these stages, behind an empty stem."""
    rows = student[0].shape[0]
    s, t = (features(x[0].new_zeros(rows, 20), maps=(x[0].new_empty(0), *x)) for x in (student, teacher))
    method = NST(NSTSpec(**settings), setting(20), None, None)
    return method.loss(batch(torch.zeros(rows, dtype=torch.int64)), s, t, PROGRESS)["nst"]


def maps(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def by_definition(s: Tensor, t: Tensor) -> float:
    """The kernel of every pair of normalised channels, image by image."""
    total = 0.0
    for a, b in zip(s.flatten(2), t.flatten(2), strict=True):
        a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
        for x, y, sign in ((a, a, 1), (b, b, 1), (a, b, -2)):
            values = [torch.dot(u, v).item() ** 2 for u in x for v in y]
            total += sign * sum(values) / len(values)
    return total / s.shape[0]


@PRECISIONS
def test_the_released_loss_and_its_gradients(dtype: torch.dtype, tolerance: float) -> None:
    """Two stages, the second pooled to the teacher's size; each stage alone and their sum."""
    case = Case("nst")
    s = [case.input(f"student_{i}", dtype, learns=True) for i in range(2)]
    t = [case.input(f"teacher_{i}", dtype) for i in range(2)]
    loss = discrepancy_of(s, t, weight=1.0)
    loss.backward()
    assert loss.dtype == dtype
    assert near(loss, case.loss or 0.0, tolerance)
    for i in range(2):
        assert near(discrepancy_of([s[i]], [t[i]], weight=1.0), case.components[f"stage_{i}"], tolerance)
        grad = s[i].grad
        assert grad is not None
        assert near(grad, case.gradient(f"student_{i}"), tolerance)


@pytest.mark.parametrize("side", [2, 5], ids=["by_positions", "by_channels"])
def test_every_pair_of_channels_counts(side: int) -> None:
    """Few positions and many channels, and the reverse: the definition's number, with the weight of 50."""
    (s,), (t,) = maps(0, (7, side, side)), maps(1, (9, side, side))
    assert discrepancy_of([s], [t]).item() == pytest.approx(50 * by_definition(s, t), rel=1e-9)


@pytest.mark.parametrize("side", [2, 5], ids=["by_positions", "by_channels"])
def test_equal_distributions_and_dead_channels(side: int) -> None:
    """The channels' order and scale do not matter; a channel of zeros has a finite gradient."""
    (s,) = maps(2, (8, side, side))
    assert discrepancy_of([3 * s.flip(1)], [s]).item() == pytest.approx(0, abs=1e-10)
    dead = torch.cat([torch.zeros_like(s[:, :1]), s[:, 1:]], 1).requires_grad_()
    discrepancy_of([dead], [s]).backward()
    assert dead.grad is not None
    assert torch.isfinite(dead.grad).all()


def test_unequal_numbers_of_stages_meet_at_the_last_or_at_the_first() -> None:
    """The network with more stages loses its shallowest, or with `first` its deepest."""
    s, t = maps(3, (4, 8, 8), (4, 4, 4)), maps(4, (6, 8, 8), (6, 8, 8), (6, 4, 4))
    assert discrepancy_of(s, t).item() == discrepancy_of(s, t[1:]).item()
    assert discrepancy_of(s, t, align="first").item() == discrepancy_of(s, t[:2]).item()
    assert discrepancy_of(s, t).item() != discrepancy_of(s, t, align="first").item()

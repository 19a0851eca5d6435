"""Losses over the whole batch: two and three ranks (gloo) give the values and gradients of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gather_workers as workers
import pytest
import torch
from torch import Tensor

from kdcli import methods

# Settings without which a method cannot run on the toy networks or would draw what ranks cannot share.
SETTINGS: dict[str, dict[str, Any]] = {"crd": {"negatives": 7, "dim": 6}, "rkd": {}}
NAMES = [name for name in methods.SHIPPED if methods.method_class(name).needs_teacher]


def run(function: Any, world: int, tmp_path: Path, *arguments: Any) -> list[dict[str, Any]]:
    """Run `function` on `world` ranks; what each of them saved."""
    out = tmp_path / f"out{world}"
    out.mkdir()
    if world == 1:
        function(0, 1, tmp_path / "unused", out, *arguments)
    else:
        call = (world, tmp_path / f"store{world}", out, *arguments)
        torch.multiprocessing.spawn(function, args=call, nprocs=world)
    return [torch.load(out / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    """max|a - b| against max|b|, or against 0.001 where b is zero up to rounding."""
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3))


@pytest.mark.parametrize(("world", "count"), [(2, 6), (2, 5), (2, 1), (3, 7), (3, 2)])
def test_rows_and_their_gradients_are_those_of_one_process(world: int, count: int, tmp_path: Path) -> None:
    """Even and uneven parts, and a rank that only has a sample to be kept busy."""
    (alone,) = run(workers.rows, 1, tmp_path, count)
    ranks = run(workers.rows, world, tmp_path, count)
    taken = [rank["share"] for rank in ranks]
    assert [first for first, _ in taken] == [sum(n for _, n in taken[:i]) for i in range(world)]
    assert sum(n for _, n in taken) == count
    for rank in ranks:
        assert torch.equal(rank["rows"], alone["rows"])
    # DDP averages over the ranks, so the gradient a rank hands on is `world` times its rows'.
    grads = [rank["grad"][:n] / world for rank, (_, n) in zip(ranks, taken, strict=True)]
    assert close(torch.cat(grads), alone["grad"])
    idle = [rank["grad"] for rank, (_, n) in zip(ranks, taken, strict=True) if n == 0]
    assert all(not grad.any() for grad in idle)


@pytest.mark.parametrize(("world", "count"), [(2, 6), (2, 5), (3, 7)])
def test_batchnorm_over_all_ranks_is_that_of_the_whole_batch(world: int, count: int, tmp_path: Path) -> None:
    """Output, gradients of input and parameters, and running statistics, also where parts are uneven."""
    (alone,) = run(workers.rows, 1, tmp_path, count)
    ranks = run(workers.rows, world, tmp_path, count)
    assert close(torch.cat([rank["normed"] for rank in ranks]), alone["normed"])
    assert close(torch.cat([rank["norm_grad"] for rank in ranks]) / world, alone["norm_grad"])
    for rank in ranks:
        assert all(close(rank["parameters"][name], alone["parameters"][name]) for name in alone["parameters"])
        assert all(close(a.double(), b.double()) for a, b in zip(rank["statistics"], alone["statistics"], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_methods_gradients_on_two_ranks_are_those_of_one(name: str, tmp_path: Path) -> None:
    """Seven images, four and three: loss, gradients of student and side modules, and banks, after two steps."""
    settings = SETTINGS.get(name, {})
    (alone,) = run(workers.method, 1, tmp_path, name, settings, 7)
    ranks = run(workers.method, 2, tmp_path, name, settings, 7)
    for rank in ranks:
        for mine, theirs in zip(rank["losses"], alone["losses"], strict=True):
            assert close(mine, theirs), "loss"
        for parameter, gradient in alone["gradients"].items():
            assert close(rank["gradients"][parameter], gradient, 1e-7), parameter
        for buffer, value in alone["buffers"].items():
            assert close(rank["buffers"][buffer], value), buffer

"""Losses over the whole batch: two and three ranks (gloo) give the values and gradients of one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gather_workers as workers
import pytest
import torch
from torch import Tensor

from kdcli import methods

# Settings that make a method small enough for the toy networks and twenty images.
# ReKD's samples are each rank's own, so that only its point is the same on any number of them.
SETTINGS: dict[str, dict[str, Any]] = {"crd": {"negatives": 7, "dim": 6}, "rekd": {"target": "point"}}
NAMES = [name for name in methods.SHIPPED if methods.method_class(name).needs_teacher]
CRD = {
    "crd_drawn_without_replacement": {"negatives": 7, "dim": 6, "replacement": False},
    "crd_with_friends": {"negatives": 7, "dim": 6, "mode": "relax"},
}

Jobs = dict[str, tuple[str, tuple[Any, ...]]]
ROWS: Jobs = {f"rows_{count}": ("rows", (count,)) for count in (1, 2, 5, 6, 7)}
METHODS: Jobs = {name: ("method", (name, SETTINGS.get(name, {}), 7)) for name in NAMES}
METHODS |= {label: ("method", ("crd", settings, 7)) for label, settings in CRD.items()}
# One or two images: a rank is only kept busy, and must leave the banks alone.
ALONE: Jobs = {f"crd_{count}": ("method", ("crd", SETTINGS["crd"], count)) for count in (1, 2)}
# With BatchNorm each rank normalises its own images, so that only two runs on equally many ranks can be equal.
NORMED: Jobs = {f"{name}_{run}": ("method", (name, SETTINGS.get(name, {}), 7, True)) for name in NAMES for run in "ab"}
JOBS: dict[int, Jobs] = {1: ROWS | METHODS | ALONE, 2: ROWS | METHODS | ALONE | NORMED, 3: ROWS | ALONE}

Found = Callable[[int, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """`found(world, label)`: what each rank made of that job. All jobs of a world are done when the first is asked for."""

    @cache
    def folder(world: int) -> Path:
        place = tmp_path_factory.mktemp(f"world{world}")
        if world == 1:
            workers.work(0, 1, place, JOBS[1])
        else:
            torch.multiprocessing.spawn(workers.work, args=(world, place, JOBS[world]), nprocs=world)
        return place

    def load(world: int, label: str) -> list[dict[str, Any]]:
        ranks = [torch.load(folder(world) / f"{label}-{rank}.pt", weights_only=True) for rank in range(world)]
        for rank in ranks:
            assert isinstance(rank, dict), rank
        return ranks

    return load


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    """max|a - b| against max|b|, or against 0.001 where b is zero up to rounding."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3))


def check_method(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """Losses of two steps, the averaged gradients of the second, and all buffers are those of one process."""
    for rank in ranks:
        for mine, theirs in zip(rank["losses"], alone["losses"], strict=True):
            assert close(mine, theirs), "loss"
        assert rank["gradients"].keys() == alone["gradients"].keys()
        for parameter, gradient in alone["gradients"].items():
            assert close(rank["gradients"][parameter], gradient, 1e-7), parameter
        for buffer, value in alone["buffers"].items():
            assert close(rank["buffers"][buffer], value), buffer


@pytest.mark.parametrize(("world", "count"), [(2, 6), (2, 5), (2, 1), (3, 7), (3, 2)])
def test_rows_and_their_gradients_are_those_of_one_process(world: int, count: int, found: Found) -> None:
    """Even and uneven parts, and a rank that only has a sample to be kept busy."""
    (alone,), ranks = found(1, f"rows_{count}"), found(world, f"rows_{count}")
    taken = [rank["share"] for rank in ranks]
    assert [first for first, _ in taken] == [sum(n for _, n in taken[:i]) for i in range(world)]
    assert sum(n for _, n in taken) == count
    for rank in ranks:
        assert torch.equal(rank["rows"], alone["rows"])
    # DDP averages over the ranks, so the gradient a rank hands on is `world` times its rows'.
    for name in ("grad", "sum_grad"):
        grads = [rank[name][:n] / world for rank, (_, n) in zip(ranks, taken, strict=True)]
        assert close(torch.cat(grads), alone[name]), name
    idle = [rank["grad"] for rank, (_, n) in zip(ranks, taken, strict=True) if n == 0]
    assert len(idle) == max(0, world - count)
    assert all(not grad.any() for grad in idle)


@pytest.mark.parametrize(("world", "count"), [(2, 6), (2, 5), (3, 7)])
def test_batchnorm_over_all_ranks_is_that_of_the_whole_batch(world: int, count: int, found: Found) -> None:
    """Output, gradients of input and parameters, and statistics, also where parts are uneven and without parameters."""
    (alone,), ranks = found(1, f"rows_{count}"), found(world, f"rows_{count}")
    assert close(torch.cat([rank["normed"] for rank in ranks]), alone["normed"])
    assert close(torch.cat([rank["norm_grad"] for rank in ranks]) / world, alone["norm_grad"])
    assert close(torch.cat([rank["plain"] for rank in ranks]), alone["plain"])
    for rank in ranks:
        assert all(close(a, b) for a, b in zip(rank["moments"], alone["moments"], strict=True))
        assert all(close(rank["parameters"][name], alone["parameters"][name]) for name in alone["parameters"])
        assert all(close(a.double(), b.double()) for a, b in zip(rank["statistics"], alone["statistics"], strict=True))


@pytest.mark.parametrize("label", list(METHODS))
def test_a_methods_gradients_on_two_ranks_are_those_of_one(label: str, found: Found) -> None:
    """Seven images, four and three."""
    (alone,) = found(1, label)
    check_method(found(2, label), alone)


@pytest.mark.parametrize("name", NAMES)
def test_with_batchnorm_two_runs_on_two_ranks_are_equal(name: str, found: Found) -> None:
    """Losses, averaged gradients and buffers of real networks, bit for bit; and all ranks take the same step."""
    once, again = found(2, f"{name}_a"), found(2, f"{name}_b")
    for one, two in zip(once, again, strict=True):
        for kind in ("gradients", "buffers"):
            assert one[kind].keys() == two[kind].keys()
            assert all(torch.equal(one[kind][key], two[kind][key]) for key in one[kind])
        assert all(torch.equal(a, b) for a, b in zip(one["losses"], two["losses"], strict=True))
    first, second = once
    assert all(torch.equal(first["gradients"][key], second["gradients"][key]) for key in first["gradients"])


@pytest.mark.parametrize(("world", "count"), [(2, 1), (3, 1), (3, 2)])
def test_a_rank_that_is_only_kept_busy_leaves_the_banks_alone(world: int, count: int, found: Found) -> None:
    """CRD with fewer images than ranks: the same banks and gradients everywhere, and those of one process."""
    (alone,) = found(1, f"crd_{count}")
    check_method(found(world, f"crd_{count}"), alone)

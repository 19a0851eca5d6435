"""Learning rates as the literature's recipes set them, and optimisers that decay every weight."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from kdcli.engine.optim import optimizer, rate
from kdcli.specs import TrainSpec


def spec(**changes: Any) -> TrainSpec:
    return TrainSpec(**{"lr": 0.05, **changes})


@pytest.mark.parametrize("per_epoch", [1, 7, 782])
def test_the_cifar_schedule_decays_at_150_180_and_210_of_240(per_epoch: int) -> None:
    """The 0-based epochs 150, 180 and 210 are the first at 1/10, 1/100 and 1/1000; the 149th is still at the peak."""
    train = spec()
    assert train.epochs == 240
    for epoch, decays in [(0, 0), (149, 0), (150, 1), (179, 1), (180, 2), (209, 2), (210, 3), (239, 3)]:
        for step in (epoch * per_epoch, (epoch + 1) * per_epoch - 1):
            assert rate(train, step, per_epoch) == pytest.approx(0.05 * 0.1**decays, rel=1e-12), (epoch, step)


@pytest.mark.parametrize(
    ("epochs", "milestones", "expected"),
    [
        (100, (0.3, 0.6, 0.9), [30, 60, 90]),  # ImageNet
        (200, (0.3, 0.6, 0.8), [60, 120, 160]),  # Tiny-ImageNet
        (24, (0.625, 0.75, 0.875), [15, 18, 21]),
        (480, (150, 180, 210), [150, 180, 210]),  # absolute ones stay where they are
        (10, (3, 0.5 + 7), [3, 8]),
        (3, (1, 2), [1, 2]),
    ],
)
def test_milestones_below_one_scale_with_the_epochs_and_others_do_not(
    epochs: int, milestones: tuple[float, ...], expected: list[int]
) -> None:
    """The decays found by watching the rate from epoch to epoch."""
    train = spec(epochs=epochs, milestones=tuple(sorted(milestones)), gamma=0.5)
    rates = [rate(train, epoch * 5, 5) for epoch in range(epochs)]
    assert [e for e in range(1, epochs) if rates[e] != rates[e - 1]] == expected
    assert rates[-1] == pytest.approx(0.05 * 0.5 ** len(expected))


def test_cosine_starts_at_the_peak_and_ends_at_the_minimum() -> None:
    """Half-way it is the mean of both; it only falls; past the end it stays at the minimum."""
    train = spec(schedule="cosine", epochs=10, min_lr=0.001)
    rates = [rate(train, step, 20) for step in range(200)]
    assert rates[0] == 0.05
    assert rates[100] == pytest.approx((0.05 + 0.001) / 2, rel=1e-12)
    assert all(a > b for a, b in pairwise(rates))
    assert rates[50] == pytest.approx(0.001 + 0.049 * (1 + math.cos(math.pi / 4)) / 2, rel=1e-12)
    assert rates[-1] == pytest.approx(0.001, rel=0.01)
    assert rate(train, 200, 20) == rate(train, 500, 20) == pytest.approx(0.001, rel=1e-12)


@pytest.mark.parametrize(("warmup", "peak"), [(0.0, 60), (2.0, 40)])
def test_onecycle_rises_to_one_peak_and_falls_to_the_minimum(warmup: float, peak: int) -> None:
    """The peak is after the warm-up, or after 30 % of all steps; linear on both sides."""
    train = spec(schedule="onecycle", epochs=10, warmup_epochs=warmup, min_lr=0.0005)
    rates = [rate(train, step, 20) for step in range(200)]
    assert max(range(200), key=rates.__getitem__) == peak
    assert rates[peak] == pytest.approx(0.05, rel=1e-12)
    assert rates[0] == pytest.approx(0.05 / (peak + 1), rel=1e-12)
    up, down = rates[: peak + 1], rates[peak:]
    assert [b - a for a, b in pairwise(up)] == pytest.approx([0.05 / (peak + 1)] * peak, rel=1e-9)
    assert all(a > b for a, b in pairwise(down))
    assert rate(train, 200, 20) == pytest.approx(0.0005, rel=1e-9)


@pytest.mark.parametrize("schedule", ["step", "cosine", "constant"])
def test_warm_up_rises_linearly_and_never_starts_at_zero(schedule: str) -> None:
    """Three epochs of 10 steps: the rate of step s is lr·(s+1)/31, and step 30 is at the peak."""
    train = spec(schedule=schedule, epochs=20, warmup_epochs=3)
    rates = [rate(train, step, 10) for step in range(31)]
    assert rates == pytest.approx([0.05 * (step + 1) / 31 for step in range(31)], rel=1e-12)


def test_warm_up_does_not_shift_the_milestones() -> None:
    """The step schedule counts epochs from the beginning, warm-up included."""
    train = spec(epochs=240, warmup_epochs=5)
    assert rate(train, 149 * 10, 10) == 0.05
    assert rate(train, 150 * 10, 10) == pytest.approx(0.005)


def test_constant_is_constant() -> None:
    """One rate from the first step to the last."""
    assert {rate(spec(schedule="constant", epochs=4), step, 10) for step in range(40)} == {0.05}


class Mixed(nn.Module):
    """A network with every kind of parameter that others exempt from weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_is_on_every_parameter(name: str) -> None:
    """One group holds BatchNorm weights, biases and scalars too; with a zero gradient all of them shrink."""
    torch.manual_seed(0)
    network = Mixed()
    nn.init.ones_(network.norm.bias)
    train = spec(optimizer=name, weight_decay=0.01)
    made = optimizer(train, network.parameters(), cuda=False)
    assert len(made.param_groups) == 1
    assert {id(p) for p in made.param_groups[0]["params"]} == {id(p) for p in network.parameters()}
    before = {key: p.detach().clone() for key, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    made.step()
    for key, p in network.named_parameters():
        assert torch.allclose(p, before[key] * (1 - 0.05 * 0.01), rtol=1e-6), key


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_and_nesterov_are_the_specs(nesterov: bool) -> None:
    """Two steps on a known gradient, computed by hand."""
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    train = spec(momentum=0.9, nesterov=nesterov, weight_decay=0.0, lr=0.1)
    made = optimizer(train, [weight], cuda=False)
    expected, velocity = 1.0, 0.0
    for gradient in (1.0, -0.5):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        made.step()
        velocity = 0.9 * velocity + gradient
        expected -= 0.1 * (gradient + 0.9 * velocity if nesterov else velocity)
    assert weight.item() == pytest.approx(expected, rel=1e-12)


def test_nesterov_without_momentum_is_plain_sgd() -> None:
    """torch refuses that pair; a method's default must not make `--momentum 0` fail."""
    made = optimizer(spec(nesterov=True, momentum=0.0), [nn.Parameter(torch.ones(1))], cuda=False)
    assert made.param_groups[0]["nesterov"] is False

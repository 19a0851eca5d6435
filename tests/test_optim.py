"""Learning rates as the literature's recipes set them, and optimisers that decay every weight or only maps."""

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
    made = optimizer(train, network, cuda=False)
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
    made = optimizer(train, nn.ParameterList([weight]), cuda=False)
    expected, velocity = 1.0, 0.0
    for gradient in (1.0, -0.5):
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        made.step()
        velocity = 0.9 * velocity + gradient
        expected -= 0.1 * (gradient + 0.9 * velocity if nesterov else velocity)
    assert weight.item() == pytest.approx(expected, rel=1e-12)


def test_nesterov_without_momentum_is_plain_sgd() -> None:
    """torch refuses that pair; a method's default must not make `--momentum 0` fail."""
    made = optimizer(spec(nesterov=True, momentum=0.0), nn.Linear(1, 1), cuda=False)
    assert made.param_groups[0]["nesterov"] is False


class Tokens(nn.Module):
    """What a network of tokens has besides maps: a class token, a table of positions, a linear map with its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.ones(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.ones(1, 5, 4))
        self.map = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_on_weights_spares_biases_norms_tokens_and_positions(name: str) -> None:
    """With a zero gradient only filters and matrices shrink; frozen parameters are in no group."""
    network = nn.ModuleDict({"conv": Mixed(), "tokens": Tokens()})
    made = optimizer(spec(optimizer=name, weight_decay=0.01, decay="weights"), network, cuda=False)
    before = {key: p.detach().clone() for key, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    made.step()
    shrunk = {key for key, p in network.named_parameters() if not torch.equal(p, before[key])}
    assert shrunk == {"conv.conv.weight", "tokens.map.weight"}
    assert [group["weight_decay"] for group in made.param_groups] == [0.01, 0.0]
    held = [p for group in made.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in network.parameters() if p.requires_grad}
    assert len(held) == len({id(p) for p in held})


def test_decay_on_weights_spares_what_timm_spares() -> None:
    """On a ViT, a Swin and a ConvNeXt as the product builds them: timm's own rule for its own network, by value."""
    import timm
    from timm.optim import param_groups_weight_decay

    from kdcli.models import build

    for short in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"):
        theirs = timm.create_model(short, num_classes=10)
        named = theirs.no_weight_decay() if hasattr(theirs, "no_weight_decay") else ()
        groups = param_groups_weight_decay(theirs, 0.05, no_weight_decay_list=tuple(named))
        expected = {group["weight_decay"]: sum(p.numel() for p in group["params"]) for group in groups}
        ours = build(f"timm:{short}", 10, 224)
        made = optimizer(spec(decay="weights", weight_decay=0.05), ours, cuda=False)
        assert {g["weight_decay"]: sum(p.numel() for p in g["params"]) for g in made.param_groups} == expected, short


def test_a_methods_undecayed_parameters_are_spared_whatever_the_recipe_says() -> None:
    """One of two parameters is named: it makes a group of its own, the other keeps the decay."""
    network = nn.Linear(2, 2)
    made = optimizer(spec(weight_decay=0.01), network, cuda=False, undecayed=[network.weight])
    assert [(g["weight_decay"], g["params"][0] is network.weight) for g in made.param_groups] == [
        (0.01, False),
        (0, True),
    ]
    everything = optimizer(spec(weight_decay=0.01), network, cuda=False, undecayed=network.parameters())
    assert [group["weight_decay"] for group in everything.param_groups] == [0.0]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_two_groups_go_on_from_a_saved_state_bit_for_bit(name: str) -> None:
    """Three steps, and three of which the last is taken by another optimiser with the saved state."""
    from kdcli.engine.state import pack, unpack

    train = spec(optimizer=name, weight_decay=0.01, decay="weights")
    images = torch.randn(3, 5, 3, 6, 6, generator=torch.Generator().manual_seed(0))

    def made() -> tuple[Mixed, torch.optim.Optimizer]:
        torch.manual_seed(1)
        network = Mixed()
        return network, optimizer(train, network, cuda=False)

    def step(network: Mixed, optimiser: torch.optim.Optimizer, number: int) -> None:
        optimiser.zero_grad()
        (network.norm(network.conv(images[number])) * network.scale).square().mean().backward()
        optimiser.step()

    whole, first = made()
    for number in range(3):
        step(whole, first, number)
    broken, second = made()
    for number in range(2):
        step(broken, second, number)
    saved = {key: value.clone() for key, value in pack(broken, second, None, {}).items()}
    resumed, third = made()
    unpack(saved, 2, resumed, third, None, torch.device("cpu"))
    step(resumed, third, 2)
    for (key, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_warm_up_starts_where_it_is_told(schedule: str) -> None:
    """From 5e-7 in equal steps; the step after the last of the warm-up is at the peak."""
    train = spec(schedule=schedule, epochs=20, warmup_epochs=2, warmup_lr=5e-7)
    rates = [rate(train, step, 10) for step in range(21)]
    rise = (0.05 - 5e-7) / 21
    assert rates == pytest.approx([5e-7 + rise * (step + 1) for step in range(21)], rel=1e-12)

"""Winograd's convolutions: the direct ones' values and gradients, only where they gain, and only where they are compiled."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdcli.models import build, winograd


@pytest.mark.parametrize(("batch", "inside", "outside", "height", "width"), [(3, 5, 7, 8, 12), (1, 1, 2, 4, 4)])
@pytest.mark.parametrize("last", [True, False])
def test_values_and_gradients_are_the_direct_ones(batch, inside, outside, height, width, last):
    """In float64 to its rounding, whatever the layout."""
    torch.manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(batch, inside, height, width, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    weight = torch.randn(outside, inside, 3, 3, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    gradient = torch.randn(batch, outside, height, width, dtype=torch.float64)
    wanted = F.conv2d(x, weight, padding=1)
    found = winograd.convolve(x, winograd.filters_of(weight))
    turned = winograd.filters_of(weight.flip(2, 3).transpose(0, 1))
    to_x, to_weight = winograd.convolve(gradient, turned), winograd.weight_gradient(gradient, x)
    for ours, theirs in zip(
        (found, to_x, to_weight), (wanted, *torch.autograd.grad(wanted, (x, weight), gradient)), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)


def test_float32_is_right_to_rounding():
    """At the size it is for, the error relative to the result's norm."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 128, 8, 8).relu(), torch.randn(128, 128, 3, 3)
    wanted = F.conv2d(x.double(), weight.double(), padding=1)
    found = winograd.convolve(x, winograd.filters_of(weight))
    assert (found - wanted).norm() / wanted.norm() < 4e-6


def test_adopted_are_those_that_gain():
    """Wide, plain 3×3 convolutions of stride 1; a network is adopted once."""
    wide = nn.Conv2d(64, 64, 3, padding=1)
    others = [
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 1),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.Conv2d(64, 64, 3, padding=1, groups=64),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.Conv2d(64, 64, 3, padding=1).double(),
    ]
    assert winograd.adopt(nn.ModuleList([wide, *others]), frozen=False) == 1
    assert isinstance(wide, winograd.WinogradConv2d)
    assert winograd.adopt(wide, frozen=True) == 0
    # Stages 2 and 3 of six blocks each, but for the two layers that halve the map.
    assert winograd.adopt(build("wrn40_2", 100), frozen=False) == 22


@pytest.mark.parametrize("frozen", [True, False])
def test_compiled_it_takes_the_other_way_and_else_it_does_not(frozen, monkeypatch):
    """Other bits, the same numbers; uncompiled, or on a map that is not whole tiles, the very bits of before."""
    monkeypatch.setattr(winograd, "_compiled", lambda function, *_: function)  # the operators uncompiled: it is quicker
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 64, 3, padding=1).requires_grad_(not frozen)
    adopted = copy.deepcopy(plain)
    winograd.adopt(adopted, frozen=frozen)
    compiled = torch.compile(adopted, backend="eager", dynamic=False)
    assert list(adopted.state_dict()) == list(plain.state_dict())
    x, odd = torch.randn(2, 64, 8, 8), torch.randn(2, 64, 7, 8)
    assert torch.equal(adopted(x), plain(x))
    assert torch.equal(compiled(odd), plain(odd))
    assert not torch.equal(compiled(x), plain(x))
    assert torch.allclose(compiled(x), plain(x), atol=1e-5)
    xs = [torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    compiled(xs[0]).square().sum().backward()
    plain(xs[1]).square().sum().backward()
    pairs = [(xs[0].grad, xs[1].grad)]
    if not frozen:
        pairs += [(a.grad, b.grad) for a, b in zip(adopted.parameters(), plain.parameters(), strict=True)]
    for ours, theirs in pairs:
        assert ours is not None
        assert theirs is not None
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-3)

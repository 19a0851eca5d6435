"""A frozen network normalising by its batch: what it computes, and that nothing of it changes."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from kdcli.models import build
from kdcli.models.batch_statistics import batch_statistics


def frozen(name: str) -> nn.Module:
    """A network whose running statistics are not those of any batch below."""
    torch.manual_seed(0)
    network = build(name, 10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return network.eval().requires_grad_(False)


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def flags(network: nn.Module) -> list[tuple[bool, bool | None]]:
    return [(module.training, getattr(module, "track_running_stats", None)) for module in network.modules()]


@pytest.mark.parametrize("name", ["resnet8", "wrn16_2", "vgg8", "mobilenetv2", "shufflenetv2", "timm:resnet18"])
def test_the_network_computes_as_in_training_and_stays_as_it_is(name: str) -> None:
    """Bit for bit what the training mode gives, pre-activations too; no tensor and no flag of the network changes."""
    network = frozen(name)
    reference = copy.deepcopy(network).train()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    modes = flags(network)
    with torch.no_grad():
        wanted = reference.features(images())  # type: ignore[operator]
        outside = network.features(images())  # type: ignore[operator]
        with batch_statistics(network):
            found = network.features(images())  # type: ignore[operator]
            for i in range(1, len(found.maps)):
                assert torch.equal(found.preact(i), wanted.preact(i))
    assert torch.equal(found.logits, wanted.logits)
    assert not torch.allclose(found.logits, outside.logits)
    assert all(torch.equal(a, b) for a, b in zip(found.maps, wanted.maps, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert flags(network) == modes
    with torch.no_grad():
        assert torch.equal(network(images()), outside.logits)


def test_what_is_no_batchnorm_keeps_its_mode() -> None:
    """Dropout stays off."""
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9)).eval()
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    with batch_statistics(network):
        assert torch.equal(network(x), network[0](x))
        assert not network[1].training
        assert network(x).mean(0).abs().max() < 1e-6


def test_flags_come_back_after_an_exception() -> None:
    """Also those that were not the usual ones."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3))
    network[0].eval()
    modes = flags(network)
    with pytest.raises(KeyError), batch_statistics(network):
        raise KeyError
    assert flags(network) == modes


def test_no_gradient_reaches_the_frozen_network() -> None:
    """Nor does the pass keep a graph without gradients being switched off."""
    network = frozen("resnet8")
    with batch_statistics(network):
        assert not network(images()).requires_grad


def test_every_batch_is_normalised_by_itself() -> None:
    """Two parts of a batch are not the whole of it."""
    network, x = frozen("resnet8"), images()
    with torch.no_grad(), batch_statistics(network):
        whole = network(x)
        parts = torch.cat([network(x[a:b]) for a, b in pairwise((0, 2, 4))])
    assert not torch.allclose(whole, parts)

"""What every registry network promises: any input size, a chain that equals forward, BatchNorm updated once."""

from __future__ import annotations

import copy

import pytest
import torch

from kdcli.errors import IncompatibleError
from kdcli.models import build
from kdcli.models.heads import Headed, build_heads
from kdcli.models.names import known
from kdcli.models.network import Network, dry_run, macs, macs_with_heads, stage_shapes

SMALL = ["wrn16_1", "resnet8", "resnet8x4", "vgg8", "resnet18", "mobilenetv2", "shufflenetv1", "shufflenetv2"]
"""One network per family."""


def chain(network: Network, x: torch.Tensor) -> torch.Tensor:
    """Logits by way of stem, stages and tail."""
    x = network.stem(x)
    for i in range(1, network.n_stages + 1):
        x = network.stage(i, x)
    return network.tail(x)[1]


@pytest.mark.parametrize("name", known())
@pytest.mark.parametrize("size", [64, 96])
def test_any_input_size_gives_one_row_per_image(name: str, size: int) -> None:
    with torch.device("meta"):
        network = build(name, 10)
    features = dry_run(network, "features", size, batch=3)
    assert features.logits.shape == (3, 10)  # type: ignore[attr-defined]
    assert features.pooled.shape == (3, network.pooled_dim)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SMALL)
def test_chain_equals_forward(name: str) -> None:
    network = build(name, 10).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(chain(network, x), network(x))


@pytest.mark.parametrize("name", SMALL)
def test_batchnorm_is_updated_once_and_never_by_preact(name: str) -> None:
    network = build(name, 10).train()
    features = network.features(torch.randn(4, 3, 32, 32))
    before = copy.deepcopy(network.state_dict())
    assert all(v == 1 for k, v in before.items() if k.endswith("num_batches_tracked"))
    for i in range(1, network.n_stages + 1):
        assert features.preact(i).shape == features.maps[i].shape
    stage_shapes(network, 32)
    macs(network, 32)
    after = network.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_wide_resnet_preact_uses_batch_statistics_in_training() -> None:
    network = build("wrn16_1", 10).train()
    features = network.features(torch.randn(8, 3, 32, 32))
    for i in (1, 2, 3):
        preact = features.preact(i)
        assert preact.mean((0, 2, 3)).abs().max() < 1e-4  # weight 1, bias 0: normalised over batch and positions
        with pytest.raises(IndexError):
            features.preact(4)


def test_vgg_pools_once_more_at_64_pixels_unless_told_not_to() -> None:
    assert stage_shapes(build("vgg8", 10), 64)[-1] == (512, 4, 4)
    assert stage_shapes(build("vgg8", 10), 32)[-1] == (512, 4, 4)
    assert stage_shapes(build("vgg8", 10, fixed_stride=True), 64)[-1] == (512, 8, 8)


def test_vgg13_with_heads_at_64_pixels_costs_what_hsakd_counts() -> None:
    # Four rotations of a 64-pixel image: 13.3 GMAC with the extra pooling, 16.1 without.
    def total(fixed: bool) -> float:
        with torch.device("meta"):
            network = build("vgg13", 100, fixed_stride=fixed)
            return 4 * macs_with_heads(Headed(network, build_heads(network, 400)), 64) / 1e9

    assert total(False) == pytest.approx(13.3, abs=0.06)
    assert total(True) == pytest.approx(16.05, abs=0.06)


def test_the_two_mobilenetv2_stems() -> None:
    two, one = build("mobilenetv2", 10), build("mobilenetv2_s1", 10)
    assert {k: v.shape for k, v in two.state_dict().items()} == {k: v.shape for k, v in one.state_dict().items()}
    assert stage_shapes(two, 32)[1:] == [(12, 16, 16), (16, 8, 8), (48, 4, 4), (160, 2, 2)]
    assert stage_shapes(one, 32)[1:] == [(12, 32, 32), (16, 16, 16), (48, 8, 8), (160, 4, 4)]


@pytest.mark.parametrize("name", [*SMALL, "mobilenetv1"])
def test_heads_train_the_backbone(name: str) -> None:
    network = build(name, 5)
    headed = Headed(network, build_heads(network, 20))
    features = headed.features(torch.randn(2, 3, 64, 64))
    assert [tuple(h.shape) for h in features.heads] == [(2, 20)] * len(network.head_taps)
    sum(h.square().sum() for h in features.heads).backward()  # type: ignore[union-attr]
    first = next(network.parameters())
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    assert all(p.grad is not None for p in headed.heads.parameters())
    assert headed(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_shallowest_heads_can_be_dropped_and_maps_rescaled() -> None:
    network = build("vgg8", 5).eval()
    headed = Headed(network, build_heads(network, 20, count=3)).eval()
    assert headed.taps == (1, 2, 4)
    with torch.no_grad():
        assert [tuple(h.shape) for h in headed.features(torch.randn(2, 3, 32, 32)).heads] == [(2, 20)] * 3
    with pytest.raises(IncompatibleError):
        build_heads(network, 20, count=5)


def test_features_compile_in_one_piece() -> None:
    network = build("wrn16_1", 10).train()
    headed = Headed(network, build_heads(network, 40))

    def loss(x: torch.Tensor) -> torch.Tensor:
        features = headed.features(x)
        return features.logits.mean() + features.preact(2).mean() + sum(h.mean() for h in features.heads)

    x = torch.randn(4, 3, 32, 32)
    plain = loss(x)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)(x)
    assert torch.allclose(plain, compiled, atol=1e-5)

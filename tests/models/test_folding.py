"""Folded networks: what they compute, how much is folded, what is left alone, and that nothing of the original changes."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from kdcli.methods.ofd import _margin
from kdcli.models import build, folding
from kdcli.models.batch_statistics import batch_statistics
from kdcli.models.folding import FoldedNorm, count_folded, folded, outputs
from kdcli.models.heads import Headed, build_heads, build_projection
from kdcli.models.names import known
from kdcli.models.network import Network, macs, macs_with_heads
from kdcli.models.panel import Panel
from kdcli.networks import fingerprint

AnyNetwork = Network | Headed | Panel

LIBRARY = [
    "timm:resnet18",
    "timm:efficientnet_b0",
    "timm:tf_efficientnet_b0",
    "timm:mobilenetv2_100",
    "timm:mobilenetv3_small_100",
    "torchvision:resnet18",
    "torchvision:mobilenet_v2",
]


def unlike_fresh(network: nn.Module) -> nn.Module:
    """The network frozen, its BatchNorms neither the identity nor alike, some of their weights negative."""
    generator = torch.Generator().manual_seed(5)

    def uniform(like: Tensor | None, low: float, high: float) -> None:
        if like is not None:
            like.copy_(low + (high - low) * torch.rand(like.shape, generator=generator))

    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                uniform(module.running_mean, -0.5, 0.5)
                uniform(module.running_var, 0.3, 2)
                uniform(module.weight, -0.5, 1.5)
                uniform(module.bias, -0.5, 0.5)
    return network.eval().requires_grad_(False)


def made(name: str, size: int = 32) -> Network:
    torch.manual_seed(0)
    network = unlike_fresh(build(name, 10, size))
    assert isinstance(network, Network)
    return network


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_same(found: AnyNetwork, wanted: AnyNetwork, x: Tensor, tolerance: float = 1e-5) -> None:
    """Every tensor of the features, and the logits of `forward`, to `tolerance` of its largest value."""
    with torch.no_grad():
        pairs = list(zip(outputs(found.features(x)), outputs(wanted.features(x)), strict=True))
        if not isinstance(found, Panel):
            pairs.append((found(x), wanted(x)))  # type: ignore[operator]
    assert len(pairs) > 5
    for a, b in pairs:
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


class Small(Network):
    """A network of one stage around any layers, whose BatchNorms may follow their layers in odd ways."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(outputs=4, n_stages=1, pooled_dim=4, classifier_name="fc")
        self.body, self.fc = body, nn.Linear(4, 4)

    def stem(self, x: Tensor) -> Tensor:
        return x

    def raw_stage(self, i: int, x: Tensor) -> Tensor:
        return self.body(x)

    def final(self, x: Tensor) -> Tensor:
        return x

    def truncated(self, first: int, outputs: int) -> Network:
        raise NotImplementedError


class Skips(nn.Module):
    """A convolution and its BatchNorm; `kind` says who else reads the convolution's output, or how often it runs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.bare, self.free = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.bn(y)
        if self.kind == "twice":
            z = z + y
        elif self.kind == "view":
            z = z + y.flatten(2)[..., :1, None]
        elif self.kind == "runs again":
            z = z + self.conv(x.flip(3))
        elif self.kind == "normalises again":
            z = z + self.bn(z)
        return z + self.free(self.bare(x))


def small(body: nn.Module) -> Small:
    torch.manual_seed(0)
    network = unlike_fresh(Small(body))
    assert isinstance(network, Small)
    return network


@pytest.mark.parametrize("name", [*known(), *LIBRARY])
def test_all_features_are_equal_at_both_sizes(name: str) -> None:
    """Maps, pre-activations, pooled vector, final map, logits; the teacher may see images twice as large."""
    network = made(name)
    result = folded(network)
    assert type(result) is type(network)
    assert not result.training
    assert not any(p.requires_grad for p in result.parameters())
    assert count_folded(result)[0] > 0
    assert_same(result, network, images())
    assert_same(result, network, images(64)[:1])


@pytest.mark.parametrize("name", ["resnet20", "wrn16_2", "shufflenetv2", "timm:efficientnet_b0"])
def test_in_float64_they_are_equal_to_its_rounding(name: str) -> None:
    network = made(name).double()
    assert_same(folded(network), network, images().double(), 1e-12)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet20", (21, 21)),  # the stem, 9 blocks of 2, 2 shortcuts
        ("wrn16_2", (6, 13)),  # the second of each of 6 blocks; not the first ones, not the last
        ("vgg8", (5, 5)),
        ("mobilenetv2", (53, 53)),  # stem and last convolution, 17 blocks of 3
        ("shufflenetv1", (49, 49)),  # the stem, 16 blocks of 3
        ("timm:resnet18", (20, 20)),
        ("timm:efficientnet_b0", (49, 49)),  # stem and head, 15 blocks of 3, and a first one of 2
        ("torchvision:resnet18", (20, 20)),
    ],
)
def test_how_many_are_folded(name: str, count: tuple[int, int]) -> None:
    network = made(name)
    assert count_folded(folded(network)) == count
    assert count_folded(network) == (0, count[1])


@pytest.mark.parametrize("name", ["resnet8", "wrn16_2", "mobilenetv2", "timm:resnet18"])
def test_the_original_stays_as_it_is(name: str) -> None:
    """Tensors, modes, hooks, and the global random state."""
    network = made(name).train().requires_grad_(True)
    before, keys, state = fingerprint(network), list(network.state_dict()), torch.get_rng_state()
    modes = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()]
    result = folded(network)
    assert torch.equal(torch.get_rng_state(), state)
    assert (fingerprint(network), list(network.state_dict())) == (before, keys)
    assert [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()] == modes
    assert all(p.requires_grad for p in network.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in result.modules())
    theirs = {p.data_ptr() for p in result.parameters()}
    assert not any(p.data_ptr() in theirs for p in network.parameters())


@pytest.mark.parametrize("name", ["resnet8", "wrn16_2", "vgg8", "mobilenetv2", "torchvision:resnet18", "timm:resnet18"])
def test_ofd_reads_the_same_margins(name: str) -> None:
    """From the BatchNorm in front of each stage's last ReLU, folded or not."""
    network = made(name)
    result = folded(network)
    for i in range(1, network.n_stages + 1):
        ours, theirs = result.preact_norm(i), network.preact_norm(i)
        assert isinstance(ours, nn.BatchNorm2d)
        assert theirs is not None
        assert ours.eps == theirs.eps
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
        assert torch.equal(_margin(result, i), _margin(network, i))


@pytest.mark.parametrize("name", ["wrn16_2", "resnet8x4", "timm:efficientnet_b0"])
def test_multiply_accumulates_are_unchanged(name: str) -> None:
    network = made(name)
    assert macs(folded(network), 32) == macs(network, 32)


@pytest.mark.parametrize("name", ["wrn16_2", "resnet8", "vgg8", "mobilenetv2"])
def test_stages_and_tail_can_be_called(name: str) -> None:
    """Methods splice networks: any stage on any map, the way back from a pre-activation, and the classifier's weight."""
    network = made(name)
    result = folded(network)
    features = network.features(images())
    for i in range(1, network.n_stages + 1):
        x = torch.randn_like(features.maps[i - 1])
        raw = network.raw_stage(i, x)
        torch.testing.assert_close(result.raw_stage(i, x), raw, rtol=0, atol=1e-5 * float(raw.abs().max()))
        torch.testing.assert_close(result.close(i, raw), network.close(i, raw))
        torch.testing.assert_close(result.raw_of(i, features.maps[i]), network.raw_of(i, features.maps[i]))
    for ours, theirs in zip(result.tail(features.maps[-1]), network.tail(features.maps[-1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(result.classifier_weight, network.classifier_weight)


@pytest.mark.parametrize("name", ["wrn16_2", "resnet8x4", "vgg8", "shufflenetv2", "timm:resnet18"])
@pytest.mark.parametrize("size", [32, 64])
def test_heads_are_folded_too(name: str, size: int) -> None:
    network = build(name, 10)
    headed = Headed(network, build_heads(network, 40), frozen=True)
    unlike_fresh(headed)
    result = folded(headed)
    assert isinstance(result, Headed)
    assert (result.frozen, result.taps) == (headed.frozen, headed.taps)
    assert count_folded(result.heads[0])[0] > 0
    if ":" not in name:  # a library network's last head is only its tail
        assert count_folded(result.heads[-1])[0] > 0
    assert_same(result, headed, images(size))
    assert macs_with_heads(result, size) == macs_with_heads(headed, size)  # type: ignore[arg-type]


def test_a_projection_is_left_alone() -> None:
    network = made("resnet8")
    headed = Headed(network, build_projection(network)).eval()
    assert_same(folded(headed), headed, images())


def test_every_network_of_a_panel_is_folded() -> None:
    panel = Panel(made("resnet14"), [made("wrn16_1"), made("vgg8")]).eval()
    result = folded(panel)
    assert isinstance(result, Panel)
    assert [count_folded(network)[0] for network in result.networks] == [15, 6, 5]
    assert_same(result, panel, images())


def test_a_network_without_batchnorm_is_copied() -> None:
    network = made("timm:vit_tiny_patch16_224")
    result = folded(network)
    assert result is not network
    assert count_folded(result) == (0, 0)
    assert_same(result, network, images(), 0)


def test_taps_of_the_user_see_what_they_saw() -> None:
    """A BatchNorm that is tapped stays; a tapped convolution's output is somebody's feature."""
    torch.manual_seed(0)
    network = build("torchvision:resnet18", 10, taps=("layer1.0.bn1", "layer2.0.conv1", "layer3"))
    unlike_fresh(network)
    result = folded(network)
    assert count_folded(result) == (18, 20)
    assert_same(result, network, images())


@pytest.mark.parametrize("kind", ["twice", "view", "runs again", "normalises again"])
def test_an_output_that_is_read_elsewhere_is_left_alone(kind: str) -> None:
    network = small(Skips(kind))
    result = folded(network)
    assert count_folded(result) == (1, 2)
    assert not isinstance(result.get_submodule("body.bn"), FoldedNorm)
    assert isinstance(result.get_submodule("body.free"), FoldedNorm)
    assert_same(result, network, images())


def test_what_is_not_a_plain_layer_is_left_alone() -> None:
    """Subclasses, weights made anew in each pass, statistics of the batch, and a classifier with a BatchNorm behind."""

    class Standardised(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in the base class
            return nn.functional.conv2d(input, self.weight / self.weight.norm(), self.bias)

    normed = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    body = nn.Sequential(
        Standardised(3, 4, 1), nn.BatchNorm2d(4), normed, nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4),
    )  # fmt: skip
    network = small(body)
    assert count_folded(folded(network)) == (1, 4)
    assert_same(folded(network), network, images())

    network = small(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)))
    assert count_folded(folded(network)) == (0, 1)

    network = small(nn.Conv2d(3, 4, 1))
    network.fc = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))  # type: ignore[assignment]
    network.classifier_name = "fc.0"
    network.classify = network.fc.forward  # type: ignore[method-assign]
    assert count_folded(folded(unlike_fresh(network))) == (0, 1)  # type: ignore[type-var]


@pytest.mark.parametrize("affine", [True, False])
def test_linear_layers_are_folded_unless_they_run_over_a_sequence(affine: bool) -> None:
    """A sequence's BatchNorm normalises positions, which here are as many as the layer's outputs."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.vector, self.of_vector = nn.Linear(4, 4), nn.BatchNorm1d(4, affine=affine)
            self.rows, self.of_rows = nn.Linear(1024, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            rows = self.of_rows(self.rows(x.flatten(2)))
            return x * (self.of_vector(self.vector(x.mean((2, 3)))) + rows.mean(2))[..., None, None]

    network = small(Gate())
    result = folded(network)
    assert isinstance(result.get_submodule("body.of_vector"), FoldedNorm)
    assert not isinstance(result.get_submodule("body.of_rows"), FoldedNorm)
    assert_same(result, network, images())


def test_a_wrong_fold_is_noticed_and_nothing_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace claims what is not so: the check on images refuses all of it."""
    network = small(Skips("twice"))
    trace = folding.trace

    def claims(network: AnyNetwork, x: Tensor) -> tuple[tuple[folding.Pair, ...], list[Tensor]]:
        pairs, found = trace(network, x)
        return (*pairs, folding.Pair("body.conv", "body.bn")), found

    monkeypatch.setattr(folding, "trace", claims)
    result = folded(network)
    assert count_folded(result) == (0, 2)
    assert_same(result, network, images(), 0)


def test_a_network_that_insists_on_float32_is_not_folded() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x.float()))

    network = small(Single())
    result = folded(network)
    assert count_folded(result) == (0, 1)
    assert_same(result, network, images(), 0)


def test_statistics_of_the_batch_are_refused() -> None:
    """Training mode, or `batch_statistics`, would silently have no effect where a BatchNorm is folded."""
    network = folded(made("wrn16_2"))
    with batch_statistics(network), pytest.raises(RuntimeError, match=re.escape("the network it was folded from")):
        network(images())
    assert network(images()).shape == (2, 10)
    with pytest.raises(RuntimeError, match="folded"):
        network.train()(images())


def test_folding_again_and_copying_change_nothing() -> None:
    network = made("resnet8")
    result = folded(network)
    assert count_folded(folded(result)) == (9, 9)
    assert_same(folded(result), result, images(), 0)
    assert_same(copy.deepcopy(result), result, images(), 0)


def test_the_memory_layout_is_kept() -> None:
    network = made("resnet8").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = [m.weight for m in folded(network).modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(weights) == 7
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_a_folded_network_compiles_in_one_piece() -> None:
    network = folded(made("wrn16_1"))
    x = images()
    with torch.no_grad():
        compiled = torch.compile(network, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, network(x))

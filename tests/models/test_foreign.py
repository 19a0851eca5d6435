"""timm and torchvision networks without downloads: cut families agree with the library, the rest is tapped."""

from __future__ import annotations

import copy

import pytest
import torch
from harness import Kd
from torch import nn
from torch.nn import functional as F

from kdcli.errors import IncompatibleError, InputError, UsageError
from kdcli.models import arch_spec, build, foreign, from_arch_spec
from kdcli.models.heads import Headed, build_heads
from kdcli.models.hooked import Hooked
from kdcli.models.network import Network, stage_shapes

TINY = [
    "timm:resnet18",
    "timm:vit_tiny_patch16_224",
    "timm:swin_pico_patch4_window7_224",
    "timm:convnext_atto",
    "timm:gmlp_ti16_224",
    "timm:mobilenetv2_050",
    "timm:mobilenetv3_small_050",
    "torchvision:resnet18",
    "torchvision:mobilenet_v3_small",
]


def scatter(network: nn.Module) -> None:
    """Moves every weight off its initial value: zero-initialised residual branches would hide mistakes."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))


def chain(network: Network, x: torch.Tensor) -> torch.Tensor:
    """Logits by way of stem, stages and tail."""
    x = network.stem(x)
    for i in range(1, network.n_stages + 1):
        x = network.stage(i, x)
    return network.tail(x)[1]


@pytest.mark.parametrize("name", TINY)
def test_cut_network_agrees_with_the_library(name: str) -> None:
    network = build(name, 10, 32).eval()
    scatter(network)
    library, _, short = name.partition(":")
    make = foreign.timm_net if library == "timm" else foreign.torchvision_net
    original = make(short, 32, False, 10).eval()
    original.load_state_dict({k.removeprefix("net."): v for k, v in network.state_dict().items()})
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = original(x)
        features = network.features(x)
        assert torch.allclose(features.logits, expected, atol=1e-5)
        assert torch.allclose(chain(network, x), expected, atol=1e-5)
        assert torch.allclose(network.get_submodule(network.classifier_name)(features.pooled), expected, atol=1e-5)
    assert network.n_stages == 4
    assert [tuple(m.shape[1:]) for m in features.maps] == stage_shapes(network, 32)
    assert all(m.dim() == 4 for m in features.maps)
    if "resnet" in name:
        for i in range(1, 5):
            assert features.preact(i).min() < 0
            assert torch.equal(F.relu(features.preact(i)), features.maps[i])
            assert network.preact_norm(i) is not None


@pytest.mark.parametrize("name", TINY)
def test_heads_of_cut_networks(name: str) -> None:
    network = build(name, 10, 32)
    headed = Headed(network, build_heads(network, 40)).train()
    scatter(headed)  # timm starts the classifiers of MLP networks at zero
    features = headed.features(torch.randn(4, 3, 32, 32))
    assert [tuple(h.shape) for h in features.heads] == [(4, 40)] * 4
    sum(h.square().sum() for h in features.heads).backward()  # type: ignore[union-attr]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert all(p.grad is not None for p in headed.heads.parameters()), "an unused part was left in a head"


@pytest.mark.parametrize("name", [n for n in TINY if "gmlp" not in n])
def test_twice_the_size_works(name: str) -> None:
    network = build(name, 10, 32).eval()
    with torch.no_grad():
        assert network(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_a_mixer_says_why_it_cannot() -> None:
    network = build("timm:gmlp_ti16_224", 10, 32)
    with pytest.raises(IncompatibleError, match="32-pixel"):
        network(torch.randn(2, 3, 64, 64))


def test_isotropic_networks_are_cut_as_in_the_literature() -> None:
    with torch.device("meta"):
        network = build("timm:vit_tiny_patch16_224", 10, 32)
    assert [len(names) for names in network.stage_names] == [2, 2, 6, 2]  # type: ignore[attr-defined]
    assert network.kind == "token"


@pytest.mark.parametrize("name", ["timm:regnetx_002", "torchvision:shufflenet_v2_x0_5"])
def test_unknown_families_are_tapped_by_hooks(name: str) -> None:
    network = build(name, 10, 32)
    assert isinstance(network, Hooked)
    assert [s[1] for s in stage_shapes(network, 32)] == [16, 8, 4, 2, 1]
    copied = copy.deepcopy(network).eval()
    with torch.no_grad():
        features = copied.features(torch.randn(2, 3, 32, 32))
    assert features.logits.shape == (2, 10)
    assert features.pooled.shape == (2, network.pooled_dim)
    with pytest.raises(IncompatibleError, match="hooks"):
        build_heads(network, 40)
    with pytest.raises(IncompatibleError):
        network.stage(1, features.maps[0])


def test_taps_by_pattern() -> None:
    network = build("timm:resnet18", 10, 32, taps=("layer[23]", "layer4"))
    assert network.n_stages == 3
    assert stage_shapes(network, 32)[1:] == [(128, 4, 4), (256, 2, 2), (512, 1, 1)]
    again = from_arch_spec(arch_spec(network))
    assert stage_shapes(again, 32) == stage_shapes(network, 32)
    with pytest.raises(UsageError, match="layer9"):
        build("timm:resnet18", 10, 32, taps=("layer9",))


def test_tapped_map_is_not_overwritten_in_place() -> None:
    network = build("timm:resnet18", 10, 32, taps=("bn1", "layer4"))
    with torch.no_grad():
        assert network.features(torch.randn(2, 3, 32, 32)).stages[0].min() < 0


def test_native_sizes() -> None:
    assert foreign.native_size("timm:vit_tiny_patch16_224") == 224
    assert foreign.native_size("torchvision:resnet18") == 224


def test_missing_weights_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> nn.Module:
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(foreign, "timm_net", offline)
    with pytest.raises(InputError, match="no route to host") as caught:
        build("timm:resnet18", 10, 32, pretrained=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("torchvision:alexnet", 32),  # tapped by hooks: it is run while it is built
        ("torchvision:maxvit_t", 32),
        ("timm:inception_v4", 32),
        ("timm:convnext_atto", 8),  # cut into stages: it is run only later
        ("timm:vit_tiny_patch16_224", 100),
        ("torchvision:inception_v3", 224),  # in training only: its auxiliary classifier needs more
    ],
)
def test_a_size_that_a_network_cannot_take_is_said(name: str, size: int) -> None:
    with torch.device("meta"), pytest.raises(IncompatibleError, match=f"{name} cannot take {size}-pixel images"):
        build(name, 10, size)


def test_twice_the_size_that_a_network_cannot_take_is_said() -> None:
    with torch.device("meta"):
        network = build("torchvision:vit_b_16", 10, 32)
    with pytest.raises(IncompatibleError, match="torchvision:vit_b_16 cannot take 64-pixel images"):
        stage_shapes(network, 64)


@pytest.mark.parametrize("words", [("inspect", "--input-size"), ("distill", "--dataset", "synthetic", "--image-size")])
def test_such_a_network_ends_a_command_with_one_line(kd: Kd, words: tuple[str, ...]) -> None:
    name = "torchvision:squeezenet1_1"
    first, *more = words
    result = kd(first, *([name] if first == "inspect" else ["--method", "none", "--student", name]), *more, 8)
    assert result.code == 4
    assert "cannot take 8-pixel images" in result.error


def test_running_out_of_memory_is_no_fault_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> nn.Module:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(foreign, "timm_net", full)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        build("timm:resnet18", 10, 32)


def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the download: weights of 1000 classes, as the library would build the network for them."""
    import torchvision

    original = torchvision.models.get_model

    def get_model(name: str, *, weights: str | None, **options: object) -> nn.Module:
        assert (weights == "DEFAULT") == ("num_classes" not in options)
        return original(name, weights=None, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torchvision.models, "get_model", get_model)


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "torchvision:shufflenet_v2_x0_5"])
def test_a_pretrained_network_gets_a_last_layer_of_its_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For other classes a fresh one, by which its checkpoint is loaded again; for 1000 the library's own."""
    published(monkeypatch)
    network = build(name, 10, 64, pretrained=True)
    fresh = build(name, 10, 64)
    assert type(network.get_submodule(network.classifier_name)) is type(fresh.get_submodule(fresh.classifier_name))
    fresh.load_state_dict(network.state_dict())
    assert network.outputs == 10
    with torch.no_grad():
        assert network.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 10)
    assert build(name, 1000, 64, pretrained=True).outputs == 1000


def test_a_last_layer_without_bias_stays_without(monkeypatch: pytest.MonkeyPatch) -> None:
    published(monkeypatch)
    with torch.device("meta"):
        pretrained, fresh = (foreign.torchvision_net("maxvit_t", 224, wanted, 10) for wanted in (True, False))
    assert list(pretrained.state_dict()) == list(fresh.state_dict())


def test_a_pretrained_vit_of_another_size_is_refused() -> None:
    """Its positions are those of one size. Nothing is fetched before that is known."""
    with pytest.raises(IncompatibleError, match="torchvision:vit_b_16 has weights for 224-pixel images only"):
        build("torchvision:vit_b_16", 10, 128, pretrained=True)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_pretrained_networks_that_could_not_be_loaded_again_are_refused(name: str) -> None:
    with pytest.raises(IncompatibleError, match="with the library's weights than without"):
        build(f"torchvision:{name}", 10, 299, pretrained=True)


@pytest.mark.filterwarnings("error")
def test_a_library_says_nothing_while_it_builds() -> None:
    """torchvision warns of GoogLeNet's initial weights unless they are asked for; they are those it takes unasked."""
    import torchvision

    torch.manual_seed(3)
    network = build("torchvision:googlenet", 10, 64)
    torch.manual_seed(3)
    with pytest.warns(FutureWarning):
        plain = torchvision.models.get_model("googlenet", weights=None, num_classes=10)
    own = {tuple(p.shape): p for p in network.parameters()}
    theirs = {tuple(p.shape): p for p in plain.parameters()}
    assert own.keys() <= theirs.keys()
    assert torch.equal(own[64, 3, 7, 7], theirs[64, 3, 7, 7])


def test_a_regnet_can_be_laid_out_without_memory() -> None:
    """As every checkpoint is before its tensors are compared."""
    with torch.device("meta"):
        network = build("torchvision:regnet_x_400mf", 10, 32)
    assert all(parameter.is_meta for parameter in network.parameters())
    assert network.tap_names  # type: ignore[attr-defined]

"""Names, aliases, suggestions, and that naming a network imports no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kdcli.errors import UsageError
from kdcli.models import arch_spec, build, from_arch_spec
from kdcli.models.names import LIGHT, canonical, describe, known


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("wrn_40_2", "wrn40_2"),
        ("WRN-40-2", "wrn40_2"),
        ("wrn28_10", "wrn28_10"),
        ("WideResNet-28-10", "wrn28_10"),
        ("ResNet32x4", "resnet32x4"),
        ("resnet-56", "resnet56"),
        ("resnet26", "resnet26"),
        ("resnet26x4", "resnet26x4"),
        ("ResNet50", "resnet50"),
        ("vgg13_bn", "vgg13"),
        ("MobileNetV2", "mobilenetv2"),
        ("mobilenetV2-S1", "mobilenetv2_s1"),
        ("ShuffleV1", "shufflenetv1"),
        ("ShuffleNetV2", "shufflenetv2"),
        ("timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"),
        ("torchvision:no_such", "torchvision:no_such"),
    ],
)
def test_alias(spelling: str, name: str) -> None:
    assert canonical(spelling) == name


@pytest.mark.parametrize("wrong", ["wrn41_2", "resnet21", "renset32x4", "vgg12", ""])
def test_unknown_name_names_field_and_a_neighbour(wrong: str) -> None:
    with pytest.raises(UsageError) as caught:
        canonical(wrong, field="student.name")
    assert caught.value.field == "student.name"
    assert caught.value.hint


def test_suggestion_is_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        canonical("renset32x4")
    assert caught.value.hint == "did you mean resnet32x4?"


def test_every_listed_network_is_described_and_builds() -> None:
    import torch

    assert set(known()) >= LIGHT
    for name in known():
        assert canonical(name) == name
        assert len(describe(name)) > 10
        with torch.device("meta"):
            network = build(name, 7)
        assert (network.arch, network.outputs) == (name, 7)
    assert "depth 28, width 10" in describe("wrn28_10")


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_unknown_library_network_suggests_one(library: str) -> None:
    with pytest.raises(UsageError, match=library) as caught:
        build(f"{library}:resnet-18", 10)
    assert "resnet18" in (caught.value.hint or "")


def test_options_a_registry_network_does_not_have() -> None:
    with pytest.raises(UsageError, match="weights"):
        build("resnet8", 10, pretrained=True)
    with pytest.raises(UsageError, match="fixed"):
        build("resnet8", 10, taps=("layer1",))


def test_arch_spec_rebuilds() -> None:
    network = build("vgg8", 12, 64, fixed_stride=True)
    spec = arch_spec(network)
    again = from_arch_spec(spec)
    assert arch_spec(again) == spec
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}


def test_names_import_no_torch() -> None:
    code = (
        "import sys, kdcli.models, kdcli.models.names as n, kdcli.models.import_keys; n.canonical('WRN-40-2');"
        "sys.exit(any(m in sys.modules for m in ('torch', 'timm', 'torchvision')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

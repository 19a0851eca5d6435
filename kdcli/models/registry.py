"""From a registry name to its network."""

from __future__ import annotations

from kdcli.errors import UsageError
from kdcli.models.mobilenetv1 import MobileNetV1
from kdcli.models.mobilenetv2 import MobileNetV2
from kdcli.models.names import LIBRARIES, canonical
from kdcli.models.network import Network
from kdcli.models.resnet import ResNet, cifar_plan, four_stage_plan
from kdcli.models.shufflenetv1 import ShuffleNetV1
from kdcli.models.shufflenetv2 import ShuffleNetV2
from kdcli.models.vgg import VGG
from kdcli.models.wide_resnet import WideResNet


def build_network(
    name: str,
    outputs: int,
    image_size: int,
    *,
    pretrained: bool,
    taps: tuple[str, ...] | None,
    fixed_stride: bool,
) -> Network:
    """See `kdcli.models.build`."""
    name = canonical(name)
    if name.startswith(LIBRARIES):
        from kdcli.models.foreign import build_foreign  # timm and torchvision are slow to import

        network = build_foreign(name, outputs, image_size, pretrained=pretrained, taps=taps)
    else:
        if pretrained:
            raise UsageError(
                f"{name} has no library weights", hint="use --pretrained with timm:NAME or torchvision:NAME only"
            )
        if taps is not None:
            raise UsageError(f"the stages of {name} are fixed", hint="taps are for timm:NAME and torchvision:NAME")
        network = _registry_network(name, outputs, fixed_stride=fixed_stride)
    network.arch, network.image_size, network.taps, network.fixed_stride = name, image_size, taps, fixed_stride
    return network


def _registry_network(name: str, outputs: int, *, fixed_stride: bool) -> Network:
    if name.startswith("wrn"):
        depth, width = name.removeprefix("wrn").split("_")
        return WideResNet(int(depth), int(width), outputs)
    if name.startswith("vgg"):
        return VGG(int(name.removeprefix("vgg")), outputs, fixed_stride=fixed_stride)
    if name.startswith("resnet"):
        depth, _, wide = name.removeprefix("resnet").partition("x")
        plan = four_stage_plan(int(depth)) if depth in ("18", "34", "50") else cifar_plan(int(depth), wide=bool(wide))
        return ResNet(plan, outputs)
    if name.startswith("mobilenetv2"):
        return MobileNetV2(outputs, stem_stride=1 if name.endswith("_s1") else 2)
    if name == "shufflenetv1":
        return ShuffleNetV1(outputs)
    if name == "shufflenetv2":
        return ShuffleNetV2(outputs)
    assert name == "mobilenetv1", name
    return MobileNetV1(outputs)

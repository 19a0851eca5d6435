"""Names of networks: what exists, and which other spellings mean the same. Imports no torch.

A registry name is lower case (`wrn40_2`, `resnet8x4`, `mobilenetv2_s1`). The spellings of the literature and of the
public code bases (`wrn_40_2`, `WRN-40-2`, `ShuffleV1`, `vgg13_bn`) are accepted and made canonical here, once.
"""

from __future__ import annotations

import re

from kdcli.errors import UsageError, nearest

DESCRIPTIONS: dict[str, str] = {
    "wrn40_2": "wide residual network, depth 40, width 2 (pre-activation, 3 stages)",
    "wrn40_1": "wide residual network, depth 40, width 1 (pre-activation, 3 stages)",
    "wrn16_2": "wide residual network, depth 16, width 2 (pre-activation, 3 stages)",
    "wrn16_1": "wide residual network, depth 16, width 1 (pre-activation, 3 stages)",
    "resnet8": "CIFAR residual network, depth 8, widths 16-32-64",
    "resnet14": "CIFAR residual network, depth 14, widths 16-32-64",
    "resnet20": "CIFAR residual network, depth 20, widths 16-32-64",
    "resnet32": "CIFAR residual network, depth 32, widths 16-32-64",
    "resnet44": "CIFAR residual network, depth 44, widths 16-32-64",
    "resnet56": "CIFAR residual network, depth 56, widths 16-32-64",
    "resnet110": "CIFAR residual network, depth 110, widths 16-32-64",
    "resnet8x4": "CIFAR residual network, depth 8, widths 64-128-256",
    "resnet32x4": "CIFAR residual network, depth 32, widths 64-128-256",
    "vgg8": "VGG with BatchNorm, 5 convolutions, one linear layer",
    "vgg11": "VGG with BatchNorm, 8 convolutions, one linear layer",
    "vgg13": "VGG with BatchNorm, 10 convolutions, one linear layer",
    "vgg16": "VGG with BatchNorm, 13 convolutions, one linear layer",
    "vgg19": "VGG with BatchNorm, 16 convolutions, one linear layer",
    "resnet18": "ResNet-18 with a 3x3 stride-1 stem (4 stages)",
    "resnet34": "ResNet-34 with a 3x3 stride-1 stem (4 stages)",
    "resnet50": "ResNet-50 with a 3x3 stride-1 stem (4 stages, bottlenecks)",
    "mobilenetv2": "MobileNetV2 of half width, stride-2 stem (the variant of most papers)",
    "mobilenetv2_s1": "MobileNetV2 of half width, stride-1 stem (the variant of HSAKD)",
    "shufflenetv1": "ShuffleNetV1, 3 groups, 1x1 stem",
    "shufflenetv2": "ShuffleNetV2 of size 1, 1x1 stem",
    "mobilenetv1": "MobileNetV1 for 224-pixel images (the ImageNet student of the ResNet-50 pairs)",
}

LIGHT: frozenset[str] = frozenset({"mobilenetv2", "mobilenetv2_s1", "shufflenetv1", "shufflenetv2"})
"""Networks that the literature trains with the smaller learning rate."""

LIBRARIES = ("timm:", "torchvision:")


def _fold(name: str) -> str:
    return re.sub(r"[-_\s]", "", name.lower())


_ALIASES: dict[str, str] = {
    **{_fold(name): name for name in DESCRIPTIONS},
    **{f"{name}bn": name for name in DESCRIPTIONS if name.startswith("vgg")},
    "shufflev1": "shufflenetv1",
    "shufflev2": "shufflenetv2",
    "mobilenetv2half": "mobilenetv2",
    "mobilev2": "mobilenetv2",
}


def known() -> list[str]:
    """The registry names, in the order in which `kd list models` shows them."""
    return list(DESCRIPTIONS)


def describe(name: str) -> str:
    """One line about the network `name` (any accepted spelling)."""
    name = canonical(name)
    if name in DESCRIPTIONS:
        return DESCRIPTIONS[name]
    for library in LIBRARIES:
        if name.startswith(library):
            return f"{name.removeprefix(library)} of {library.removesuffix(':')}"
    if name.startswith("wrn"):
        depth, width = name.removeprefix("wrn").split("_")
        return f"wide residual network, depth {depth}, width {width} (pre-activation, 3 stages)"
    depth, _, wide = name.removeprefix("resnet").partition("x")
    return f"CIFAR residual network, depth {depth}, widths {'64-128-256' if wide else '16-32-64'}"


def canonical(name: str, *, field: str | None = None) -> str:
    """The registry name meant by `name`; `timm:` and `torchvision:` names pass through unchecked.

    Raises:
        UsageError: there is no such network; the hint names the nearest one. `field`: the flag or spec field at fault.
    """
    for library in LIBRARIES:
        if name.lower().startswith(library):
            return library + name[len(library) :]
    found = _ALIASES.get(_fold(name)) or _by_depth(name)
    if found is None:
        raise UsageError(f"there is no network named {name!r}", field=field, hint=nearest(name, DESCRIPTIONS))
    return found


def _by_depth(name: str) -> str | None:
    """A network that is not listed but of a valid depth: `wrn28_10` (6n+4), `resnet26` or `resnet26x4` (6n+2)."""
    spelled = re.sub(r"[-\s]", "_", name.lower())
    wide = re.fullmatch(r"(?:wrn|wide_?resnet)_?(\d{2,3})_(\d{1,2})", spelled)
    if wide:
        depth, width = int(wide[1]), int(wide[2])
        return f"wrn{depth}_{width}" if depth >= 10 and depth % 6 == 4 and width >= 1 else None
    plain = re.fullmatch(r"resnet_?(\d{1,4})(x4)?", spelled)
    if plain:
        depth = int(plain[1])
        return f"resnet{depth}{plain[2] or ''}" if depth >= 8 and depth % 6 == 2 else None
    return None

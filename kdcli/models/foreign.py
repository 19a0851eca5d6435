"""`timm:NAME` and `torchvision:NAME`: any network of the two libraries as a `Network`.

Known families are cut into stages, the rest is tapped by hooks. Images of 64 pixels or less get a patch size of 4 (ViT,
Mixer) or 2 with windows of 4 (Swin); convolutional networks keep their architecture, stem included, and simply have
smaller maps.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from kdcli.errors import IncompatibleError, InputError, KdError, UsageError, nearest
from kdcli.models.chain import Chain, Create
from kdcli.models.hooked import Hooked
from kdcli.models.network import Network, dry_run, reason_of, taking

SMALL = 64
"""Images up to this side (pixels) count as small."""
SMALL_SWINS = {"swin_pico_patch4_window7_224": 48, "swin_nano_patch4_window7_224": 64}
"""Swin-P and Swin-N of the OFA experiments, which timm does not list: width of the first stage."""

_OTHERWISE_PRETRAINED = {"googlenet": "another network", "inception_v3": "timm:inception_v3"}
"""Networks that torchvision builds otherwise for its weights, and what to take instead."""


def build_foreign(
    name: str, outputs: int, image_size: int, *, pretrained: bool, taps: tuple[str, ...] | None
) -> Network:
    """The network `name` (with its library's prefix); the other arguments as in `kdcli.models.build`.

    Raises:
        UsageError: the library has no such network, or a pattern in `taps` matches nothing.
        IncompatibleError: the library cannot build it for this image size, or it cannot take images of that size.
        InputError: the library's weights could not be had.
    """
    library, _, short = name.partition(":")
    check_name(name)
    make = timm_net if library == "timm" else torchvision_net
    try:
        net = make(short, image_size, pretrained, outputs)
    except KdError:
        raise
    except Exception as error:
        reason = reason_of(error)
        if pretrained:
            raise InputError(
                f"the weights of {name} could not be loaded: {reason}",
                hint="check the network, or leave --pretrained out",
            ) from error
        raise IncompatibleError(f"{name} cannot be built for {image_size}-pixel images: {reason}") from error
    # Truncated copies get fresh weights, pretrained or not.
    create: Create = partial(make, short, image_size, False)
    with taking(name, image_size):  # only in their first pass do many networks notice what they are given
        family = _family(library, net) if taps is None else None
        network = Hooked(net, outputs, image_size, taps) if family is None else family.cut(create, net)
        dry_run(network, "features", image_size)
    return network


def check_name(name: str) -> None:
    """Raises UsageError, naming the nearest one, if the library has no network of this name."""
    library, _, short = name.partition(":")
    if library == "timm":
        import timm

        if short not in SMALL_SWINS and not timm.is_model(short):
            raise UsageError(f"timm has no network named {short!r}", hint=nearest(short, timm.list_models()))
    else:
        import torchvision

        names = torchvision.models.list_models(module=torchvision.models)
        if short not in names:
            raise UsageError(f"torchvision has no network named {short!r}", hint=nearest(short, names))


def native_size(name: str) -> int:
    """Side in pixels of the images the library trains `name` with."""
    check_name(name)
    library, _, short = name.partition(":")
    if short in SMALL_SWINS:
        return 224
    if library == "timm":
        import timm

        config = timm.get_pretrained_cfg(short)
        return 224 if config is None else int(config.input_size[-1])
    import torchvision

    weights = torchvision.models.get_model_weights(short)
    default = next(iter(weights), None)
    return 224 if default is None else int(default.transforms().crop_size[0])


def _family(library: str, net: nn.Module) -> type[Chain] | None:
    if library == "timm":
        from kdcli.models.timm_chains import FAMILIES
    else:
        from kdcli.models.torchvision_chains import FAMILIES
    return FAMILIES.get(type(net))


def timm_net(name: str, image_size: int, pretrained: bool, outputs: int) -> nn.Module:
    """timm's network for square images of `image_size` pixels."""
    import timm
    from timm.models import is_model_in_modules

    if name in SMALL_SWINS:
        return _small_swin(name, image_size, pretrained, outputs)
    config = timm.get_pretrained_cfg(name)
    native = config is not None and image_size == config.input_size[-1]
    small = image_size <= SMALL
    options: dict[str, object] = {"pretrained": pretrained, "num_classes": outputs}
    if is_model_in_modules(name, ["vision_transformer", "deit"]):
        options |= {"img_size": image_size, "dynamic_img_size": True} | ({"patch_size": 4} if small else {})
    elif is_model_in_modules(name, ["swin_transformer"]):
        options |= {"img_size": image_size, "strict_img_size": False}
        options |= {"patch_size": 2, "window_size": 4} if small else {}
    elif is_model_in_modules(name, ["mlp_mixer"]) and not native:
        if pretrained:
            raise _one_size_only(f"timm:{name}")
        from kdcli.models.mixers import small_mixer

        mixer = small_mixer(name, image_size, 4, outputs) if small else None
        if mixer is not None:
            return mixer
        options["img_size"] = image_size
    elif config is not None and config.fixed_input_size and not native:
        options["img_size"] = image_size
    return timm.create_model(name, **options)  # type: ignore[arg-type]


def _small_swin(name: str, image_size: int, pretrained: bool, outputs: int) -> nn.Module:
    """Depths 2-2-2-2 and 2, 4, 8, 16 attention heads."""
    from timm.models.swin_transformer import SwinTransformer

    if pretrained:
        raise InputError(f"there are no published library weights of timm:{name}", hint="leave --pretrained out")
    patch, window = (2, 4) if image_size <= SMALL else (4, 7)
    return SwinTransformer(
        img_size=image_size,
        patch_size=patch,
        window_size=window,
        embed_dim=SMALL_SWINS[name],
        depths=(2, 2, 2, 2),
        num_heads=(2, 4, 8, 16),
        num_classes=outputs,
        strict_img_size=False,
    )


def torchvision_net(name: str, image_size: int, pretrained: bool, outputs: int) -> nn.Module:
    """torchvision's network; pretrained ones get a fresh last layer unless `outputs` is the library's 1000."""
    import torchvision

    options: dict[str, object] = {}
    if pretrained and name in _OTHERWISE_PRETRAINED:
        # What is trained from them could not be loaded again: a checkpoint's network is built without the weights.
        raise IncompatibleError(
            f"torchvision:{name} has other layers and another scale of its input with the library's weights than without",
            hint=f"use {_OTHERWISE_PRETRAINED[name]}, or leave --pretrained out",
        )
    if name.startswith("vit_"):
        if pretrained and image_size != native_size(f"torchvision:{name}"):
            raise _one_size_only(f"torchvision:{name}")
        options["image_size"] = image_size
    if name in _OTHERWISE_PRETRAINED:
        options["init_weights"] = True  # what it does unasked, with a warning
    if not pretrained:
        with _CountingOnCpu() if name.startswith("regnet_") else nullcontext():
            return torchvision.models.get_model(name, weights=None, num_classes=outputs, **options)
    net = torchvision.models.get_model(name, weights="DEFAULT")
    last = _classifier(net)
    layer = net.get_submodule(last)
    fresh: nn.Module | None = None
    if isinstance(layer, nn.Linear) and layer.out_features != outputs:
        fresh = nn.Linear(layer.in_features, outputs, bias=layer.bias is not None)
    elif isinstance(layer, nn.Conv2d) and layer.out_channels != outputs:
        fresh = nn.Conv2d(layer.in_channels, outputs, kernel_size=1, bias=layer.bias is not None)
    if fresh is not None:
        parent, _, leaf = last.rpartition(".")
        setattr(net.get_submodule(parent), leaf, fresh)
    return net


class _CountingOnCpu(TorchFunctionMode):
    """RegNet computes its widths with tensors: on the meta device, where checkpoints are compared, they have no values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        more = dict(kwargs or {})
        if func in (torch.arange, torch.tensor):
            more.setdefault("device", "cpu")
        return func(*args, **more)


def _classifier(net: nn.Module) -> str:
    """The dotted name of the last linear layer; in a network without any (SqueezeNet) of the last 1x1 convolution."""
    layers = dict(net.named_modules())
    linear = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
    one_by_one = [n for n, module in layers.items() if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)]
    return (linear or one_by_one)[-1]


def _one_size_only(name: str) -> IncompatibleError:
    return IncompatibleError(
        f"{name} has weights for {native_size(name)}-pixel images only",
        hint="set --image-size to that, or leave --pretrained out",
    )

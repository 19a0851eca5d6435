"""`timm:NAME` and `torchvision:NAME`: any network of the two libraries as a `Network`.

Known families are cut into stages, the rest is tapped by hooks. Images of 64 pixels or less get a patch size of 4 (ViT,
Mixer) or 2 with windows of 4 (Swin); convolutional networks keep their architecture, stem included, and simply have
smaller maps.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from kdcli.errors import IncompatibleError, InputError, KdError, UsageError, nearest
from kdcli.models.chain import Chain, Create
from kdcli.models.hooked import Hooked
from kdcli.models.network import Network

SMALL = 64
"""Images up to this side (pixels) count as small."""
SMALL_SWINS = {"swin_pico_patch4_window7_224": 48, "swin_nano_patch4_window7_224": 64}
"""Swin-P and Swin-N of the OFA experiments, which timm does not list: width of the first stage."""


def build_foreign(
    name: str, outputs: int, image_size: int, *, pretrained: bool, taps: tuple[str, ...] | None
) -> Network:
    """The network `name` (with its library's prefix); the other arguments as in `kdcli.models.build`.

    Raises:
        UsageError: the library has no such network, or a pattern in `taps` matches nothing.
        IncompatibleError: the library cannot build it for this image size.
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if pretrained:
            raise InputError(
                f"the weights of {name} could not be loaded: {reason}",
                hint="check the network, or leave --pretrained out",
            ) from error
        raise IncompatibleError(f"{name} cannot be built for {image_size}-pixel images: {reason}") from error
    # Truncated copies get fresh weights, pretrained or not.
    create: Create = partial(make, short, image_size, False)
    family = None if taps is not None else _family(library, net)
    return Hooked(net, outputs, image_size, taps) if family is None else family.cut(create, net)


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
            raise IncompatibleError(
                f"timm:{name} has weights for {native_size(f'timm:{name}')}-pixel images only",
                hint="set --image-size to that, or leave --pretrained out",
            )
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
    if name.startswith("vit_") and not pretrained:
        options["image_size"] = image_size
    if not pretrained:
        return torchvision.models.get_model(name, weights=None, num_classes=outputs, **options)
    net = torchvision.models.get_model(name, weights="DEFAULT")
    last = [n for n, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
    linear = net.get_submodule(last)
    assert isinstance(linear, nn.Linear)
    if linear.out_features != outputs:
        parent, _, leaf = last.rpartition(".")
        setattr(net.get_submodule(parent), leaf, nn.Linear(linear.in_features, outputs))
    return net

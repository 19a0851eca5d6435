"""Networks: by name, with every stage callable.

`names` and `import_keys` import no torch; everything else here is loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdcli.models.network import Network

__all__ = ["arch_spec", "build", "from_arch_spec"]


def build(
    name: str,
    outputs: int,
    image_size: int = 32,
    *,
    pretrained: bool = False,
    taps: tuple[str, ...] | None = None,
    fixed_stride: bool = False,
) -> Network:
    """A network with fresh weights (or the library's, see `pretrained`).

    Args:
        name: a registry name or alias, `timm:NAME` or `torchvision:NAME`.
        outputs: number of logits.
        image_size: side in pixels of the images it will see. The registry's networks work at any size; those of the
            libraries may choose their patch and window sizes by it.
        pretrained: load the library's weights (`timm:` and `torchvision:` only).
        taps: module names or glob patterns to use as stages (`timm:` and `torchvision:` only).
        fixed_stride: the down-sampling must not depend on the image size (switches off vgg's extra pooling).

    Raises:
        UsageError: no such network, or an option it does not have.
        InputError: the library's weights could not be had.
    """
    from kdcli.models.registry import build_network

    return build_network(name, outputs, image_size, pretrained=pretrained, taps=taps, fixed_stride=fixed_stride)


def arch_spec(network: Network) -> dict[str, object]:
    """All that is needed to build `network` again (without its weights), as JSON-able values."""
    return {
        "name": network.arch,
        "outputs": network.outputs,
        "image_size": network.image_size,
        "taps": None if network.taps is None else list(network.taps),
        "fixed_stride": network.fixed_stride,
    }


def from_arch_spec(spec: dict[str, object]) -> Network:
    """The network that `arch_spec` described, with fresh weights."""
    taps = spec.get("taps")
    return build(
        str(spec["name"]),
        int(spec["outputs"]),  # type: ignore[call-overload]
        int(spec["image_size"]),  # type: ignore[call-overload]
        taps=None if taps is None else tuple(taps),  # type: ignore[arg-type]
        fixed_stride=bool(spec.get("fixed_stride", False)),
    )

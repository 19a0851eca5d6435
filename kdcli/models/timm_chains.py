"""Families of timm that are cut into stages (see `Chain`).

timm's own `forward_head` does the pooling, so whatever a variant pools with is kept; the layers between the last stage
and the pooling belong to the tail.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, cast

import torch
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.efficientnet import EfficientNet
from timm.models.mlp_mixer import MlpMixer
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnet import Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from kdcli.errors import IncompatibleError
from kdcli.models.chain import Chain, Create


def runs(blocks: int) -> list[list[str]]:
    """`blocks.*` in four runs of 2 : 2 : 6 : 2, as OFA cuts isotropic networks (after blocks 1, 3, 9, 11 of 12);
    fewer than four blocks: one run each."""
    edges = [0, *(max(k, round(blocks * share / 12)) for k, share in enumerate((2, 4, 10, 12), start=1))]
    if blocks < 4:
        edges = list(range(blocks + 1))
    return [[f"blocks.{j}" for j in range(a, b)] for a, b in pairwise(edges)]


def square(tokens: torch.Tensor) -> torch.Tensor:
    """Patch tokens `[B, N, C]` of a square image to `[B, C, h, h]`, h * h = N."""
    b, n, c = tokens.shape
    side = math.isqrt(n)
    return tokens.transpose(1, 2).reshape(b, c, side, side)


class TimmResNet(Chain):
    """ResNet, ResNeXt, SE-ResNet …: the closing activation of each stage is taken out of its last block, so that the
    pre-activation map exists. (`net` alone is therefore not the network any more; its state dict is.)"""

    stem_names = ("conv1", "bn1", "act1", "maxpool")

    @classmethod
    def cut(cls, create: Create, net: nn.Module, first: int = 0) -> TimmResNet:
        return cls(create, net, [[f"layer{i}"] for i in (1, 2, 3, 4)], "fc", first)

    def __init__(self, create: Create, net: nn.Module, stages: list[list[str]], classifier: str, first: int) -> None:
        super().__init__(create, net, stages, classifier, first)
        self.closing = nn.ModuleDict()
        for i in self.own_stages:
            block = self._last_block(i)
            name = "act3" if isinstance(block, Bottleneck) else "act2"
            self.closing[str(i)] = block.get_submodule(name)
            block.register_module(name, nn.Identity())

    def _last_block(self, i: int) -> nn.Module:
        return cast(nn.Sequential, self.net.get_submodule(f"layer{i}"))[-1]

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        net = cast(ResNet, self.net)
        return net.maxpool(net.act1(net.bn1(net.conv1(x))))

    def close(self, i: int, raw: torch.Tensor) -> torch.Tensor:
        return self.closing[str(i)](raw)

    def preact_norm(self, i: int) -> nn.BatchNorm2d | None:
        block = self._last_block(i)
        norm = block.get_submodule("bn3" if isinstance(block, Bottleneck) else "bn2")
        return norm if isinstance(norm, nn.BatchNorm2d) else None

    def final(self, x: torch.Tensor) -> torch.Tensor | None:
        net = cast(ResNet, self.net)
        plain = getattr(net.global_pool, "pool_type", "") == "avg" and not net.drop_rate
        return x if plain else None

    def tail(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = cast(ResNet, self.net).forward_head(x, pre_logits=True)
        return pooled, self.classify(pooled)


class TimmViT(Chain):
    """ViT and DeiT. Native: all tokens `[B, prefix + N, C]`; maps: the patch tokens. A head sees patch tokens only, so
    it averages them instead of reading a class token."""

    kind = "token"
    isotropic = True
    stem_names = (
        "patch_embed", "cls_token", "reg_token", "pos_embed", "dist_token", "pos_drop", "patch_drop", "norm_pre",
        "head_dist",
    )  # fmt: skip

    @classmethod
    def cut(cls, create: Create, net: nn.Module, first: int = 0) -> TimmViT:
        return cls(create, net, runs(len(cast(VisionTransformer, net).blocks)), "head", first)

    @property
    def _vit(self) -> VisionTransformer:
        return cast(VisionTransformer, self.net)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        net = self._vit
        return net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(x))))

    def to_map(self, x: torch.Tensor) -> torch.Tensor:
        return square(x if self.first else x[:, self._vit.num_prefix_tokens :])

    def from_map(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).transpose(1, 2)

    @property
    def prefix_tokens(self) -> torch.Tensor | None:
        count = self._vit.num_prefix_tokens
        return self._embedded(self._vit.patch_embed.grid_size[0])[:count] if count else None

    def positions(self, side: int) -> torch.Tensor | None:
        if self._vit.pos_embed is None:
            return None
        return square(self._embedded(side)[None, self._vit.num_prefix_tokens :])[0]

    def _embedded(self, side: int) -> torch.Tensor:
        """`[P + side², C]`: what the network adds to a sequence of patches, and puts in front of it."""
        net = self._vit
        blank = self.classifier_weight.new_zeros((1, side, side, net.embed_dim))
        return net._pos_embed(blank if net.dynamic_img_size else blank.flatten(1, 2))[0]

    def normed(self, last: torch.Tensor) -> torch.Tensor:
        return square(self._vit.norm(self.from_map(last)))

    @property
    def pools_tokens(self) -> bool:
        return isinstance(self._vit, VisionTransformerDistilled) or self._vit.global_pool not in (
            "avg",
            "avgmax",
            "max",
        )

    def tail(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        net = self._vit
        x = net.norm(x)
        if self.first:
            pooled = x.mean(1) if net.attn_pool is None else net.attn_pool(x)
            pooled = net.head_drop(net.fc_norm(pooled))
            return pooled, self.classify(pooled)
        if isinstance(net, VisionTransformerDistilled):
            # Two linear layers on two tokens, averaged; `pooled` is the mean of the tokens.
            classes, distilled = net.head_drop(x[:, 0]), net.head_drop(x[:, 1])
            return (classes + distilled) / 2, (net.head(classes) + net.head_dist(distilled)) / 2
        pooled = net.forward_head(x, pre_logits=True)
        return pooled, self.classify(pooled)


class TimmSwin(Chain):
    """Swin. Native: `[B, H, W, C]`."""

    kind = "token"
    stem_names = ("patch_embed",)

    @classmethod
    def cut(cls, create: Create, net: nn.Module, first: int = 0) -> TimmSwin:
        return cls(
            create, net, [[f"layers.{i}"] for i in range(cast(SwinTransformer, net).num_layers)], "head.fc", first
        )

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        return cast(SwinTransformer, self.net).patch_embed(x)

    def to_map(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2)

    def from_map(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)

    def normed(self, last: torch.Tensor) -> torch.Tensor:
        return self.to_map(cast(SwinTransformer, self.net).norm(self.from_map(last)))

    def tail(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        net = cast(SwinTransformer, self.net)
        pooled = net.forward_head(net.norm(x), pre_logits=True)
        return pooled, self.classify(pooled)


class TimmConvNeXt(Chain):
    """ConvNeXt; stage maps are residual sums, so there is no pre-activation."""

    stem_names = ("stem",)

    @classmethod
    def cut(cls, create: Create, net: nn.Module, first: int = 0) -> TimmConvNeXt:
        return cls(create, net, [[f"stages.{i}"] for i in range(len(cast(ConvNeXt, net).stages))], "head.fc", first)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        return cast(ConvNeXt, self.net).stem(x)

    def tail(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        net = cast(ConvNeXt, self.net)
        pooled = net.forward_head(cast(Any, net.norm_pre)(x), pre_logits=True)
        return pooled, self.classify(pooled)


class TimmMixer(Chain):
    """MLP-Mixer, ResMLP, gMLP. Native: tokens `[B, N, C]`. N is fixed: token mixing has a weight per position."""

    kind = "token"
    isotropic = True
    stem_names = ("stem",)

    @classmethod
    def cut(cls, create: Create, net: nn.Module, first: int = 0) -> TimmMixer:
        return cls(create, net, runs(len(cast(MlpMixer, net).blocks)), "head", first)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        stem = cast(MlpMixer, self.net).stem
        if tuple(x.shape[2:]) != tuple(cast("tuple[int, int]", stem.img_size)):
            raise IncompatibleError(
                f"{self.arch} was built for {self.image_size}-pixel images and mixes a fixed number of patches; "
                f"it cannot read {x.shape[2]} x {x.shape[3]}",
                hint="choose another network, or keep the image size",
            )
        return stem(x)

    def to_map(self, x: torch.Tensor) -> torch.Tensor:
        return square(x)

    def from_map(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).transpose(1, 2)

    def normed(self, last: torch.Tensor) -> torch.Tensor:
        return square(cast(MlpMixer, self.net).norm(self.from_map(last)))

    def tail(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        net = cast(MlpMixer, self.net)
        pooled = net.forward_head(net.norm(x), pre_logits=True)
        return pooled, self.classify(pooled)


class TimmEfficientNet(Chain):
    """MobileNetV2, EfficientNet, MNASNet …: groups of blocks, a stage per resolution below the stem's."""

    stem_names = ("conv_stem", "bn1")

    @classmethod
    def cut(cls, create: Create, net: nn.Module, first: int = 0) -> TimmEfficientNet:
        return cls(create, net, stages_by_reduction(cast(EfficientNet, net)), "classifier", first)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        net = cast(EfficientNet, self.net)
        return net.bn1(net.conv_stem(x))

    def tail(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        net = cast(EfficientNet, self.net)
        pooled = net.forward_head(net.bn2(net.conv_head(x)), pre_logits=True)
        return pooled, self.classify(pooled)


class TimmMobileNetV3(Chain):
    """MobileNetV3 and its kin: as EfficientNet, but the last convolution comes after the pooling."""

    stem_names = ("conv_stem", "bn1")

    @classmethod
    def cut(cls, create: Create, net: nn.Module, first: int = 0) -> TimmMobileNetV3:
        return cls(create, net, stages_by_reduction(cast(MobileNetV3, net)), "classifier", first)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        net = cast(MobileNetV3, self.net)
        return net.bn1(net.conv_stem(x))

    def tail(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = cast(MobileNetV3, self.net).forward_head(x, pre_logits=True)
        return pooled, self.classify(pooled)


def stages_by_reduction(net: EfficientNet | MobileNetV3) -> list[list[str]]:
    """`blocks.*` in runs that end where timm says a resolution ends; blocks at the stem's resolution join the first."""
    infos = [info for info in net.feature_info if str(info["module"]).startswith("blocks.")]
    ends = [int(str(info["module"]).split(".")[1]) for info in infos if info["reduction"] > 2]
    ends = [*ends[:-1], len(net.blocks) - 1] if ends else [len(net.blocks) - 1]
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [[f"blocks.{j}" for j in range(a, b + 1)] for a, b in zip(starts, ends, strict=True)]


FAMILIES: dict[type[nn.Module], type[Chain]] = {
    ResNet: TimmResNet,
    VisionTransformer: TimmViT,
    VisionTransformerDistilled: TimmViT,
    SwinTransformer: TimmSwin,
    ConvNeXt: TimmConvNeXt,
    MlpMixer: TimmMixer,
    EfficientNet: TimmEfficientNet,
    MobileNetV3: TimmMobileNetV3,
}
"""Exact classes; a subclass may compute differently and is tapped by hooks instead."""

"""Families of torchvision that are cut into stages (see `Chain`)."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import ConvNeXt, EfficientNet, MobileNetV2, MobileNetV3, ResNet, SwinTransformer
from torchvision.models.resnet import BasicBlock, Bottleneck

from kdcli.models.blocks import pool
from kdcli.models.chain import Chain, Create


def residual_sum(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A residual block without its last ReLU (the block has only one ReLU module, so it cannot be taken out)."""
    block = cast("BasicBlock | Bottleneck", block)
    skip = x if block.downsample is None else block.downsample(x)
    x = block.relu(block.bn1(block.conv1(x)))
    x = block.bn2(block.conv2(x))
    if isinstance(block, Bottleneck):
        x = block.bn3(block.conv3(block.relu(x)))
    return x + skip


class TorchvisionResNet(Chain):
    """ResNet, ResNeXt, wide ResNet."""

    stem_names = ("conv1", "bn1", "maxpool")

    @classmethod
    def cut(cls, create: Create, net: nn.Module, first: int = 0) -> TorchvisionResNet:
        return cls(create, net, [[f"layer{i}"] for i in (1, 2, 3, 4)], "fc", first)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        net = cast(ResNet, self.net)
        return net.maxpool(net.relu(net.bn1(net.conv1(x))))

    def raw_stage(self, i: int, x: torch.Tensor) -> torch.Tensor:
        *front, last = cast(nn.Sequential, self.net.get_submodule(f"layer{i}"))
        for block in front:
            x = block(x)
        return residual_sum(last, x)

    def close(self, i: int, raw: torch.Tensor) -> torch.Tensor:
        return F.relu(raw)

    def preact_norm(self, i: int) -> nn.BatchNorm2d | None:
        last = cast(nn.Sequential, self.net.get_submodule(f"layer{i}"))[-1]
        norm = last.get_submodule("bn3" if isinstance(last, Bottleneck) else "bn2")
        return norm if isinstance(norm, nn.BatchNorm2d) else None

    def final(self, x: torch.Tensor) -> torch.Tensor:
        return x


class TorchvisionMobile(Chain):
    """MobileNetV2, MobileNetV3, EfficientNet: `features` is one sequence; its last entry, a 1x1 convolution, belongs to
    the tail. A stage per resolution below the stem's."""

    stem_names = ("features.0",)

    @classmethod
    def cut(cls, create: Create, net: nn.Module, first: int = 0) -> TorchvisionMobile:
        head = cast(nn.Sequential, net.get_submodule("classifier"))
        return cls(create, net, _by_resolution(net), f"classifier.{len(head) - 1}", first)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.net.get_submodule("features.0")(x)

    def tail(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = cast(nn.Sequential, self.net.get_submodule("features"))
        pooled = pool(features[-1](x))
        for layer in cast(nn.Sequential, self.net.get_submodule("classifier"))[:-1]:
            pooled = layer(pooled)
        return pooled, self.classify(pooled)


def _by_resolution(net: nn.Module) -> list[list[str]]:
    """Entries 1.. of `features` but the last, in runs of equal side; those at the stem's side join the first run."""
    features = cast(nn.Sequential, net.get_submodule("features"))
    stages: list[list[str]] = [[]]
    for j, entry in enumerate(features):
        if 0 < j < len(features) - 1:
            # A stage ends before an entry that halves the side; the first one to do so opens stage 1.
            if stages[-1] and _strides(entry) and any(_strides(features[int(n.split(".")[1])]) for n in stages[-1]):
                stages.append([])
            stages[-1].append(f"features.{j}")
    return stages


def _strides(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Conv2d) and m.stride[0] > 1 for m in module.modules())


class TorchvisionConvNeXt(Chain):
    """ConvNeXt: `features` is stem, stage, then down-sampling and stage three times."""

    stem_names = ("features.0",)

    @classmethod
    def cut(cls, create: Create, net: nn.Module, first: int = 0) -> TorchvisionConvNeXt:
        return cls(create, net, _stem_and_pairs(net), "classifier.2", first)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.net.get_submodule("features.0")(x)

    def tail(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        net = cast(ConvNeXt, self.net)
        pooled = net.classifier[1](net.classifier[0](net.avgpool(x)))
        return pooled, self.classify(pooled)


class TorchvisionSwin(Chain):
    """Swin. Native: `[B, H, W, C]`. Patch and window sizes stay those of the architecture."""

    kind = "token"
    stem_names = ("features.0",)

    @classmethod
    def cut(cls, create: Create, net: nn.Module, first: int = 0) -> TorchvisionSwin:
        return cls(create, net, _stem_and_pairs(net), "head", first)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.net.get_submodule("features.0")(x)

    def to_map(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2)

    def from_map(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)

    def final(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_map(cast(SwinTransformer, self.net).norm(x))


def _stem_and_pairs(net: nn.Module) -> list[list[str]]:
    entries = len(cast(nn.Sequential, net.get_submodule("features")))
    return [["features.1"], *([f"features.{j}", f"features.{j + 1}"] for j in range(2, entries, 2))]


FAMILIES: dict[type[nn.Module], type[Chain]] = {
    ResNet: TorchvisionResNet,
    MobileNetV2: TorchvisionMobile,
    MobileNetV3: TorchvisionMobile,
    EfficientNet: TorchvisionMobile,
    ConvNeXt: TorchvisionConvNeXt,
    SwinTransformer: TorchvisionSwin,
}
"""Exact classes; anything else is tapped by hooks."""

"""The shape every network has here: a stem, L stages and a tail, each callable on its own.

    F0 = stem(x),   F_i = stage(i, F_{i-1}) for i = 1..L,   (pooled, logits) = tail(F_L)

A network can also be *truncated*: built with only the stages from `first` on and its tail, fed with a feature map. That
is what an auxiliary head is ("the remaining stages again"), so heads need no code of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kdcli.errors import IncompatibleError, KdError
from kdcli.models.blocks import pool
from kdcli.models.features import Features
from kdcli.models.names import LIBRARIES


class Network(nn.Module, ABC):
    """Base of all networks.

    Between stem, stages and tail travels the network's *native* tensor. For convolutional networks that is the map
    `[B, C, H, W]` itself; token networks pass sequences (prefix tokens included) and `to_map`, `from_map` translate.

    Args:
        outputs: width of the last linear layer.
        n_stages: L.
        pooled_dim: width of the pooled vector.
        classifier_name: state-dict prefix of the last linear layer (not `classifier`: that is a layer's name in vgg).
        first: 0 for a whole network; i in 1..L for stages i..L and the tail only; L+1 for the last stage once more on
            its own output (stride 1), then the tail.
    """

    arch: str = ""
    """Registry name, set by `build`."""
    image_size: int = 32
    """Side in pixels of the images it was built for."""
    taps: tuple[str, ...] | None = None
    """Module names tapped on request (`timm:`, `torchvision:` networks only)."""
    fixed_stride: bool = False
    """Whether down-sampling was asked not to depend on the input size (vgg)."""
    kind: Literal["conv", "token"] = "conv"
    """`token` for attention and MLP networks."""

    def __init__(self, *, outputs: int, n_stages: int, pooled_dim: int, classifier_name: str, first: int = 0) -> None:
        super().__init__()
        self.outputs, self.n_stages, self.pooled_dim = outputs, n_stages, pooled_dim
        self.classifier_name, self.first = classifier_name, first
        self.head_taps: tuple[int, ...] = tuple(range(1, n_stages + 1))
        """Indices into `Features.maps` of the maps that feed auxiliary heads."""

    @property
    def own_stages(self) -> tuple[int, ...]:
        """The stages this network holds, in order: 1..L, or fewer if it is truncated."""
        if self.first > self.n_stages:
            return self.extra_stages
        return tuple(range(max(1, self.first), self.n_stages + 1))

    @property
    def extra_stages(self) -> tuple[int, ...]:
        """The stages that are repeated behind the last one when `first` is L+1."""
        return (self.n_stages,)

    @abstractmethod
    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, 3, H, W]` to the native form of F0."""

    @abstractmethod
    def raw_stage(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """Stage i (1..L) of F_{i-1}, up to but without its closing step."""

    def final(self, x: torch.Tensor) -> torch.Tensor | None:
        """F_L to the map `[B, C, H, W]` whose mean over the positions is the pooled vector; None where there is none.

        A network without one (class tokens, a normalisation behind the pooling) has a `tail` of its own.
        """
        return None

    def classify(self, pooled: torch.Tensor) -> torch.Tensor:
        """`[B, C]` to logits `[B, K]`."""
        return self.get_submodule(self.classifier_name)(pooled)

    @property
    def classifier_weight(self) -> torch.Tensor:
        """`[K, C]`, the weight of the last linear layer."""
        weight = self.get_submodule(self.classifier_name).weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def tail(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """F_L to `(pooled [B, C], logits [B, K])`."""
        final = self.final(x)
        assert final is not None, f"{type(self).__name__} has neither a final map nor a tail of its own"
        pooled = pool(final)
        return pooled, self.classify(pooled)

    @abstractmethod
    def truncated(self, first: int, outputs: int) -> Network:
        """A network of the same class with fresh weights, only the stages from `first` on, and `outputs` outputs."""

    def close(self, i: int, raw: torch.Tensor) -> torch.Tensor:
        """The closing step of stage i: a ReLU unless a family says otherwise."""
        return F.relu(raw)

    def preact(self, i: int, raw: torch.Tensor) -> torch.Tensor:
        """The pre-activation map `[B, C, H, W]` of stage i, given what `raw_stage` returned."""
        return self.to_map(raw)

    def raw_of(self, i: int, preact: torch.Tensor) -> torch.Tensor:
        """What `raw_stage` returned, given the map `[B, C, H, W]` that `preact` made of it: its inverse in evaluation mode.

        Of a sequence with tokens besides the map (class tokens) only the map's own are there.
        """
        return self.from_map(preact)

    def preact_norm(self, i: int) -> nn.BatchNorm2d | None:
        """The BatchNorm whose output stage i's final ReLU sees (OFD reads its margins there); None if there is none."""
        return None

    def to_map(self, x: torch.Tensor) -> torch.Tensor:
        """Native tensor to `[B, C, H, W]`."""
        return x

    def from_map(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` to the native tensor of a truncated network."""
        return x

    @property
    def prefix_tokens(self) -> torch.Tensor | None:
        """`[P, C]`, what a sequence in front of the first stage holds before its patches (class tokens, their positions
        included); None for a network without any. Parameters are in its graph."""
        return None

    def positions(self, side: int) -> torch.Tensor | None:
        """`[C, side, side]`, what is added to the patches for their position; None if nothing is."""
        return None

    def normed(self, last: torch.Tensor) -> torch.Tensor:
        """The last stage's map `[B, C, H, W]` behind the normalisation of its positions, where the tail begins with one."""
        return last

    @property
    def pools_tokens(self) -> bool:
        """Whether the pooled vector comes from the prefix tokens, and is no mean over the patches."""
        return False

    def stage(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """F_i from F_{i-1}, both native; i in 1..L."""
        return self.close(i, self.raw_stage(i, x))

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """The native tensor in front of the first stage: from images, or from a map if the network is truncated."""
        return self.from_map(x) if self.first else self.stem(x)

    def features(self, x: torch.Tensor) -> Features:
        """Everything from one pass over images `[B, 3, H, W]`; every BatchNorm is updated once in training mode."""
        x = self.enter(x)
        maps, raws = [self.to_map(x)], []
        for i in self.own_stages:
            raw = self.raw_stage(i, x)
            x = self.close(i, raw)
            raws.append(raw)
            maps.append(self.to_map(x))
        final = self.final(x)
        if final is None:
            pooled, logits = self.tail(x)
        else:
            pooled = pool(final)
            logits = self.classify(pooled)
        return Features(logits, pooled, tuple(maps), final=final, _raw=tuple(raws), network=self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, 3, H, W]` (a truncated network: maps) to logits `[B, K]`."""
        x = self.enter(x)
        for i in self.own_stages:
            x = self.stage(i, x)
        return self.tail(x)[1]

    def head(self, tap_position: int, outputs: int) -> nn.Module:
        """The auxiliary head for the `tap_position`-th of `head_taps`, with fresh weights.

        It maps that tap's map `[B, C, H, W]` to `[B, outputs]`: the remaining stages again, global pooling, a linear
        layer; behind the last stage the last stage once more at stride 1 (HSAKD, Yang et al. 2021, section 3.1).
        """
        head = self.truncated(self.head_taps[tap_position] + 1, outputs)
        head.arch, head.image_size = self.arch, self.image_size
        return head


class _Pass(nn.Module):
    """A module whose forward is some method of another: what `functional_call` needs."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, x: torch.Tensor) -> object:
        return getattr(self.module, self.method)(x)


def dry_run(module: nn.Module, method: str, image_size: int, *, batch: int = 2) -> object:
    """`module.method(images)` on the meta device: shapes without work, and nothing in the module changes."""
    wrapped = _Pass(module, method)
    state: Iterable[tuple[str, torch.Tensor]] = [*wrapped.named_parameters(), *wrapped.named_buffers()]
    images = torch.empty(batch, 3, image_size, image_size, device="meta")
    with torch.no_grad():
        return functional_call(
            wrapped,
            {
                name: t.detach().to("meta", torch.float32) if t.is_floating_point() else t.to("meta")
                for name, t in state
            },
            (images,),
        )


@contextmanager
def taking(arch: str, image_size: int) -> Iterator[None]:
    """What a library's network (`timm:`, `torchvision:`) raises about images of this size becomes an IncompatibleError."""
    try:
        yield
    except KdError:
        raise
    except Exception as error:
        if not arch.startswith(LIBRARIES):
            raise
        hint = "use larger images, those of the size it was made for, or another network"
        raise IncompatibleError(
            f"{arch} cannot take {image_size}-pixel images: {reason_of(error)}", hint=hint
        ) from error


def reason_of(error: Exception) -> str:
    """What a library says, in a line. Raises the error again where memory ran out: that is no fault of the network."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        raise error
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def stage_shapes(network: Network, image_size: int) -> list[tuple[int, int, int]]:
    """`(C, H, W)` of F0..FL for square images of `image_size` pixels. BatchNorm statistics stay as they are.

    Raises:
        IncompatibleError: a library's network cannot take images of that size.
    """
    with taking(network.arch, image_size):
        features = dry_run(network, "features", image_size)
    assert isinstance(features, Features)
    return [(m.shape[1], m.shape[2], m.shape[3]) for m in features.maps]


def parameters_of(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def macs(network: nn.Module, image_size: int) -> int:
    """Multiply-accumulates of one `3 x image_size x image_size` image through `forward`.

    Convolutions, linear layers and (in attention) matrix products; no bias, normalisation or pooling.
    """
    return _count(network, "forward", image_size)


def macs_with_heads(network: nn.Module, image_size: int) -> int:
    """As `macs`, for a pass through `features`, so with auxiliary heads where there are any."""
    return _count(network, "features", image_size)


def _count(module: nn.Module, method: str, image_size: int) -> int:
    # Two images, then halved: BatchNorm in training mode refuses a single value per channel.
    with FlopCounterMode(display=False) as counter:
        dry_run(module, method, image_size, batch=2)
    return counter.get_total_flops() // 4

"""A copy of a frozen network whose BatchNorm layers are folded into the layers in front of them.

In evaluation mode BatchNorm is a scale and a shift per channel. Behind a convolution or linear layer W, b they go into
its weight and bias (with γ, β, μ, σ² of the BatchNorm):

    γ · (W∗x + b - μ) / √(σ² + ε) + β = W'∗x + b',   W' = W · γ / √(σ² + ε),   b' = (b - μ) · γ / √(σ² + ε) + β

Which BatchNorm follows which layer is never read off names. One pass is watched, and a pair is folded only if the one's
output is the other's input, both ran once, and nothing else read that output. Then both networks see the same images,
in float64, where rounding cannot hide a mistake; if they differ anywhere, nothing is folded.

A folded network is for evaluation mode with the statistics of the training only. In training mode, and so within
`batch_statistics`, it stops with an error rather than compute something else.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdcli.models.features import Features
from kdcli.models.heads import Headed
from kdcli.models.network import Network
from kdcli.models.panel import Panel

AnyNetwork = TypeVar("AnyNetwork", bound=Network | Headed | Panel)

TOLERANCE = 1e-9
"""Largest |folded - original| / |original| of any tensor in the float64 check (Euclidean norms)."""


class FoldedNorm(nn.BatchNorm2d):
    """What stands where a BatchNorm (of any number of dimensions) was: it passes its input on.

    It is a BatchNorm still, with the parameters and statistics of the one it replaces, because some methods read them
    (OFD's margins, by way of `Network.preact_norm`).

    Raises:
        RuntimeError: it is called in training mode: the statistics of the batch are in nobody's weights.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.training = False

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the base class calls it so
        if self.training:
            raise RuntimeError("a folded BatchNorm has no statistics of its own; use the network it was folded from")
        return input


def folded(network: AnyNetwork) -> AnyNetwork:
    """A frozen copy in evaluation mode with every BatchNorm folded that can be; `network` stays as it is.

    All it computes is equal to rounding: maps, pre-activations, pooled vectors, logits, heads, assistants. It costs two
    passes of two random images in float64; no global random state is used.

    Not folded: a BatchNorm with something in between (the bn1 and the last bn of a wide residual network), layers that
    run several times or not at all, layers with hooks (taps), kinds of layers not known here, and the classifier.
    """
    result = copy.deepcopy(network).eval().requires_grad_(False)
    if not any(isinstance(module, _BatchNorm) for module in result.modules()):
        return result
    try:
        pairs = _verified_pairs(result)
    except (RuntimeError, TypeError):
        # The network, or the device, cannot compute in float64. It is slower unfolded, but it works.
        pairs = ()
    with torch.no_grad():
        _fold(result, pairs)
    return result


def count_folded(network: nn.Module) -> tuple[int, int]:
    """How many BatchNorm layers of `network` are folded, and of how many."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    return sum(isinstance(norm, FoldedNorm) for norm in norms), len(norms)


@dataclass(frozen=True)
class Pair:
    """A layer and the BatchNorm that alone reads its output, by name."""

    layer: str
    norm: str


def _verified_pairs(network: Network | Headed | Panel) -> tuple[Pair, ...]:
    """The pairs of a network in evaluation mode; none if it computes something else once they are folded."""
    exact = copy.deepcopy(network).double()
    some = next(exact.parameters())
    side = _backbone(network).image_size
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = images.to(some.device)
    with torch.no_grad():
        pairs, wanted = trace(exact, images)
        _fold(exact, pairs)
        return pairs if _agree(outputs(exact.features(images)), wanted) else ()


def _backbone(network: Network | Headed | Panel) -> Network:
    if isinstance(network, Headed):
        return network.network
    return network.teacher if isinstance(network, Panel) else network


def outputs(features: Features) -> list[Tensor]:
    """Every tensor a method can read off `features`, those of the assistants included."""
    found = [features.logits, features.pooled, *features.maps, *features.heads, *features._raw]
    if features.final is not None:
        found.append(features.final)
    if features.network is not None:
        found += [features.preact(i) for i in range(1, len(features._raw) + 1)]
    for assistant in features.assistants:
        found += outputs(assistant)
    return found


def _agree(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    pairs = zip(found, wanted, strict=True)
    return all(bool((a - b).norm() <= TOLERANCE * b.norm()) for a, b in pairs)  # not a number: not equal


class _Reads(TorchDispatchMode):
    """Counts the operators that read the memory of watched tensors, views of them included."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for address in {_address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}:
            if address in self.counts:
                self.counts[address] += 1
        return func(*args, **kwargs)


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@dataclass
class _Seen:
    """What went through the layers of one pass. Everything is kept, so that no address is given away twice."""

    reads: _Reads = field(default_factory=_Reads)
    made: dict[str, list[Tensor]] = field(default_factory=dict)
    """Outputs of the convolutions and linear layers, by name."""
    given: dict[str, list[Tensor]] = field(default_factory=dict)
    """Inputs of the BatchNorms, by name."""

    def after(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """A forward hook for a convolution or linear layer."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.made.setdefault(name, []).append(output)
            self.reads.counts[_address(output)] = 0

        return hook

    def before(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """A forward pre-hook for a BatchNorm."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.given.setdefault(name, []).extend(args[:1])

        return hook


def trace(network: Network | Headed | Panel, images: Tensor) -> tuple[tuple[Pair, ...], list[Tensor]]:
    """The pairs that can be folded, found in one pass over images [B,3,H,W], and that pass's `outputs`."""
    classifiers = {m.get_submodule(m.classifier_name) for m in network.modules() if isinstance(m, Network)}
    layers, norms = {}, {}
    for name, module in network.named_modules():
        # A hook is somebody's eye on the value before or after; methods read the classifier's weight.
        if module._forward_hooks or module._forward_pre_hooks or module in classifiers:
            continue
        if type(module) in _layer_types():
            layers[name] = module
        elif type(module) in _norm_types() and module.running_mean is not None:
            norms[name] = module
    seen = _Seen()
    handles = [module.register_forward_hook(seen.after(name)) for name, module in layers.items()]
    handles += [module.register_forward_pre_hook(seen.before(name)) for name, module in norms.items()]
    try:
        with seen.reads:
            results = outputs(network.features(images))
    finally:
        for handle in handles:
            handle.remove()
    shown = {_address(x) for x in results}
    makers = {id(made[0]): name for name, made in seen.made.items() if len(made) == 1}
    pairs = []
    for norm, given in seen.given.items():
        layer = makers.get(id(given[0])) if len(given) == 1 else None
        if layer is None or _address(given[0]) in shown or seen.reads.counts[_address(given[0])] != 1:
            continue
        if _channels_second(layers[layer], given[0]):
            pairs.append(Pair(layer, norm))
    return tuple(pairs), results


def _layer_types() -> set[type[nn.Module]]:
    """Exact classes: a subclass may do something to its weight first. timm's layers count if timm is in use."""
    found: set[type[nn.Module]] = {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear}
    return found | ({timm.Conv2dSame} if (timm := sys.modules.get("timm.layers")) else set())


def _norm_types() -> set[type[nn.Module]]:
    found: set[type[nn.Module]] = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}
    return found | ({timm.BatchNormAct2d} if (timm := sys.modules.get("timm.layers")) else set())


def _channels_second(layer: nn.Module, output: Tensor) -> bool:
    """Whether the dimension that BatchNorm normalises is the layer's output width: not so for a sequence's linear layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return output.dim() == weight.dim() and output.shape[1] == weight.shape[0]


def _fold(network: nn.Module, pairs: Sequence[Pair]) -> None:
    for pair in pairs:
        layer, norm = network.get_submodule(pair.layer), network.get_submodule(pair.norm)
        assert isinstance(norm, _BatchNorm)
        _merge(layer, norm)
        stands_in: nn.Module = FoldedNorm(norm)
        if "act" in norm._modules:  # timm's BatchNorm and activation in one
            stands_in = nn.Sequential(stands_in, norm.get_submodule("drop"), norm.get_submodule("act"))
        _replace(network, norm, stands_in)


def _merge(layer: nn.Module, norm: _BatchNorm) -> None:
    """Weight and bias of `layer` with the BatchNorm in them; computed in float64, frozen, dtype and layout kept."""
    values = layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias
    w, b, mean, variance, scale, shift = (None if x is None else x.detach().double() for x in values)  # type: ignore[operator]
    assert w is not None
    assert mean is not None
    assert variance is not None
    weight, bias = fuse_conv_bn_weights(w, b, mean, variance, norm.eps, scale, shift)
    assert isinstance(layer.weight, Tensor)
    dtype = layer.weight.dtype
    layer.register_parameter("weight", nn.Parameter(weight.detach().to(dtype), requires_grad=False))
    layer.register_parameter("bias", nn.Parameter(bias.detach().to(dtype), requires_grad=False))


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Under every name that `old` has."""
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent.register_module(name, new)

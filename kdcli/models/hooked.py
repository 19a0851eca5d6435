"""Any network of a library, tapped by hooks: features yes, stages as functions no."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import nn

from kdcli.errors import IncompatibleError
from kdcli.models.chain import without_inplace
from kdcli.models.features import Features
from kdcli.models.network import Network
from kdcli.models.taps import find, first_tensor, matching, watch


class OutputTap:
    """A forward hook that keeps a module's first output tensor. An object, so that deep copies of a network work."""

    def __init__(self, kept: dict[str, torch.Tensor], name: str) -> None:
        self.kept, self.name = kept, name

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            self.kept[self.name] = tensor


class InputTap:
    """A forward pre-hook that keeps a module's first input tensor under the name `pooled`."""

    def __init__(self, kept: dict[str, torch.Tensor]) -> None:
        self.kept = kept

    def __call__(self, module: nn.Module, args: tuple[object, ...]) -> None:
        tensor = first_tensor(args)
        if tensor is not None:
            self.kept["pooled"] = tensor


class Hooked(Network):
    """A library network whose stages are outputs of named modules.

    With automatic taps F0 is the largest map and F1.. are the others, one per resolution; with `patterns` F1.. are the
    outputs of the matching modules and F0 is the largest map. There may be none (token networks): then only logits and
    pooled vector are available. `stem`, `stage`, `tail` and `head` raise IncompatibleError.

    Args:
        net: the library's network.
        outputs: its number of logits.
        image_size: side in pixels of the images it is watched with.
        patterns: module names or glob patterns, or None for the automatic rule.
    """

    def __init__(self, net: nn.Module, outputs: int, image_size: int, patterns: tuple[str, ...] | None) -> None:
        calls = watch(net, image_size)
        found = find(calls, image_size, outputs)
        names = found.stages
        if patterns is not None:
            stages = matching(calls, patterns)
            names = (*(names[:1] or stages[:1]), *stages)
        elif len(names) == 1:
            names = names * 2
        pooled = next(c for c in calls if c.name == found.classifier).input_shape
        pooled_dim = pooled[1] if len(pooled) == 4 else pooled[-1]
        super().__init__(
            outputs=outputs,
            n_stages=max(0, len(names) - 1),
            pooled_dim=pooled_dim,
            classifier_name=f"net.{found.classifier}",
        )
        self.net = without_inplace(net)
        self.tap_names = names
        """Module names behind F0..FL."""
        self._kept: dict[str, torch.Tensor] = {}
        for name in set(names):
            net.get_submodule(name).register_forward_hook(OutputTap(self._kept, name))
        net.get_submodule(found.classifier).register_forward_pre_hook(InputTap(self._kept))

    def features(self, x: torch.Tensor) -> Features:
        self._kept.clear()
        logits = self.forward(x)
        maps = tuple(self._kept[name] for name in self.tap_names)
        pooled = self._kept["pooled"]
        self._kept.clear()  # nothing may outlive the pass: it would keep the graph alive
        return Features(logits, pooled.flatten(1), maps, _raw=maps[1:], network=self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = first_tensor(self.net(x))  # some networks return auxiliary logits too while training
        assert logits is not None
        return logits

    def _uncut(self) -> NoReturn:
        raise IncompatibleError(
            f"{self.arch} is tapped by hooks and cannot be cut into stages, so it has no auxiliary heads",
            hint="use a ResNet, ViT, Swin, ConvNeXt, Mixer, MobileNet or EfficientNet, without taps of your own",
        )

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        self._uncut()

    def raw_stage(self, i: int, x: torch.Tensor) -> torch.Tensor:
        self._uncut()

    def tail(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._uncut()

    def truncated(self, first: int, outputs: int) -> Network:
        self._uncut()

"""A network of timm or torchvision, cut into stem, stages and tail where its family is known.

The library's module is kept whole as `net`, so state-dict keys are the library's own behind `net.`. A truncated chain
is the same architecture built again with the unused parts taken out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import nn

from kdcli.models.network import Network

Create = Callable[[int], nn.Module]
"""Number of outputs to a fresh library network. Must survive `copy.deepcopy` (a `functools.partial` does)."""


def without_inplace(net: nn.Module) -> nn.Module:
    """Switches in-place activations off: they would overwrite the value a tap has just kept."""
    for module in net.modules():
        if "inplace" in vars(module):
            module.inplace = False  # type: ignore[assignment]
    return net


class Chain(Network):
    """Base of the cut library networks.

    Heads: the remaining stages again. Behind the last stage: the last stage again if it maps a shape to itself
    (`isotropic`), otherwise only the tail, because such a stage cannot be built at stride 1.

    Args:
        create: builds the library's network, for truncated copies.
        net: the network to wrap.
        stages: per stage, the dotted names of its modules, in order.
        classifier: dotted name of the last linear layer.
        first: as in `Network`.
    """

    isotropic: ClassVar[bool] = False
    stem_names: ClassVar[tuple[str, ...]] = ()
    """Dotted names of what only the stem uses; missing ones are passed over (not every variant has a class token)."""

    def __init__(
        self, create: Create, net: nn.Module, stages: Sequence[Sequence[str]], classifier: str, first: int
    ) -> None:
        linear = net.get_submodule(classifier)
        assert isinstance(linear, nn.Linear), f"{classifier} is a {type(linear).__name__}"
        super().__init__(
            outputs=linear.out_features,
            n_stages=len(stages),
            pooled_dim=linear.in_features,
            classifier_name=f"net.{classifier}",
            first=first,
        )
        self.create = create
        self.net = without_inplace(net)
        self.stage_names = tuple(tuple(names) for names in stages)
        if first:
            self._drop_unused()

    @property
    def extra_stages(self) -> tuple[int, ...]:
        return (self.n_stages,) if self.isotropic else ()

    def _drop_unused(self) -> None:
        unused = list(self.stem_names)
        for i, names in enumerate(self.stage_names, start=1):
            if i not in self.own_stages:
                unused += names
        for dotted in unused:
            parent_name, _, leaf = dotted.rpartition(".")
            parent = self.net.get_submodule(parent_name)
            if leaf in parent._modules:
                parent.register_module(leaf, nn.Identity())
            elif leaf in parent._parameters:
                parent.register_parameter(leaf, None)

    def raw_stage(self, i: int, x: torch.Tensor) -> torch.Tensor:
        for name in self.stage_names[i - 1]:
            x = self.net.get_submodule(name)(x)
        return x

    def close(self, i: int, raw: torch.Tensor) -> torch.Tensor:
        return raw

    def truncated(self, first: int, outputs: int) -> Network:
        return self.cut(self.create, self.create(outputs), first)

    @classmethod
    @abstractmethod
    def cut(cls, create: Create, net: nn.Module, first: int = 0) -> Chain:
        """The chain over `net`, which must be of this family."""

"""Finding the stage features of a network nobody described.

One evaluation-mode forward of two images is watched. A candidate is a module whose (first) output is a square map with
a side that divides the image's; for every side the one with the shallowest name is taken, of those the latest to run. A
naive rule (the latest output at any depth) would pick expansion convolutions and shortcut branches instead. The
classifier is the last linear layer or 1x1 convolution that runs (of those with the right number of outputs, if any).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from kdcli.errors import UsageError, nearest


def first_tensor(output: object) -> torch.Tensor | None:
    """A tensor itself, or the first tensor of a tuple or list; None for anything else."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, tuple | list):
        return next((item for item in output if isinstance(item, torch.Tensor)), None)
    return None


@dataclass(frozen=True)
class Call:
    """The last time a module ran."""

    name: str
    shape: tuple[int, ...]
    """Of its first output tensor."""
    input_shape: tuple[int, ...]
    classifies: bool
    """It is a linear layer or a 1x1 convolution."""
    has_parameters: bool


@dataclass(frozen=True)
class Found:
    """Where a network's features are, as module names in running order."""

    stages: tuple[str, ...]
    """One module per side, largest first: the first one is the stem."""
    classifier: str


def watch(net: nn.Module, image_size: int) -> list[Call]:
    """Every module's last call in running order (by the end of the call), from a forward of two zero images."""
    calls: dict[str, Call] = {}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            out, given = first_tensor(output), first_tensor(args)
            if out is None:
                return
            calls.pop(name, None)  # so that a module that runs again moves to the end
            one_by_one = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
            calls[name] = Call(
                name,
                tuple(out.shape),
                () if given is None else tuple(given.shape),
                one_by_one or isinstance(module, nn.Linear),
                next(module.parameters(), None) is not None,
            )

        return hook

    handles = [m.register_forward_hook(hook_for(name)) for name, m in net.named_modules() if name]
    was_training = net.training
    parameter = next(net.parameters())
    try:
        net.eval()
        with torch.no_grad():
            net(torch.zeros(2, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        net.train(was_training)
        for handle in handles:
            handle.remove()
    return list(calls.values())


def find(calls: list[Call], image_size: int, outputs: int) -> Found:
    """The rule of this module applied to what `watch` saw.

    Raises:
        UsageError: the network never ran a linear layer or 1x1 convolution.
    """
    layers = [c for c in calls if c.classifies]
    if not layers:
        raise UsageError("the network has no linear layer or 1x1 convolution that could be its classifier")
    classifier = next((c for c in reversed(layers) if c.shape[1:2] == (outputs,)), layers[-1]).name
    chosen: dict[int, Call] = {}
    for call in calls:
        if not _is_map(call, image_size) or f"{classifier}.".startswith(f"{call.name}."):
            continue
        side, held = call.shape[2], chosen.get(call.shape[2])
        if held is None or call.name.count(".") <= held.name.count("."):
            chosen[side] = call
    return Found(tuple(chosen[side].name for side in sorted(chosen, reverse=True)), classifier)


def _is_map(call: Call, image_size: int) -> bool:
    if len(call.shape) != 4 or call.shape[0] != 2 or call.shape[2] != call.shape[3] or image_size % call.shape[2]:
        return False
    if call.shape[2] > 1:
        return True
    # A 1x1 map is a stage only if it was computed from a larger one, not pooled or part of squeeze-and-excitation.
    return call.has_parameters and len(call.input_shape) == 4 and call.input_shape[2] > 1


def matching(calls: list[Call], patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the modules that match any of `patterns` (`layer?`, `blocks.*`), in running order.

    Raises:
        UsageError: a pattern matches no module that ran and returned a 4-dimensional map.
    """
    names = [c.name for c in calls if len(c.shape) == 4]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"no module named {pattern!r} returns a map", field="taps", hint=nearest(pattern, names))
    return tuple(n for n in names if any(fnmatchcase(n, p) for p in patterns))

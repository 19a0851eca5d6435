"""The resume state: everything a run needs to go on as if it had never stopped, as tensors and plain JSON.

No generator state is kept, because there is none: order, augmentation and dropout are functions of (seed, epoch, step).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdcli.errors import InputError

_MODEL, _OPTIMIZER, _AVERAGE, _SUM = "model.", "optimizer.", "average.", "sum."
_STATISTICS = (".running_mean", ".running_var")


def pack(
    step: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None, sums: dict[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors of a run by name: modules, optimiser slots by parameter name, averaged weights, running sums."""
    tensors = {f"{_MODEL}{key}": value for key, value in step.state_dict().items()}
    for name, parameter in _trainable(step):
        for slot, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{name}.{slot}"] = value
    if average is not None:
        tensors |= {f"{_AVERAGE}{key}": value for key, value in average.state_dict().items()}
    return tensors | {f"{_SUM}{key}": value for key, value in sums.items()}


def unpack(
    tensors: dict[str, Tensor],
    at: int,
    step: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """Put a packed state back; returns the running sums.

    Raises:
        InputError: a tensor is missing, unknown or of another shape (a state of other code, never repaired silently).
    """
    groups: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in (_MODEL, _OPTIMIZER, _AVERAGE, _SUM)}
    for key, value in tensors.items():
        prefix = key[: key.find(".") + 1]
        if prefix not in groups or (prefix == _SUM and value.ndim):
            raise InputError(f"the saved state holds an unknown tensor {key}", hint="start anew with --overwrite")
        groups[prefix][key[len(prefix) :]] = value
    _strict(step, groups[_MODEL], "model")
    if average is not None:
        _strict(average, groups[_AVERAGE], "average")
    slots = groups[_OPTIMIZER]
    for name, parameter in _trainable(step):
        mine = {key.rpartition(".")[2]: value for key, value in slots.items() if key.rpartition(".")[0] == name}
        if at > 0 and not mine and optimizer.defaults.get("momentum", 1):
            raise InputError(f"the saved state lacks the optimiser's memory of {name}", hint="start anew: --overwrite")
        for slot, value in mine.items():
            if slot != "step" and value.shape != parameter.shape:
                raise InputError(f"the saved {slot} of {name} has another shape", hint="start anew with --overwrite")
        # AdamW's step counter lives where the fused kernel wants it. Everything else must lie in memory like its
        # parameter (channels-last): the fused kernels go through both in storage order and do not look at strides.
        optimizer.state[parameter] = {
            slot: value.to(device) if slot == "step" else torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            for slot, value in mine.items()
        }
    return {key: value.to(device) for key, value in groups[_SUM].items()}


def not_finite(tensors: dict[str, Tensor], step: nn.Module) -> str | None:
    """The first weight, averaged weight, BatchNorm statistic or optimiser slot of a packed state with NaN or infinity.

    Other buffers are a method's own business, and so are the running sums.
    """
    weights = {f"{_MODEL}{name}" for name, _ in step.named_parameters()}
    for name, value in tensors.items():
        meant = name in weights or name.startswith((_OPTIMIZER, _AVERAGE)) or name.endswith(_STATISTICS)
        if meant and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return name
    return None


def _trainable(step: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in step.named_parameters() if parameter.requires_grad]


def _strict(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as problem:
        reason = " ".join(str(problem).split())[:200]
        raise InputError(f"the saved {what} does not fit: {reason}", hint="start anew with --overwrite") from None

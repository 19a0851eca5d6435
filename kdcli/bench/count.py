"""What a step has to do, counted and not timed: multiply-accumulates, and bytes to and from memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from kdcli.bench.ours import Ours
from kdcli.engine.step import deploy
from kdcli.models.folding import FoldedNorm
from kdcli.models.network import Network, stage_shapes
from kdcli.models.panel import Panel

_UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Traffic(TorchDispatchMode):
    """Adds up the bytes of the inputs and outputs of every operation run inside, in `bytes`.

    What an operation changes in place counts as read and as written. Views and empty tensors move nothing. Each operation
    is taken to read from and write to memory, so this is an upper bound: caches and fused operations save part of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._schema.name.partition("::")[2] in _UNWRITTEN:
            return out
        read, returned = _tensors((args, kwargs)), _tensors(out)
        given = {_storage(t) for t in read}
        changed = _changed(func, args, kwargs)
        made = [t for t in returned if _storage(t) not in given]
        if changed or made or not returned:  # else a view, or an argument handed back
            self.bytes += sum(map(_size, [*read, *changed, *made]))
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among an operation's arguments that it writes to."""
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += _tensors(value)
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor; of an expanded one only those there are."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _convolution_backward(grad: Any, x: Any, weight: Any, *more: Any, **_: Any) -> int:
    """Each gradient asked for costs what the convolution did. torch's own formula ignores groups in that of the weight."""
    transposed, mask = more[4], more[7]
    return conv_flop_count(x, weight, grad, transposed) * (int(mask[0]) + int(mask[1]))


def counted(function: Callable[[], object]) -> tuple[int, int]:
    """`(multiply-accumulates, bytes)` of what `function` does: products of matrices and convolutions, and `Traffic`."""
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as flops, Traffic() as traffic:
        function()
    return flops.get_total_flops() // 2, traffic.bytes


def counted_step(ours: Ours) -> tuple[int, int]:
    """`counted` for one step, operation by operation: forward and backward pass and the optimiser, on the whole batch."""
    training, batch, progress = ours.training, ours.batch(), ours.progress()

    def step() -> None:
        training.optimizer.zero_grad(set_to_none=True)
        training.module(batch, progress).total.backward()
        training.optimizer.step()

    return counted(step)


def least_bytes(ours: Ours) -> int:
    """A lower estimate of the bytes that a step moves, however well its operations are fused.

    - Trained weights, their gradients and the optimiser's slots: read once and written once each.
    - A frozen teacher's weights: read once.
    - The images, as each network sees them: read once.
    - The map of every stage F0..FL: written and read once in the forward pass and, of the student, its gradient likewise
      in the backward pass. What happens inside a stage could stay in caches.
    """
    step, teacher, batch, progress = ours.parts.step, ours.parts.teacher, ours.batch(), ours.progress()
    element = 2 if ours.device.precision == "bf16" else 4
    trained = sum(_size(p) for p in step.parameters() if p.requires_grad)
    slots = sum(_size(t) for state in ours.training.optimizer.state.values() for t in _tensors(state))
    with torch.no_grad():
        views = step.method.student_views(batch, progress)
        total = 2 * (2 * trained + slots) + views.nbytes + 4 * element * _map_elements(ours.parts.student, views)
        if teacher is None:
            return total
        views = step.method.teacher_views(batch, progress)
    idle = {id(p) for module in teacher.modules() if isinstance(module, FoldedNorm) for p in module.parameters()}
    total += sum(_size(p) for p in teacher.parameters() if id(p) not in idle)
    networks: list[nn.Module] = list(teacher.networks) if isinstance(teacher, Panel) else [teacher]
    for network in networks:
        backbone = deploy(network)
        assert isinstance(backbone, Network)
        total += views.nbytes + 2 * element * _map_elements(backbone, views)
    return total


def _map_elements(network: Network, views: Tensor) -> int:
    return len(views) * sum(c * h * w for c, h, w in stage_shapes(network, views.shape[-1]))

"""A stand-in for CUDA graphs on the CPU: it records the operations of a block, undoes them, and repeats them at each replay.

Like a graph it knows tensors only. What Python decided while it recorded stays decided, so a step that is not the same work
each time is found out here as it would be on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SYNCHRONISING = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "unique_dim", "is_nonzero"}
"""Operations for which the host would wait, which CUDA refuses to record."""

RESHAPING = {"unsqueeze_", "squeeze_", "transpose_", "t_", "as_strided_", "detach_"}
"""Operations in place that change how a tensor is seen, and nothing in memory: no kernel, nothing to repeat."""


class Tape(TorchDispatchMode):
    """What `torch.cuda.CUDAGraph` is to `torch.cuda.graph`."""

    def __init__(self) -> None:
        super().__init__()
        self.repeat: list[Callable[[], None]] = []
        self.made: set[int] = set()
        self.kept: list[Tensor] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name in SYNCHRONISING:
            raise RuntimeError(f"{name} waits for the device")
        if name == "lift_fresh":
            raise RuntimeError("a tensor made from numbers of the host")
        for given in self._written(func, args, kwargs):
            whole = given.untyped_storage()
            if whole.data_ptr() not in self.made:
                self.before.setdefault(whole.data_ptr(), (_flat(given), _flat(given).clone()))
        # Aliases: a tensor that is reshaped in place later stays here as it was.
        given = tree_map(_alias, (args, kwargs))
        result = func(*args, **kwargs)
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        read = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        fresh = [x.untyped_storage().data_ptr() not in read for x in results]
        self.made |= {x.untyped_storage().data_ptr() for x, new in zip(results, fresh, strict=True) if new}
        self.kept += results  # no address is given away twice
        if any(fresh) or (func._schema.is_mutable and name not in RESHAPING):
            held = [_alias(x) if new else None for x, new in zip(results, fresh, strict=True)]
            self.repeat.append(lambda: self._again(func, given, held))
        return result

    def _written(self, func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        # This one changes the running statistics and does not declare it.
        found = [x for x in args[3:5] if x is not None] if func._schema.name[6:] == "native_batch_norm" else []
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                found += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
        return found

    @staticmethod
    def _again(func: Any, given: Any, held: list[Tensor | None]) -> None:
        args, kwargs = given
        now = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
        for old, new in zip(held, now, strict=True):
            if old is not None:
                old.copy_(new)

    def pool(self) -> None:
        """There is one memory."""

    def replay(self) -> None:
        """Do again what was recorded."""
        with torch.no_grad():
            for step in self.repeat:
                step()


def _alias(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _flat(x: Tensor) -> Tensor:
    """All of a tensor's storage, [n]."""
    return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())


class Recording:
    """What `torch.cuda.graph` is: nothing that happens inside has happened afterwards."""

    def __init__(self, graph: Tape, pool: Any = None, stream: Any = None, capture_error_mode: str = "") -> None:
        self.graph = graph

    def __enter__(self) -> None:
        self.random = torch.get_rng_state()
        self.graph.__enter__()

    def __exit__(self, *problem: Any) -> None:
        self.graph.__exit__(*problem)
        torch.set_rng_state(self.random)
        with torch.no_grad():
            for now, then in self.graph.before.values():
                now.copy_(then)

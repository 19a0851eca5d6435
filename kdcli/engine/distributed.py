"""Ranks: torch.distributed as it is, with the few collectives the engine needs; no-ops in a single process."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdcli.engine.device import choose
from kdcli.errors import LostRankError, WorkerError
from kdcli.specs import SystemSpec


def start(system: SystemSpec) -> None:
    """Join the process group that the launcher described in the environment (`RANK`, `WORLD_SIZE` …), if there is one.

    GPUs talk by NCCL, CPUs by gloo. NCCL is told at once which GPU is this rank's: it would take the first one.

    Raises:
        UsageError: there is no GPU for this rank.
        WorkerError: the ranks did not find each other.
    """
    if "RANK" not in os.environ or dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    device, timeout = choose(system), timedelta(seconds=system.rank_timeout)
    try:
        with _stdout_for_answers_only():
            if device.type == "cuda":
                torch.cuda.set_device(device)
                dist.init_process_group("nccl", timeout=timeout, device_id=device)
            else:
                dist.init_process_group("gloo", timeout=timeout)
            dist.barrier()  # connects the ranks, which gloo does at the first collective
    except (RuntimeError, ValueError) as problem:
        raise WorkerError(f"the ranks did not find each other: {str(problem).splitlines()[0]}") from None


@contextlib.contextmanager
def _stdout_for_answers_only() -> Iterator[None]:
    """Send what gloo prints while it connects (torch 2.10 does, from C++) to stderr: stdout holds the answer alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Turn the loss of another rank, which torch reports as a RuntimeError of gloo's or NCCL's, into `LostRankError`."""
    try:
        yield
    except RuntimeError as problem:
        if world() == 1 or not (isinstance(problem, dist.DistError) or "gloo" in str(problem)):
            raise
        hint = "run the same command again to go on"
        raise LostRankError("another rank died or stopped answering", hint=hint) from None


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_(tensor: Tensor) -> Tensor:
    """Sum `tensor` over the ranks, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_true(flag: Tensor) -> Tensor:
    """Whether a bool tensor [] is true on every rank."""
    if world() == 1:
        return flag
    number = flag.to(torch.int32)
    dist.all_reduce(number, op=dist.ReduceOp.MIN)
    return number.bool()


def any_of(value: int, device: torch.device) -> int:
    """The largest `value` over the ranks: a stop signal seen by one is seen by all."""
    if world() == 1:
        return value
    number = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number.item())


def share_buffers(module: nn.Module) -> None:
    """Give every rank the first rank's buffers."""
    if world() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def barrier() -> None:
    """Wait for every rank."""
    if world() > 1:
        dist.barrier()
